"""What a few steps spend their time and memory on, when asked: a trace, a table of operators, a memory snapshot.

The trace opens in https://ui.perfetto.dev or chrome://tracing, the snapshot in https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger(__name__)
OPERATORS_IN_TABLE = 60
MEMORY_EVENTS = 1_000_000  # allocations and frees that a snapshot remembers, the newest


@dataclass
class ProfileConfig:
    """Which steps are traced; tracing slows them down and their rows in metrics.jsonl show it."""

    start: int | None = None  # first step to trace, counted from 1 as in metrics.jsonl; null: none
    steps: int = 3  # how many; each is some tens of megabytes for a large model
    all_ranks: bool = False  # trace every rank, not only the main one
    memory: bool = False  # memory too: on CUDA a snapshot of its history, on a CPU bytes per operator

    def __post_init__(self) -> None:
        if self.start is not None and self.start < 1:
            raise ValueError(f"profile.start={self.start} must be at least 1, the first step; null: trace nothing")
        if self.steps < 1:
            raise ValueError(f"profile.steps={self.steps} must be at least 1; profile.start=null traces nothing")


class Profiler:
    """Traces the steps asked for, from `__enter__` to `__exit__`; off, it does nothing and writes nothing.

    A run that ends or fails within these steps, by lack of memory too, leaves a trace of those it came to.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: torch.device) -> None:
        self.folder, self.rank, self.device, self.memory = folder / "profile", rank, device, config.memory
        is_on = config.start is not None and (config.all_ranks or rank == 0)
        self._wanted = range(config.start, config.start + config.steps) if is_on and config.start else None
        self._trace: _Trace | None = None

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._trace is not None:
            for path in self._finish():
                log.info("profile: %s", path)

    def step(self, step: int) -> list[Path]:
        """The step numbered `step`, counted from 1, begins; the files written when the traced ones are over."""
        if self._wanted is None:
            return []
        if step >= self._wanted.stop:
            return self._finish()
        if step in self._wanted:
            if self._trace is None:
                self._trace = _Trace(self.device, memory=self.memory)
            self._trace.begin(step)
        return []

    def _finish(self) -> list[Path]:
        """Write what there is; nothing is traced after it. A disk that is full does not end the run."""
        assert self._wanted is not None
        trace, wanted = self._trace, self._wanted
        self._trace = self._wanted = None
        if trace is None:
            log.warning(
                "train.profile.start=%d: nothing is traced, because the run goes on after step %d; choose a later step",
                *(wanted.start, wanted.stop - 1),
            )
            return []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return trace.write(self.folder / f"rank_{self.rank}_steps_{trace.first}-{trace.last}")
        except (OSError, RuntimeError) as error:
            log.warning("profile of steps %d-%d was not written: %s", trace.first, trace.last, error)
            return []
        finally:
            trace.close()


class _Trace:
    """A running profiler, with a span named after each step."""

    def __init__(self, device: torch.device, *, memory: bool) -> None:
        self.first = self.last = 0
        self.is_cuda = device.type == "cuda"
        self.device, self.has_snapshot = device, memory and self.is_cuda
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        self._profile = profile(activities=activities, profile_memory=memory and not self.is_cuda, acc_events=True)
        self._span = ExitStack()
        self._is_running = True
        if self.has_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile.start()

    def begin(self, step: int) -> None:
        self._span.close()
        self.first, self.last = self.first or step, step
        self._span.enter_context(record_function(f"step {step}"))

    def write(self, stem: Path) -> list[Path]:
        """Stop, and write beside one another what belongs to `stem`."""
        snapshot, trace, table = (Path(f"{stem}{end}") for end in ("_memory.pickle", ".json.gz", "_operators.txt"))
        if self.has_snapshot:  # first: after a lack of memory it is what is wanted
            torch.cuda.memory._dump_snapshot(str(snapshot))
        self.close()
        self._profile.export_chrome_trace(str(trace))
        by = "self_device_time_total" if self.is_cuda else "self_cpu_time_total"
        table.write_text(self._profile.key_averages().table(sort_by=by, row_limit=OPERATORS_IN_TABLE) + "\n")
        return [path for path in (trace, table, snapshot) if path.exists()]

    def close(self) -> None:
        """Trace no more; a second call does nothing."""
        if not self._is_running:
            return
        self._is_running = False
        if self.is_cuda:
            torch.cuda.synchronize(self.device)  # kernels that still run belong to the traced steps
        self._span.close()
        self._profile.stop()
        if self.has_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
