"""A new run from the weights of another: `init_from=PATH`. Not `--resume`: steps, optimizer and data begin anew."""

from __future__ import annotations

from pathlib import Path

from vjepa.config import ConfigError
from vjepa.hub import CONFIG, WeightsError, encoder_config, from_pretrained, load_strict
from vjepa.nn.encoder import EncoderConfig
from vjepa.objectives.jepa import JEPA
from vjepa.train import checkpoint
from vjepa.train.distributed import ALONE, World
from vjepa.train.run_dir import RunDir
from vjepa.train.start import IN_WORDS, load_start


def load_initial_weights(objective: JEPA, path: Path | str, world: World = ALONE) -> str:
    """Fill an objective, whole or in shards, from a run or from exported weights; what was taken, in words.

    From a run's directory, or one of its checkpoints: encoder, predictor and what follows the encoder (an EMA target or
    an average) of the newest checkpoint; a frozen teacher stays that of the recipe.
    From an exported folder or a released .pt file: the encoder and what follows it alike, the predictor stays as
    initialised.
    Raises ConfigError for a path that is none of these, CheckpointError or WeightsError where shapes or names differ,
    or where an exported encoder computed with other positions, heads or levels, which no shape shows.
    """
    path = Path(path)
    saved = _checkpoint(path)
    if saved is not None:
        return load_start(saved, objective, world)
    if path.is_file() or (path / CONFIG).is_file():
        _refuse_other_numbers(encoder_config(path), objective.encoder.config, path)
        weights = from_pretrained(path).state_dict()
        for encoder in {objective.encoder, objective.exported}:
            load_strict(encoder, weights, source=str(path))
        names = ["encoder", *([] if objective.follower is None else [IN_WORDS[objective.config.exported]])]
        return f"{' and '.join(names)} of {path}"
    raise ConfigError(
        f"init_from={path} is no run with a checkpoint, no exported folder (RUN/exports/STAGE) and no released .pt file"
    )


UNSEEN_IN_SHAPES = (
    "num_heads",
    "rope",
    "rope_base",
    "interpolate_rope",
    "absolute_position",
    "absolute_position_base",
    "attention_mask",
    "levels",
)


def _refuse_other_numbers(stored: EncoderConfig, built: EncoderConfig, path: Path) -> None:
    """The same weights with other positions, heads or levels are another model: they load, and give other features."""

    def as_in_recipes(config: EncoderConfig, name: str) -> object:
        return [level + 1 for level in config.levels] if name == "levels" else getattr(config, name)

    pairs = [(name, as_in_recipes(stored, name), as_in_recipes(built, name)) for name in UNSEEN_IN_SHAPES]
    different = [f"model.{name}={now} here, {then} there" for name, then, now in pairs if then != now]
    if different and stored.depth == built.depth:  # another depth has missing weights, which says more
        raise WeightsError(
            f"init_from={path}: these weights were trained as another model: {'; '.join(different)}. Set the recipe's "
            "to those of the weights"
        )


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint meant by a run's directory or by a checkpoint's own."""
    if (path / checkpoint.COMMITTED).is_file():
        return path
    found = checkpoint.committed(RunDir(path).checkpoints)
    return found[-1][1] if found else None
