"""The two layouts of released weights, V-JEPA 2 and 2.1: their names, and what their shapes do not say.

The layouts are told apart by their final norms (`norm`, or one `norms_block` per level). What follows from the layout
is never asked of the user: V-JEPA 2 was trained with tiled RoPE at unscaled positions and has one level; 2.1 with
interleaved RoPE scaled to 16 x 16 and the levels of its depth. Reading one as the other gives other features (on random
weights differences of the size of the features, reference 3), so a `rope` or `levels` that contradicts is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vjepa.batch import MODALITIES
from vjepa.hub.strict import Names, WeightsError, rename
from vjepa.nn.encoder import EncoderConfig, default_levels
from vjepa.nn.predictor import PredictorConfig
from vjepa.nn.rope import RopeLayout
from vjepa.registry import SIZES

RELEASED_LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}
RELEASED_SIZES = ("vit_base", "vit_large", "vit_huge", "vit_giant", "vit_gigantic")
HEAD_DIM = 64  # of every released encoder but ViT-H, whose is 80
DROPPED = ("pos_embed", "predictor_pos_embed")  # left over in some V-JEPA 2 files; nothing reads them (reference 6.6)

_BLOCK = tuple(
    f"{part}.{kind}"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)


@dataclass(frozen=True)
class Layout:
    """What the weights of one family have in common and do not say themselves."""

    name: str
    rope: RopeLayout
    interpolate_rope: bool
    final_norm: str  # released name of a norm that no other layout has
    encoder_names: Names  # released prefix -> ours

    @property
    def patterns(self) -> frozenset[str]:
        """Names of an encoder's weights, numbers as `#`."""
        fixed = [name for name, _ in self.encoder_names]
        leaves = [name + kind for name in fixed if name.endswith(".") for kind in ("weight", "bias")]
        whole = [name for name in fixed if not name.endswith(".")]
        norms = [re.sub(r"(norms_block)\.", r"\1.#.", name) for name in leaves]
        return frozenset([*norms, *whole, *(f"blocks.#.{name}" for name in _BLOCK)])

    def levels(self, depth: int) -> tuple[int, ...]:
        if self is VJEPA2:
            return (depth - 1,)
        return RELEASED_LEVELS.get(depth, default_levels(depth))


VJEPA2 = Layout(
    name="V-JEPA 2",
    rope="tiled",
    interpolate_rope=False,
    final_norm="norm.weight",
    encoder_names=(("patch_embed.proj.", "tokenizer.video."), ("norm.", "norms.0.")),
)
VJEPA21 = Layout(
    name="V-JEPA 2.1",
    rope="interleaved",
    interpolate_rope=True,
    final_norm="norms_block.0.weight",
    encoder_names=(
        ("patch_embed.proj.", "tokenizer.video."),
        ("patch_embed_img.proj.", "tokenizer.image."),
        ("video_mod_embed", "tokenizer.video_embed"),
        ("img_mod_embed", "tokenizer.image_embed"),
        ("norms_block.", "norms."),
    ),
)
LAYOUTS = (VJEPA21, VJEPA2)
PREDICTOR_NAMES: Names = (
    ("predictor_embed.", "embed."),
    ("predictor_blocks.", "blocks."),
    ("predictor_norm.", "norm."),
    ("predictor_proj.", "masked_head."),
    ("predictor_proj_context.", "context_head."),
    ("video_mod_embed", "modality_embeds.video"),
    ("img_mod_embed", "modality_embeds.image"),
)


def clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the wrappers' `module.` and `backbone.`, without left-over position tables; fp32 values."""
    named = {re.sub(r"(module|backbone)\.", "", name): value for name, value in state.items()}
    return {name: value.float() for name, value in named.items() if name not in DROPPED}


def recognise(encoder: Mapping[str, Tensor], source: str) -> Layout:
    """The layout of an encoder's cleaned weights; WeightsError with the nearest one where it is none."""
    for layout in LAYOUTS:
        if layout.final_norm in encoder:
            return layout
    raise WeightsError(f"{source} is in no known layout: {nearest(encoder)}")


def nearest(names: Mapping[str, object]) -> str:
    """Which layout has most names in common with `names`, and what differs, in words."""
    found = {re.sub(r"\.\d+\.", ".#.", name) for name in names}
    layout = max(LAYOUTS, key=lambda each: len(found & each.patterns) / max(1, len(found | each.patterns)))
    shared = len(found & layout.patterns)
    if not shared:
        return f"none of its names is one of theirs ({', '.join(sorted(found)[:5])}, ...)"
    lacking, strange = sorted(layout.patterns - found), sorted(found - layout.patterns)
    return (
        f"nearest is {layout.name}, with {shared} of {len(layout.patterns)} names; it lacks "
        f"{', '.join(lacking[:5]) or 'nothing'}, and has beside them {', '.join(strange[:5]) or 'nothing'}"
    )


@dataclass(frozen=True)
class ReleasedEncoder:
    """Cleaned weights of an encoder under their released names, read into ours."""

    weights: Mapping[str, Tensor]
    layout: Layout
    source: str

    def config(
        self,
        num_heads: int | None = None,
        *,
        rope: RopeLayout | None = None,
        levels: Sequence[int] | None = None,
    ) -> EncoderConfig:
        """Widths and depth from the weights, the rest from the layout; what is given must not contradict either."""
        dim, in_chans, tubelet_size, patch_size = need(self.weights, "patch_embed.proj.weight", self.source).shape[:4]
        depth = count(self.weights, r"blocks\.(\d+)\.")
        if rope not in (None, self.layout.rope):
            raise WeightsError(
                f"{self.source}: rope={rope} contradicts the layout: these are {self.layout.name} weights (they have "
                f"{self.layout.final_norm}), trained with rope={self.layout.rope}; leave rope out"
            )
        return EncoderConfig(
            embed_dim=dim,
            depth=depth,
            num_heads=encoder_heads(dim, depth, num_heads, self.source),
            mlp_ratio=need(self.weights, "blocks.0.mlp.fc1.weight", self.source).shape[0] / dim,
            qkv_bias="blocks.0.attn.qkv.bias" in self.weights,
            levels=self._levels(depth, levels),
            patch_size=patch_size,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            rope=self.layout.rope,
            interpolate_rope=self.layout.interpolate_rope,
            image_tokenizer="patch_embed_img.proj.weight" in self.weights,
            modality_embed="video_mod_embed" in self.weights,
        )

    def _levels(self, depth: int, asked: Sequence[int] | None) -> tuple[int, ...]:
        known = self.layout.levels(depth)
        if asked is None:
            return known
        is_known = self.layout is VJEPA2 or depth in RELEASED_LEVELS
        if is_known and tuple(asked) != known:
            raise WeightsError(
                f"{self.source}: levels={tuple(asked)} contradicts the layout: {self.layout.name} weights of depth "
                f"{depth} were trained with levels {known} (0-based); leave levels out"
            )
        return tuple(asked)

    def state(self) -> dict[str, Tensor]:
        """The weights under our names; modality embeddings are (1, 1, D) in the files, (D,) here."""
        renamed = rename(self.weights, self.layout.encoder_names)
        return {name: value.flatten() if name.endswith("_embed") else value for name, value in renamed.items()}


@dataclass(frozen=True)
class ReleasedPredictor:
    """Cleaned weights of a predictor under their released names, read into ours."""

    weights: Mapping[str, Tensor]
    layout: Layout
    source: str

    def __post_init__(self) -> None:
        if any(name.startswith("action_encoder.") for name in self.weights):
            raise WeightsError(
                f"{self.source}: the predictor is conditioned on actions (V-JEPA 2-AC), which this code does not have; "
                "from_pretrained reads the encoder alone"
            )
        family = VJEPA21 if "predictor_proj_context.weight" in self.weights else VJEPA2
        if family is not self.layout:
            raise WeightsError(
                f"{self.source}: the encoder is {self.layout.name}, the predictor {family.name} (by its "
                "predictor_proj_context, which only 2.1 has): the two were not trained together"
            )

    def config(self, encoder: EncoderConfig, num_heads: int) -> PredictorConfig:
        first, last = ("0.", "2.") if "predictor_embed.0.weight" in self.weights else ("", "")
        width = self._need(f"predictor_embed.{last}weight").shape[0]
        fan_in = self._need(f"predictor_embed.{first}weight").shape[1]
        if width % num_heads:
            raise WeightsError(f"{self.source}: width {width} does not divide by predictor_num_heads={num_heads}")
        return PredictorConfig(
            encoder_dim=encoder.embed_dim,
            num_levels=fan_in // encoder.embed_dim,
            target_dim=self._need("predictor_proj.weight").shape[0],
            embed_dim=width,
            depth=count(self.weights, r"predictor_blocks\.(\d+)\."),
            num_heads=num_heads,
            mlp_ratio=self._need("predictor_blocks.0.mlp.fc1.weight").shape[0] / width,
            qkv_bias="predictor_blocks.0.attn.qkv.bias" in self.weights,
            rope=self.layout.rope,
            interpolate_rope=self.layout.interpolate_rope,
            modality_embed="video_mod_embed" in self.weights,
            context_head="predictor_proj_context.weight" in self.weights,
        )

    def state(self) -> dict[str, Tensor]:
        """The weights under our names; mask token 0, the only trained one (reference 1.5), serves both modalities."""
        trained = self._need("mask_tokens.0").flatten()
        kept = {name: value for name, value in self.weights.items() if not name.startswith("mask_tokens.")}
        renamed = rename(kept, PREDICTOR_NAMES)
        state = {name: value.flatten() if "modality_embeds" in name else value for name, value in renamed.items()}
        return state | {f"mask_tokens.{name}": trained.clone() for name in MODALITIES}

    def _need(self, name: str) -> Tensor:
        return need(self.weights, name, self.source)


def encoder_heads(dim: int, depth: int, asked: int | None, source: str) -> int:
    """Heads of an encoder, which its weights do not show: of a size we know, else one per 64 channels.

    ViT-H has 16 heads of 80 channels: the head dimension decides what RoPE rotates, so a released size has its own.
    """
    known = {(size.embed_dim, size.depth): (name, size.num_heads) for name, size in SIZES.items()}
    name, heads = known.get((dim, depth), (None, dim // HEAD_DIM))
    if name in RELEASED_SIZES and asked not in (None, heads):
        raise WeightsError(f"{source}: num_heads={asked}, but {name} ({dim} x {depth}) has {heads}; leave it out")
    heads = asked or heads
    if heads < 1 or dim % heads or (asked is None and name is None and dim % HEAD_DIM):
        raise WeightsError(
            f"{source}: {dim} channels do not divide into heads of {HEAD_DIM}: give num_heads to "
            "vjepa.hub.import_official"
        )
    return heads


def need(state: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in state:
        raise WeightsError(f"{source}: missing {name}; the file is in no layout of V-JEPA 2 or 2.1: {nearest(state)}")
    return state[name]


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that `pattern` finds in the names."""
    numbers = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1
