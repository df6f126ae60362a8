"""What a rank of a resumed run holds and sees; run by `on_ranks`, see test_elastic_resume.py."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.train.ranks import train_debug
from vjepa.train.signals import StopFlag
from vjepa.train.trainer import Trainer


@dataclass
class Witness:
    """One rank's account of a run."""

    target: str = ""  # digest of the target encoder before the first step, whole; the main rank's alone
    held: int = 0  # numbers of it that lie on this rank
    clips: dict[tuple[str, int, int], str] = field(default_factory=dict)  # (modality, step, ordinal) -> digest
    num_seen: int = 0  # clips that reached the objective, repeated ones too


def witness(run_dir: Path, shards: Path, *arguments: str) -> Witness:
    """Train, or go on, and tell what was loaded and which clips reached the objective."""
    seen, fit = Witness(), Trainer.fit

    def see(_: nn.Module, given: tuple[Any, ...]) -> None:
        micro_batch, step = given[:2]
        for modality, batch in micro_batch.items():
            for ordinal, clip in zip(batch.ordinals, batch.clips, strict=True):
                seen.clips[modality, step, ordinal] = digest({"": clip})
                seen.num_seen += 1

    def watched(self: Trainer, stop: StopFlag) -> None:
        seen.target = digest(self.export_state())
        seen.held = sum(_local(tensor).numel() for tensor in self.objective.exported.parameters())
        self.objective.register_forward_pre_hook(see)
        fit(self, stop)

    Trainer.fit = watched
    train_debug(run_dir, shards, *arguments)
    return seen


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and every bit of the tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
