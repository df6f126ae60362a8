"""J and F are those of the official DAVIS evaluation: its own figures on real masks, and cases worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, gaussian_filter

from evals.jf import (
    ObjectScore,
    SequenceScorer,
    Statistics,
    boundary,
    boundary_measure,
    mean_scores,
    region_similarity,
    youtube_vos_means,
)
from evals.tasks.tracking import main
from evals.videos import write_mask

SIZE = 40, 60  # diagonal 72.1 px: a tolerance of 1 px
SQUARE = (slice(10, 20), slice(10, 20))


def mask(*places: tuple[slice, slice], shape: tuple[int, int] = SIZE) -> np.ndarray:
    found = np.zeros(shape, dtype=bool)
    for place in places:
        found[place] = True
    return found


def blob(seed: int, shape: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, 6) > 0.01


def test_osvos_masks_get_the_official_figures(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shared / "data"
    predictions = data / "davis_osvos_results" / "osvos"
    arguments = ["--predictions", str(predictions), "--ground-truth", str(data / "davis2016" / "Annotations" / "480p")]
    assert main(["score", *arguments, "--details"]) == 0
    *lines, mean = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    official = json.loads((data / "davis2016" / "osvos_jf_reference.json").read_text())["sequences"]
    assert sorted(line["sequence"] for line in lines) == sorted(path.name for path in predictions.iterdir())
    assert len(lines) == 6
    for line in lines:
        for name in ("J", "F", "JR", "JD", "FR", "FD"):
            assert line[name] == pytest.approx(official[line["sequence"]][name], abs=2e-6), (line["sequence"], name)
    for name in ("J", "F"):
        assert mean[name] == pytest.approx(np.mean([line[name] for line in lines]))


def test_j_is_intersection_over_union() -> None:
    truth, shifted = mask(SQUARE), mask((slice(10, 20), slice(15, 25)))
    assert region_similarity(shifted, truth) == pytest.approx(50 / 150)
    assert region_similarity(mask(), truth) == 0
    assert region_similarity(mask(), mask()) == 1


def test_an_outline_lies_on_the_upper_left_of_each_step() -> None:
    square = mask((slice(2, 4), slice(2, 4)), shape=(6, 6))
    expected = np.zeros((6, 6), dtype=bool)
    expected[1, 1:4] = expected[1:4, 1] = expected[3, 2:4] = expected[2:4, 3] = True
    assert (boundary(square) == expected).all()


def test_the_edge_of_the_image_is_no_outline() -> None:
    assert not boundary(np.ones(SIZE, dtype=bool)).any()
    left_half = mask((slice(0, 40), slice(0, 30)))
    assert boundary(left_half).sum() == 40
    assert boundary_measure(np.ones(SIZE, dtype=bool), mask()) == 1, "neither has an outline"


@pytest.mark.parametrize("shape", [(40, 60), (120, 200), (240, 427)])
def test_f_is_that_of_outlines_dilated_by_a_disk(shape: tuple[int, int]) -> None:
    """The official way: dilate one outline by a disk, count the pixels of the other one inside."""
    radius = int(np.ceil(0.008 * np.linalg.norm(shape)))
    rows, columns = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = rows**2 + columns**2 <= radius**2
    for seed in range(3):
        predicted, truth = blob(seed, shape), blob(seed + 10, shape)
        ours, theirs = boundary(predicted), boundary(truth)
        precision = (ours & binary_dilation(theirs, disk)).sum() / ours.sum()
        recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
        assert boundary_measure(predicted, truth) == pytest.approx(2 * precision * recall / (precision + recall))


def test_f_forgives_a_pixel_at_this_size_and_no_more() -> None:
    truth = mask(SQUARE)
    assert boundary_measure(truth, truth) == 1
    assert boundary_measure(mask((slice(10, 20), slice(11, 21))), truth) == 1
    assert boundary_measure(mask((slice(10, 20), slice(12, 22))), truth) < 0.8
    assert boundary_measure(mask((slice(30, 40), slice(40, 50))), truth) == 0
    assert boundary_measure(mask(), truth) == boundary_measure(truth, mask()) == 0


def test_recall_and_decay_of_eight_frames() -> None:
    """Quarters of 8 frames end at 1, 2.75, 4.5, 6.25, 8 from 1, rounded 1, 3, 5 (4.5 upwards), 6, 8."""
    found = Statistics.of([1.0, 0.8, 0.6, 0.5, 0.5, 0.4, 0.2, 0.0])
    assert found.mean == pytest.approx(0.5)
    assert found.recall == pytest.approx(3 / 8), "0.5 itself is not above it"
    assert found.decay == pytest.approx((1.0 + 0.8 + 0.6) / 3 - (0.4 + 0.2 + 0.0) / 3)


def scored(truths: list[np.ndarray], guesses: list[np.ndarray], ids: list[int], **settings) -> dict[int, ObjectScore]:
    scorer = SequenceScorer("clip", ids, len(truths), **settings)
    for index, (truth, guess) in enumerate(zip(truths, guesses, strict=True)):
        scorer.add(index, truth, guess)
    return {each.object_id: each for each in scorer.scores()}


def test_first_and_last_frame_do_not_count() -> None:
    truth, nothing = mask(SQUARE).astype(np.uint8), np.zeros(SIZE, dtype=np.uint8)
    found = scored([truth] * 4, [nothing, truth, truth, nothing], [1])[1]
    assert (found.region.mean, found.boundary.mean, found.num_frames) == (1, 1, 2)
    with pytest.raises(ValueError, match="3 are needed"):
        SequenceScorer("clip", [1], 2)


def two_objects() -> np.ndarray:
    ids = np.zeros(SIZE, dtype=np.uint8)
    ids[SQUARE], ids[25:35, 30:50] = 1, 7
    return ids


def test_each_of_several_objects_is_compared_under_its_own_id() -> None:
    truth = two_objects()
    swapped = np.select([truth == 1, truth == 7], [7, 1]).astype(np.uint8)
    assert {each: score.j_and_f for each, score in scored([truth] * 3, [truth] * 3, [1, 7]).items()} == {1: 1, 7: 1}
    assert {each: score.j_and_f for each, score in scored([truth] * 3, [swapped] * 3, [1, 7]).items()} == {1: 0, 7: 0}
    with pytest.raises(ValueError, match=r"ids \[3\], the true masks \[1, 7\]"):
        scored([truth] * 3, [np.full_like(truth, 3)] * 3, [1, 7])


def test_void_pixels_count_nowhere() -> None:
    truth = two_objects()
    truth[0:5] = 255
    guess = two_objects()
    guess[0:5] = 1
    assert scored([truth] * 3, [guess] * 3, [1, 7])[1].region.mean < 1
    assert scored([truth] * 3, [guess] * 3, [1, 7], void=255)[1].region.mean == 1


def test_an_object_that_enters_late_counts_after_its_entry_on_youtube_vos() -> None:
    early = np.where(two_objects() == 1, 1, 0).astype(np.uint8)
    truths = [early, early, two_objects(), two_objects(), two_objects()]
    wrong_until_entry = [early, two_objects(), early, two_objects(), two_objects()]
    found = scored(truths, wrong_until_entry, [1, 7], protocol="youtube_vos")
    assert [found[1].num_frames, found[7].num_frames] == [4, 2]
    assert found[7].region.mean == 1
    strict = scored(truths, wrong_until_entry, [1, 7])[7]
    assert [strict.num_frames, strict.region.mean] == [3, pytest.approx(1 / 3)]


def score_of(sequence: str, each: int, j: float, f: float) -> ObjectScore:
    return ObjectScore(sequence, each, Statistics(j, 1, 0), Statistics(f, 1, 0), 3)


def test_the_mean_is_over_objects_not_over_sequences() -> None:
    found = mean_scores([score_of("a", 1, 0.2, 0.3), score_of("a", 2, 0.2, 0.3), score_of("b", 1, 0.8, 0.6)])
    assert found["J"] == pytest.approx(0.4)
    assert found["F"] == pytest.approx(0.4)


def test_g_is_the_mean_of_four_so_rare_unseen_objects_weigh_as_much() -> None:
    objects = [score_of("a", 1, 0.8, 0.6), score_of("a", 2, 0.6, 0.6), score_of("b", 1, 0.1, 0.3)]
    found = youtube_vos_means(objects, {("a", 1): True, ("a", 2): True, ("b", 1): False})
    assert found == pytest.approx({"G": 0.425, "J_seen": 0.7, "F_seen": 0.6, "J_unseen": 0.1, "F_unseen": 0.3})
    assert youtube_vos_means(objects[:2], {("a", 1): True, ("a", 2): True})["G"] == pytest.approx(0.65)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """True masks of two sequences of four frames, and predictions that are right."""
    for root in ("truth", "predicted"):
        for sequence in ("one", "two"):
            for frame in range(4):
                ids = two_objects() if sequence == "two" else mask(SQUARE).astype(np.uint8) * 255
                write_mask(tmp_path / root / sequence / f"{frame:05}.png", ids)
    return tmp_path / "truth", tmp_path / "predicted"


def run_score(truth: Path, predicted: Path, *more: str) -> int:
    return main(["score", "--predictions", str(predicted), "--ground-truth", str(truth), *more])


def test_a_line_per_sequence_and_one_for_the_means(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    truth, predicted = folders
    write_mask(predicted / "two" / "00001.png", np.where(two_objects() == 7, 7, 0).astype(np.uint8))
    assert run_score(truth, predicted) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"sequence": "one", "J": 1.0, "F": 1.0},
        {"sequence": "two", "J": 0.75, "F": 0.75},
        {"sequence": "mean", "J": pytest.approx(5 / 6), "F": pytest.approx(5 / 6)},
    ]


def test_what_is_missing_is_named_before_anything_is_scored(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    truth, predicted = folders
    (predicted / "two" / "00002.png").unlink()
    (predicted / "two" / "00003.png").unlink()  # the last frame is not scored, so nobody misses it
    assert run_score(truth, predicted) == 2
    assert "two lacks 1 of 2 scored frames: 00002.png" in capsys.readouterr().err
    (predicted / "two").rename(predicted / "too")
    assert run_score(truth, predicted) == 2
    streams = capsys.readouterr()
    assert "lacks 1 of 2 sequences: two" in streams.err
    assert not streams.out
    assert run_score(truth, predicted, "--sequences", "one") == 0


def test_a_prediction_of_another_size_is_refused(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    truth, predicted = folders
    write_mask(predicted / "one" / "00001.png", np.zeros((20, 30), dtype=np.uint8))
    assert run_score(truth, predicted) == 2
    assert "sequence one, frame 1: the prediction is 20x30, the true mask 40x60" in capsys.readouterr().err
