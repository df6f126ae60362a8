"""The training loop. It knows no stage, no data format and no kind of objective."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from vjepa.batch import MicroBatch, Modality
from vjepa.nn.predictor import Predictor
from vjepa.objectives.embeddings import StepEmbeddings
from vjepa.objectives.jepa import JEPA, Result
from vjepa.objectives.outputs import Outputs
from vjepa.objectives.terms import term_kinds
from vjepa.train import checkpoint
from vjepa.train.config import TrainConfig
from vjepa.train.data_counts import DataCounters
from vjepa.train.distributed import World
from vjepa.train.health import RollBack
from vjepa.train.latents import latent_diagnostics
from vjepa.train.levels import diagnose
from vjepa.train.optim import build_optimizer, set_schedule
from vjepa.train.parallel import full, full_state, gradient_sync, parallelise
from vjepa.train.probes import build_probes
from vjepa.train.profiling import Profiler
from vjepa.train.record import Interrupted, Recorder, StepRecord
from vjepa.train.remedies import prevention
from vjepa.train.run_dir import RunDir
from vjepa.train.saver import Saver
from vjepa.train.signals import StopFlag
from vjepa.train.stragglers import StepClock, stragglers
from vjepa.train.watchdog import Watchdog

log = logging.getLogger(__name__)
STATE_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
Batches = Callable[[int, int], Generator[MicroBatch]]


class Trainer:
    """Runs an objective from its first, or its last saved, step to the last one.

    An objective on the meta device gets its memory and, by `fill`, its values once it is spread over the ranks.
    `batches(first, end)` yields `num_micro_batches` micro-batches per step for this rank, for the steps from `first` up
    to and without `end`; `data_counters` is asked at logged steps what they have cost.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: JEPA,
        batches: Batches,
        *,
        num_micro_batches: int,
        world: World,
        run: RunDir,
        max_bad_fraction: float = 0.05,
        title: str = "train",
        config_hash: str = "",
        fill: Callable[[JEPA], None] | None = None,
        data_counters: DataCounters | None = None,
    ) -> None:
        self.config, self.world, self.run = config, world, run
        self.batches, self.num_micro_batches = batches, num_micro_batches
        self.config_hash = config_hash
        self.objective = objective
        self.module: nn.Module = parallelise(objective, config.parallel, world, precision=config.precision, fill=fill)
        self.optimizer = build_optimizer(objective, config.optim)
        self.recorder = Recorder(
            config,
            run,
            world,
            start_step=0,
            max_bad_fraction=max_bad_fraction,
            title=title,
            held_by=prevention(objective.config.target, term_kinds(objective.config.terms)),
            data_counters=data_counters,
        )
        self.probes = build_probes(config.probe, objective, world)
        self.step = 0  # completed steps
        self.seconds = 0.0  # spent training, over all segments
        self.roll_backs = 0
        self.detour = 0  # steps' worth of data left out by roll backs: step n takes the data of step n + detour
        self.clock = StepClock(world.device)
        self.watchdog = Watchdog(config.watchdog, run.path, world.rank, say=log.warning)
        self.profiler = Profiler(config.profile, run.path, world.rank, world.device)
        self.saver = Saver(run.checkpoints, config.checkpoint, world)
        self._saved_step = 0
        self._has_stepped = False  # since this process began

    # ----------------------------------------------------------------------------------------------------- the loop

    def fit(self, stop: StopFlag) -> None:
        """Train to the last step; checkpoints on the way, at the end, and when `stop` is set on any rank.

        Raises Interrupted (after saving), UnsoundStepError, CollapseError, BadDataError or CheckpointError, on all
        ranks alike.
        """
        stop.is_early = False
        with closing(self.saver), self.watchdog, self.profiler:
            while True:
                try:
                    self._run(stop)
                    return
                except RollBack as fall:
                    self._roll_back(fall)

    def _run(self, stop: StopFlag) -> None:
        stream = self.batches(self.step + self.detour, self.config.steps + self.detour)
        self.recorder.open()
        with closing(self.recorder), closing(stream):
            while self.step < self.config.steps:
                record = self._train_step(stream, stop)
                self.watchdog.beat("numbers", self.step)  # where the host waits for the device
                self.recorder.hand_over(record)
                if self.recorder.stop_signal:
                    self.save()
                    self.saver.wait()
                    raise Interrupted(self.recorder.stop_signal, self.step)
                if self.recorder.save_failed:
                    self.saver.wait()
                if self.config.checkpoint.is_due(self.step):
                    self.save()
            self.save()
            self.saver.wait()

    def _train_step(self, stream: Iterator[MicroBatch], stop: StopFlag) -> StepRecord:
        started = time.perf_counter()
        record = StepRecord(step=self.step + 1, row=self._set_schedules())
        result: Result | None = None
        micro_batch: MicroBatch = {}
        for path in self.profiler.step(record.step):
            self.recorder.message(f"profile: {path}")
        for index, (micro_batch, of_step) in enumerate(self._micro_batches(stream, record)):
            result = None  # let go of the last micro-batch's outputs before the next ones are made
            if self.step and not self._has_stepped:
                self._settle_buckets(micro_batch, of_step)
            self._has_stepped = True
            result = self._forward_backward(micro_batch, of_step, is_last=index == self.num_micro_batches - 1)
            record.add(micro_batch, result.metrics, flops=self.objective.flops(micro_batch))
        assert result is not None
        record.is_diagnostic = self._is_diagnostic_step()
        self._begin("update")
        self._look(record, result.outputs, micro_batch)
        grad_norm = self._gradient_norm()
        record.means["grad_norm"] = full(grad_norm)
        self.recorder.count_data(record)
        record.reduce(self.world, stop, save_failed=self.saver.has_failed)
        if not self.recorder.must_skip(record):
            self._update(grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        record.row |= {"step_seconds": seconds, "data_wait": record.waited / seconds}
        return record

    def _micro_batches(
        self, stream: Iterator[MicroBatch], record: StepRecord
    ) -> Iterator[tuple[MicroBatch, StepEmbeddings | None]]:
        """A step's micro-batches, with the embeddings of all of them where terms look at the whole batch."""
        if self.num_micro_batches == 1 or not self.objective.embeddings():
            for _ in range(self.num_micro_batches):
                yield self._take(stream, record), None
            return
        micro_batches = [self._take(stream, record) for _ in range(self.num_micro_batches)]
        parts = []
        for micro_batch in micro_batches:
            with self._autocast():
                parts.append(self.objective.embed(self._on_device(micro_batch), self.step))
        for index, micro_batch in enumerate(micro_batches):
            yield micro_batch, StepEmbeddings(parts, index)

    def _look(self, record: StepRecord, outputs: Mapping[Modality, Outputs], micro_batch: MicroBatch) -> None:
        """Probe the features of the last micro-batch; in diagnostic steps measure them, and name slow ranks."""
        if self.probes is not None:
            modality = self.config.probe.modality
            self.probes.observe(outputs[modality], micro_batch[modality])
        if record.is_diagnostic:
            record.means = diagnose(self.objective, outputs, self.world)
            with self._autocast():
                record.means |= latent_diagnostics(self.objective, outputs)
            record.means |= {} if self.probes is None else self.probes.figures()
            self._name_stragglers()

    def _take(self, stream: Iterator[MicroBatch], record: StepRecord) -> MicroBatch:
        """The next micro-batch; how long it let us wait is counted."""
        self._begin("data")
        asked = time.perf_counter()
        micro_batch = next(stream)
        seconds = time.perf_counter() - asked
        record.waited += seconds
        self.clock.waited(seconds)
        self._begin("forward")
        return micro_batch

    def _begin(self, phase: str) -> None:
        """A sign of life for the watchdog."""
        self.watchdog.beat(phase, self.step + 1)

    def _name_stragglers(self) -> None:
        """Say which ranks kept the others waiting since the last time; collective."""
        figures, hosts = zip(*self.world.gather_objects((self.clock.drain(), platform.node())), strict=True)
        if self.step > self.recorder.start_step:  # the first step's wait is for the workers to start
            for line in stragglers(figures, hosts, self.config.watchdog.straggler_ratio):
                self.recorder.message(line)

    def _set_schedules(self) -> dict[str, float]:
        step, total = self.step, self.config.steps
        row = set_schedule(self.optimizer, self.config.optim, step, total)
        if (momentum := self.objective.momentum_at(step, total)) is not None:
            row["momentum"] = momentum
        return row | self.objective.weights_at(step, list(self.config.batch.as_dict()))

    def _is_diagnostic_step(self) -> bool:
        return self.step == 0 or (self.step + 1) % self.config.diagnostics_every == 0

    def _on_device(self, micro_batch: MicroBatch) -> MicroBatch:
        return {modality: batch.to(self.world.device) for modality, batch in micro_batch.items()}

    def _autocast(self) -> torch.autocast:
        is_bf16 = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def _forward_backward(self, micro_batch: MicroBatch, of_step: StepEmbeddings | None, *, is_last: bool) -> Result:
        with gradient_sync(self.module, is_last=is_last or self.config.parallel.reduce_each):
            with self.clock.forward(), self._autocast():
                result: Result = self.module(self._on_device(micro_batch), self.step, of_step)
            self._begin("backward")
            (result.loss / self.num_micro_batches).backward()
        return result

    def _settle_buckets(self, micro_batch: MicroBatch, of_step: StepEmbeddings | None) -> None:
        """Before the first step of a resumed run: one backward pass whose gradients are thrown away.

        DistributedDataParallel lays its buckets out anew after its first backward pass. From three ranks on the layout
        decides in which order gradients are added, so a resumed run must have the later one from its first step, as the
        run that was not interrupted has it.
        """
        if not isinstance(self.module, DistributedDataParallel):
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        self._forward_backward(micro_batch, of_step, is_last=True)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def _gradient_norm(self) -> Tensor:
        """Over all parameters, before clipping."""
        without = [name for name, p in self.objective.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, f"no gradient reached {without}: see freeze_unused"
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])

    def _update(self, grad_norm: Tensor) -> None:
        """Clip where asked, step, move what follows the encoder."""
        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), self.config.optim.clip_grad, grad_norm)
        self.optimizer.step()
        self.objective.update_target(self.step, self.config.steps)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def export_state(self) -> dict[str, Tensor]:
        """The exported encoder's weights, whole, on the main rank ({} on others); all ranks must call it."""
        return full_state(self.objective.exported)

    def export_predictor(self) -> Predictor | None:
        """The predictor, whole, on the main rank (None on others and where there is none); all ranks must call it.

        The head for visible tokens is left out where no term trains it.
        """
        predictor = self.objective.predictor
        if predictor is None:
            return None
        weights = full_state(predictor)
        if not self.world.is_main:
            return None
        is_trained = predictor.trains_context_head
        with torch.device("meta"):
            whole = Predictor(replace(predictor.config, context_head=is_trained))
        kept = {name: value for name, value in weights.items() if is_trained or not name.startswith("context_head.")}
        whole.load_state_dict(kept, assign=True)
        return whole

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Checkpoint the completed steps, after reading their numbers: what is not sound is never saved."""
        self.watchdog.beat("save", self.step)
        self.recorder.sync()
        if self._saved_step == self.step:
            return
        meta = {
            "step": self.step,
            "world_size": self.world.size,
            "config_hash": self.config_hash,
            "exported": self.objective.config.exported,
            "seconds": self.seconds,
            "detour": self.detour,
            "roll_backs": self.roll_backs,
            "recorder": self.recorder.state_dict(),
        }
        self.saver.save(self.step, self._state(), meta)
        self._saved_step = self.step

    def carry_optimizer(self, path: Path) -> None:
        """Begin with the averages that AdamW had in another run's checkpoint; its learning rate is this run's own."""
        state = get_optimizer_state_dict(self.objective, self.optimizer, options=STATE_OPTIONS)
        checkpoint.load_moments(path, state, self.world)
        set_optimizer_state_dict(self.objective, self.optimizer, state, options=STATE_OPTIONS)

    def _roll_back(self, fall: RollBack) -> None:
        """Go on from the newest checkpoint that is good enough, with the data behind the step that fell; all alike."""
        self.saver.wait()
        count, fallen = self.roll_backs + 1, fall.step - 1 + self.detour
        limit = self.config.health.max_roll_backs
        if count > limit:
            raise type(fall.error)(
                f"{fall.error}. No roll back: {self.roll_backs} roll backs were made before"
            ) from fall
        if not self.world.on_main(lambda: self._has_checkpoint(fall.before)):
            why = "yet" if fall.before is None else f"of fewer than {fall.before} steps"
            raise type(fall.error)(f"{fall.error}. No roll back: there is no checkpoint {why}") from fall
        if (first := fall.before) is not None:
            self.world.on_main(lambda: checkpoint.set_collapsed_aside(self.run.checkpoints, first))
        step = self.resume()
        if fall.before is not None:
            self.recorder.alarms.reset_strikes()
        self.roll_backs, self.detour = count, fallen + 1 - step
        if self.world.is_main:
            log.warning("%s. Rolled back to step %d, %d of at most %d times", fall.error, step, count, limit)

    def _has_checkpoint(self, before: int | None) -> bool:
        return any(before is None or step < before for step, _ in checkpoint.committed(self.run.checkpoints))

    def resume(self) -> int:
        """Load the newest complete checkpoint and cut the run's logs back to it; the step, 0 where there is none."""
        found = checkpoint.newest(self.run.checkpoints, self.world)
        if found is not None:
            step, path = found
            state = self._state()
            meta = checkpoint.load(path, state, self.world, is_verified=True)
            if meta["config_hash"] != self.config_hash and self.world.is_main:
                log.warning(
                    "%s was written under another configuration: %s was edited since, or defaults in the code changed",
                    *(path, self.run.config),
                )
            set_model_state_dict(self.objective, state["model"], options=STATE_OPTIONS)
            set_optimizer_state_dict(self.objective, self.optimizer, state["optimizer"], options=STATE_OPTIONS)
            if self.probes is not None:
                self.probes.load_state(state["probes"])
            self.recorder.load_state_dict(meta["recorder"], step)
            self.step = self._saved_step = step
            self.seconds = meta["seconds"]
            self.detour, self.roll_backs = meta.get("detour", 0), meta.get("roll_backs", 0)  # older ones have neither
        if self.world.is_main:
            checkpoint.clean_partial(self.run.checkpoints)
            self.run.cut_back(self.step)
        self.world.barrier()
        return self.step

    def _state(self) -> dict[str, Any]:
        probes = {} if self.probes is None else {"probes": self.probes.state()}
        return probes | {
            "model": get_model_state_dict(self.objective, options=STATE_OPTIONS),
            "optimizer": get_optimizer_state_dict(self.objective, self.optimizer, options=STATE_OPTIONS),
        }
