"""Features live or cached: the same numbers, known by what they depend on, whole files within a bound."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vjepa
from evals import cache as cache_module
from evals.adapters import CallableFeatures
from evals.cache import (
    CachedFeatures,
    CacheError,
    FeatureCache,
    LiveFeatures,
    Request,
    file_digest,
    open_features,
    source_identity,
)
from evals.features import EncoderFeatures, PixelFeatures
from tests.train.ranks import on_ranks
from vjepa.train.distributed import init_world


@dataclass
class Counting:
    """Pixels, and how many clips were asked for."""

    name: str = "counting"
    identity: str = "pixels"
    clips: int = 0
    pixels: PixelFeatures = field(default_factory=lambda: PixelFeatures(8, 1))

    def tokens(self, clips: Tensor) -> Tensor:
        self.clips += len(clips)
        return self.pixels.tokens(clips)


def request(number: int, view: str = "whole") -> Request:
    clip = torch.randint(0, 256, (3, 1, 16, 24), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Request(f"record {number}", view, lambda: clip)


def test_live_and_cached_features_are_the_same_and_computed_once(tmp_path: Path) -> None:
    source, requests = Counting(), [request(number) for number in range(4)]
    expected = LiveFeatures(source)(requests)
    cached = open_features(source, tmp_path)
    source.clips = 0
    for _ in range(2):
        assert torch.equal(cached(requests), expected)
    assert source.clips == 4
    assert torch.equal(open_features(source, tmp_path)(requests[::-1]), expected.flip(0))
    assert source.clips == 4


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    source = Counting()
    cached = open_features(source, tmp_path)
    cached([request(0), request(2)])
    assert torch.equal(
        cached([request(0), request(1), request(2)]), LiveFeatures(Counting())([*map(request, range(3))])
    )
    assert source.clips == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_gives_the_same_live_and_cached(tmp_path: Path, dtype: str) -> None:
    requests = [request(0), request(1)]
    cached = open_features(Counting(), tmp_path, dtype=dtype)  # pyright: ignore[reportArgumentType]
    live = open_features(Counting(), None, dtype=dtype)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        assert torch.equal(cached(requests), live(requests))
    assert live(requests).element_size() == 2


def test_a_key_says_all_that_features_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path)
    cached = CachedFeatures.of(Counting(), cache)
    others = [
        CachedFeatures.of(Counting(identity="other"), cache).key(request(0)),
        CachedFeatures.of(Counting(), cache, dtype="bfloat16").key(request(0)),
        cached.key(request(1)),
        cached.key(request(0, "mirrored")),
    ]
    before = cached.key(request(0))
    with monkeypatch.context() as newer:
        newer.setattr(cache_module, "CLIPS_VERSION", 2)
        others.append(cached.key(request(0)))
    assert len({before, *others}) == 6
    assert CachedFeatures.of(Counting(name="renamed"), cache).key(request(0)) == cached.key(request(0))


def test_an_encoder_is_known_by_its_weights_and_settings() -> None:
    first = vjepa.create_model("vit_debug", seed=0)
    again, other = vjepa.create_model("vit_debug", seed=0), vjepa.create_model("vit_debug", seed=1)
    assert source_identity(EncoderFeatures("a", first)) == source_identity(EncoderFeatures("b", again))
    assert source_identity(EncoderFeatures("a", first)) != source_identity(EncoderFeatures("a", other))
    with torch.no_grad():
        next(iter(again.norms.parameters())).view(-1)[0] += 1e-6
    assert source_identity(EncoderFeatures("a", first)) != source_identity(EncoderFeatures("a", again))
    assert source_identity(PixelFeatures(8, 1)) != source_identity(PixelFeatures(16, 1))


def test_a_source_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    class Nameless:
        name = "nameless"

        def tokens(self, clips: Tensor) -> Tensor:
            return clips

    with pytest.raises(ValueError, match="nameless cannot be cached"):
        open_features(Nameless(), tmp_path)


def test_a_full_cache_says_so_once_and_features_stay_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, requests = Counting(), [request(number) for number in range(5)]
    one = FeatureCache(tmp_path / "one")
    CachedFeatures.of(source, one)([request(0)])
    cache = FeatureCache(tmp_path / "few", max_bytes=2 * one.bytes)
    cached = CachedFeatures.of(source, cache)
    for _ in range(2):
        assert torch.equal(cached(requests), LiveFeatures(source)(requests))
    assert cache.bytes == sum(path.stat().st_size for path in cache.folder.rglob("*.*")) <= cache.max_bytes
    assert len(list(cache.folder.rglob("*.safetensors"))) == 2
    assert [record.message.startswith(f"cache {cache.folder} is full") for record in caplog.records] == [True]


def test_ranks_share_the_room_that_is_left(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    CachedFeatures.of(Counting(), cache)([request(0)])
    size = cache.bytes
    shared = FeatureCache(tmp_path, max_bytes=5 * size, writers=2)
    CachedFeatures.of(Counting(), shared)([request(number) for number in range(1, 5)])
    assert shared.bytes == FeatureCache(tmp_path).bytes == 3 * size


def test_a_cache_knows_its_size_when_it_is_opened_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    CachedFeatures.of(Counting(), cache)([request(0), request(1)])
    assert FeatureCache(tmp_path).bytes == cache.bytes > 0


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = open_features(Counting(), tmp_path)

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CacheError, match=r"no room on the disk for \d+ bytes.*cache\.max_gib"):
            cached([request(0)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.equal(cached([request(0)]), LiveFeatures(Counting())([request(0)]))


def test_a_damaged_file_is_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Counting()
    cached = open_features(source, tmp_path)
    expected = cached([request(0)]).clone()
    [path] = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(cached([request(0)]), expected)
    assert source.clips == 2
    assert "is damaged" in caplog.text


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def fill_on_this_rank(folder: Path) -> tuple[int, bool]:
    """How many clips one of two ranks computed, and whether it then finds those of both."""
    with init_world("cpu") as world:
        source, requests = Counting(), [request(number) for number in range(6)]
        cached = CachedFeatures.of(source, FeatureCache(folder))
        cached.fill(requests, batch_size=2, world=world)
        computed = source.clips
        features = cached(requests)
        return computed, source.clips == computed and torch.equal(features, LiveFeatures(Counting())(requests))


@pytest.mark.distributed
def test_ranks_fill_a_cache_in_shares(tmp_path: Path) -> None:
    assert on_ranks(2, fill_on_this_rank, tmp_path) == [(3, True), (3, True)]


def test_what_float16_cannot_hold_is_refused_and_a_large_sum_is_not() -> None:
    large = Request("c", "v", lambda: torch.full((3, 1, 32, 32), 255, dtype=torch.uint8))
    source = CallableFeatures("big", lambda clips: torch.full((len(clips), 4, 8), 6e4), 16)
    assert LiveFeatures(source, "float16")([large]).max() == 6e4
    beyond = CallableFeatures("bigger", lambda clips: torch.full((len(clips), 4, 8), 7e4), 16)
    assert LiveFeatures(beyond)([large]).isfinite().all()
    with pytest.raises(ValueError, match=r"bigger are not finite: .* overflow as torch.float16"):
        LiveFeatures(beyond, "float16")([large])


def test_a_function_says_what_its_features_depend_on() -> None:
    function = CallableFeatures("mine", lambda clips: clips, 16)
    with pytest.raises(ValueError, match="features of mine cannot be cached: CallableFeatures does not say"):
        source_identity(function)
    assert source_identity(replace(function, identity="weights of May")) == "weights of May"
