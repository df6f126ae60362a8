"""What a step leaves behind, and what is decided from it by all ranks together.

The numbers of a step are read one step later, so that the device never waits for the host (at once where a step that
is not sound is to be skipped); they are always read before a checkpoint is written. All decisions (on a step that is
not sound, on collapse, on too many bad samples, on a signal) follow from numbers summed over ranks: every rank decides
the same.
"""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vjepa.batch import MicroBatch
from vjepa.train.accounts import Accounts
from vjepa.train.config import TrainConfig
from vjepa.train.data_counts import DataCounters, DataCounts
from vjepa.train.diagnostics import CollapseAlarms, CollapseError
from vjepa.train.distributed import World
from vjepa.train.health import Health, RollBack, Trouble
from vjepa.train.incident import incident_folder, note_incident
from vjepa.train.metrics import MetricsWriter, ProgressDisplay
from vjepa.train.run_dir import RunDir
from vjepa.train.signals import STOP_SIGNALS, StopFlag

log = logging.getLogger(__name__)
CEILING_FROM = 200  # samples seen before the share of bad ones is judged


class BadDataError(RuntimeError):
    """More samples had to be replaced than data.max_bad_fraction allows."""


class Interrupted(Exception):
    """The run was asked to stop by a signal; it saved first."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}, saved: continue with --resume")
        self.signum, self.step = signum, step


@dataclass(frozen=True)
class Reading:
    """A record's numbers, on the host."""

    row: dict[str, float]  # means over ranks
    clips: float
    trouble: Trouble | None
    data: dict[str, float]  # sums over ranks


@dataclass
class StepRecord:
    """The traces of one step on this rank; tensors are still on the device."""

    step: int = 0  # completed steps
    sums: dict[str, Tensor] = field(default_factory=dict)  # over this rank's micro-batches
    means: dict[str, Tensor] = field(default_factory=dict)  # taken once a step
    row: dict[str, float] = field(default_factory=dict)  # numbers that the host knows
    micro_batches: list[MicroBatch] = field(default_factory=list)  # as they came, to be kept if the step is not sound
    bad: list[Any] = field(default_factory=list)
    clips: int = 0
    tokens: int = 0  # of all clips, masked or not
    flops: int = 0
    waited: float = 0.0  # seconds, for data
    data: dict[str, float] = field(default_factory=dict)  # what this rank's data have cost so far, at logged steps
    num_micro_batches: int = 0
    is_diagnostic: bool = False
    own_loss: Tensor | None = None  # of this rank
    reduced: Tensor | None = None
    read: Reading | None = None

    def add(self, micro_batch: MicroBatch, metrics: dict[str, Tensor], *, flops: int = 0) -> None:
        """Count a micro-batch and sum its metrics."""
        self.flops += flops
        self.micro_batches.append(micro_batch)
        for batch in micro_batch.values():
            self.bad += batch.rejected
            self.clips += len(batch)
            self.tokens += len(batch) * math.prod(batch.grid)
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_micro_batches += 1

    @property
    def names(self) -> list[str]:
        return [*self.sums, *self.means]

    def reduce(self, world: World, stop: StopFlag, *, save_failed: bool = False) -> None:
        """Sum over ranks what all must know, in one collective; nothing is read by the host."""
        self.own_loss = self.sums["loss"] / self.num_micro_batches
        grad_norm = self.means["grad_norm"]
        is_finite = torch.isfinite(self.own_loss) & torch.isfinite(grad_norm)
        device = grad_norm.device
        means = [value / self.num_micro_batches for value in self.sums.values()] + list(self.means.values())
        told = [len(self.bad), self.clips, save_failed, *stop.as_list(), *self.data.values()]
        flags = torch.tensor(told, dtype=torch.float64, device=device)
        values = [value.to(device, torch.float64).reshape(1) for value in (*means, ~is_finite)]
        self.reduced = world.sum(torch.cat([*values, flags]))


class Recorder:
    """Reads records one step late, writes rows, and raises what all ranks must raise."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDir,
        world: World,
        *,
        start_step: int,
        max_bad_fraction: float,
        title: str,
        held_by: Sequence[str] = (),
        data_counters: DataCounters | None = None,
    ) -> None:
        self.config, self.run, self.world, self.max_bad_fraction = config, run, world, max_bad_fraction
        self.alarms = CollapseAlarms(config.alarms, held_by)
        self.health = Health(config.health)
        self.accounts = Accounts(world.device)
        self.data = DataCounts(data_counters, world)
        self.samples_seen, self.bad_seen = 0, 0
        self.final_loss = math.nan
        self.stop_signal = 0
        self.save_failed = False  # on some rank
        self._pending: StepRecord | None = None
        self.start_step, self._title = start_step, title
        self._writer: MetricsWriter | None = None
        self._display: ProgressDisplay | None = None

    def open(self) -> None:
        """Open the run's files on the main rank; the data are counted from here on."""
        self.data.restart()
        if self.world.is_main:
            self._writer = MetricsWriter(
                self.run.metrics, start_step=self.start_step, tensorboard=self.config.tensorboard
            )
            self._display = ProgressDisplay(self.config.steps, self.start_step, title=self._title)

    def close(self) -> None:
        self._pending = None
        if self._writer is not None and self._display is not None:
            self._writer.close()
            self._display.close()

    def sync(self) -> None:
        """Read the pending record and flush the rows to the disk: what a checkpoint stands on."""
        self.settle()
        if self._writer is not None:
            self._writer.sync()

    def message(self, text: str) -> None:
        """One line for people, on the main rank."""
        if self._display is not None:
            self._display.message(text)

    def is_due(self, record: StepRecord) -> bool:
        """Whether a sound step gets a row."""
        is_due = record.step % self.config.log_every == 0 or record.step == self.config.steps
        return is_due or record.is_diagnostic

    def count_data(self, record: StepRecord) -> None:
        """Count a step's data; where it gets a row, all ranks' sums so far travel with its numbers."""
        self.data.add(clips=record.clips, waited=record.waited)
        if self.is_due(record):
            record.data = self.data.snapshot()

    def hand_over(self, record: StepRecord) -> None:
        """Take a step's record and read the one before it."""
        self.settle()
        self._pending = record

    def must_skip(self, record: StepRecord) -> bool:
        """Whether no update may be made from a step; waits for its numbers where the policies know skipping."""
        if not self.config.health.is_immediate:
            return False
        self.settle()
        return self._read(record).trouble is not None

    def settle(self) -> None:
        """Read the pending record and log it.

        Raises, on all ranks alike, NonFiniteError, SpikeError or RollBack for a step that is not sound and not skipped,
        CollapseError or RollBack for features that are not, and BadDataError.
        """
        record, self._pending = self._pending, None
        if record is None:
            return
        reading = record.read or self._read(record)
        self._log(record, reading)
        self._judge_bad()

    def _read(self, record: StepRecord) -> Reading:
        """Wait for a record's numbers and act on what they say."""
        assert record.reduced is not None
        values = record.reduced.tolist()
        count = len(record.names)
        row = {name: value / self.world.size for name, value in zip(record.names, values[:count], strict=True)}
        non_finite, bad, clips, save_failed, *rest = values[count:]
        signals, data = rest[: len(STOP_SIGNALS)], dict(zip(record.data, rest[len(STOP_SIGNALS) :], strict=True))
        self.samples_seen += int(clips)
        self.save_failed |= bool(save_failed)
        for signum, received in zip(STOP_SIGNALS, signals, strict=True):
            if received:
                self.stop_signal = signum
        if bad:
            self._note_bad(record, int(bad))
        trouble = self.health.judge(record.step, row, is_finite=not non_finite)
        if trouble is not None:
            self._face(trouble, record, row)
        record.read = Reading(row, clips, trouble, data)
        return record.read

    def _face(self, trouble: Trouble, record: StepRecord, row: dict[str, float]) -> None:
        """Write a step that is not sound down and raise what its policy asks for."""
        assert record.own_loss is not None
        error = note_incident(
            self.run.path, trouble, record.micro_batches, float(record.own_loss), row | record.row, self.world
        )
        if trouble.policy == "stop":
            raise error
        if trouble.policy == "roll_back":
            raise RollBack(trouble.step, error)
        self.message(
            f"step {trouble.step} is skipped: {trouble.what}; see {incident_folder(self.run.path, trouble.step)}"
        )

    def _log(self, record: StepRecord, reading: Reading) -> None:
        if reading.trouble is not None:  # skipped: what is not finite has no place in a row
            finite = {name: value for name, value in reading.row.items() if math.isfinite(value)}
            self._write(record, finite | {"skipped": 1.0}, reading.clips)
            return
        self.final_loss = reading.row["loss"]
        if self.is_due(record):
            row = self._write(record, reading.row | self.data.row(reading.data), reading.clips)
            for text in self.data.alarms():
                self.message(f"ALARM at step {record.step}: {text}")
            alarms = self.alarms.observe_named(record.step, row)
            for text in alarms.values():
                self.message(f"ALARM at step {record.step}: {text}")
            if alarms:
                self._face_collapse(record.step, alarms)

    def _face_collapse(self, step: int, alarms: Mapping[str, str]) -> None:
        """Raise what the policy asks for, from numbers that are the same on all ranks."""
        policy = self.config.alarms.on_collapse
        if policy == "warn":
            return
        first, more = next(iter(alarms.values())), len(alarms) - 1
        others = f" ({more} more alarms, of {', '.join(list(alarms)[1:])})" if more else ""
        error = CollapseError(
            f"step {step}: features look collapsed. {first}{others}. train.alarms.on_collapse={policy}; with warn, "
            "--resume goes on from the last checkpoint"
        )
        if policy == "roll_back":
            # A checkpoint of n steps holds the weights that the evaluation at step n + 1 measures.
            raise RollBack(step, error, before=self.alarms.broken_since(alarms) - 1)
        raise error

    def _write(self, record: StepRecord, row: dict[str, float], clips: float) -> dict[str, float]:
        seconds = max(record.row["step_seconds"], 1e-9)
        spent = self.accounts.of(seconds, clips=clips, tokens=record.tokens * self.world.size, flops=record.flops)
        row = {"step": record.step, **row, **record.row, **spent}
        if self._writer is not None and self._display is not None:
            self._writer.write(row)
            self._display.update(row)
        return row

    def _note_bad(self, record: StepRecord, bad: int) -> None:
        self.bad_seen += bad
        everyone = [entry for entries in self.world.gather_objects(record.bad) for entry in entries]
        if self.world.is_main:
            with self.run.bad_samples.open("a") as file:
                for entry in everyone:
                    file.write(json.dumps({"step": record.step, **_as_dict(entry)}) + "\n")
        for entry in everyone[:3]:
            self.message(f"bad sample replaced: {_as_dict(entry)}")

    def _judge_bad(self) -> None:
        share = self.bad_seen / max(1, self.samples_seen)
        if self.samples_seen >= CEILING_FROM and share > self.max_bad_fraction:
            raise BadDataError(
                f"{self.bad_seen} of {self.samples_seen} samples ({share:.1%}) could not be decoded and were replaced, "
                f"above data.max_bad_fraction={self.max_bad_fraction:.1%}: see {self.run.bad_samples}, ingest the data "
                "again or raise the ceiling"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint's meta."""
        return {
            "samples_seen": self.samples_seen,
            "bad_seen": self.bad_seen,
            "final_loss": self.final_loss,
            "alarms": self.alarms.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        self.samples_seen, self.bad_seen = state["samples_seen"], state["bad_seen"]
        self.final_loss = state["final_loss"]
        self.alarms.load_state_dict(state["alarms"])
        if "health" in state:  # not in checkpoints of before there were policies
            self.health.load_state_dict(state["health"])
        self.start_step = step


def _as_dict(entry: Any) -> dict[str, Any]:
    """A bad sample's fields, whatever record the loader uses."""
    return dict(entry) if isinstance(entry, dict) else dict(vars(entry))
