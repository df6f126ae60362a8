"""What a step leaves behind, and what is decided from it by all ranks together.

The numbers of a step are read one step later, so that the device never waits for the host; they are always read before
a checkpoint is written. All decisions (stop on a non-finite value, on too many bad samples, on a signal) follow from
numbers summed over ranks: every rank decides the same.
"""

from __future__ import annotations

import json
import logging
import math
import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vjepa.batch import MicroBatch
from vjepa.train.accounts import Accounts
from vjepa.train.config import TrainConfig
from vjepa.train.diagnostics import CollapseAlarms
from vjepa.train.distributed import World
from vjepa.train.metrics import MetricsWriter, ProgressDisplay
from vjepa.train.run_dir import RunDir
from vjepa.train.signals import STOP_SIGNALS, StopFlag

log = logging.getLogger(__name__)
CEILING_FROM = 200  # samples seen before the share of bad ones is judged
MOST_KEYS_NAMED = 12


class NonFiniteError(RuntimeError):
    """A loss or gradient norm was not finite; the message names step and sample keys."""


class BadDataError(RuntimeError):
    """More samples had to be replaced than data.max_bad_fraction allows."""


class Interrupted(Exception):
    """The run was asked to stop by a signal; it saved first."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}, saved: continue with --resume")
        self.signum = signum


@dataclass
class StepRecord:
    """The traces of one step on this rank; tensors are still on the device."""

    step: int = 0  # completed steps
    sums: dict[str, Tensor] = field(default_factory=dict)  # over this rank's micro-batches
    means: dict[str, Tensor] = field(default_factory=dict)  # taken once a step
    row: dict[str, float] = field(default_factory=dict)  # numbers that the host knows
    keys: list[str] = field(default_factory=list)
    bad: list[Any] = field(default_factory=list)
    clips: int = 0
    tokens: int = 0  # of all clips, masked or not
    flops: int = 0
    num_micro_batches: int = 0
    is_diagnostic: bool = False
    loss_is_finite: Tensor | None = None
    reduced: Tensor | None = None

    def add(self, micro_batch: MicroBatch, metrics: dict[str, Tensor], *, flops: int = 0) -> None:
        """Count a micro-batch and sum its metrics."""
        self.flops += flops
        for batch in micro_batch.values():
            self.keys += [f"{batch.modality}:{key}" for key in batch.keys]
            self.bad += batch.rejected
            self.clips += len(batch)
            self.tokens += len(batch) * math.prod(batch.grid)
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_micro_batches += 1

    @property
    def names(self) -> list[str]:
        return [*self.sums, *self.means]

    def reduce(self, world: World, stop: StopFlag, *, loss: str, grad_norm: Tensor) -> None:
        """Sum over ranks what all must know, in one collective; nothing is read by the host."""
        self.loss_is_finite = torch.isfinite(self.sums[loss])
        is_finite = self.loss_is_finite & torch.isfinite(grad_norm)
        device = grad_norm.device
        means = [value / self.num_micro_batches for value in self.sums.values()] + list(self.means.values())
        flags = torch.tensor([len(self.bad), self.clips, *stop.as_list()], dtype=torch.float64, device=device)
        values = [value.to(device, torch.float64).reshape(1) for value in (*means, ~is_finite)]
        self.reduced = world.sum(torch.cat([*values, flags]))


class Recorder:
    """Reads records one step late, writes rows, and raises what all ranks must raise."""

    def __init__(
        self, config: TrainConfig, run: RunDir, world: World, *, start_step: int, max_bad_fraction: float, title: str
    ) -> None:
        self.config, self.run, self.world, self.max_bad_fraction = config, run, world, max_bad_fraction
        self.alarms = CollapseAlarms(config.alarms)
        self.accounts = Accounts(world.device)
        self.samples_seen, self.bad_seen = 0, 0
        self.final_loss = math.nan
        self.stop_signal = 0
        self._pending: StepRecord | None = None
        self._start_step, self._title = start_step, title
        self._writer: MetricsWriter | None = None
        self._display: ProgressDisplay | None = None

    def open(self) -> None:
        """Open the run's files on the main rank."""
        if self.world.is_main:
            self._writer = MetricsWriter(
                self.run.metrics, start_step=self._start_step, tensorboard=self.config.tensorboard
            )
            self._display = ProgressDisplay(self.config.steps, self._start_step, title=self._title)

    def close(self) -> None:
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

    def hand_over(self, record: StepRecord) -> None:
        """Take a step's record and read the one before it."""
        self.settle()
        self._pending = record

    def settle(self) -> None:
        """Read the pending record: log it, and raise NonFiniteError or BadDataError where all ranks must stop."""
        record, self._pending = self._pending, None
        if record is None:
            return
        assert record.reduced is not None
        values = record.reduced.tolist()
        count = len(record.names)
        row = {name: value / self.world.size for name, value in zip(record.names, values[:count], strict=True)}
        non_finite, bad, clips, *signals = values[count:]
        self.samples_seen += int(clips)
        if bad:
            self._note_bad(record, int(bad))
        if non_finite:
            self._stop_non_finite(record, row)
        self.final_loss = row["loss"]
        self._log(record, row, clips)
        self._judge_bad()
        for signum, received in zip(STOP_SIGNALS, signals, strict=True):
            if received:
                self.stop_signal = signum

    def _log(self, record: StepRecord, row: dict[str, float], clips: float) -> None:
        is_due = record.step % self.config.log_every == 0 or record.step == self.config.steps
        if not (is_due or record.is_diagnostic):
            return
        seconds = max(record.row["step_seconds"], 1e-9)
        spent = self.accounts.of(seconds, clips=clips, tokens=record.tokens * self.world.size, flops=record.flops)
        row = {"step": record.step, **row, **record.row, **spent}
        alarms = self.alarms.observe(record.step, row)
        if self._writer is not None and self._display is not None:
            self._writer.write(row)
            self._display.update(row)
        for text in alarms:
            self.message(f"ALARM at step {record.step}: {text}")

    def _stop_non_finite(self, record: StepRecord, row: dict[str, float]) -> None:
        assert record.loss_is_finite is not None
        everyone = self.world.gather_objects((bool(record.loss_is_finite), record.keys))
        culprits = {rank: keys for rank, (is_finite, keys) in enumerate(everyone) if not is_finite}
        if not culprits:  # the gradient alone, and that is everyone's
            culprits = {rank: keys for rank, (_, keys) in enumerate(everyone)}
        path = self.run.path / f"non_finite_step_{record.step:08d}.json"
        if self.world.is_main:
            numbers = {name: repr(value) for name, value in (row | record.row).items()}
            path.write_text(json.dumps({"step": record.step, "keys": culprits, "values": numbers}, indent=2) + "\n")
        named = ", ".join(key for keys in culprits.values() for key in keys[:MOST_KEYS_NAMED])
        raise NonFiniteError(
            f"step {record.step}: loss {row['loss']} and gradient norm {row['grad_norm']}: not finite on rank(s) "
            f"{sorted(culprits)}, with samples {named} (all of them in {path}). The last checkpoint is from before; "
            "look at these samples, lower train.optim.lr.peak or set train.optim.clip_grad, and --resume"
        )

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
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        self.samples_seen, self.bad_seen = state["samples_seen"], state["bad_seen"]
        self.final_loss = state["final_loss"]
        self.alarms.load_state_dict(state["alarms"])
        self._start_step = step


def _as_dict(entry: Any) -> dict[str, Any]:
    """A bad sample's fields, whatever record the loader uses."""
    return dict(entry) if isinstance(entry, dict) else dict(vars(entry))
