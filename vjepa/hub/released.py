"""The released checkpoints (.pt): which there are, which encoder is read, and whether a file's name tells the truth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vjepa.hub.files import read_torch
from vjepa.hub.layouts import (
    VJEPA2,
    VJEPA21,
    Layout,
    ReleasedEncoder,
    ReleasedPredictor,
    clean,
    count,
    nearest,
    need,
    recognise,
)
from vjepa.hub.strict import WeightsError, load_strict
from vjepa.nn.attention import BackendName
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor
from vjepa.nn.rope import RopeLayout
from vjepa.registry import SIZES

ENCODER_KEYS = ("ema_encoder", "target_encoder", "encoder")  # the order in which the weights to evaluate are looked for
DOWNLOADS = "https://dl.fbaipublicfiles.com/vjepa2/"
V_JEPA_1_MASK_TOKENS = 2  # V-JEPA 2 has ten
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleasedFile:
    """A file of the release: its name below DOWNLOADS, its layout and its size's name in the registry."""

    name: str
    layout: Layout
    size: str
    title: str


RELEASED = (
    ReleasedFile("vitl.pt", VJEPA2, "vit_large", "ViT-L, 256 px"),
    ReleasedFile("vith.pt", VJEPA2, "vit_huge", "ViT-H, 256 px"),
    ReleasedFile("vitg.pt", VJEPA2, "vit_giant", "ViT-g, 256 px"),
    ReleasedFile("vitg-384.pt", VJEPA2, "vit_giant", "ViT-g, 384 px"),
    ReleasedFile("vjepa2_1_vitb_dist_vitG_384.pt", VJEPA21, "vit_base", "ViT-B distilled from ViT-G, 384 px"),
    ReleasedFile("vjepa2_1_vitl_dist_vitG_384.pt", VJEPA21, "vit_large", "ViT-L distilled from ViT-G, 384 px"),
    ReleasedFile("vjepa2_1_vitg_384.pt", VJEPA21, "vit_giant", "ViT-g, 384 px"),
    ReleasedFile("vjepa2_1_vitG_384.pt", VJEPA21, "vit_gigantic", "ViT-G, 384 px"),
)


def import_official(
    path: Path | str,
    *,
    num_heads: int | None = None,
    predictor_num_heads: int = 12,
    key: str | None = None,
    rope: RopeLayout | None = None,
    levels: Sequence[int] | None = None,
    attention: BackendName = "auto",
) -> tuple[Encoder, Predictor]:
    """Encoder and predictor of a released V-JEPA 2 or 2.1 checkpoint, loaded strictly.

    Widths, depths and the layout are read off the weights; RoPE and levels follow from the layout and the depth, and
    `rope` or `levels` that contradict them are refused. Head counts cannot be read off: those of the released sizes,
    else one head per 64 channels; the predictor's are 12. `key` names the encoder's entry; by default ema_encoder,
    target_encoder, encoder are tried and the log says which was taken. Of the mask tokens only the first was ever
    trained (reference 1.5), so it serves both modalities.
    """
    checkpoint = read_checkpoint(Path(path))
    released, encoder = _encoder(checkpoint, Path(path), key, num_heads, rope, levels, attention)
    predictor = _predictor(checkpoint, released, encoder, predictor_num_heads, attention)
    return encoder, predictor


def import_encoder(path: Path | str, *, attention: BackendName = "auto") -> Encoder:
    """The encoder alone of a released checkpoint: also of V-JEPA 2-AC, whose predictor is not ours."""
    return _encoder(read_checkpoint(Path(path)), Path(path), None, None, None, None, attention)[1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a .pt file, its tensors mapped into memory; WeightsError where it holds no predictor."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("predictor"), Mapping):
        found = sorted(map(str, checkpoint))[:10] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise WeightsError(
            f"{path} is no V-JEPA training checkpoint: no 'predictor' entry, found {found}"
            + (f"; {nearest(checkpoint)}" if isinstance(checkpoint, dict) else "")
        )
    return checkpoint


def choose_key(checkpoint: Mapping[str, Any], key: str | None, path: Path) -> str:
    """The entry of the encoder to read: the averaged one where there is one."""
    candidates = ENCODER_KEYS if key is None else (key,)
    found = [candidate for candidate in candidates if candidate in checkpoint]
    if not found:
        raise WeightsError(f"{path} has no entry {' or '.join(candidates)}; it has {sorted(checkpoint)}")
    others = [name for name in ENCODER_KEYS if name in checkpoint and name != found[0]]
    log.info(
        "%s: the encoder's weights are those of %r%s", path, found[0], f" (also there: {others})" if others else ""
    )
    return found[0]


def released_encoder(checkpoint: Mapping[str, Any], path: Path, key: str | None = None) -> ReleasedEncoder:
    """The encoder's weights under their released names, their layout known and the file's name checked."""
    key = choose_key(checkpoint, key, path)
    source = f"{path}[{key}]"
    weights = clean(checkpoint[key])
    released = ReleasedEncoder(weights, recognise(weights, source), source)
    _check_not_version_1(checkpoint, key, source)
    _check_name(path, released)
    return released


def same_size(released: ReleasedEncoder) -> list[ReleasedFile]:
    """The released files of this layout, width and depth."""
    shape = _width_and_depth(released)
    return [file for file in RELEASED if file.layout is released.layout and _shape(file) == shape]


def _encoder(
    checkpoint: Mapping[str, Any],
    path: Path,
    key: str | None,
    num_heads: int | None,
    rope: RopeLayout | None,
    levels: Sequence[int] | None,
    attention: BackendName,
) -> tuple[ReleasedEncoder, Encoder]:
    released = released_encoder(checkpoint, path, key)
    encoder = Encoder(released.config(num_heads, rope=rope, levels=levels), attention=attention)
    load_strict(encoder, released.state(), source=released.source)
    return released, encoder


def _predictor(
    checkpoint: Mapping[str, Any], encoder: ReleasedEncoder, loaded: Encoder, num_heads: int, attention: BackendName
) -> Predictor:
    source = encoder.source.partition("[")[0] + "[predictor]"
    released = ReleasedPredictor(clean(checkpoint["predictor"]), encoder.layout, source)
    predictor = Predictor(released.config(loaded.config, num_heads), attention=attention)
    load_strict(predictor, released.state(), source=source)
    return predictor


def _width_and_depth(released: ReleasedEncoder) -> tuple[int, int]:
    width = need(released.weights, "patch_embed.proj.weight", released.source).shape[0]
    return width, count(released.weights, r"blocks\.(\d+)\.")


def _shape(file: ReleasedFile) -> tuple[int, int]:
    return SIZES[file.size].embed_dim, SIZES[file.size].depth


def _check_name(path: Path, released: ReleasedEncoder) -> None:
    """A file with a released name must hold what the name says: vitg and vitG are one name where case is ignored."""
    named = next((file for file in RELEASED if file.name == path.name), None)
    if named is None or named in same_size(released):
        return
    held = ", ".join(file.name for file in same_size(released)) or "no released size"
    dim, depth = _width_and_depth(released)
    raise WeightsError(
        f"{path} has the name of {named.layout.name} {named.title} ({_shape(named)[0]} wide, {_shape(named)[1]} "
        f"blocks) but holds {released.layout.name} weights {dim} wide with {depth} blocks ({held}). On a disk that "
        "ignores case, vitg and vitG overwrite each other: download each under a name of its own, or rename this file "
        "to what it holds"
    )


def _check_not_version_1(checkpoint: Mapping[str, Any], key: str, source: str) -> None:
    """V-JEPA 1 has V-JEPA 2's names, absolute positions instead of RoPE, and one mask token for each of two masks."""
    has_positions = any(name.endswith("pos_embed") for name in checkpoint[key])
    tokens = count(clean(_mask_tokens(checkpoint["predictor"])), r"mask_tokens\.(\d+)")
    if has_positions and tokens == V_JEPA_1_MASK_TOKENS:
        raise WeightsError(
            f"{source} looks like V-JEPA 1: pos_embed beside {tokens} mask tokens. It adds absolute positions and has "
            "no RoPE, so its weights would load as V-JEPA 2 and give wrong features; V-JEPA 1 is not read"
        )


def _mask_tokens(predictor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in predictor.items() if "mask_tokens." in name}
