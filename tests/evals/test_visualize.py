"""The PCA picture shows what varies over a clip's patches, always in the same colours."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vjepa
from evals.visualize import guess_modality, main, patch_features, pca_grid, pca_images, trained_geometry


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_colours_follow_the_main_directions() -> None:
    """Two groups of patches that differ along one direction get opposite ends of the first colour."""
    tokens = 0.01 * random(2, 4, 4, 16)
    tokens[:, :, 2:] += 5
    rgb = pca_images(tokens)
    assert rgb.shape == (2, 4, 4, 3)
    red = rgb[..., 0]
    assert (red[:, :, 2:].min() - red[:, :, :2].max()).item() > 0.9


def test_the_picture_is_deterministic_and_within_range() -> None:
    tokens = random(3, 5, 4, 32)
    rgb = pca_images(tokens)
    assert torch.equal(rgb, pca_images(tokens.clone()))
    assert rgb.min().item() == 0
    assert rgb.max().item() == 1
    assert torch.allclose(pca_images(tokens + 7), rgb, atol=1e-5), "a constant added to all features changes nothing"


def test_the_sign_of_a_component_is_fixed_by_its_largest_loading() -> None:
    direction = torch.tensor([0.1, -2.0, 0.3, 0.2])
    amount = torch.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    red = pca_images(amount * direction)[..., 0].flatten()
    assert red[0] > 0.9 > 0.1 > red[-1], "the loading of dimension 1 is made positive: red falls with the amount"


def test_constant_features_give_one_grey() -> None:
    assert torch.equal(pca_images(torch.ones(2, 3, 3, 8)), torch.full((2, 3, 3, 3), 0.5))


def test_fewer_than_three_dimensions_are_padded() -> None:
    assert torch.equal(pca_images(random(2, 3, 3, 2))[..., 2], torch.full((2, 3, 3), 0.5))


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        pca_images(torch.full((1, 2, 2, 4), torch.nan))


def test_the_grid_shows_the_middle_frame_of_every_tubelet() -> None:
    frames = torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1).expand(8, 4, 4, 3)
    figure = pca_grid(frames, {"trained": torch.zeros(4, 2, 2, 3), "untrained": torch.zeros(4, 2, 2, 3)})
    shown = [int(np.asarray(axis.images[0].get_array())[0, 0, 0]) for axis in figure.axes[:4]]
    assert shown == [1, 3, 5, 7]
    assert [axis.get_ylabel() for axis in figure.axes[::4]] == ["frame", "trained", "untrained"]


def test_rows_that_do_not_fit_the_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="8 frames do not fit"):
        pca_grid(torch.zeros(8, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, 2, 2, 3))


def test_patch_features_name_the_size_that_does_not_fit() -> None:
    encoder = vjepa.create_model("vit_debug")
    with pytest.raises(ValueError, match="30x30 must be a multiple"):
        patch_features(encoder, torch.zeros(3, 4, 30, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match="frames=3"):
        patch_features(encoder, torch.zeros(3, 3, 32, 32, dtype=torch.uint8))


def test_the_command_writes_a_picture_of_an_image(tmp_path: Path) -> None:
    vjepa.hub.save_pretrained(vjepa.create_model("vit_debug"), tmp_path / "model")
    pixels = (random(40, 60, 3).abs() * 100).clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    out = tmp_path / "new" / "pca.png"
    main(["--model", str(tmp_path / "model"), "--clip", str(tmp_path / "picture.png"), "--out", str(out), "--size=64"])
    assert Image.open(io.BytesIO(out.read_bytes())).width > 100


def test_the_clip_defaults_to_what_the_model_was_trained_on(tmp_path: Path) -> None:
    trained_on = {"recipe": "demo", "frames": 8, "size": 112}
    vjepa.hub.save_pretrained(vjepa.create_model("vit_debug"), tmp_path, extra={"pretraining": trained_on})
    assert trained_geometry(tmp_path) == {"frames": 8, "size": 112}
    assert trained_geometry(tmp_path / "released.pt") == {}


def test_modality_by_ending() -> None:
    assert guess_modality(Path("a.JPG")) == "image"
    assert guess_modality(Path("a.mkv")) == "video"
