"""Every released file is known by name, layout and size, told apart from its neighbours, and documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vjepa
from tests.hub.released_files import version_2, write
from vjepa.hub import RELEASED, WeightsError, describe, encoder_config, load_strict
from vjepa.hub.layouts import PREDICTOR_NAMES as PREDICTOR
from vjepa.hub.layouts import VJEPA2, VJEPA21, Layout, ReleasedPredictor
from vjepa.hub.released import DOWNLOADS, ReleasedFile, released_encoder, same_size
from vjepa.hub.strict import rename, swapped
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor, PredictorConfig
from vjepa.registry import create_encoder, create_predictor, model_config

README = Path(__file__).parents[2] / "vjepa" / "README.md"
PARAMETERS = {  # reference 1.1 and 1.5
    "vjepa2_1_vitb_dist_vitG_384.pt": (86_833_152, 22_874_752),
    "vjepa2_1_vitl_dist_vitG_384.pt": (304_680_960, 22_973_056),
    "vjepa2_1_vitg_384.pt": (1_013_267_968, 55_400_704),
    "vjepa2_1_vitG_384.pt": (1_845_216_768, 59_433_472),
}
NUM_MASK_TOKENS = {"V-JEPA 2": 10, "V-JEPA 2.1": 8}


def official(file: ReleasedFile) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint of a released file's names and shapes, without memory."""
    layout, is_new = file.layout, file.layout is VJEPA21
    options = {"rope": layout.rope, "interpolate_rope": layout.interpolate_rope}
    depth = model_config(file.size).depth
    config = model_config(
        file.size, levels=layout.levels(depth), image_tokenizer=is_new, modality_embed=is_new, **options
    )
    encoder = rename(create_encoder(config, device="meta").state_dict(), swapped(layout.encoder_names))
    is_distilled = "dist" in file.name
    num_levels = 4 if is_new and not is_distilled else 1
    predictor = create_predictor(
        PredictorConfig(
            encoder_dim=config.embed_dim,
            num_levels=num_levels,
            target_dim=1664 if is_distilled else num_levels * config.embed_dim,
            depth=24 if num_levels > 1 else 12,
            modality_embed=is_new,
            context_head=is_new,
            **options,
        ),
        device="meta",
    )
    weights = rename(predictor.state_dict(), swapped(PREDICTOR))
    tokens = {f"mask_tokens.{i}": torch.empty(1, 1, 384, device="meta") for i in range(NUM_MASK_TOKENS[layout.name])}
    weights = {name: value for name, value in weights.items() if "mask_tokens" not in name} | tokens
    return {"ema_encoder" if is_distilled else "target_encoder": encoder, "predictor": weights}


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.name)
def test_every_released_layout_loads_strictly_at_full_size(file: ReleasedFile) -> None:
    checkpoint = official(file)
    released = released_encoder(checkpoint, Path(file.name))
    assert file in same_size(released)
    config = released.config()
    assert config.rope == ("tiled" if file.layout is VJEPA2 else "interleaved")
    assert config.num_heads == model_config(file.size).num_heads
    read = ReleasedPredictor(checkpoint["predictor"], released.layout, file.name)
    with torch.device("meta"):
        encoder, predictor = Encoder(config), Predictor(read.config(config, 12))
        load_strict(encoder, released.state(), source=file.name)
        load_strict(predictor, read.state(), source=file.name)
    if file.name in PARAMETERS:
        counted = sum(p.numel() for p in encoder.parameters()), sum(p.numel() for p in predictor.parameters())
        extra_mask_tokens = 6 * 384  # eight there, two here
        assert counted == (PARAMETERS[file.name][0], PARAMETERS[file.name][1] - extra_mask_tokens)


def test_a_file_whose_name_says_another_model_is_refused() -> None:
    """Where case is ignored, vitG lands in the file called vitg."""
    by_name = {file.name: file for file in RELEASED}
    giant, gigantic = by_name["vjepa2_1_vitg_384.pt"], by_name["vjepa2_1_vitG_384.pt"]
    with pytest.raises(WeightsError, match=r"1408 wide, 40 blocks.* but holds V-JEPA 2\.1 weights 1664 .*vitG_384\.pt"):
        released_encoder(official(gigantic), Path("disk") / giant.name)
    with pytest.raises(WeightsError, match=r"V-JEPA 2 ViT-g, 256 px .* but holds V-JEPA 2\.1 weights 1408"):
        released_encoder(official(giant), Path("vitg.pt"))
    assert same_size(released_encoder(official(gigantic), Path("renamed.pt"))) == [gigantic]


def test_a_tiny_file_under_a_released_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, version_2(), "vitl.pt")
    for read in (vjepa.from_pretrained, encoder_config, describe):
        with pytest.raises(WeightsError, match="has the name of V-JEPA 2 ViT-L"):
            read(path)


def test_info_says_model_key_levels_rope_and_parameters(tmp_path: Path) -> None:
    facts = describe(write(tmp_path, version_2()))
    assert facts["format"] == "released checkpoint, layout of V-JEPA 2"
    assert facts["key"] == "target_encoder; encoders there: target_encoder, encoder"
    assert facts["model"] == "none of the released sizes; vit_debug"
    assert facts["levels"] == "3 (0-based blocks)"
    assert facts["rope"] == "tiled, positions not scaled"
    encoder = vjepa.from_pretrained(tmp_path / "released.pt")
    assert facts["parameters"] == f"{sum(p.numel() for p in encoder.parameters()):,}"
    assert "72 wide, 2 blocks; reads 1 level, gives 48 channels" in facts["predictor"]


@pytest.mark.parametrize(("layout", "lost"), [(VJEPA2, "norm."), (VJEPA21, "norms_block.")], ids=["2", "2.1"])
def test_an_unknown_layout_is_refused_with_the_nearest(tmp_path: Path, layout: Layout, lost: str) -> None:
    file = next(file for file in RELEASED if file.layout is layout)
    checkpoint = official(file)
    [key] = set(checkpoint) - {"predictor"}
    checkpoint[key] = {name: value for name, value in checkpoint[key].items() if not name.startswith(lost)}
    checkpoint[key]["head.weight"] = torch.ones(2)
    with pytest.raises(WeightsError) as caught:
        released_encoder(checkpoint, tmp_path / "strange.pt")
    assert f"nearest is {layout.name}, with" in str(caught.value)
    assert f"lacks {lost}" in str(caught.value)
    assert "beside them head.weight" in str(caught.value)


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.name)
def test_the_readme_has_the_download_of_every_file(file: ReleasedFile) -> None:
    assert f"wget {DOWNLOADS}{file.name}\n" in README.read_text()
