"""What travels beside the weights: how clips must be prepared, and a card that says where the weights are from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vjepa.batch import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from vjepa.hub.folder import Rounding
    from vjepa.nn.encoder import Encoder, EncoderConfig
    from vjepa.nn.predictor import Predictor

UNKNOWN_LICENCE = "unknown"
LABELS = {
    "recipe": "Recipe",
    "stage": "Stage",
    "steps": "Optimizer steps",
    "clips": "Clips seen",
    "data": "Data",
    "size": "Resolution of video, pixels",
    "image_size": "Resolution of images, pixels",
    "frames": "Frames a clip",
    "fps": "Frames a second",
    "seed": "Seed",
    "init_std": "Standard deviation of the initial weights",
    "source": "Weights from",
}


def preprocessor(config: EncoderConfig, trained_on: Mapping[str, Any]) -> dict[str, Any]:
    """How a clip becomes the encoder's input; size, frames and fps are null where the training is not known."""
    return {
        "size": trained_on.get("size"),
        "frames": trained_on.get("frames"),
        "fps": trained_on.get("fps"),
        "image_size": trained_on.get("image_size"),
        "rescale_factor": 1 / 255,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "patch_size": config.patch_size,
        "tubelet_size": config.tubelet_size,
        "layout": "[B, C, T, H, W], RGB",
    }


def model_card(
    name: str,
    encoder: Encoder,
    trained_on: Mapping[str, Any],
    *,
    sha256: str,
    dtype: str,
    rounding: Rounding | None,
    predictor: Predictor | None,
    licence: str | None,
) -> str:
    """The README.md of an exported folder, in Markdown with the front matter that model hubs read."""
    parts = [
        f"---\nlicense: {licence or UNKNOWN_LICENCE}\nlibrary_name: vjepa-pipeline\n"
        "pipeline_tag: feature-extraction\ntags: [video, self-supervised, jepa]\n---",
        f"# {name}\n\nA video encoder trained by self-supervised prediction in latent space (V-JEPA). Clips in, one "
        "feature vector per token out; it has no classes and no text.",
        "## The weights\n\n" + _table(_weights(encoder, sha256, dtype, rounding, predictor, licence)),
        "## Training\n\n" + (_table(_training(trained_on)) if trained_on else "Not known to the exporter."),
        _how_to_load(encoder, trained_on),
    ]
    return "\n\n".join(parts) + "\n"


def network_facts(config: EncoderConfig) -> dict[str, str]:
    """What decides an encoder's numbers and cannot be seen in the shapes of its weights, label -> words."""
    return {
        "token": f"{config.tubelet_size} frames x {config.patch_size} x {config.patch_size} pixels",
        "levels": f"{words(config.levels)} (0-based blocks)",
        "rope": f"{config.rope}, positions {'scaled to a grid of 16' if config.interpolate_rope else 'not scaled'}",
        "images": "their own tokenizer" if config.image_tokenizer else "the frame repeated to a tubelet",
    }


def words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def num_parameters(module: Encoder | Predictor) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _weights(
    encoder: Encoder,
    sha256: str,
    dtype: str,
    rounding: Rounding | None,
    predictor: Predictor | None,
    licence: str | None,
) -> list[tuple[str, str]]:
    config = encoder.config
    rows = [
        ("Encoder", f"{config.embed_dim} wide, {config.depth} blocks, {config.num_heads} heads"),
        ("Parameters", f"{num_parameters(encoder):,}"),
        *((label.capitalize().replace("Rope", "RoPE"), told) for label, told in network_facts(config).items()),
        ("Stored as", dtype),
        ("SHA-256 of model.safetensors", f"`{sha256}`"),
        ("Licence", licence or "not stated by the exporter"),
    ]
    if rounding is not None:
        said = f"at most {rounding.max_difference:.2g} in one number, {rounding.relative:.2g} relative (norm)"
        rows.append((f"Features, {dtype} against fp32 weights", f"{said}; on one random clip"))
    if predictor is not None:
        rows.append(("Predictor", f"{num_parameters(predictor):,} parameters, in predictor.safetensors"))
    return rows


def _training(trained_on: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(LABELS.get(name, name), words(value)) for name, value in trained_on.items() if value is not None]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _how_to_load(encoder: Encoder, trained_on: Mapping[str, Any]) -> str:
    frames = trained_on.get("frames") or 8 * encoder.tubelet_size
    size = trained_on.get("size") or 16 * encoder.patch_size
    tokens = f"{frames // encoder.tubelet_size * (size // encoder.patch_size) ** 2}"
    return (
        "## How to load it\n\n"
        "```python\n"
        "import vjepa\n"
        "from vjepa.batch import normalise\n\n"
        'encoder = vjepa.from_pretrained("THIS_FOLDER")\n'
        f"clips = ...  # uint8 [B, {encoder.config.in_chans}, {frames}, {size}, {size}], RGB\n"
        f"tokens = encoder(normalise(clips))  # [B, {tokens}, {encoder.embed_dim}], in (t, h, w) order\n"
        "```\n\n"
        "`normalise` divides by 255 and applies the ImageNet mean and standard deviation (preprocessor_config.json)."
    )
