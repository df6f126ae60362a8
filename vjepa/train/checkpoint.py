"""Checkpoints that are either whole or not there (DESIGN 6).

checkpoints/step_00012000/  dcp/  meta.json  manifest.sha256  COMMITTED

A checkpoint is written under a name ending in `.partial`, every file is hashed and flushed, then the folder is renamed:
a process killed at any moment leaves the older ones as they were. Loading verifies the hashes (torch loads flipped
bytes without a word) and compares key sets itself (torch ignores extra ones).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from vjepa.train.distributed import ALONE, World

log = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d{8,})$")
COMMITTED, MANIFEST, META, PARTIAL = "COMMITTED", "manifest.sha256", "meta.json", ".partial"
CUT_SHORT = "unexpected pos"  # what torch says of a file that took fewer bytes than it was given
FULL_BELOW_BYTES = 1 << 20  # with less than this free, a save that failed did so for want of space


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why and what to do."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 1000  # steps between checkpoints; the last step always gets one
    keep: int = 4  # newest checkpoints that stay on disk
    milestone_every: int | None = None  # steps between checkpoints that stay for good; null: none do
    asynchronous: bool = True  # write in a thread while training goes on; costs a copy of the rank's state on the host

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1")
        if self.milestone_every is not None and self.milestone_every < 1:
            raise ValueError(
                f"checkpoint.milestone_every={self.milestone_every} must be at least 1; null keeps no milestones"
            )

    def is_milestone(self, step: int) -> bool:
        return self.milestone_every is not None and step % self.milestone_every == 0

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or self.is_milestone(step)


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def committed(root: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints under `root`, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = NAME.match(path.name)
        if match and (path / COMMITTED).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save(
    root: Path,
    step: int,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    world: World,
    config: CheckpointConfig,
) -> Path:
    """Write one checkpoint, collectively; then remove all but the newest `keep` and the milestones. Nothing committed
    is ever touched before the new one is complete."""
    final = checkpoint_path(root, step)
    unfinished = final.with_name(final.name + PARTIAL)
    try:
        world.on_main(lambda: _begin(unfinished))
        writer = FileSystemWriter(unfinished / "dcp", sync_files=True)
        with _without_single_process_warning():
            state_dict_saver.save(
                dict(state), storage_writer=writer, process_group=world.group, no_dist=world.size == 1
            )
        parts = world.on_all(lambda: _hash_files(unfinished, f"dcp/__{world.rank}_*"))  # each rank what it wrote
        digests = {name: digest for part in parts for name, digest in part.items()}
        world.on_main(lambda: _commit(unfinished, final, meta, digests))
    except (Exception, CheckpointException) as error:  # torch's own is a BaseException
        raise _save_error(final, unfinished, error, world) from error
    world.on_main(lambda: _retire(root, config))
    return final


def _begin(unfinished: Path) -> None:
    _remove(unfinished)
    unfinished.mkdir(parents=True)


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """torch warns that a save or load without a process group is one of a single process: here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _save_error(final: Path, unfinished: Path, error: BaseException, world: World) -> CheckpointError:
    is_full = _is_full(error, final.parent)
    if world.is_main:
        _remove(unfinished)
    reason = (
        f"the disk or quota of {final.parent} is full: free space and start again with --resume"
        if is_full
        else _root_cause(error)
    )
    if not is_full and CUT_SHORT in reason:  # torch's file format has swallowed the system's error
        reason = f"a file was cut short by a quota or a limit on file sizes: raise it, then --resume ({reason})"
    return CheckpointError(f"checkpoint {final} could not be written: {reason}. Committed checkpoints are untouched.")


def _is_full(error: BaseException, folder: Path) -> bool:
    numbers = {cause.errno for cause in _causes(error) if isinstance(cause, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return True
    # torch may turn a short write into an error of its own format
    return folder.is_dir() and shutil.disk_usage(folder).free < FULL_BELOW_BYTES


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, through torch's collection of the ranks' failures, root last."""
    yield error
    behind = [error.__cause__ or error.__context__]
    if isinstance(error, CheckpointException):
        behind = [failure for failure, _ in error.failures.values()]
    for cause in behind:
        if cause is not None:
            yield from _causes(cause)


def _root_cause(error: BaseException) -> str:
    root = list(_causes(error))[-1]
    return f"{type(root).__name__}: {str(root).strip().partition(chr(10))[0]}"


def _hash_files(folder: Path, pattern: str) -> dict[str, str]:
    """The hash of every file that fits, by its place under the folder."""
    return {str(path.relative_to(folder)): _sha256(path) for path in folder.glob(pattern) if path.is_file()}


def _commit(unfinished: Path, final: Path, meta: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    _write(unfinished / META, json.dumps(dict(meta), indent=2) + "\n")
    there = {str(path.relative_to(unfinished)): path for path in unfinished.rglob("*") if path.is_file()}
    lines = [f"{digests.get(name) or _sha256(path)}  {name}" for name, path in sorted(there.items())]
    _write(unfinished / MANIFEST, "\n".join(lines) + "\n")
    _write(unfinished / COMMITTED, f"{_sha256(unfinished / MANIFEST)}\n")
    for folder in (unfinished / "dcp", unfinished):
        _sync_folder(folder)
    replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
    _remove(replaced)
    if final.exists():  # an uncommitted folder of that name, or the same step saved again
        final.rename(replaced)  # at once: a half-removed checkpoint must not look whole
    unfinished.rename(final)
    _sync_folder(final.parent)
    _remove(replaced)


def _retire(root: Path, config: CheckpointConfig) -> None:
    for step, path in committed(root)[: -config.keep]:
        if config.is_milestone(step):
            continue
        doomed = path.with_name(path.name + PARTIAL)
        _remove(doomed)
        path.rename(doomed)  # first of all: a half-removed checkpoint must not look whole
        _remove(doomed)


def load(path: Path, state: dict[str, Any], world: World, *, is_verified: bool = False) -> dict[str, Any]:
    """Verify the checkpoint (unless `newest` just has) and load it into `state`, collectively; returns its meta."""
    if not is_verified:
        refuse_damaged(path, world)
    _compare_keys(path, state)
    reader = FileSystemReader(path / "dcp")
    try:
        with _without_single_process_warning():
            state_dict_loader.load(state, storage_reader=reader, process_group=world.group, no_dist=world.size == 1)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {path} does not fit this run: {_root_cause(error)}") from error
    return read_meta(path)


def load_module(path: Path, module: nn.Module, prefix: str, world: World = ALONE) -> None:
    """Verify the checkpoint and load the parameters of `module`, whole or in shards over the ranks of `world`.

    They are stored as model.PREFIX.* or, for "", model.*.
    """
    refuse_damaged(path, world)
    load_modules(path, {prefix: module})


def load_modules(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """The same of several modules by their prefixes, and of a checkpoint that was verified."""
    state = {
        ".".join(filter(None, (prefix, name))): tensor.detach()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    _load_part(path, {"model": state})


def load_moments(path: Path, optimizer_state: dict[str, Any], world: World = ALONE) -> None:
    """Verify the checkpoint and load the averages of every parameter's gradient into a flat state of the optimizer.

    Learning rates and the like stay as they are. CheckpointError where other parameters were trained there.
    """
    refuse_damaged(path, world)
    moments = {name: value for name, value in optimizer_state.items() if name.startswith("state.")}
    stored = {name for name in _stored(path) if name.startswith("optimizer.state.")}
    if extra := sorted(stored - {f"optimizer.{name}" for name in moments}):
        raise CheckpointError(
            f"the optimizer of checkpoint {path} has {extra[0].removeprefix('optimizer.state.')}, which is not trained "
            f"here ({len(extra)} such entries in all)"
        )
    state = {"optimizer": moments}
    _load_part(path, state)
    optimizer_state.update(state["optimizer"])


def _load_part(path: Path, state: dict[str, Any]) -> None:
    """Load what `state` names, which may be less than the checkpoint holds."""
    missing = sorted(set(_flatten(state)) - _stored(path))
    if missing:
        raise CheckpointError(f"checkpoint {path} has no {missing[0]} ({len(missing)} missing in all)")
    try:
        with _without_single_process_warning():
            state_dict_loader.load(state, storage_reader=FileSystemReader(path / "dcp"), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {path} does not fit the model: {_root_cause(error)}") from error


def _stored(path: Path) -> set[str]:
    """The names of all that a checkpoint holds."""
    return set(FileSystemReader(path / "dcp").read_metadata().state_dict_metadata)


def read_meta(path: Path) -> dict[str, Any]:
    return json.loads((path / META).read_text())


def verify(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, None where nothing is; every rank reads its share of the files."""
    return next(filter(None, world.on_all(lambda: _verify(path, world))), None)


def _verify(path: Path, world: World) -> str | None:
    manifest = path / MANIFEST
    if not manifest.is_file() or (path / COMMITTED).read_text().strip() != _sha256(manifest):
        return f"{MANIFEST} does not match {COMMITTED}"
    for line in manifest.read_text().splitlines()[world.rank :: world.size]:
        digest, name = line.split("  ", 1)
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != digest:
            return f"{name} does not have the content that was written"
    return None


def refuse_damaged(path: Path, world: World) -> None:
    """Raise CheckpointError where a file of a checkpoint is not what was written; every rank reads its share."""
    if problem := verify(path, world):
        raise CheckpointError(f"checkpoint {path} is damaged: {problem}")


def _compare_keys(path: Path, state: Mapping[str, Any]) -> None:
    stored, wanted = _stored(path), set(_flatten(state))
    missing, extra = sorted(wanted - stored), sorted(stored - wanted)
    if missing or extra:
        lines = [f"  missing in the checkpoint: {name}" for name in missing[:10]]
        lines += [f"  not in this run: {name}" for name in extra[:10]]
        raise CheckpointError(
            f"checkpoint {path} does not fit this run ({len(missing)} missing, {len(extra)} extra keys):\n"
            + "\n".join(lines)
        )


def _flatten(state: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in state.items():
        name = f"{prefix}{key}"
        names += _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [name]
    return names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def newest(root: Path, world: World) -> tuple[int, Path] | None:
    """The newest intact checkpoint, the same on all ranks; None where there was never one.

    Damaged ones on the way to it are moved aside, as step_N.damaged, and named. Raises CheckpointError where there are
    checkpoints, but none is complete and intact.
    """
    for step, path in reversed(world.on_main(lambda: _candidates(root))):
        problem = verify(path, world)
        if problem is None:
            return step, path
        world.on_main(partial(_set_aside, path, problem))
    world.on_main(lambda: _refuse_all_damaged(root))
    return None


def _candidates(root: Path) -> list[tuple[int, Path]]:
    complete = committed(root)
    there = sorted(path for path in root.glob("step_*") if NAME.match(path.name))
    if there and not complete:
        raise CheckpointError(
            f"{there[-1]} and {len(there) - 1} more have no {COMMITTED} file: they are damaged copies. Put it back, or "
            "move the folders away to start at step 0"
        )
    if there and there[-1] != complete[-1][1]:
        log.warning("%s has no %s file and is left out", there[-1], COMMITTED)
    return complete


def _set_aside(path: Path, problem: str) -> None:
    aside = _rename(path, "damaged")
    log.warning("%s is damaged (%s): moved to %s, the one before it is taken", path, problem, aside.name)


def set_collapsed_aside(root: Path, first: int) -> None:
    """Move the checkpoints of `first` and more steps aside, as step_N.collapsed; for the main rank. They stay there."""
    for step, path in committed(root):
        if step >= first:
            aside = _rename(path, "collapsed")
            log.warning("%s is from after features had collapsed: moved to %s", path, aside.name)


def _rename(path: Path, why: str) -> Path:
    aside = path.with_name(f"{path.name}.{why}")
    _remove(aside)
    path.rename(aside)
    return aside


def _refuse_all_damaged(root: Path) -> None:
    if aside := sorted(root.glob("step_*.damaged")):
        raise CheckpointError(
            f"{root} holds no intact checkpoint, {aside[-1].name} and {len(aside) - 1} more are damaged: put an intact "
            "copy in the place of one, or start a new run in another run_dir"
        )


def clean_partial(root: Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in root.glob(f"*{PARTIAL}") if root.is_dir() else ():
        log.info("removing %s, left by an interrupted save", path)
        _remove(path)
