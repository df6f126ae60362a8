"""Models that are compared, by the names a user gives: what each kind of evaluation reads of them.

A folder of ours, a released .pt, `hf:FOLDER` of transformers, `untrained:SIZE`, `py:FILE.py:FUNCTION` of a user; beside
each, but a user's, its architecture without training, and RGB + position for each patch size. A model that an
evaluation makes no sense for says why: Unsuited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.adapters import CallableFeatures, TransformersFeatures, load_transformers, load_user
from evals.anticipation import AnticipationFeatures
from evals.cache import encoder_identity, module_identity
from evals.clip_protocol import ClipProtocol
from evals.dense_config import DenseConfig
from evals.dense_features import LevelFeatures, RgbPosition
from evals.features import EncoderFeatures, FeatureSource, PixelFeatures
from evals.labelled_suite import read_pretraining
from evals.probe_config import ProbeConfig
from evals.protocol import RGB, TRAINED, UNTRAINED, DoesNotFit, Unsuited
from evals.references import RgbPatches
from vjepa.hub import from_pretrained, import_official, predictor_from_pretrained
from vjepa.nn.encoder import Encoder
from vjepa.nn.init import WEIGHT_STD
from vjepa.nn.predictor import Predictor
from vjepa.registry import create_encoder, create_model, create_predictor, list_models

HUGGING_FACE, USER = "hf", "py"


# ------------------------------------------------------------------------------------------------------ kinds of model


@dataclass(frozen=True)
class EncoderModel:
    """One of our encoders, trained or not, with its predictor where the file holds it."""

    name: str
    encoder: Encoder
    predictor: Predictor | None = None
    training_seed: int | None = None

    @cached_property
    def identity(self) -> str:
        predictor = "" if self.predictor is None else module_identity(self.predictor, asdict(self.predictor.config))
        return encoder_identity(self.encoder) + predictor

    @property
    def patch_size(self) -> int:
        return self.encoder.patch_size

    @property
    def tubelet_size(self) -> int:
        return self.encoder.tubelet_size

    def dense(self, config: DenseConfig) -> FeatureSource:
        """Tokens of single images."""
        levels, tokenizer = config.level_indices, config.tokenizer
        return LevelFeatures(self.name, self.encoder, levels, tokenizer, bf16=config.encoder_bf16)

    def clips(self, config: ProbeConfig) -> FeatureSource | AnticipationFeatures:
        """Tokens that attentive probes read."""
        if not config.is_anticipation:
            blocks = config.blocks(self.encoder)
            return LevelFeatures(self.name, self.encoder, blocks, join="tokens", bf16=config.encoder_bf16)
        if self.predictor is None:
            raise Unsuited("ek100 reads what the predictor expects, and beside this encoder lies none")
        assert config.clips.fps is not None  # ProbeConfig sees to it
        return AnticipationFeatures(self.name, self.encoder, self.predictor, config.clips.fps, bf16=config.encoder_bf16)

    def frames(self) -> FeatureSource:
        """Tokens of single frames, for masks that are carried along."""
        return EncoderFeatures(self.name, self.encoder)

    def last(self) -> FeatureSource:
        """The last level of clips."""
        return EncoderFeatures(self.name, self.encoder)


@dataclass(frozen=True)
class ForeignModel:
    """Somebody else's encoder, of transformers or a user's: the patch tokens of its last state, whatever is asked."""

    name: str
    source: TransformersFeatures | CallableFeatures
    training_seed: int | None = None

    @property
    def identity(self) -> str:
        assert self.source.identity is not None  # load_user sees to it
        return self.source.identity

    @property
    def patch_size(self) -> int:
        return self.source.patch_size

    @property
    def tubelet_size(self) -> int:
        return self.source.tubelet_size

    def dense(self, config: DenseConfig) -> FeatureSource:
        if config.levels is not None:
            raise Unsuited(
                f"levels={config.levels} are blocks of our encoders; of transformers' the last state is read"
            )
        return replace(self.source, bf16=config.encoder_bf16)

    def clips(self, config: ProbeConfig) -> FeatureSource:
        if config.is_anticipation:
            raise Unsuited("ek100 reads what a predictor expects, and this model has none")
        if config.levels not in ([-1], []):
            raise Unsuited(
                f"levels={config.levels} are blocks of our encoders; of transformers' the last state is read"
            )
        return replace(self.source, bf16=config.encoder_bf16)

    def frames(self) -> FeatureSource:
        return self.source

    def last(self) -> FeatureSource:
        return self.source


@dataclass(frozen=True)
class PixelModel:
    """No network: colours and position, each evaluation's own floor; masks are carried by colours alone."""

    patch_size: int
    tubelet_size: int
    name: str = RGB
    training_seed: int | None = None

    @property
    def identity(self) -> str:
        return f"pixels {self.patch_size} {self.tubelet_size}"

    def dense(self, config: DenseConfig) -> FeatureSource:
        source = RgbPosition(self.patch_size, name=self.name)
        needs_padding = config.head.kind == "attentive" and config.head.width is None
        return Padded(source, config.head.num_heads, self.name) if needs_padding else source

    def clips(self, config: ProbeConfig) -> FeatureSource:
        if config.is_anticipation:
            raise Unsuited("ek100 reads what a predictor expects, and pixels have none")
        return Padded(PixelFeatures(self.patch_size, self.tubelet_size), config.head.num_heads, self.name)

    def frames(self) -> FeatureSource:
        return RgbPatches(self.patch_size)

    def last(self) -> FeatureSource:
        return PixelFeatures(self.patch_size, self.tubelet_size)


Model = EncoderModel | ForeignModel | PixelModel
"""What evaluations ask for sources of features; rows have its name, its identity digests all these depend on."""


@dataclass(frozen=True)
class Padded:
    """A source with channels of zeros behind its own: a probe's heads must divide the width."""

    source: FeatureSource
    multiple: int
    name: str

    def tokens(self, clips: Tensor) -> Tensor:
        tokens = self.source.tokens(clips)
        return F.pad(tokens, (0, -tokens.shape[-1] % self.multiple))


# ------------------------------------------------------------------------------------------------------ do they fit?


def show(source: FeatureSource, frames: int, height: int, width: int) -> None:
    """Give a source one black clip of this size, as a try. Raises what it raises at sizes that it does not take."""
    source.tokens(torch.zeros(1, 3, frames, height, width, dtype=torch.uint8))


def rehearse_clips(source: FeatureSource | AnticipationFeatures, clips: ClipProtocol, model: Model) -> None:
    """Show a source of `model` a black clip of the recipe. Raises DoesNotFit that says which keys to set."""
    frames, size = clips.frames, clips.size
    if size % model.patch_size or (frames > 1 and frames % model.tubelet_size):
        raise DoesNotFit(
            f"clips.frames={frames} and clips.size={size} must be multiples of the tubelet of {model.tubelet_size} "
            f"frames and of the patch of {model.patch_size} pixels: {round(size / 16) * model.patch_size} has as many "
            "patches as this size has patches of 16"
        )
    if isinstance(source, AnticipationFeatures):
        source.tokens(torch.zeros(1, 3, frames, size, size, dtype=torch.uint8), torch.ones(1))
    else:
        show(source, frames, size, size)


# ------------------------------------------------------------------------------------------------------------- by name


def load_models(specs: Sequence[str], *, device: torch.device | str = "cpu") -> list[Model]:
    """The models of `specs`, then those they are measured against.

    A spec is PATH, `hf:FOLDER`, `untrained:SIZE` or `py:FILE.py:FUNCTION`, each perhaps as NAME=SPEC. A single trained
    model is called `trained`, several by their folders or files, a user's one of several by itself.
    """
    named = [_name_and_spec(spec) for spec in specs]
    num_trained = sum(not spec.startswith(f"{UNTRAINED}:") for _, spec in named)
    loaded = [_load(name, spec, is_only=num_trained == 1, device=device) for name, spec in named]
    models = [model for model, _ in loaded]
    rivals = _untrained([each for each in loaded if each[1] is not None]) + _pixels(models)
    names = [model.name for model in [*models, *rivals]]
    if strange := [name for name in names if "/" in name or name.startswith(".")]:
        raise ValueError(
            f"--model {strange[0]}=...: files and folders are called by this name: leave out / and a first ."
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--model: {', '.join(repeated)} comes twice; results go by names: write --model NAME=PATH")
    return [*models, *rivals]


def load_model(spec: str, *, device: torch.device | str = "cpu") -> EncoderModel | ForeignModel:
    """The model of one spec (see `load_models`), without what it is measured against."""
    name, spec = _name_and_spec(spec)
    kind, _, rest = spec.partition(":")
    if kind == UNTRAINED:
        return _untrained_size(name, rest, device)
    if kind == HUGGING_FACE:
        source = load_transformers(rest, name=name, device=str(device))
        return ForeignModel(source.name, source)
    if kind == USER:
        return _user(name, rest, device)
    path = _existing(spec)
    return EncoderModel(name or path.stem, *_read(path, device))


def _name_and_spec(spec: str) -> tuple[str | None, str]:
    name, equals, rest = spec.partition("=")
    return (name, rest) if equals and name and not Path(spec).exists() else (None, spec)


def _load(name: str | None, spec: str, *, is_only: bool, device: torch.device | str) -> tuple[Model, Model | None]:
    """The model of a spec, and its architecture without training (None where it is that itself)."""
    kind, _, rest = spec.partition(":")
    if kind == UNTRAINED:
        return _untrained_size(name, rest, device), None
    if kind == HUGGING_FACE:
        source = load_transformers(rest, device=str(device))
        source = replace(source, name=name or (TRAINED if is_only else source.name))
        return ForeignModel(source.name, source), ForeignModel(UNTRAINED, _anew(source))
    if kind == USER:
        return _user(name or (TRAINED if is_only else None), rest, device), None
    path = _existing(spec)
    return _ours(name or (TRAINED if is_only else path.stem), path, device)


def _existing(spec: str) -> Path:
    path = Path(spec)
    if not path.exists():
        raise ValueError(
            f"--model {spec}: no such file or folder. Give a folder of an exported encoder, a released .pt, hf:FOLDER "
            f"of transformers, py:FILE.py:FUNCTION of your own, or untrained:SIZE with one of "
            f"{', '.join(list_models())}; nothing is downloaded by name"
        )
    return path


def _read(path: Path, device: torch.device | str) -> tuple[Encoder, Predictor | None]:
    if path.is_file():
        encoder, predictor = import_official(path)
        return encoder.to(device).eval(), predictor.to(device).eval()
    return from_pretrained(path, device=device), predictor_from_pretrained(path, device=device)


def _ours(name: str, path: Path, device: torch.device | str) -> tuple[EncoderModel, EncoderModel]:
    pretraining, (encoder, predictor) = read_pretraining(path), _read(path, device)
    begin = {"seed": pretraining.get("seed", 0), "weight_std": pretraining.get("init_std", WEIGHT_STD)}
    first = create_encoder(encoder.config, device="cpu", **begin).to(device).eval()
    expected = None if predictor is None else create_predictor(predictor.config, device="cpu", **begin)
    expected = None if expected is None else expected.to(device).eval()
    seed = pretraining.get("seed")
    return EncoderModel(name, encoder, predictor, seed), EncoderModel(UNTRAINED, first, expected, seed)


def _untrained_size(name: str | None, size: str, device: torch.device | str) -> EncoderModel:
    if size not in list_models():
        raise ValueError(f"--model untrained:{size}: there is no such size; sizes: {', '.join(list_models())}")
    encoder = create_model(size, device="cpu", seed=0).to(device).eval()
    return EncoderModel(name or f"{UNTRAINED}_{size}", encoder)


def _user(name: str | None, spec: str, device: torch.device | str) -> ForeignModel:
    source = load_user(spec, device=str(device))
    return ForeignModel(name or source.name, replace(source, name=name or source.name))


def _anew(source: TransformersFeatures) -> TransformersFeatures:
    """The same architecture at its initialisation, seed 0."""
    device = next(source.model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(source.model)(source.model.config)
    return replace(source, name=UNTRAINED, model=model.to(device).eval())


def _untrained(loaded: Sequence[tuple[Model, Model | None]]) -> list[Model]:
    """What models were before their training, each once; more than one are named after the model."""
    different: dict[str, tuple[str, Model]] = {}
    for model, first in loaded:
        if first is not None:
            different.setdefault(first.identity, (model.name, first))
    if len(different) == 1:
        return [first for _, first in different.values()]
    return [_renamed(first, f"{UNTRAINED}_{name}") for name, first in different.values()]


def _renamed(model: Model, name: str) -> Model:
    if isinstance(model, ForeignModel):
        return ForeignModel(name, replace(model.source, name=name))
    assert isinstance(model, EncoderModel)
    return replace(model, name=name)


def _pixels(models: Sequence[Model]) -> list[Model]:
    """RGB and position for every patch size among the models; of several the later are named after it."""
    tubelets: dict[int, int] = {}
    for model in models:
        tubelets[model.patch_size] = max(tubelets.get(model.patch_size, 1), model.tubelet_size)
    sizes = list(tubelets.items())
    return [PixelModel(*size, RGB if place == 0 else f"{RGB}_{size[0]}") for place, size in enumerate(sizes)]
