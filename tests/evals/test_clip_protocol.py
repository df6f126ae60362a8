"""A video becomes the clips of the papers: which frames, which pixels, the same ones every time."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.decode import DecodeError, MediaInfo
from evals import clip_protocol
from evals.augment import CHANGES, AugmentConfig, erase, make_change, rand_augment
from evals.clip_protocol import (
    ClipProtocol,
    ClipReader,
    encode_clips,
    segment_frames,
    spatial_boxes,
    training_clips,
    validation_clips,
)
from evals.features import PixelFeatures
from evals.media import FrameFolder, open_media
from tests.evals.rendered import ramp, write_video

PLAIN = AugmentConfig(scale_min=1, aspect_min=1, aspect_max=1, erase=0, rand_augment=False)


def protocol(**changes: object) -> ClipProtocol:
    return replace(ClipProtocol(frames=4, segments=2, frame_step=2, size=16, augment=PLAIN), **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ which frames


def test_a_clip_lies_in_the_middle_of_its_partition() -> None:
    """Two partitions of 14 frames, clips that span 8: 3 frames before and after each."""
    assert segment_frames(28, 10.0, protocol()).tolist() == [[3, 5, 7, 9], [17, 19, 21, 23]]


def test_the_reference_form_draws_each_place_within_its_partition() -> None:
    drawn = {
        tuple(segment_frames(28, 10.0, protocol(), np.random.default_rng(seed))[:, 0].tolist()) for seed in range(40)
    }
    assert len(drawn) > 10
    assert {first for first, _ in drawn} <= set(range(7))
    assert {second for _, second in drawn} <= set(range(14, 21))


def test_partitions_shorter_than_a_clip_overlap_from_start_to_end() -> None:
    assert segment_frames(12, 10.0, protocol()).tolist() == [[0, 2, 4, 6], [4, 6, 8, 10]]
    assert segment_frames(12, 10.0, protocol(segments=3))[:, 0].tolist() == [0, 2, 4]


def test_a_short_video_is_padded_with_its_last_frame() -> None:
    assert segment_frames(5, 10.0, protocol()).tolist() == [[0, 2, 4, 4]] * 2
    assert segment_frames(1, 10.0, protocol()).tolist() == [[0, 0, 0, 0]] * 2


def test_fps_takes_the_place_of_the_step() -> None:
    at_rate = protocol(frame_step=None, fps=4.0)
    assert segment_frames(24, 12.0, replace(at_rate, segments=1)).tolist() == [[6, 9, 12, 15]]
    assert segment_frames(24, 12.0, at_rate)[0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 2}, r"clips\.views=2"),
        ({"fps": 4.0}, "give one of frame_step=2 and fps=4.0"),
        ({"frame_step": None}, "give one of frame_step=None and fps=None"),
        ({"segments": 0}, "segments=0"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(**changes)


# ------------------------------------------------------------------------------------------------------ which pixels


def test_three_views_run_along_the_long_side_and_one_has_a_margin() -> None:
    resized, boxes = spatial_boxes(240, 320, 3, 120)
    assert resized == (120, 160)
    assert [(box.top, box.left) for box in boxes] == [(0, 0), (0, 20), (0, 40)]
    resized, boxes = spatial_boxes(320, 240, 3, 120)
    assert [(box.top, box.left) for box in boxes] == [(0, 0), (20, 0), (40, 0)]
    resized, boxes = spatial_boxes(240, 320, 1, 224)
    assert resized == (256, 341)
    assert boxes == [(16, 58, 224, 224)]


@dataclass
class Stripes:
    """A video whose column x of frame f has the value x + 100 f: shows place and time."""

    info: MediaInfo
    largest: int = 0

    def frames_at(self, times: np.ndarray) -> Tensor:
        self.largest = max(self.largest, len(times))
        numbers = torch.from_numpy(np.floor(times * self.info.fps))
        pixels = torch.arange(self.info.width) + 100 * numbers[:, None]
        shape = (len(times), 3, self.info.height, self.info.width)
        return pixels[:, None, None, :].expand(shape).byte()


def stripes(frames: int = 28) -> Stripes:
    return Stripes(MediaInfo(frames, 10.0, 0.0, frames / 10, 24, 16, "made"))


def test_views_and_segments_are_the_places_and_times_they_say() -> None:
    clips = validation_clips(stripes(), protocol())
    assert clips.shape == (3, 2, 3, 4, 16, 16)
    for view, left in enumerate((0, 4, 8)):
        for segment, first in enumerate((3, 17)):
            expected = (left + torch.arange(16) + 100 * (first + 2 * torch.arange(4))[:, None]) % 256
            assert torch.equal(clips[view, segment, 0, :, 0].long(), expected)


def test_few_frames_of_a_large_video_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, few = stripes(), stripes()
    expected = validation_clips(whole, protocol())
    monkeypatch.setattr(clip_protocol, "DECODED_BYTES", 3 * 16 * 24 * 2)
    assert torch.equal(validation_clips(few, protocol()), expected)
    assert (whole.largest, few.largest) == (4, 2)


def test_files_give_the_frames_that_the_protocol_names(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", ramp(28))
    clips = ClipReader(protocol()).validate(path, ordinal=0)
    assert clips.shape == (3, 2, 3, 4, 16, 16)
    numbers = ((clips.float().mean(dim=(0, 2, 4, 5)) - 10) / 3).round().long()
    assert numbers.tolist() == [[3, 5, 7, 9], [17, 19, 21, 23]]


def test_validation_is_the_same_whatever_the_seed_unless_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", ramp(28))
    first, second = (ClipReader(protocol(), seed=seed).validate(path, ordinal=seed) for seed in (0, 1))
    assert torch.equal(first, second)
    told = protocol(validation_offset="random")
    drawn = [ClipReader(told, seed=seed).validate(path, ordinal=0) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_training_clips_depend_on_seed_epoch_and_ordinal_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ramp.mp4", ramp(28))
    reader = ClipReader(protocol(augment=AugmentConfig()))
    clips = reader.train(path, ordinal=4, epoch=1)
    assert clips.shape == (1, 2, 3, 4, 16, 16)
    assert torch.equal(clips, reader.train(path, ordinal=4, epoch=1))
    assert not torch.equal(clips, reader.train(path, ordinal=4, epoch=2))
    assert not torch.equal(clips, reader.train(path, ordinal=5, epoch=1))


def test_an_image_is_repeated_and_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    for number, pixels in enumerate(ramp(28)):
        Image.fromarray(pixels).save(tmp_path / f"{number:05d}.png")
    from_folder = ClipReader(protocol()).validate(tmp_path, ordinal=0)
    numbers = ((from_folder.float().mean(dim=(0, 2, 4, 5)) - 10) / 3).round().long()
    assert numbers.tolist() == [[3, 5, 7, 9], [17, 19, 21, 23]]
    image = ClipReader(protocol(segments=1, views=1)).validate(tmp_path / "00007.png", ordinal=0)
    assert image.shape == (1, 1, 3, 4, 16, 16)
    assert (image == 31).all()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"this is no video")
    with pytest.raises(DecodeError, match=r"bad\.mp4"):
        ClipReader(protocol()).validate(tmp_path / "bad.mp4", ordinal=0)


def test_a_folder_of_many_frames_is_listed_by_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Path for each of 60,000 frames took a second, for every clip of it."""
    for name in ("2.PNG", "1.png", "notes.txt"):
        Image.new("RGB", (16, 16)).save(tmp_path / name, format="png")
    monkeypatch.setattr(Path, "iterdir", lambda folder: pytest.fail("a Path for every frame"))
    folder = FrameFolder.open(tmp_path)
    assert folder.names == ("1.png", "2.PNG")
    assert folder.frames_at(np.array([0.0, 1 / 12])).shape == (2, 3, 16, 16)


def test_a_damaged_frame_of_a_folder_is_named_and_so_is_one_of_another_size(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number:05}.png")
    reader = ClipReader(protocol(segments=1, views=1, frame_step=1))
    (tmp_path / "00001.png").write_bytes(b"this is no picture")
    with pytest.raises(DecodeError, match=f"{tmp_path.name}: frame 00001.png: "):
        reader.validate(tmp_path, ordinal=0)
    Image.new("RGB", (16, 24)).save(tmp_path / "00001.png")
    with pytest.raises(DecodeError, match=r"frame 00001\.png is \[24, 16\], the first \[16, 16\]"):
        reader.validate(tmp_path, ordinal=0)


def test_tokens_of_a_videos_clips_lie_side_by_side() -> None:
    source = PixelFeatures(patch_size=8, tubelet_size=2)
    clips = torch.randint(0, 256, (2, 3, 3, 4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = encode_clips(source, clips, batch_size=4)
    assert tokens.shape == (2, 3 * 8, 3 * 2 * 64 + 24)
    assert torch.equal(tokens[1, 8:16], source.tokens(clips[1, 1:2]).flatten(1, 3)[0])


# ----------------------------------------------------------------------------------------------------- augmentation


def test_plain_training_clips_are_the_whole_frame() -> None:
    clip = training_clips(stripes(frames=4), protocol(segments=1, frame_step=1), np.random.default_rng(0))
    assert torch.equal(clip[0, 0, 0, :, 0], torch.arange(4, 20).add(100 * torch.arange(4)[:, None]).byte())


def test_a_quarter_of_clips_lose_one_box_in_all_frames_to_noise() -> None:
    clip = torch.full((3, 4, 24, 24), 7, dtype=torch.uint8)
    config, generator = AugmentConfig(), np.random.default_rng(0)
    changed = [erase(clip, config, generator) != 7 for _ in range(400)]
    hit = [mask for mask in changed if mask.any()]
    assert len(hit) == pytest.approx(100, abs=25)
    for mask in hit[:20]:
        rows, columns = mask.any(dim=3).any(dim=0).any(dim=0), mask.any(dim=2).any(dim=0).any(dim=0)
        box = mask[:, :, rows][..., columns]
        assert box.float().mean() > 0.9, "all frames have the same box"
        assert 0.01 <= box[0, 0].numel() / 24**2 <= 0.4


def test_no_clip_is_mirrored_unless_told() -> None:
    assert AugmentConfig().flip == 0
    told = protocol(augment=replace(PLAIN, flip=1.0), segments=1, frame_step=1)
    mirrored = training_clips(stripes(frames=4), told, np.random.default_rng(0))
    plain = training_clips(stripes(frames=4), protocol(segments=1, frame_step=1), np.random.default_rng(0))
    assert torch.equal(mirrored.flip(-1), plain)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_changes_a_picture_and_keeps_its_size(name: str) -> None:
    pixels = np.random.default_rng(0).integers(20, 200, (16, 20, 3)).astype(np.uint8)
    changed = make_change(name, 0.7, -1.0)(Image.fromarray(pixels))
    assert changed.size == (20, 16)
    assert (np.array(changed) != pixels).any()


def test_rand_augment_changes_all_frames_alike() -> None:
    still = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip, generator = still.repeat(1, 4, 1, 1), np.random.default_rng(1)
    results = [rand_augment(clip, AugmentConfig(), generator) for _ in range(10)]
    assert all((result == result[:, :1]).all() for result in results)
    assert sum(bool((result != clip).any()) for result in results) >= 7
    assert rand_augment(clip, AugmentConfig(rand_augment=False), generator) is clip


def test_open_media_says_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no frames"):
        open_media(tmp_path)
