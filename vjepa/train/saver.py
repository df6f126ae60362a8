"""Checkpoints written while training goes on: copied to the host at once, to the disk in a thread."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from torch.distributed.checkpoint.staging import BlockingAsyncStager

from vjepa.train import checkpoint
from vjepa.train.checkpoint import CheckpointConfig, CheckpointError
from vjepa.train.distributed import World

log = logging.getLogger(__name__)
PATIENCE_S = 120.0  # for a save still running when the run ends with an error


class Saver:
    """Writes one checkpoint at a time. Its thread has a process group of its own; all ranks call all methods alike.

    Every rank copies what it holds: its shards, or the whole state where every rank has a copy of the model.
    """

    def __init__(self, root: Path, config: CheckpointConfig, world: World) -> None:
        self.root, self.config, self.world = root, config, world
        self._beside = world.beside() if config.asynchronous else world
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether this rank's save has ended in an error that `wait` will raise."""
        return self._error is not None

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Begin a checkpoint, after the end of the one before; raises CheckpointError where that one failed."""
        self.wait()
        if not self.config.asynchronous:
            checkpoint.save(self.root, step, state, meta, self.world, self.config)
            return
        staged = BlockingAsyncStager().stage(dict(state))
        arguments = (self.root, step, staged, copy.deepcopy(dict(meta)), self._beside, self.config)
        self._thread = Thread(target=self._write, args=arguments, name=f"checkpoint {step}")
        self._thread.start()

    def _write(self, *arguments: Any) -> None:
        try:
            checkpoint.save(*arguments)
        except BaseException as error:  # raised on the training thread, by wait
            self._error = error

    def wait(self) -> None:
        """Until the last checkpoint is committed; raises CheckpointError on all ranks where it failed on any."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        problems = self.world.gather_objects(None if error is None else str(error))
        if error is not None:
            raise error
        if any(problems):
            raise CheckpointError(next(filter(None, problems)))

    def close(self) -> None:
        """Let a running save end, without the other ranks: this one may be leaving with an error of its own."""
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
        if self._error is not None:
            log.error("%s", self._error)
