"""Claims: global views come first, then local ones; times shared or own; all of it a function of (seed, ordinal)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.clips import random_clip_times
from data_pipeline.config import ClipConfig, DataConfig, LocalConfig, ModalityConfig, SourceConfig
from data_pipeline.dataset import ClipDataset
from data_pipeline.decode import choose_backend, frames_at, open_decoder
from data_pipeline.loader import build_loader, clip_bytes
from data_pipeline.plan import hash64
from data_pipeline.sample import Sample
from data_pipeline.transforms import make_view

LOCAL = LocalConfig(views=3, size=8, frames=2)
CLIP = ClipConfig(frames=4, fps=8.0, size=16, views=2, local=LOCAL)


def config(shards: Path, clip: ClipConfig, *, workers: int = 0) -> DataConfig:
    """Both modalities; an image's local views keep its one frame."""
    source = {"debug": SourceConfig(str(shards))}
    local = dataclasses.replace(clip.local, frames=None)
    image = dataclasses.replace(clip, frames=1, local=local, view_times="shared")
    return DataConfig(video=ModalityConfig(source, clip), image=ModalityConfig(dict(source), image), workers=workers)


def sample(shards: Path, clip: ClipConfig, *, ordinal: int = 3, seed: int = 0, modality: str = "video") -> Sample:
    return ClipDataset(config(shards, clip), seed=seed).sample(modality, ordinal)


def own(clip: ClipConfig) -> ClipConfig:
    return dataclasses.replace(clip, view_times="own")


def same(first: Sample, second: Sample) -> bool:
    return all(torch.equal(*pair) for pair in zip(first.views, second.views, strict=True))


@pytest.mark.parametrize("clip", [CLIP, own(CLIP)], ids=["shared", "own"])
def test_global_views_come_first_then_local_ones(shards: Path, clip: ClipConfig):
    found = sample(shards, clip)
    assert found.num_global == 2
    assert [tuple(view.shape) for view in found.views] == [(3, 4, 16, 16)] * 2 + [(3, 2, 8, 8)] * 3
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in found.views)
    assert sum(view.numel() for view in found.views) == clip_bytes(clip)


def test_an_image_has_local_views_of_its_one_frame(shards: Path):
    found = sample(shards, CLIP, modality="image")
    assert [tuple(view.shape) for view in found.views] == [(3, 1, 16, 16)] * 2 + [(3, 1, 8, 8)] * 3


@pytest.mark.parametrize(("modality", "view_times"), [("video", "shared"), ("video", "own"), ("image", "shared")])
def test_one_view_is_bit_for_bit_what_it_was_before_there_were_others(shards: Path, modality: str, view_times: str):
    """The sample restated: times, then the crop, drawn from one generator."""
    clip = dataclasses.replace(CLIP, views=1, local=LocalConfig(), view_times=view_times)
    dataset = ClipDataset(config(shards, clip), seed=5)
    for ordinal in range(4):
        place = dataset.plans[modality].locate(ordinal)
        data, _ = dataset._opened[modality].shards[place.source].read(place.index, verify=True)
        decoder = open_decoder(data, modality, backend=choose_backend("auto"))
        generator = np.random.default_rng([5, hash64(modality), ordinal, 0])
        times = random_clip_times(decoder.info, 4 if modality == "video" else 1, 8.0, generator)
        expected = make_view(frames_at(decoder, times), clip, generator)
        found = dataset.sample(modality, ordinal)
        assert len(found.views) == found.num_global == 1
        assert torch.equal(found.clip, expected)
        assert (found.extra["timestamps"] == times).all()
        assert "view_timestamps" not in found.extra


def test_local_views_leave_the_global_ones_as_they_were_and_look_closer(shards: Path):
    """Equal local frames draw nothing before the global crops."""
    clip = dataclasses.replace(CLIP, local=LocalConfig(views=1, size=16, scale_min=0.05, scale_max=0.05))
    found, alone = sample(shards, clip), sample(shards, dataclasses.replace(CLIP, local=LocalConfig()))
    assert all(torch.equal(*pair) for pair in zip(found.views[:2], alone.views, strict=True))
    assert not torch.equal(found.views[2], found.views[0])
    [first, *_, last] = clip.crops()
    assert (first.scale_min, last.scale_max, last.flip) == (0.3, 0.05, 0.5)


def test_shared_times_of_a_shorter_view_are_consecutive_frames_of_the_clip(shards: Path):
    still = dataclasses.replace(
        CLIP,
        views=1,
        scale_min=1.0,
        aspect_min=1.0,
        aspect_max=1.0,
        flip=0.0,
        local=dataclasses.replace(LOCAL, views=8),
    )
    still = dataclasses.replace(still, local=dataclasses.replace(still.local, size=16, scale_min=1.0, scale_max=1.0))
    found = sample(shards, still)
    clip, times = found.clip, found.extra["timestamps"]
    starts = []
    for view, own_times in zip(found.views[1:], found.extra["view_timestamps"][1:], strict=True):
        [start] = [i for i in range(3) if (times[i : i + 2] == own_times).all()]
        assert torch.equal(view, clip[:, start : start + 2])
        starts.append(start)
    assert len(set(starts)) > 1


@pytest.mark.parametrize("backend", ["torchcodec", "pyav"])
def test_own_times_give_each_view_the_frames_of_its_own_times(shards: Path, backend: str):
    whole = dataclasses.replace(own(CLIP), views=3, scale_min=1.0, aspect_min=1.0, aspect_max=1.0, flip=0.0)
    dataset = ClipDataset(dataclasses.replace(config(shards, whole), decoder=backend), seed=0)
    found = dataset.sample("video", 3)
    times = found.extra["view_timestamps"]
    assert [len(each) for each in times] == [4, 4, 4, 2, 2, 2]
    assert len({each[0] for each in times}) == 6
    assert (found.extra["timestamps"] == times[0]).all()
    place = dataset.plans["video"].locate(3)
    data, _ = dataset._opened["video"].shards[place.source].read(place.index, verify=True)
    for view, each in zip(found.views[:3], times, strict=False):
        alone = frames_at(open_decoder(data, "video", backend=dataset.backend), each)
        assert torch.equal(view, make_view(alone, whole, np.random.default_rng(0)))


@pytest.mark.parametrize("clip", [CLIP, own(CLIP)], ids=["shared", "own"])
def test_views_are_a_function_of_seed_and_ordinal(shards: Path, clip: ClipConfig):
    first = sample(shards, clip)
    assert same(first, sample(shards, clip))
    assert not same(first, sample(shards, clip, seed=1))
    assert not same(first, sample(shards, clip, ordinal=4))
    assert not any(torch.equal(first.views[2], other) for other in first.views[3:])


def test_a_worker_gives_the_same_views(shards: Path):
    def views(workers: int) -> list[Sample]:
        built = build_loader(
            config(shards, own(CLIP), workers=workers), seed=1, batch={"video": 3, "image": 3}, stop_step=2
        )
        return [sample for item in built for modality in ("video", "image") for sample in item[modality]]

    assert all(same(*pair) for pair in zip(views(0), views(1), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": -1}, r"local.views=-1"),
        ({"size": 0}, r"local.size=0"),
        ({"frames": 0}, r"local.frames=0"),
        ({"frames": 5}, r"local.frames=5: must not exceed the clip's frames=4"),
        ({"scale_min": 0.4}, r"local.scale_max=0.3: must be between local.scale_min=0.4"),
    ],
)
def test_impossible_local_views_are_refused_by_name(options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        ClipConfig(frames=4, local=LocalConfig(**options))  # pyright: ignore[reportArgumentType]


def test_an_image_has_no_times_of_its_own():
    with pytest.raises(ValueError, match=r"image.clip.view_times='own'"):
        DataConfig(image=ModalityConfig(clip=ClipConfig(frames=1, view_times="own")))
    with pytest.raises(ValueError, match="view_times='mine': shared or own"):
        ClipConfig(view_times="mine")  # pyright: ignore[reportArgumentType]
