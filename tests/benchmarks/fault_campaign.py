"""Break a debug run on two ranks in many ways, resume it after each, and compare it with an uninterrupted run.

python -m tests.benchmarks.fault_campaign [--mode ddp|fsdp] [--faults NAME ...] [--seed 0] [--folder DIR]

After every fault the run must resume from its newest intact checkpoint and name what it left out; at the end every step
is logged once, and every number and the weights are bit for bit those of the uninterrupted run. `hang` takes part when
it is named: `--faults hang --patience SECONDS`, with what shortens the run's own time-out in `--set key=value`.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.benchmarks.campaign import (
    CampaignError,
    await_death,
    changed,
    check_resume,
    checkpoints_of,
    compare,
    complete,
    is_intact,
    kill_sessions,
    last_logged,
    newest_checkpoint,
    poll,
    rows_of,
    sessions_of,
    sha256,
    start,
)

RANKS = 2
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "launch.train")
COMMAND = (sys.executable, *TORCHRUN, "--recipe", "debug")
DEATH_PATIENCE_S = 20.0  # torchrun itself gives up on a rank that does not end after 30 s
END_PATIENCE_S = 240.0


# ---------------------------------------------------------------------------------------------------------- the run


@dataclass
class Expectation:
    """What the next start must say."""

    fault: str  # what happened, for people; empty where nothing did
    newest: int  # step of the newest intact checkpoint, 0 for none
    left_out: list[str]  # folders that it must name


@dataclass
class Run:
    """The run under test over all its lives."""

    run_dir: Path
    overrides: Sequence[str]
    rng: random.Random
    patience: float  # seconds in which all ranks must have ended when one hangs
    say: Callable[[str], None]
    closing: ExitStack  # undoes mounts
    expected: Expectation | None = None
    living: Life | None = None
    num_survived: int = 0  # faults that the run got over

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def newest(self) -> int:
        return newest_checkpoint(self.run_dir)

    def begin(self) -> Life:
        """Start the run, or resume it; return when all ranks are there."""
        resume = ["--resume"] if (self.run_dir / "config.yaml").exists() else []
        started = time.time()
        self.living = Life(self, start(COMMAND, self.run_dir, [*self.overrides, *resume]), started)
        self.living.find_ranks()
        return self.living

    def expect(self, fault: str) -> None:
        """Note what happened and what the next start must therefore say; all processes must be gone."""
        found = checkpoints_of(self.run_dir)
        newest = max((step for step, path in found.items() if is_intact(path)), default=0)
        damaged = [path.name for step, path in found.items() if step > newest]
        self.expected = Expectation(fault, newest, damaged + [path.name for path in self.partial()])

    def check(self, output: str) -> None:
        """CampaignError unless the start that printed `output` did what was expected of it."""
        expected, self.expected = self.expected, None
        if expected is None:
            return
        check_resume(output, expected.newest)
        for name in expected.left_out:
            if not re.search(rf"/{name}\b.*(damaged|interrupted)", output):
                raise CampaignError(f"{name} was left out without a word:\n{output}")
            if not (name.endswith(".partial") or (self.checkpoints / f"{name}.damaged").is_dir()):
                raise CampaignError(f"{name}, damaged, was not set aside:\n{output}")
        if expected.fault:
            self.num_survived += 1
            told = f", named {', '.join(expected.left_out)}" if expected.left_out else ""
            self.say(f"{self.num_survived}. {expected.fault}; resumed from step {expected.newest}{told}")

    def advance(self, count: int) -> list[Path]:
        """Let the run live until it has got over the last fault and has `count` complete checkpoints; these."""
        if self.expected is not None or len(checkpoints_of(self.run_dir)) < count:
            life = self.begin()
            life.wait_for_step(self.newest + 1)
            poll(life.process, lambda: len(checkpoints_of(self.run_dir)) >= count)
            life.kill()
            life.end()
            self.expect("")
        return list(checkpoints_of(self.run_dir).values())

    def partial(self) -> list[Path]:
        return sorted(self.checkpoints.glob("*.partial"))


@dataclass
class Life:
    """One start of the run, until all its processes are gone."""

    run: Run
    process: subprocess.Popen[str]
    started: float
    ranks: list[int] = field(default_factory=list)  # their process ids; each leads a session of its own

    @property
    def sessions(self) -> set[int]:
        return {self.process.pid, *self.ranks}

    def find_ranks(self) -> None:
        """Return when torchrun has started all ranks."""

        def are_there() -> bool:
            children = sessions_of(self.process.pid) - {self.process.pid}
            found = {int(rank): pid for pid in children if (rank := _environment(pid).get("RANK")) is not None}
            self.ranks = [pid for _, pid in sorted(found.items())]
            return len(self.ranks) == RANKS

        poll(self.process, are_there)

    def wait_for_step(self, step: int) -> None:
        """Return some time after `step` was logged; what was logged before this life does not count."""
        metrics = self.run.run_dir / "metrics.jsonl"
        poll(self.process, lambda: changed(metrics) > self.started and last_logged(self.run.run_dir) >= step)
        time.sleep(self.run.rng.uniform(0, 0.1))

    def freeze_in_save(self) -> None:
        """Stop all ranks (SIGSTOP) while a checkpoint is half written."""
        while True:
            poll(self.process, lambda: max(map(changed, self.run.partial()), default=0.0) > self.started)
            time.sleep(self.run.rng.uniform(0, 0.02))
            for pid in self.ranks:
                os.kill(pid, signal.SIGSTOP)
            if self.run.partial():
                return
            for pid in self.ranks:  # too late for this one
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL of everything."""
        kill_sessions(self.sessions)

    def end(self, patience: float = DEATH_PATIENCE_S) -> tuple[str, float]:
        """Wait until all processes are gone: the output, which must show that the last fault was got over, and the
        seconds."""
        output, seconds = await_death(self.process, self.sessions, patience)
        self.run.living = None
        self.run.check(output)
        return output, seconds


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}  # it has gone
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


# -------------------------------------------------------------------------------------------------------- the faults


def kill_in_step(run: Run) -> str:
    """SIGKILL of rank 1 in the middle of a step."""
    life = run.begin()
    life.wait_for_step(run.newest + run.rng.randint(6, 9))
    os.kill(life.ranks[1], signal.SIGKILL)
    _, seconds = life.end()
    return f"rank 1 killed after step {last_logged(run.run_dir)} was logged: all gone after {seconds:.1f} s"


def kill_in_save(run: Run, rank: int) -> str:
    """SIGKILL of one rank while a checkpoint is half written."""
    life = run.begin()
    life.freeze_in_save()
    saving = run.partial()[0].name
    os.kill(life.ranks[rank], signal.SIGKILL)
    for other in set(life.ranks) - {life.ranks[rank]}:
        os.kill(other, signal.SIGCONT)
    _, seconds = life.end()
    return f"rank {rank} killed while {saving} was written: all gone after {seconds:.1f} s"


def fill_disk(run: Run) -> str:
    """No space for the next checkpoint: on a file system of its own where mounting is allowed."""
    saved = run.advance(1)
    place = _mount(run)
    before = _content(saved)
    life = run.begin()
    if place is None:
        for pid in life.ranks:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    output, _ = life.end(END_PATIENCE_S)
    # torch hides the reason from a limit (EFBIG) behind an error of its own format
    full = r"the disk or quota of \S+ is full" if place else r"\S.*"
    told = re.search(rf"could not be written: .*?({full})", output)
    if told is None or life.process.returncode == 0:
        raise CampaignError(f"the disk is full, but the run ended with {life.process.returncode}, saying:\n{output}")
    if _content(saved) != before:
        raise CampaignError(f"committed checkpoints changed when the disk was full: {before}")
    if place is not None:
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
    return f"disk full ({'tmpfs' if place else 'limit'}): said `{told[1]}`, {len(saved)} checkpoint(s) as they were"


def damage(run: Run, *harms: Callable[[Path, random.Random], str]) -> str:
    """Damage the newest checkpoints, one for each of `harms`, so that one intact is left."""
    saved = run.advance(len(harms) + 1)
    harmed = [harm(path, run.rng) for harm, path in zip(harms, reversed(saved), strict=False)]
    return "; ".join(harmed)


def truncate(path: Path, rng: random.Random) -> str:
    """Cut the end off one file of a checkpoint."""
    victim = rng.choice([file for file in sorted(path.rglob("*")) if file.is_file() and file.parent.name == "dcp"])
    size = victim.stat().st_size
    os.truncate(victim, size - rng.randint(1, size // 2))
    return f"{path.name}/{victim.relative_to(path)} truncated from {size} to {victim.stat().st_size} bytes"


def flip(path: Path, rng: random.Random) -> str:
    """Invert one byte of a checkpoint so that torch alone loads it without a word, and other weights."""
    right = _loaded(path)
    shards = sorted((path / "dcp").glob("*.distcp"))
    while True:
        victim = rng.choice(shards)
        content = bytearray(victim.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 0xFF
        victim.write_bytes(content)
        try:
            wrong = _loaded(path)
        except Exception:  # this byte torch does miss: any error of its formats
            wrong = right
        different = sum(not torch.equal(right[name], wrong[name]) for name in right)
        if different:
            break
        content[place] ^= 0xFF
        victim.write_bytes(content)
    return (
        f"{path.name}/{victim.relative_to(path)}: byte {place} of {len(content)} flipped, which torch alone loads "
        f"silently ({different} tensor of {len(right)} differs)"
    )


def stop_one(run: Run) -> str:
    """SIGTERM to one rank only: all save the same step and stop."""
    life = run.begin()
    life.wait_for_step(run.newest + run.rng.randint(1, 4))
    rank = run.rng.randrange(RANKS)
    os.kill(life.ranks[rank], signal.SIGTERM)
    output, seconds = life.end()
    told = re.findall(r"stopped by SIGTERM at step (\d+), saved: continue with --resume", output)
    statuses = set(re.findall(r"exitcode +: (-?\d+)", output))
    if len(told) != RANKS or len(set(told)) != 1 or statuses != {"143"} or life.process.returncode != 1:
        raise CampaignError(f"SIGTERM to rank {rank} alone: torchrun ended with {life.process.returncode}:\n{output}")
    if not run.newest == last_logged(run.run_dir) == int(told[0]):
        raise CampaignError(f"not step {told[0]}, but {run.newest} is the newest checkpoint:\n{output}")
    return f"SIGTERM to rank {rank} alone: both saved step {told[0]} and ended with 143 after {seconds:.1f} s"


def hang(run: Run) -> str:
    """SIGSTOP of rank 1: the others must end by their own time-out, and torchrun with them."""
    life = run.begin()
    life.wait_for_step(run.newest + run.rng.randint(1, 4))
    os.kill(life.ranks[1], signal.SIGSTOP)
    _, seconds = life.end(run.patience)
    if life.process.returncode == 0:
        raise CampaignError("rank 1 hangs, but torchrun ended with 0")
    return f"rank 1 hangs: all gone after {seconds:.1f} s"


FAULTS: Mapping[str, Callable[[Run], str]] = {
    "step": kill_in_step,
    "save-0": lambda run: kill_in_save(run, 0),
    "save-1": lambda run: kill_in_save(run, 1),
    "disk": fill_disk,
    "truncated": lambda run: damage(run, truncate),
    "flipped": lambda run: damage(run, flip),
    "both": lambda run: damage(run, truncate, flip),
    "sigterm": stop_one,
    "hang": hang,
}
USUAL = [name for name in FAULTS if name != "hang"]


# ---------------------------------------------------------------------------------------------- disks and checkpoints


def _mount(run: Run) -> Path | None:
    """A tmpfs in place of the run's checkpoints, with their content and space for half another one; None where
    mounting is not allowed. When the campaign ends the content goes back to the disk."""
    folder = run.checkpoints
    for path in run.partial():  # resuming would make space
        shutil.rmtree(path)
    run.expect("")
    kib = _kib(folder) + _kib(checkpoints_of(run.run_dir)[run.newest]) // 2
    aside = folder.with_name("checkpoints.disk")
    folder.rename(aside)
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True)
    if done.returncode:
        folder.rmdir()
        aside.rename(folder)
        return None
    run.closing.enter_context(_back_to_disk(folder, aside))
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    return folder


@contextmanager
def _back_to_disk(folder: Path, aside: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(aside)
        shutil.copytree(folder, aside)
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
        aside.rename(folder)


def _kib(folder: Path) -> int:
    """What the files take on a file system with pages of 4 KiB, one more for each folder."""
    return sum(4 * -(-path.stat().st_size // 4096) if path.is_file() else 4 for path in [folder, *folder.rglob("*")])


def _content(checkpoints: Sequence[Path]) -> dict[Path, str]:
    """Hashes of all files of these checkpoints."""
    return {file: sha256(file) for path in checkpoints for file in path.rglob("*") if file.is_file()}


def _loaded(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint as torch loads them, without a look at the manifest."""
    reader = FileSystemReader(path / "dcp")
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return state


# ------------------------------------------------------------------------------------------------------ the campaign


def fault_campaign(run: Run, reference: Path, faults: Sequence[str]) -> None:
    """Run through the faults, then to the end, and compare with the run in `reference`.

    Raises CampaignError on a survivor, a resume from another than the newest intact checkpoint, one left out without a
    word, a step missing or logged twice, any number that differs, or weights that differ.
    """
    try:
        for fault in faults:
            run.expect(FAULTS[fault](run))
        life = run.begin()
        output, _ = life.end(END_PATIENCE_S)
    finally:
        if run.living is not None:
            run.living.kill()
    if life.process.returncode != 0:
        raise CampaignError(f"the last life ended with {life.process.returncode}:\n{output}")
    compare(run.run_dir, reference)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=USUAL, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the two runs go; a temporary folder by default")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds in which a hang must have ended the run")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of both runs")
    arguments = parser.parse_args()
    overrides = ["train.steps=40", f"train.parallel.mode={arguments.mode}", *arguments.set]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as closing:
        folder = arguments.folder or Path(temporary)
        reference = folder / f"{arguments.mode}_uninterrupted"
        rng = random.Random(arguments.seed)
        run = Run(folder / f"{arguments.mode}_broken", overrides, rng, arguments.patience, print, closing)
        try:
            complete(start(COMMAND, reference, overrides))
            fault_campaign(run, reference, arguments.faults)
        except CampaignError as error:
            print(f"FAILED after {run.num_survived} of {len(arguments.faults)} faults: {error}", file=sys.stderr)
            return 1
        print(
            f"{arguments.mode}: {run.num_survived} faults on {RANKS} ranks: {len(rows_of(run.run_dir))} steps, each "
            "logged once, every number and the weights bit for bit those of the uninterrupted run "
            f"({time.monotonic() - started:.0f} s)"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
