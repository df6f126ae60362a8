"""Pictures: PCA shows what varies over a clip's patches, masks show each token's class, always in the same colours."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

import vjepa
from evals.features import FeatureSet
from evals.pca import pca_images
from evals.protocol import IGNORE, EvalConfig, FitConfig, Task
from evals.tasks import segmentation
from evals.visualize import (
    CLASS_COLOURS,
    TINT,
    guess_modality,
    main,
    masks_figure,
    patch_features,
    pca_grid,
    trained_geometry,
)


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


CLASSES = ("background", "static", "moving")


def colour(label: int, under: int = 0) -> list[int]:
    """The colour of a class over a grey frame."""
    return [round(TINT * 255 * part + (1 - TINT) * under) for part in to_rgb(CLASS_COLOURS[label - 1])]


def picture(axis: Axes) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def test_masks_are_the_classes_in_colour_over_the_frame() -> None:
    """One clip of one step, grey 40: truth has a token of each class and an ignored one, the model another."""
    clips = torch.full((1, 3, 2, 8, 8), 40, dtype=torch.uint8)
    truth = torch.tensor([[[[0, 1], [2, IGNORE]]]])
    figure = masks_figure(clips, truth, {"trained": truth.clamp_min(0).flip(-1)}, CLASSES)
    frame, true, predicted = (picture(axis) for axis in figure.axes)
    assert (frame == 40).all()
    assert true[3, 4].tolist() == true[0, 7].tolist() == colour(1, 40), "the upper right token, to its borders"
    assert true[4, 3].tolist() == colour(2, 40)
    assert (true[:4, :4] == 40).all(), "background is the frame"
    assert (true[4:, 4:] == 40).all(), "what is ignored is the frame"
    assert predicted[0, 0].tolist() == colour(1, 40)
    assert predicted[7, 7].tolist() == colour(2, 40)
    assert [axis.get_ylabel() for axis in figure.axes] == ["frame", "truth", "trained"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["static", "moving"]


def test_the_drawn_masks_have_sharp_borders_and_no_other_colours() -> None:
    clips = torch.zeros(1, 1, 2, 32, 32, dtype=torch.uint8)
    figure = masks_figure(clips, torch.tensor([[[[1, 2], [2, 0]]]]), {}, CLASSES)
    file = io.BytesIO()
    figure.savefig(file)
    drawn = np.asarray(Image.open(file).convert("RGB"))
    box = figure.axes[1].get_window_extent()
    height = len(drawn)
    inside = drawn[height - round(box.y1) : height - round(box.y0), round(box.x0) : round(box.x1)]
    assert abs(inside.shape[0] - 64) <= 1, "two pixels for one of a clip of 32"
    found = {tuple(pixel) for pixel in inside[2:-2, 2:-2].reshape(-1, 3).tolist()}
    assert found == {(0, 0, 0), tuple(colour(1)), tuple(colour(2))}


def test_a_column_is_a_time_step_with_the_middle_frame_of_its_tubelet_and_its_own_classes() -> None:
    clips = torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1, 1).expand(2, 3, 8, 4, 4).clone()
    clips[1] += 100
    truth = torch.zeros(2, 4, 1, 1, dtype=torch.int64)
    truth[1, 2] = 1
    figure = masks_figure(clips, truth, {}, CLASSES)
    shown = [int(picture(axis)[0, 0, 0]) for axis in figure.axes]
    assert shown[:4] == [1, 3, 5, 7]
    assert shown[8:12] == [101, 103, 105, 107]
    assert [shown[i] for i in (12, 13, 15)] == [101, 103, 107]
    assert picture(figure.axes[14])[0, 0].tolist() == colour(1, 105), "clip 1, truth, step 2"


@pytest.mark.parametrize(("max_columns", "lines", "per_line"), [(16, 1, 16), (8, 2, 8), (4, 4, 4), (3, 4, 3)])
def test_clips_lie_side_by_side_as_far_as_there_is_room(max_columns: int, lines: int, per_line: int) -> None:
    truth = torch.zeros(4, 4, 2, 2, dtype=torch.int64)
    clips = torch.zeros(4, 3, 8, 8, 8, dtype=torch.uint8)
    figure = masks_figure(clips, truth, {"trained": truth, "rgb": truth}, CLASSES, max_columns=max_columns)
    boxes = [axis.get_position() for axis in figure.axes]
    assert len({round(box.y0, 4) for box in boxes}) == 4 * lines, "frame, truth and two models for each line of clips"
    assert len({round(box.x0, 4) for box in boxes}) == per_line
    assert len({(round(box.x0, 4), round(box.y0, 4)) for box in boxes}) == len(boxes), "none hides another"
    corners = np.array([box.extents for box in boxes])
    assert corners.min() > -1e-9, "none leaves the figure"
    assert corners.max() < 1 + 1e-9


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (torch.zeros(1, 4, 3, 2), torch.zeros(1, 4, 3, 2), r"truth \[1, 4, 3, 2\] does not lie on clips"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 4, 4), r"rgb \[1, 4, 4, 4\] does not lie"),
        (torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), r"truth \[2, 4, 2, 2\] does not lie"),
        (torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0), "rgb holds class 3, but there are 3 classes"),
    ],
)
def test_masks_that_do_not_fit_are_refused(truth: Tensor, predicted: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks_figure(torch.zeros(1, 3, 8, 8, 8, dtype=torch.uint8), truth.long(), {"rgb": predicted.long()}, CLASSES)


def test_predicted_classes_are_those_that_the_evaluation_scores() -> None:
    """On features that know most of the truth: the mIoU of the predicted tokens is the score of the same seed."""
    task = Task("layout", "segmentation", "layout", CLASSES, "tokens")
    sets = []
    for seed in (1, 2):
        truth = torch.randint(0, 3, (20, 2, 2, 3), generator=torch.Generator().manual_seed(seed))
        tokens = torch.nn.functional.one_hot(truth, 3).float() + 0.6 * random(20, 2, 2, 3, 3, seed=seed)
        sets.append(FeatureSet({"tokens": tokens}, {"layout": truth}))
    train, test = sets
    config = EvalConfig(seeds=(0, 5), fit=FitConfig(steps=20))
    scores = {score.seed: score.value for score in segmentation.evaluate([task], train, test, config)}
    for seed, value in scores.items():
        predicted = segmentation.predict(task, train, test, config, seed=seed)
        assert predicted.shape == (20, 2, 2, 3)
        truth = test.labels["layout"]
        ious = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in range(3)]
        assert float(sum(ious)) / 3 == pytest.approx(value)
        assert 0.5 < value < 1
    assert scores[0] != scores[5], "each seed is another probe"


def test_the_command_says_what_is_wrong_in_a_line(model: str, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    command = ["--model", model, "--clip", str(tmp_path / "broken.mp4"), "--out"]
    for out in ("picture.png", "film.mp4"):
        with pytest.raises(SystemExit, match=r"^error: .*broken\.mp4"):
            main([*command, str(tmp_path / out)])
