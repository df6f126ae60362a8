"""Claims: a crop made on the device is the worker's, bit for bit on a CPU, and little more is sent than is needed."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline import loader as loader_module
from data_pipeline.config import ClipConfig, DataConfig, LocalConfig, ModalityConfig, SourceConfig
from data_pipeline.crop_later import MOST_PIXELS, CropLater, CropsLater, cut_view
from data_pipeline.dataset import ClipDataset
from data_pipeline.loader import build_loader, clip_bytes
from data_pipeline.transforms import make_view

CPU = torch.device("cpu")
SMALL_BOXES = ClipConfig(size=64, scale_min=0.05, scale_max=0.2)
ANY_BOXES = ClipConfig(size=40, scale_min=0.05, scale_max=1.0)
LARGE_BOXES = ClipConfig(size=24, scale_min=0.8, scale_max=1.0)
VIEWS = ClipConfig(frames=4, fps=8.0, size=32, views=2, local=LocalConfig(views=2, size=12, frames=2))


def frames(number: int = 3, height: int = 60, width: int = 80, *, hard: bool = False) -> Tensor:
    """Noise, or black and white pixels only; stored as channels last: uint8 `[T, C, H, W]`."""
    pixels = np.random.default_rng(0).integers(0, 256, (number, height, width, 3), np.uint8)
    return torch.from_numpy(pixels // 128 * 255 if hard else pixels).permute(0, 3, 1, 2)


def both(config: ClipConfig, count: int = 24, **kind: Any) -> tuple[Tensor, CropsLater]:
    """The same crops of the same frames: made at once `[B, C, T, H, W]`, and to be made."""
    made = [make_view(frames(**kind), config, np.random.default_rng(i)) for i in range(count)]
    later = [cut_view(frames(**kind), config, np.random.default_rng(i)) for i in range(count)]
    return torch.stack(made), CropLater.stack(later)


def config(shards: Path, on: Any, *, workers: int = 0, view_times: Any = "shared") -> DataConfig:
    source = {"debug": SourceConfig(str(shards))}
    clip = dataclasses.replace(VIEWS, view_times=view_times)
    image = dataclasses.replace(VIEWS, frames=1, local=LocalConfig(views=2, size=12))
    video = ModalityConfig(source, clip)
    return DataConfig(video=video, image=ModalityConfig(dict(source), image), workers=workers, augment_on=on)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("clip", [SMALL_BOXES, ANY_BOXES, LARGE_BOXES], ids=["small", "any", "large"])
def test_on_a_cpu_it_is_the_worker_s_crop_bit_for_bit(clip: ClipConfig, number: int):
    made, later = both(clip, number=number)
    assert len(set(later.is_flipped)) == 2, "both kinds are among them"
    found = later.to(CPU)
    assert later.shape == found.shape == made.shape
    assert found.is_contiguous()
    assert torch.equal(found, made)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("clip", [SMALL_BOXES, ANY_BOXES, LARGE_BOXES], ids=["small", "any", "large"])
def test_in_floats_it_differs_by_one_level_at_most(clip: ClipConfig, hard: bool):
    made, later = both(clip, hard=hard)
    found = later.make(later.pixels, is_exact=False)
    assert found.dtype == torch.uint8
    difference = (found.int() - made.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.3


def test_no_pixel_outside_the_box_is_sent_and_no_more_than_twice_the_view():
    _, small = both(SMALL_BOXES)
    assert all(60 * 80 * 0.04 < height * width < 60 * 80 * 0.21 for height, width in small.boxes)
    assert small.pixels.numel() == sum(3 * 3 * height * width for height, width in small.boxes) < small.shape.numel()
    _, large = both(LARGE_BOXES)
    assert set(large.boxes) == {(24, 24)}, "resized where they were decoded"
    _, mixed = both(ANY_BOXES)
    assert (40, 40) in mixed.boxes
    assert max(height * width for height, width in mixed.boxes) > 40 * 40
    assert mixed.pixels.numel() <= MOST_PIXELS * mixed.shape.numel()


def test_some_of_the_clips_are_those_of_all():
    made, later = both(ANY_BOXES, count=6)
    for part in (slice(0, 2), slice(2, 5), slice(4, None), slice(3, 3)):
        assert later[part].shape == made[part].shape
        assert torch.equal(later[part].to(CPU), made[part])
    assert torch.equal(later[1:5][1:3].to(CPU), made[2:4])
    with pytest.raises(ValueError, match="not in steps of 2"):
        later[::2]


def test_views_of_different_shapes_are_refused():
    one, other = (cut_view(frames(number), ANY_BOXES, np.random.default_rng(0)) for number in (2, 3))
    with pytest.raises(ValueError, match=r"\[\(3, 2, 40, 40\), \(3, 3, 40, 40\)\] cannot be stacked"):
        CropLater.stack([one, other])


def test_it_can_be_pickled_for_a_worker():
    made, later = both(ANY_BOXES, count=3)
    assert torch.equal(pickle.loads(pickle.dumps(later)).to(CPU), made)


@pytest.mark.parametrize("view_times", ["shared", "own"])
def test_every_view_of_a_sample_is_the_same_wherever_it_is_made(shards: Path, view_times: str):
    here, there = (ClipDataset(config(shards, on, view_times=view_times), seed=3) for on in ("worker", "device"))
    for modality in ("video", "image"):
        for ordinal in range(6):
            wanted, found = here.sample(modality, ordinal), there.sample(modality, ordinal)
            assert (found.key, found.num_global) == (wanted.key, wanted.num_global)
            later: Any = found.views
            assert all(isinstance(view, CropLater) for view in later)
            for mine, theirs in zip(later, wanted.views, strict=True):
                assert torch.equal(CropLater.stack([mine]).to(CPU)[0], theirs)


def test_workers_send_them_and_a_restart_changes_nothing(shards: Path):
    def batches(on: str, workers: int, first: int) -> list[Tensor]:
        made = config(shards, on, workers=workers)
        loader = build_loader(
            made, seed=1, batch={"video": 4, "image": 4}, start_step=first, stop_step=3, collate=_first
        )
        return [later.to(CPU) for item in loader for later in item.values()]

    wanted = batches("worker", 0, 0)
    for found, expected in ((batches("device", 2, 0), wanted), (batches("device", 1, 1), wanted[2:])):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def _first(samples: list[Any]) -> Any:
    """A collate function for the first view."""
    views = [sample.views[0] for sample in samples]
    return views[0].stack(views) if isinstance(views[0], CropLater) else torch.stack(views)


def test_shared_memory_is_checked_for_the_most_that_may_be_sent(shards: Path, monkeypatch: pytest.MonkeyPatch):
    each = 4 * sum(clip_bytes(part.clip) for part in config(shards, "worker").modalities().values())
    free = int(1.5 * each * 2 / 0.8)  # of two batches ahead: enough for the views, not for twice their pixels
    usage: Callable[[Any], Any] = lambda path: type("Usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr(loader_module.shutil, "disk_usage", usage)
    build_loader(config(shards, "worker", workers=1), seed=0, batch={"video": 4, "image": 4})
    with pytest.raises(ValueError, match="free in /dev/shm"):
        build_loader(config(shards, "device", workers=1), seed=0, batch={"video": 4, "image": 4})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory and a GPU's resize need CUDA")
@pytest.mark.parametrize("clip", [SMALL_BOXES, ANY_BOXES, LARGE_BOXES], ids=["small", "any", "large"])
def test_on_cuda_it_is_the_worker_s_crop_within_one_level(clip: ClipConfig):
    made, later = both(clip, number=16)
    pinned = later.pin_memory()
    assert pinned.pixels.is_pinned()
    found = pinned.to(torch.device("cuda"), non_blocking=True)
    assert found.is_cuda
    assert (found.cpu().int() - made.int()).abs().max() <= 1
    assert torch.equal(found, pinned.to(torch.device("cuda")))


def test_another_place_is_refused():
    with pytest.raises(ValueError, match=r"augment_on='gpu': worker or device"):
        DataConfig(augment_on="gpu")  # pyright: ignore[reportArgumentType]
