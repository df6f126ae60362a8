"""Before the first step of a job on a cluster: is every node fit to train, and do they agree? Ends in seconds.

Two parts. `check_nodes` asks every node what it sees (device, disk, data, clock, versions, code) over the store at
which the ranks meet, so that a node whose device is gone can still say so. `check_all_reduce` then tries the
collectives. Every rank comes to the same verdict, which names the node at fault.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from data_pipeline.config import DataConfig
from data_pipeline.retries import RemoteConfig
from data_pipeline.sources import open_source
from launch.config import RunConfig
from launch.rendezvous import Place
from launch.snapshot import ROOT, hash_code
from vjepa.objectives import build_objective
from vjepa.train.checkpoint import committed
from vjepa.train.distributed import World
from vjepa.train.run_dir import PACKAGES, RunDir

PATIENCE_S = 20.0  # for one look at the disk or the data; a file system that hangs is a fault
MAX_SKEW_S = 5.0  # between clocks: times of logs and of files are compared over nodes
TRIAL_BYTES = 1 << 20  # written to the run's disk
REDUCED = 1 << 20  # float32 numbers of the all-reduce
REPETITIONS = 3
ROUND_S = 60.0  # all ranks have come, and every look is bounded: nobody is later than this
BYTES_OF_NUMBER = 4  # weights and both moments are kept in float32
BYTES_BESIDE = 15_000  # of names, headers and settings for each tensor that is trained, measured
T = TypeVar("T")


class PreflightError(RuntimeError):
    """What is wrong before the first step, and on which node; `culprit` where it is one of several."""

    def __init__(self, text: str, culprit: str | None = None) -> None:
        super().__init__(text)
        self.culprit = culprit


@dataclass(frozen=True)
class Report:
    """What a rank sees; of the ranks of a node the first one looks at what the node has in common."""

    rank: int
    node: str
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)  # of Python, torch, CUDA, ..., and the code's hash
    clock: float = 0.0  # seconds; read by all ranks at the same moment


@dataclass(frozen=True)
class Fault:
    """Something wrong on a node."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


def check_nodes(config: RunConfig, place: Place, store: Store | None) -> str:
    """Look at this node, compare with all others, and say in one line what was found; collective.

    Raises PreflightError on all ranks alike.
    """
    began = time.monotonic()
    report = look(config, place)
    reports = [report] if store is None else exchange(store, place, report)
    faults = compare(reports)
    if faults:
        raise _error(faults, {report.node for report in reports})
    clocks = [report.clock for report in reports]
    nodes, spread = len({report.node for report in reports}), max(clocks) - min(clocks)
    seconds = time.monotonic() - began
    return (
        f"preflight: {len(reports)} rank(s) on {nodes} node(s) are fit, clocks within {spread:.2f} s, {seconds:.1f} s"
    )


def _error(faults: Sequence[Fault], nodes: set[str]) -> PreflightError:
    """What all nodes have is no fault of one."""
    at_fault = {fault.node for fault in faults}
    culprit = next(iter(at_fault)) if len(at_fault) == 1 and len(nodes) > 1 else None
    return PreflightError("before the first step: " + "; ".join(dict.fromkeys(map(str, faults))), culprit)


# -------------------------------------------------------------------------------------------------------- on each node


def look(config: RunConfig, place: Place) -> Report:
    """This rank's device, and for the node: disk, data, versions."""
    checks: list[Callable[[], None]] = [lambda: check_device(config.train.device, place.local_rank)]
    if place.local_rank == 0:
        checks += [
            lambda: check_disk(Path(config.run_dir), config, place.node),
            lambda: check_data(config.data, {name for name, maker in config.prepare.items() if maker != "none"}),
        ]
    problems = [problem for check in checks if (problem := _problem(check))]
    return Report(place.rank, place.node, problems, versions() if place.local_rank == 0 else {})


def versions() -> dict[str, str]:
    """What must be the same on all nodes, the code itself included."""
    found = {"python": platform.python_version(), "CUDA": str(torch.version.cuda), "code": hash_code(ROOT)}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _problem(check: Callable[[], None]) -> str | None:
    """What a check complains of; a check that does not end is a complaint."""
    try:
        within(PATIENCE_S, check)
    except Exception as error:
        return f"{error}" if isinstance(error, PreflightError) else f"{type(error).__name__}: {error}"
    return None


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result of `action`, run in a thread that is left behind where it takes longer: PreflightError."""
    outcome: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="preflight")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not outcome:
        raise PreflightError(f"no answer of the disk, the data or the device within {seconds:g} s")
    return outcome[0]


def check_device(wanted: str, local_rank: int) -> None:
    """The GPU that SLURM gave this rank is there and computes."""
    has_gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) > 0
    if wanted == "cpu" or (wanted == "auto" and not has_gpus):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= local_rank:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise PreflightError(f"no GPU for local rank {local_rank}: torch sees {count}, visible devices: {visible}")
    ones = torch.ones(1024, 1024, device=torch.device("cuda", local_rank))
    if (found := float((ones @ ones).sum())) != 2.0**30:
        raise PreflightError(f"GPU {local_rank} computes wrongly: {found} in place of {2.0**30}")


def check_disk(run_dir: Path, config: RunConfig, node: str) -> None:
    """The run's folder takes and gives back bytes, and has room for the checkpoints to come."""
    folder = RunDir(run_dir).checkpoints
    file, content = folder / f".preflight_{node}", os.urandom(TRIAL_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        if file.read_bytes() != content:
            raise PreflightError(f"{folder} gives back other bytes than were written")
    except OSError as error:
        raise PreflightError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            file.unlink()
    check_room(run_dir, needed_bytes(config, len(committed(folder))))


def check_room(run_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise PreflightError(
            f"{run_dir} has {free / 1e9:.1f} GB free, and the checkpoints to come need {needed / 1e9:.1f} GB "
            "(train.checkpoint.keep): free space, keep fewer, or choose another run_dir"
        )


def needed_bytes(config: RunConfig, num_there: int) -> int:
    """What checkpoints will still take on the disk: one more than are kept is there while the next is written."""
    return checkpoint_bytes(config) * (config.train.checkpoint.keep + 1 - min(num_there, config.train.checkpoint.keep))


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint: all weights, and two moments of those that are trained."""
    objective = build_objective(config.objective, config.model, config.predictor, seed=0, device="meta")
    weights = sum(tensor.nbytes for tensor in objective.state_dict().values())
    trained = [parameter.numel() for parameter in objective.parameters() if parameter.requires_grad]
    return weights + BYTES_OF_NUMBER * 2 * sum(trained) + BYTES_BESIDE * len(trained)


def check_data(data: DataConfig, made: set[str]) -> None:
    """Every source opens: its manifest is readable, some of its files are there; sources still to be made excepted."""
    remote = RemoteConfig(**(vars(data.remote) | {"attempts": 2, "timeout": PATIENCE_S / 4, "give_up": PATIENCE_S / 2}))
    for modality, part in data.modalities().items():
        for name, source in part.sources.items():
            if name in made:
                continue
            records = open_source(source.path, modality, remote=remote, stream=source.stream)
            with closing(records):  # pyright: ignore[reportArgumentType]
                if not len(records):
                    raise PreflightError(f"data.{modality}.sources.{name}: {source.path} has no {modality} records")


# -------------------------------------------------------------------------------------------------- between the nodes


def exchange(store: Store, place: Place, report: Report, *, clock: Callable[[], float] = time.time) -> list[Report]:
    """Every rank's report, with the time at which all had come; the same on all ranks."""
    texts = _all_of(store, place, "report", json.dumps(asdict(report)))
    now = clock()  # everyone was let go by the same last arrival
    clocks = _all_of(store, place, "clock", json.dumps(now))
    return [Report(**(json.loads(text) | {"clock": json.loads(at)})) for text, at in zip(texts, clocks, strict=True)]


def _all_of(store: Store, place: Place, what: str, text: str) -> list[str]:
    """Everyone's text; PreflightError with the ranks that did not give one in time."""
    keys = [f"preflight/{what}/{rank}" for rank in range(place.size)]
    store.set(keys[place.rank], text)
    deadline = time.monotonic() + ROUND_S
    try:
        store.wait(keys, timedelta(seconds=ROUND_S))
    except RuntimeError as error:
        if time.monotonic() < deadline:
            raise  # the connection, not the time
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise PreflightError(f"rank {', '.join(map(str, absent))} gave no answer within {ROUND_S:g} s") from error
    return [value.decode() for value in store.multi_get(keys)]


def compare(reports: Sequence[Report]) -> list[Fault]:
    """What is wrong on single nodes, and where a node differs from most."""
    faults = [Fault(report.node, problem) for report in reports for problem in report.problems]
    return faults + _compare_clocks(reports) + _compare_versions([report for report in reports if report.versions])


def _compare_clocks(reports: Sequence[Report]) -> list[Fault]:
    """A node whose clock is away from most others'; without a majority, all nodes."""
    clocks = {report.node: report.clock for report in reports}
    middle = statistics.median_low(clocks.values())
    away = {node: clock - middle for node, clock in clocks.items() if abs(clock - middle) > MAX_SKEW_S}
    if away and 2 * len(away) >= len(clocks):
        spread = max(clocks.values()) - min(clocks.values())
        return [Fault(node, f"clocks are {spread:.1f} s apart (at most {MAX_SKEW_S:g} s)") for node in clocks]
    text = "its clock is {:+.1f} s from the others' (at most {:g} s)"
    return [Fault(node, text.format(seconds, MAX_SKEW_S)) for node, seconds in away.items()]


def _compare_versions(reports: Sequence[Report]) -> list[Fault]:
    """A node that has another version than most; without a majority, all nodes."""
    faults = []
    for name in sorted({name for report in reports for name in report.versions}):
        found = {report.node: report.versions.get(name, "none") for report in reports}
        usual, count = Counter(found.values()).most_common(1)[0]
        if count == len(found):
            continue
        is_majority = 2 * count > len(found)
        faults += [
            Fault(node, f"{name} is {one}" + (f", {usual} on {count} of {len(found)} nodes" if is_majority else ""))
            for node, one in found.items()
            if one != usual or not is_majority
        ]
    return faults


# -------------------------------------------------------------------------------------------------------- collectives


def check_all_reduce(world: World) -> str:
    """Sum a known pattern over all ranks: right on every rank, and how long it takes; collective.

    Raises PreflightError on all ranks alike, with those where the sum is wrong.
    """
    pattern = torch.arange(REDUCED, device=world.device).remainder(7).float()
    right = pattern * (world.size * (world.size + 1) // 2)
    seconds, is_right = [], True
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        summed = world.sum(pattern * (world.rank + 1))
        is_right &= bool((summed == right).all())  # waits for the device
        seconds.append(time.perf_counter() - began)
    everyone = world.gather_objects((is_right, platform.node()))
    judge_sums(everyone)
    slowest = max(world.gather_objects(min(seconds)))
    size = f"{REDUCED * 4 >> 20} MiB over {world.size} rank(s)"
    return f"preflight: all-reduce of {size} is right, {1000 * slowest:.1f} ms"


def judge_sums(everyone: Sequence[tuple[bool, str]]) -> None:
    """Raise PreflightError where a rank's sum was wrong; a single node is at fault where only its ranks are wrong."""
    wrong = {rank: node for rank, (is_right, node) in enumerate(everyone) if not is_right}
    if not wrong:
        return
    places = ", ".join(f"rank {rank} on {node}" for rank, node in wrong.items())
    nodes, all_nodes = set(wrong.values()), {node for _, node in everyone}
    culprit = next(iter(nodes)) if len(nodes) == 1 and len(all_nodes) > 1 else None
    raise PreflightError(f"before the first step: an all-reduce gave a wrong sum on {places}", culprit)
