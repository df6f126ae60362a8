"""A new run from the weights of another: `init_from=PATH`. Not `--resume`: steps and data begin anew.

The optimizer begins anew too, unless init_optimizer=carry; a predictor comes from exported weights with
init_predictor=true, and from a run always.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from launch.config import RunConfig
from vjepa.config import ConfigError
from vjepa.hub import (
    CONFIG,
    WeightsError,
    encoder_config,
    from_pretrained,
    load_strict,
    predictor_config,
    predictor_from_pretrained,
)
from vjepa.nn.encoder import EncoderConfig
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.objectives.jepa import JEPA
from vjepa.train import checkpoint
from vjepa.train.distributed import ALONE, World
from vjepa.train.run_dir import RunDir
from vjepa.train.start import IN_WORDS, listed, load_start


def load_initial_weights(objective: JEPA, path: Path | str, world: World = ALONE, *, predictor: bool = False) -> str:
    """Fill an objective, whole or in shards, from a run or from exported weights; what was taken, in words.

    From a run's directory, or one of its checkpoints: encoder, predictor and what follows the encoder (an EMA target or
    an average) of the newest checkpoint; a frozen teacher stays that of the recipe.
    From an exported folder or a released .pt file: the encoder and what follows it alike, and the predictor where it is
    asked for; else that stays as initialised.
    Raises ConfigError for a path that is none of these, CheckpointError or WeightsError where shapes or names differ,
    or where what was exported computed with other positions, heads or levels, which no shape shows.
    """
    path = Path(path)
    saved = _checkpoint(path)
    if saved is not None:
        return load_start(saved, objective, world)
    if not is_exported(path):
        raise ConfigError(
            f"init_from={path} is no run with a checkpoint, no exported folder (RUN/exports/STAGE) and no released .pt "
            "file"
        )
    check_exported(objective, path, predictor=predictor)
    weights = from_pretrained(path).state_dict()
    for encoder in {objective.encoder, objective.exported}:
        load_strict(encoder, weights, source=str(path))
    names = ["encoder", *([] if objective.follower is None else [IN_WORDS[objective.config.exported]])]
    if predictor:
        names.append("predictor")
        _load_predictor(objective, path)
    return f"{listed(names)} of {path}"


def check_exported(objective: JEPA, path: Path, *, predictor: bool) -> None:
    """Refuse exported weights of another encoder or predictor, by their configurations alone."""
    _refuse_other_encoder(encoder_config(path), objective.encoder.config, path)
    if predictor:
        _refuse_other_predictor(predictor_config(path), objective.predictor, path)


def optimizer_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint whose optimizer a run goes on with; None where it begins anew.

    ConfigError where `init_from` neither is a run nor lies in one that has a checkpoint.
    """
    if not config.carries:
        return None
    assert config.init_from is not None  # checked with the configuration
    path = Path(config.init_from)
    saved = _checkpoint(path)
    if saved is None and path.parent.name == "exports":
        saved = _checkpoint(path.parent.parent)
    if saved is None:
        raise ConfigError(
            f"init_optimizer=carry: init_from={path} is no run with a checkpoint, nor an export in the folder of one; "
            "exported weights hold no optimizer: give the run, or init_optimizer=fresh"
        )
    return saved


def is_exported(path: Path) -> bool:
    """Whether a path is a released file or an exported folder."""
    return path.is_file() or (path / CONFIG).is_file()


def _load_predictor(objective: JEPA, path: Path) -> None:
    """The predictor of exported weights; without a head for visible tokens where none is trained here either."""
    stored = predictor_from_pretrained(path)
    assert stored is not None
    assert objective.predictor is not None
    weights, mine = stored.state_dict(), objective.predictor.state_dict()
    if not stored.config.context_head:
        weights = {name: value for name, value in mine.items() if name.startswith(HEAD)} | weights
    load_strict(objective.predictor, weights, source=str(path))


HEAD = "context_head."
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


def _refuse_other_encoder(stored: EncoderConfig, built: EncoderConfig, path: Path) -> None:
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


MAY_DIFFER = ("mask_token_std", "context_head")  # how it was initialised; a head that is looked at by itself


def _refuse_other_predictor(stored: PredictorConfig | None, built: Predictor | None, path: Path) -> None:
    """Refuse where there is no predictor, here or there, or another one."""
    if built is None:
        raise ConfigError("init_predictor=true: nothing is predicted here (objective.target=none)")
    if stored is None:
        raise WeightsError(f"init_predictor=true: {path} holds no predictor: set init_predictor=false for a fresh one")
    then, now = asdict(stored), asdict(built.config)
    different = [f"{name}={now[name]} here, {then[name]} there" for name in now if then[name] != now[name]]
    different = [text for text in different if not text.startswith(MAY_DIFFER)]
    if different:
        raise WeightsError(
            f"init_predictor=true: the predictor of {path} is another one: {'; '.join(different)}. Set the recipe's to "
            "those of the weights, or init_predictor=false for a fresh one"
        )
    if not stored.context_head and built.trains_context_head:
        raise WeightsError(
            f"init_predictor=true: the predictor of {path} has no head for visible tokens, which "
            "objective.terms.context_prediction trains here: set init_predictor=false"
        )


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint meant by a run's directory or by a checkpoint's own."""
    if (path / checkpoint.COMMITTED).is_file():
        return path
    found = checkpoint.committed(RunDir(path).checkpoints)
    return found[-1][1] if found else None
