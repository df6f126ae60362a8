"""The report shows what a run left behind, says what is missing, and is one file that needs nothing else."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import ClipConfig, DataConfig, ModalityConfig, SourceConfig
from data_pipeline.prepare.synthetic import make_debug_shards
from evals.protocol import Row
from evals.results import merge_summary
from launch import report_pictures
from launch.chain import ChainRequest
from launch.config import RunConfig
from launch.report import build_reports, main
from launch.report_figures import (
    DIAGNOSTICS,
    diagnostics_figure,
    learning_figure,
    loss_figure,
    schedule_figure,
    series,
    smoothed,
)
from launch.report_pictures import NUM_CLIPS
from launch.report_run import ReportError
from launch.report_single import build_report
from tests.data_pipeline.made_videos import ramp, write_video
from vjepa import hub
from vjepa.config import ModelConfig, PredictorSettings, build_models, to_yaml
from vjepa.objectives.jepa import JEPA
from vjepa.train.config import TrainConfig
from vjepa.train.diagnostics import AlarmConfig

STEPS = 200


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_debug_shards(tmp_path_factory.mktemp("shards") / "debug", videos=4, images=1)


def run_config(run_dir: Path, shards: Path) -> RunConfig:
    video = ModalityConfig(
        sources={"shapes": SourceConfig(path=str(shards))}, clip=ClipConfig(frames=4, fps=4.0, size=64)
    )
    return RunConfig(
        recipe="debug",
        stage="primary",
        run_dir=str(run_dir),
        model=ModelConfig(name="vit_debug"),
        predictor=PredictorSettings(embed_dim=48, depth=2, num_heads=3),
        data=DataConfig(video=video),
        train=TrainConfig(steps=STEPS, alarms=AlarmConfig(warmup_steps=60)),
    )


def rows(*, cosine_from: float = 0.5, cosine_to: float = 0.5) -> list[dict[str, Any]]:
    """The rows of a run whose mean cosine goes from one value to another."""
    noise = np.random.default_rng(0).normal(size=STEPS + 1)
    found = []
    for step in range(1, STEPS + 1):
        loss = 0.6 + 0.5 * np.exp(-step / 40) + 0.02 * noise[step]
        row: dict[str, Any] = {"step": step, "loss": loss, "lr": 1e-3 * min(1, step / 50), "momentum": 0.996}
        for term, share in (("masked_prediction", 0.7), ("context_prediction", 0.3)):
            row[f"loss/{term}"] = share * loss
            row |= {f"loss/{term}/video": share * loss * 1.1, f"loss/{term}/image": share * loss * 0.9}
        ramp = {modality: min(full, step / 200) for modality, full in (("video", 0.5), ("image", 0.7))}
        row |= {f"weight/context_prediction/{modality}": value for modality, value in ramp.items()}
        row["weight_decay"] = 0.04
        row |= {"clips_per_second": 20 + noise[step], "data_wait": 0.05, "step_seconds": 0.8}
        if step % 20 == 0:
            cosine = cosine_from + (cosine_to - cosine_from) * step / STEPS
            for modality in ("video", "image"):
                for level in (1, 2, 3, 4):
                    values = (0.5 + 0.1 * level, cosine, 20.0 + step / 10, 0.3 + step / 500, 0.05 * level)
                    row |= {f"diag/{modality}/level{level}/{k}": v for k, v in zip(DIAGNOSTICS, values, strict=True)}
        found.append(row)
    return found


def make_run(run_dir: Path, config: RunConfig, rows: list[dict[str, Any]], *, finished: bool = True) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "environment.json").write_text(json.dumps({"packages": {"torch": "9.9"}, "git_sha": "abc123"}))
    if finished:
        encoder, _ = build_models(config.model, config.predictor, seed=3)
        hub.save_pretrained(encoder, run_dir / "exports" / "primary")
        stage = {"steps": STEPS, "seconds": 125.4, "final_loss": 0.6}
        (run_dir / "summary.json").write_text(json.dumps({"recipe": "debug", "stages": {"primary": stage}}))
    return run_dir


def test_a_finished_run_gives_a_page_that_needs_nothing_else(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "my-run", run_config(tmp_path / "my-run", shards), rows())
    (run / "bad_samples.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    html = build_report(run).read_text()
    names = {path.name for path in (run / "report").glob("*.png")}
    assert names == {
        "loss.png",
        "diagnostics.png",
        "throughput.png",
        "schedules.png",
        *(f"pca_{i}.png" for i in range(NUM_CLIPS)),
    }
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in html
    for shown in ("my-run", "2 min 05 s", "<b>2</b><span>bad samples replaced", "abc123", "9.9", "No collapse alarm"):
        assert shown in html
    assert len(re.findall("shapes / ", html)) == 2 * NUM_CLIPS, "each clip is named in caption and picture"


def test_pictures_hold_frames_and_both_encoders(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), rows())
    build_report(run)
    picture = Image.open(io.BytesIO((run / "report" / "pca_0.png").read_bytes()))
    assert picture.height / picture.width > 1, "two tubelets wide, three rows high"


def test_a_collapse_is_reported_once_per_measure_with_its_first_step(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), rows(cosine_from=0.9, cosine_to=1.0))
    html = build_report(run).read_text()
    assert "8 collapse alarm(s)" in html
    assert "step 140: video level 1: mean_cosine 0.97 is above 0.95" in html


def test_a_run_in_progress_gives_a_page_that_says_what_is_missing(tmp_path: Path, shards: Path) -> None:
    few = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}]
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), few, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    html = build_report(run).read_text()
    assert "2 of 200" in html
    assert "not finished" in html
    assert "has not exported an encoder" in html
    assert html.count("The run logged nothing of this") == 3


def test_shards_that_are_gone_leave_a_note_in_place_of_pictures(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tmp_path / "gone")
    html = build_report(make_run(tmp_path / "run", config, rows())).read_text()
    assert "no pictures of features" in html
    assert "gone/manifest.json: no such file" in html


def test_a_directory_without_a_run_is_refused_by_file(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(ReportError, match=r"config\.yaml does not exist"):
        build_report(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*config\.yaml"):
        main([str(tmp_path)])
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), [], finished=False)
    (run / "metrics.jsonl").write_text("not json\n{}\n")
    with pytest.raises(ReportError, match="line 1 is not JSON"):
        build_report(run)


def test_text_from_outside_is_escaped(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), rows()[:30], finished=False)
    (run / "command.txt").write_text("<script>alert(1)</script>\n")
    assert "<script" not in build_report(run).read_text()


ROW = Row("primary", "motion", "linear", "accuracy", True, "trained", 0, 0.0)


def measured(task: str, model: str, *values: float, **fields: Any) -> list[Row]:
    """A row for each value, which are those of probe seeds 0, 1, ..."""
    return [replace(ROW, task=task, model=model, seed=i, value=value, **fields) for i, value in enumerate(values)]


def report_of(run_dir: Path, shards: Path, evals: list[Row]) -> str:
    """The page of an unfinished run with these evaluations: no encoder, no pictures of features."""
    run = make_run(run_dir, run_config(run_dir, shards), rows()[:30], finished=False)
    merge_summary(run, evals)
    return build_report(run).read_text()


def result_lines(html: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Task -> class of its line in the table of evaluations, and class and text of each value."""
    found = {}
    for table in re.findall(r'<table class="results">.*?</table>', html):
        for kind, task, cells in re.findall(r'<tr(?: class="(\w+)")?><td>(\w+)(.*?)</tr>', table):
            found[task] = (kind, re.findall(r'<td class="(value[^"]*)">([^<]*)</td>', cells))
    return found


def test_the_table_has_a_line_per_task_with_mean_and_deviation_and_the_best_in_bold(
    tmp_path: Path, shards: Path
) -> None:
    evals = [
        *measured("motion", "rgb", 0.2, 0.3),
        *measured("motion", "trained", 0.9, 0.8, 1.0),
        *measured("motion", "trained", 0.1, 0.1, step=100),
        *measured("motion", "untrained", 0.5),
    ]
    html = report_of(tmp_path / "run", shards, evals)
    assert re.findall("<th>(.*?)</th>", html)[:5] == ["task", "metric", "trained", "untrained", "rgb"]
    values = [("value best", "0.900 ± 0.100"), ("value", "0.500"), ("value", "0.250 ± 0.071")]
    assert result_lines(html) == {"motion": ("", values)}
    assert "over probe seeds 0, 1, 2 of one training" in html
    assert "not ahead of" not in html


def test_lines_in_which_a_reference_is_as_good_are_marked_and_name_it(tmp_path: Path, shards: Path) -> None:
    evals = [
        *measured("motion", "trained", 0.5),
        *measured("motion", "untrained", 0.25),
        *measured("motion", "rgb", 0.5),
        *measured("segmentation", "trained", 0.5),
        *measured("segmentation", "untrained", 0.75),
        *measured("segmentation", "rgb", 0.625),
        *measured("depth", "trained", 0.25, higher_is_better=False),
        *measured("depth", "untrained", 0.5, higher_is_better=False),
    ]
    html = report_of(tmp_path / "run", shards, evals)
    assert result_lines(html) == {
        "motion": ("behind", [("value best", "0.500"), ("value", "0.250"), ("value best ahead", "0.500")]),
        "segmentation": ("behind", [("value", "0.500"), ("value best ahead", "0.750"), ("value ahead", "0.625")]),
        "depth": ("", [("value best", "0.250"), ("value", "0.500"), ("value", "")]),
    }
    assert re.findall("trained is not ahead of ([^<]*)<", html) == ["rgb", "untrained, rgb"]


def test_several_trainings_count_once_each(tmp_path: Path, shards: Path) -> None:
    """Means of the trainings: 0.5 and 0.7; the probe seeds within each differ by far less."""
    evals = [
        *measured("motion", "trained", 0.49, 0.51, training_seed=0),
        *measured("motion", "trained", 0.69, 0.71, training_seed=1),
        *measured("motion", "rgb", 0.2, 0.4),
    ]
    html = report_of(tmp_path / "run", shards, evals)
    assert result_lines(html)["motion"][1] == [("value best", "0.600 ± 0.141"), ("value", "0.300 ± 0.141")]
    assert "over 2 trainings, for each of which the mean over its probe seeds is taken first" in html
    assert "(rgb: over probe seeds, no training changes them)" in html


def test_stages_have_a_table_each(tmp_path: Path, shards: Path) -> None:
    evals = [*measured("motion", "trained", 0.5), *measured("class", "trained", 0.75, stage="cooldown")]
    html = report_of(tmp_path / "run", shards, evals)
    assert re.findall("<h3>(.*?)</h3>", html) == ["primary", "cooldown"]
    assert {task: values for task, (_, values) in result_lines(html).items()} == {
        "motion": [("value best", "0.500")],
        "class": [("value best", "0.750")],
    }


def test_the_learning_curve_runs_from_the_untrained_to_the_finished_encoder(tmp_path: Path, shards: Path) -> None:
    evals = [
        *measured("motion", "trained", 0.8, 1.0),
        *measured("motion", "untrained", 0.25),
        *measured("motion", "rgb", 0.3),
        *measured("motion", "trained", 0.6, step=100),
    ]
    assert "No checkpoint on the way was evaluated" in report_of(tmp_path / "none", shards, evals[:-1])
    assert not (tmp_path / "none" / "report" / "learning.png").exists()
    html = report_of(tmp_path / "run", shards, evals)
    assert "No checkpoint on the way was evaluated" not in html
    png = base64.b64encode((tmp_path / "run" / "report" / "learning.png").read_bytes()).decode()
    assert png in html


def test_the_learning_figure_has_a_panel_per_task_with_means_and_the_pixels_dashed() -> None:
    curves = {"motion": {0: [0.25], 1500: [0.8, 1.0], 375: [0.5, 0.7]}, "class": {0: [0.1], 375: [0.2]}}
    figure = learning_figure(curves, {"motion": 0.3}, {"motion": "accuracy", "class": "accuracy"})
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["motion (accuracy)", "class (accuracy)"]
    trained, rgb = figure.axes[0].get_lines()
    assert np.asarray(trained.get_xydata()) == pytest.approx(np.array([(0, 0.25), (375, 0.6), (1500, 0.9)]))
    assert trained.get_marker() == "o"
    assert (rgb.get_linestyle(), list(np.asarray(rgb.get_ydata()))) == ("--", [0.3, 0.3])
    (band,) = figure.axes[0].collections
    assert np.asarray(band.get_paths()[0].vertices)[:, 1].max() == pytest.approx(0.9 + 0.2 / 2**0.5)
    assert len(figure.axes[1].get_lines()) == 1, "no pixels were measured"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trained", "rgb"]
    assert learning_figure({}, {}, {}) is None


def test_the_end_of_the_learning_curve_is_the_last_step_of_the_training(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("launch.report_single.learning_figure", lambda *arguments: seen.append(arguments))
    evals = [
        *measured("motion", "trained", 0.8),
        *measured("motion", "trained", 0.6, step=100),
        *measured("motion", "trained", 0.7, step=100, stage="cooldown"),
        *measured("motion", "untrained", 0.25),
        *measured("motion", "rgb", 0.2, 0.4),
        *measured("class", "trained", 0.5),
        *measured("class", "trained", 0.5, step=100),
    ]
    report_of(tmp_path / "run", shards, evals)
    ((curves, references, _),) = seen
    assert curves == {"motion": {0: [0.25], 100: [0.6], STEPS: [0.8]}}, "chosen tasks of this stage"
    assert references == {"motion": pytest.approx(0.3)}


def test_pictures_of_evaluations_are_embedded_under_their_names(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), rows()[:30], finished=False)
    (run / "evals").mkdir()
    Image.new("RGB", (3, 2), "red").save(run / "evals" / "predicted_masks.png")
    html = build_report(run).read_text()
    url = "data:image/png;base64," + base64.b64encode((run / "evals" / "predicted_masks.png").read_bytes()).decode()
    assert f'<figcaption>predicted masks</figcaption><img src="{url}" alt="predicted masks">' in html


def test_the_page_goes_from_what_was_learned_to_how(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "run", run_config(tmp_path / "run", shards), rows()[:30], finished=False)
    merge_summary(run, measured("motion", "trained", 0.5))
    (run / "evals").mkdir()
    Image.new("RGB", (3, 2)).save(run / "evals" / "predicted_masks.png")
    assert re.findall("<h2>(.*?)</h2>", build_report(run).read_text()) == [
        "No collapse alarm",
        "Evaluation",
        "Learning curve",
        "Predictions",
        "Loss",
        "Health",
        "What the encoder sees",
        "How to read this",
        "Throughput",
        "Schedules",
        "What it ran on",
        "Configuration",
    ]


def test_a_run_that_was_not_evaluated_says_so(tmp_path: Path, shards: Path) -> None:
    html = report_of(tmp_path / "run", shards, [])
    assert "has not been evaluated: python -m launch.evaluate RUN" in html
    assert "Learning curve" not in html


def test_the_ramp_of_lambda_is_drawn_as_training_logs_it(tmp_path: Path, shards: Path) -> None:
    """The keys are those of the objective, not of this file: a curve nobody logs would be left out in silence."""
    config = run_config(tmp_path, shards)
    encoder, predictor = build_models(config.model, config.predictor, seed=0)
    logged = JEPA(config.objective, encoder, predictor).weights_at(0, ["video", "image"])
    assert set(logged) >= {f"weight/context_prediction/{modality}" for modality in ("video", "image")}
    figure = schedule_figure(rows())
    assert figure is not None
    drawn = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    lines = drawn["weight of context prediction"].get_lines()
    assert sorted(float(np.asarray(line.get_ydata()).max()) for line in lines) == [0.5, 0.7]


def test_a_model_with_absolute_positions_is_shown_clips_of_the_size_it_was_trained_on(
    tmp_path: Path, shards: Path
) -> None:
    for name, position, size in (("free", 0.0, 256), ("fixed", 2.0, 64)):
        config = run_config(tmp_path / name, shards)
        config.model.absolute_position = position
        html = build_report(make_run(tmp_path / name, config, rows()[:30])).read_text()
        assert len(re.findall(rf"at {size} px \(trained at 64\)</figcaption>", html)) == NUM_CLIPS


def test_curves_are_the_logged_values() -> None:
    logged = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1.0}]
    steps, values = series(logged, "loss")
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [2, 1]
    figure = loss_figure(rows())
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["total loss", "context prediction", "masked prediction"]
    assert [line.get_label() for line in figure.axes[1].get_lines() if not str(line.get_label()).startswith("_")] == [
        "video",
        "image",
    ]


def test_diagnostics_have_a_line_per_level_and_a_panel_per_measure() -> None:
    figure = diagnostics_figure(rows(), AlarmConfig())
    assert figure is not None
    assert len(figure.axes) == 10
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert labels == ["block 1", "block 2", "block 3", "block 4"]
    assert diagnostics_figure([{"step": 1, "loss": 1.0}], AlarmConfig()) is None


def test_smoothing_keeps_a_constant_and_removes_noise() -> None:
    assert smoothed(np.full(100, 3.0)).tolist() == pytest.approx([3.0] * 100)
    noise = np.random.default_rng(0).normal(size=3000)
    assert smoothed(noise).std() < 0.2 * noise.std()


def test_pictures_are_made_of_media_files_too_and_of_streams_not(tmp_path: Path) -> None:
    write_video(tmp_path / "film.mp4", ramp(30))
    clip = ClipConfig(frames=4, size=64)
    sources = {"plain": SourceConfig(str(tmp_path)), "stream": SourceConfig(str(tmp_path / "x-{0..9}.tar"))}
    config = RunConfig(data=DataConfig(video=ModalityConfig(sources, clip)))
    clips, notes = report_pictures._clips(config)
    assert [caption.partition(" at ")[0] for caption in clips] == ["plain / film.mp4"]
    assert not notes


def test_stages_stand_in_their_order_and_pixels_once_however_they_were_evaluated(tmp_path: Path) -> None:
    """Also on a page without any stage's rows: none has logged a step."""
    rows = [
        Row(stage, "motion", "linear", "accuracy", True, model, 0, value)
        for stage, model, value in (
            *(("cooldown", "rgb", 0.2), ("cooldown", "trained", 0.8)),
            *(("primary", "rgb", 0.3), ("primary", "trained", 0.9)),
        )
    ]
    ChainRequest("debug", ("primary", "cooldown")).write(tmp_path)
    merge_summary(tmp_path, rows)
    html = build_reports(tmp_path).read_text()
    heads = re.findall("<th>(.*?)</th>", html)
    assert heads[-5:] == ["task", "metric", "primary", "cooldown", "rgb"]
    assert "0.300" in html
    assert "0.200" not in html
    assert "primary is as good as cooldown or better in: motion" in html
