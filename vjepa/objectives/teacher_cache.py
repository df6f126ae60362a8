"""What a frozen teacher has said of each clip, kept on disk: the next student, or a repeated run, need not ask again.

A target depends on the clip's pixels and on the teacher, and on nothing that is trained. The pixels of an ordinal are
decided by data configuration and seed, which the caller hands over as words. These, the teacher's weights and how it
is run are the key of a folder; a folder of another key is refused.

    FOLDER/video/key.json                            what all files here depend on, one entry per dependence
    FOLDER/video/000012/000012345.safetensors        targets [N, L*D] of the clip at ordinal 12345, 1000 to a folder

One file per clip and not per micro-batch: which clips share a micro-batch changes with ranks, batch and steps, a clip's
ordinal does not. Modalities have keys of their own, so that a run without images shares the videos'. What is kept is
normalised, as losses take it: nothing is left to do but to read, and levels that are not predicted take no space.

Files are written under another name and renamed, and never changed: any number of runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vjepa.batch import Batch
from vjepa.nn.encoder import Encoder
from vjepa.objectives.collectives import sum_over_ranks

log = logging.getLogger(__name__)
FORMAT = 1  # of the files; part of every key
PER_FOLDER = 1000
THREADS = 8  # files that are read, or written, at once
CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAVE = "or leave the cache out: objective.teacher.cache=null (a run goes on with --resume, its losses are the same)"

Key = Mapping[str, str]
T = TypeVar("T")


class TeacherCache:
    """The targets of one teacher over one stream of clips, in `folder`.

    `clips` says for each modality what decides the pixels of an ordinal, `teacher` what decides the tokens of a clip.
    """

    def __init__(self, folder: Path | str, *, teacher: Key, clips: Mapping[str, Key], dtype: torch.dtype) -> None:
        self.folder, self.teacher, self.clips, self.dtype = Path(folder), teacher, clips, dtype
        self.num_read = self.num_computed = 0  # clips of this process
        self.was_read = False  # the last micro-batch, on all ranks
        self._opened: set[str] = set()

    def targets(self, batches: Sequence[Batch], compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Targets [B, N, L*D] fp32 of each batch's first view: read, or of `compute` where any rank lacks a clip.

        The whole micro-batch is then computed, on every rank: a sharded teacher is gathered by all of them, and only
        among the same neighbours are a clip's targets the same to the last digit. `compute` gives numbers that `dtype`
        holds, so that read and computed ones are the same. Collective. Raises ValueError for a folder of another key
        and OSError where a file cannot be read or written; the other ranks raise RuntimeError.
        """
        device = batches[0].clips.device
        found: list[list[Tensor | None]] = []
        with _OnAllRanks() as ranks:
            for batch in batches:
                self._open(batch.modality, device)
                found.append(_at_once(partial(self._read, batch), range(len(batch))))
            ranks.count = sum(tokens is None for each in found for tokens in each)
        self.was_read = ranks.count == 0
        if self.was_read:
            self.num_read += sum(len(batch) for batch in batches)
            rows = [[tokens for tokens in each if tokens is not None] for each in found]
            return [torch.stack(each).to(device).float() for each in rows]
        targets = compute()
        self.num_computed += sum(len(batch) for batch in batches)
        with _OnAllRanks():
            for batch, target, held in zip(batches, targets, found, strict=True):
                _at_once(partial(self._write, batch, target), [i for i, tokens in enumerate(held) if tokens is None])
        return targets

    def summary(self) -> str:
        """One line for people."""
        return f"teacher cache {self.folder}: {self.num_read} clips read, {self.num_computed} clips computed"

    # ------------------------------------------------------------------------------------------------------- the key

    def _open(self, modality: str, device: torch.device) -> None:
        """Found the modality's folder, or compare the key it was founded with."""
        if modality in self._opened:
            return
        path, key = self.folder / modality / "key.json", self._key(modality, device)
        try:
            theirs = json.loads(_found(path, json.dumps(key, indent=1).encode()))
        except OSError as error:
            raise OSError(f"objective.teacher.cache: {path} is out of reach ({error}): mend that, {LEAVE}") from error
        except ValueError as error:
            raise ValueError(f"objective.teacher.cache: {path} is not JSON ({error}): name another folder") from error
        differing = [name for name in sorted(key | theirs) if key.get(name) != theirs.get(name)]
        if differing:
            lines = [f"{name}: there {theirs.get(name)}, here {key.get(name)}" for name in differing]
            raise ValueError(
                f"objective.teacher.cache={self.folder} holds another teacher's targets, or of other {modality} clips:"
                + "".join(f"\n  {line}" for line in lines)
                + "\nName another folder, or ask for what differs as it is there"
            )
        self._opened.add(modality)

    def _key(self, modality: str, device: torch.device) -> dict[str, str]:
        """All that a file of this modality depends on; the precision is that of the passes of this run."""
        is_mixed = torch.is_autocast_enabled(device.type)
        computed = str(torch.get_autocast_dtype(device.type)) if is_mixed else "as the weights"
        own = {"format": str(FORMAT), "kept as": str(self.dtype), "teacher: computed in": computed}
        told = {f"teacher: {name}": value for name, value in self.teacher.items()}
        return own | told | {f"{modality}: {name}": value for name, value in self.clips[modality].items()}

    # --------------------------------------------------------------------------------------------------------- files

    def _path(self, batch: Batch, index: int) -> Path:
        ordinal = batch.ordinals[index]
        return self.folder / batch.modality / f"{ordinal // PER_FOLDER:06d}" / f"{ordinal:09d}.safetensors"

    def _read(self, batch: Batch, index: int) -> Tensor | None:
        """The targets of one clip; None where they are not there, are of another record or are damaged."""
        path = self._path(batch, index)
        try:
            content = path.read_bytes()  # and no memory map, in which a disk that fails is a SIGBUS
            tokens = load(content)["targets"]
            told: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OSError(f"objective.teacher.cache: {path} cannot be read ({error}): mend that, {LEAVE}") from error
        except (SafetensorError, KeyError) as error:
            return self._damaged(path, str(error))
        if {name: told.get(name) for name in ("record", "attempt")} != _record(batch, index):
            return None  # a decoder that was too slow once had the record replaced, here or there
        if len(tokens) != math.prod(batch.grid) or told.get("crc32") != _checksum(tokens):
            return self._damaged(path, "its numbers are not those that were written")
        return tokens

    def _damaged(self, path: Path, why: str) -> None:
        log.warning("objective.teacher.cache: %s is damaged (%s): it is computed and written anew", path, why)

    def _write(self, batch: Batch, targets: Tensor, index: int) -> None:
        tokens = targets[index].detach().to("cpu", self.dtype).contiguous()
        path = self._path(batch, index)
        content = save({"targets": tokens}, metadata=_record(batch, index) | {"crc32": _checksum(tokens)})
        try:
            _replace(path, content)
        except OSError as error:
            raise OSError(
                f"objective.teacher.cache: {path} cannot be written ({error}); clips take {len(content) / 1e6:.1f} MB: "
                f"make room, {LEAVE}"
            ) from error


class _OnAllRanks:
    """A part of a step that each rank does alone: all ranks leave it together, or raise together.

    `count` is this rank's when it ends, and the sum over ranks afterwards.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _OnAllRanks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt waits for nobody
        told = torch.tensor([self.count, error is not None])  # in the host's memory: the device is not waited for
        self.count, failed = sum_over_ranks(told).tolist()
        if failed and error is None:
            raise RuntimeError("another rank stopped at its part of objective.teacher.cache: see its error")


def weights_sha256(encoder: Encoder) -> str:
    """Of names, types, shapes and bytes of all parameters; a ViT-G takes some seconds."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _record(batch: Batch, index: int) -> dict[str, str]:
    """Which record a clip was cut from, and how many were tried in its place before: attempts crop otherwise."""
    tried = sum(bad.ordinal == batch.ordinals[index] for bad in batch.rejected)
    return {"record": batch.keys[index], "attempt": str(tried)}


def _checksum(tokens: Tensor) -> str:
    return str(zlib.crc32(tokens.flatten().view(torch.uint8).numpy().data))


def _at_once(action: Callable[[int], T], indices: Iterable[int]) -> list[T]:
    """Results of all in order, on some threads that last no longer: a loader may fork its workers between two steps."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(action, indices))


def _found(path: Path, content: bytes) -> bytes:
    """What a file holds; where there is none, it appears with this content, whole, for one of several founders."""
    if not path.exists():
        part = _part(path, content)
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another was faster
        finally:
            part.unlink()
    return path.read_bytes()


def _replace(path: Path, content: bytes) -> None:
    """A file that appears whole, in place of one that may be there."""
    _part(path, content).replace(path)


def _part(path: Path, content: bytes) -> Path:
    """The content beside `path`, under a name that nobody else takes; nothing is left where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        part.write_bytes(content)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part


def kept_as(targets: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Targets in fp32, rounded to what `dtype` holds."""
    return [target if dtype == torch.float32 else target.to(dtype).float() for target in targets]
