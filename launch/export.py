"""From a run to weights that travel: the target encoder, and the predictor beside it, in the hub's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from launch.config import RunConfig
from vjepa import hub
from vjepa.nn.predictor import Predictor
from vjepa.registry import create_encoder


def export_run(
    run_dir: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    predictor: Predictor | None = None,
    *,
    steps: int | None = None,
) -> Path:
    """Write RUN/exports/STAGE/: weights, and what is known of their training, which the model card tells.

    The predictor lies in a file of its own, which no reader of the encoder opens: 3 % of a ViT-G's bytes, 17 % of a
    ViT-L's. `steps` are those that were trained, null in the card where they are not known.
    """
    encoder = create_encoder(config.model.encoder_config(), device="meta")
    encoder.load_state_dict(weights, assign=True)
    clip = config.data.video.clip
    trained_on = {
        "recipe": config.recipe,
        "stage": config.stage,
        "steps": steps,
        "data": [f"{modality}/{name}" for modality, part in config.data.modalities().items() for name in part.sources],
        "init_from": config.init_from,
        "seed": config.train.seed,  # with init_std: the untrained encoder of this run can be built again
        "init_std": config.model.init_std,
        "frames": clip.frames,
        "fps": clip.fps,
        "size": clip.size,
        "image_size": config.data.image.clip.size,
    }
    folder = run_dir / "exports" / config.stage
    return hub.save_pretrained(encoder, folder, predictor=predictor, extra={"pretraining": trained_on})
