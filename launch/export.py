"""From a run to weights that travel: the target encoder in the hub's format."""

from __future__ import annotations

from pathlib import Path

from launch.config import RunConfig
from vjepa import hub
from vjepa.nn.encoder import Encoder


def export_run(run_dir: Path, config: RunConfig, encoder: Encoder) -> Path:
    """Write RUN/exports/STAGE/ with the clips that the encoder was trained on beside its weights."""
    clip = config.data.video.clip
    trained_on = {
        "recipe": config.recipe,
        "stage": config.stage,
        "seed": config.train.seed,  # with init_std: the untrained encoder of this run can be built again
        "init_std": config.model.init_std,
        "frames": clip.frames,
        "fps": clip.fps,
        "size": clip.size,
        "image_size": config.data.image.clip.size,
    }
    return hub.save_pretrained(encoder, run_dir / "exports" / config.stage, extra={"pretraining": trained_on})
