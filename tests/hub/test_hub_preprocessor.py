"""The preprocessor file of a Hugging Face folder makes of a video the pixels that our evaluations see in it.

Ours is the one view of evals/clip_protocol.py: the short side to 256/224 of the size, its centre, ImageNet statistics.
The long side is rounded here and cut down there: a frame where that differs is resized to another width by one pixel.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.transforms import cut, resize
from evals.clip_protocol import spatial_boxes
from tests.hub.released_files import version_2, write
from vjepa.batch import normalise
from vjepa.hub import export_hf, from_pretrained

SIZE = 64  # short side 73
FRAMES = {"wide": (90, 120), "high": (120, 90), "square": (96, 96), "smaller than the clip": (40, 40)}
GREY_LEVEL = 1 / 255 / 0.224  # of a normalised pixel: what resampling in floats and rounding may differ by


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processor")
    return export_hf(from_pretrained(write(out, version_2())), out / "hf", size=SIZE)


def video(height: int, width: int) -> Tensor:
    """Noise, of which a view that is one pixel off has nothing left: uint8 [T, C, H, W]."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def our_view(frames: Tensor) -> Tensor:
    """What an evaluation gives the encoder, [T, C, SIZE, SIZE]."""
    resized, [box] = spatial_boxes(frames.shape[-2], frames.shape[-1], 1, SIZE)
    view = cut(resize(frames, resized), box)
    return normalise(view.permute(1, 0, 2, 3)[None])[0].permute(1, 0, 2, 3)


def described_view(folder: Path, frames: Tensor) -> Tensor:
    """The file's fields taken at their word, where transformers' own class cannot run (it needs torchvision)."""
    stored = json.loads((folder / "video_preprocessor_config.json").read_text())
    short, crop_size = stored["size"]["shortest_edge"], stored["crop_size"]
    sides = [int(short * side / min(frames.shape[-2:])) for side in frames.shape[-2:]]
    resized = torch.nn.functional.interpolate(frames, size=sides, mode="bilinear", antialias=True)
    top, left = (sides[0] - crop_size["height"]) // 2, (sides[1] - crop_size["width"]) // 2
    crop = resized[..., top : top + crop_size["height"], left : left + crop_size["width"]]
    mean, std = (torch.tensor(stored[field]).view(3, 1, 1) for field in ("image_mean", "image_std"))
    return (crop.float() * stored["rescale_factor"] - mean) / std


@pytest.mark.parametrize("name", FRAMES)
def test_the_file_s_fields_describe_our_evaluation_s_view(name: str, folder: Path) -> None:
    frames = video(*FRAMES[name])
    torch.testing.assert_close(described_view(folder, frames), our_view(frames), atol=1e-5, rtol=0)


def test_a_long_side_that_is_rounded_up_here_costs_a_pixel_of_stretch_at_the_border(folder: Path) -> None:
    """90 x 160 becomes 73 x 130 here and 73 x 129 there: a ramp of 160 grey levels is off by one of its steps."""
    ramp = torch.arange(160, dtype=torch.uint8).expand(2, 3, 90, 160)
    difference = (described_view(folder, ramp) - our_view(ramp)).abs().max()
    assert GREY_LEVEL / 2 < difference < 2.01 * GREY_LEVEL


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="transformers' VJEPA2VideoProcessor needs torchvision, which this project does not install",
)
@pytest.mark.parametrize("name", FRAMES)
def test_transformers_video_processor_gives_our_evaluation_s_pixels(name: str, folder: Path) -> None:
    from transformers import AutoVideoProcessor

    processor = AutoVideoProcessor.from_pretrained(str(folder), local_files_only=True)
    assert type(processor).__name__ == "VJEPA2VideoProcessor"
    frames = video(*FRAMES[name])
    theirs = processor(frames, return_tensors="pt")["pixel_values_videos"][0]
    torch.testing.assert_close(theirs, our_view(frames), atol=1.01 * GREY_LEVEL, rtol=0)
