"""Films and strips of whole videos: one basis for all of it, heat where the patch is, memory of a window."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from evals.pca import CHUNK_BYTES, PcaBasis, pca_images
from evals.similarity import SimilarityMap
from evals.video_pictures import GIF_STEPS, write_gif
from evals.visualize import main
from tests.evals.rendered import moving_square, write_video

SHORT = ["--frames=4", "--overlap=2", "--fps=10", "--size=32"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", moving_square("right", 0, frames=13))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_one_basis_of_chunks_is_the_picture_of_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.pca.CHUNK_BYTES", 2 * 8 * 4 * 5 * 16)
    assert CHUNK_BYTES > 10_000
    features = tokens(9, 4, 5, 16) * np.linspace(3, 1, 16, dtype=np.float32)
    basis = PcaBasis.fit(features)
    found = torch.cat([basis.colours(features[i : i + 1]) for i in range(9)])
    assert torch.allclose(found, pca_images(torch.from_numpy(features)), atol=1e-5)


def test_only_the_foreground_is_coloured() -> None:
    """An object in the middle of the picture that differs along one direction; the rim is the background."""
    features = 0.01 * tokens(3, 6, 6, 8)
    features[:, 2:4, 2:4, 0] += 5
    rgb = PcaBasis.fit(features, foreground=True).colours(features)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[2:4, 2:4] = True
    assert (rgb[:, ~inside] == 0).all()
    assert rgb[:, inside].sum() > 1


def test_heat_is_the_cosine_with_the_patch() -> None:
    features = tokens(2, 3, 3, 8)
    features[1, 2, 0] = 4 * features[0, 1, 1]
    found = SimilarityMap.of(features, (0, 1, 1))
    values = found.values(features[1])
    assert values[2, 0].item() == pytest.approx(1, abs=1e-6)
    expected = (
        features[1, 0, 0] @ features[0, 1, 1] / np.linalg.norm(features[1, 0, 0]) / np.linalg.norm(features[0, 1, 1])
    )
    assert values[0, 0].item() == pytest.approx(expected, abs=1e-6)
    frame = np.zeros((24, 24, 3), np.uint8)
    heat = found.overlay(frame, features[1], step=1).astype(int).sum(axis=2)
    assert heat[16:, :8].min() == heat.max(), "the brightest is the token that points the same way"
    assert (found.overlay(frame, features[0], step=0)[8, 8:16] == 255).all(), "the patch itself has a rim"
    with pytest.raises(ValueError, match="lies outside the tokens"):
        SimilarityMap.of(features, (0, 3, 0))


@pytest.mark.parametrize("more", [[], ["--foreground"], ["--patch=0.6,20,10"], ["--patch-tokens=3,1,0"]])
def test_a_film_shows_every_step_beside_its_frame(model: str, video: Path, tmp_path: Path, more: list[str]) -> None:
    main(["--model", model, "--clip", str(video), "--out", str(tmp_path / "a.mp4"), *SHORT, *more])
    with av.open(str(tmp_path / "a.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate or 0) == 5
    assert len(shown) == 7
    assert shown[0].shape == (32, 64, 3)
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    left = shown[2][:, :32].astype(int)
    nearest = min(range(13), key=lambda i: np.abs(left - frames[i].astype(int)).sum())
    assert nearest == 5, "the third step has frames 4 and 5; of two the later"


def test_gif_and_strip_of_a_whole_video(model: str, video: Path, tmp_path: Path) -> None:
    for name, more in (("a.gif", []), ("a.png", ["--whole"]), ("b.png", ["--patch-tokens=0,0,0"])):
        main(["--model", model, "--clip", str(video), "--out", str(tmp_path / name), *SHORT, *more])
    with Image.open(tmp_path / "a.gif") as film:
        assert (getattr(film, "n_frames", 1), film.size) == (7, (64, 32))
    colours, heat = (Image.open(io.BytesIO((tmp_path / name).read_bytes())) for name in ("a.png", "b.png"))
    assert colours.width > 300
    assert colours.tobytes() != heat.tobytes()


def test_a_gif_of_hours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write an \.mp4"):
        write_gif(tmp_path / "a.gif", iter(()), 2, GIF_STEPS + 1)
