"""Rows are kept, merged and shown, all of them."""

import io
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evals.comparison import rows_by_digest
from evals.protocol import EvalConfig, FitConfig, Focus, KnnConfig, Row, Score, Task
from evals.results import (
    ResultsError,
    ahead_of,
    append_results,
    beside_each_other,
    columns,
    curve,
    format_cell,
    merge_summary,
    not_ahead,
    num_trainings,
    print_curve,
    print_table,
    read_summary_rows,
    save,
    summarise,
)

ROW = Row("primary", "motion", "linear", "accuracy", True, "trained", 0, 0.75)


def test_a_row_has_the_fields_that_tools_rely_on() -> None:
    """DESIGN section 8; step and training seed only where they say something."""
    assert ROW.to_json() == {
        "stage": "primary",
        "task": "motion",
        "probe": "linear",
        "metric": "accuracy",
        "higher_is_better": True,
        "model": "trained",
        "seed": 0,
        "value": 0.75,
    }
    assert replace(ROW, step=0, training_seed=1).to_json() == ROW.to_json() | {"step": 0, "training_seed": 1}
    assert Row.of(Score("motion", "linear", "accuracy", 0, 0.75), stage="primary", model="trained") == ROW


def test_results_grow_and_the_summary_keeps_the_newest(tmp_path: Path) -> None:
    """Measured again, a row takes the old one's place in the summary; another step or model does not."""
    again, untrained, early = replace(ROW, value=0.5), replace(ROW, model="untrained"), replace(ROW, step=10)
    save(tmp_path, [ROW, untrained])
    save(tmp_path, [again, early])
    lines = (tmp_path / "evals" / "results.jsonl").read_text().splitlines()
    assert [Row(**json.loads(line)) for line in lines] == [ROW, untrained, again, early]
    assert read_summary_rows(tmp_path) == [again, untrained, early]


def append_many(folder: Path, seed: int) -> None:
    for value in range(30):
        append_results(folder, [replace(ROW, seed=seed, value=float(value))])


def test_two_processes_that_share_a_folder_lose_no_row(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=append_many, args=(tmp_path, n)) for n in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len((tmp_path / "evals" / "results.jsonl").read_text().splitlines()) == 60


def test_points_of_the_training_curve_never_mix_with_the_finished_stage(tmp_path: Path) -> None:
    """`evals` of the summary is read by tools that average over a task and model."""
    early = replace(ROW, step=10, value=0.25)
    save(tmp_path, [ROW, early])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["evals"], summary["curve"]) == ([ROW.to_json()], [early.to_json()])
    assert summarise([ROW, early]) == {"motion": {"trained": [0.75]}}
    untrained = replace(ROW, model="untrained", value=0.125)
    late = replace(ROW, step=20, value=0.5)
    assert curve([ROW, late, early, untrained]) == {"motion": {0: [0.125], 10: [0.25], 20: [0.5], None: [0.75]}}
    assert curve([ROW, untrained]) == {}


def test_several_trainings_count_once_each() -> None:
    """The spread of the table is that of the trainings, not of the probes on each."""
    rows = [replace(ROW, training_seed=t, seed=p, value=t + p / 8) for t in (0, 1) for p in (0, 2)]
    assert summarise(rows) == {"motion": {"trained": [0.125, 1.125]}}
    assert num_trainings(rows) == 2
    assert summarise(rows[:2]) == {"motion": {"trained": [0.0, 0.25]}}
    points = [replace(row, step=5) for row in rows]
    assert curve([*rows, *points])["motion"] == {5: [0.125, 1.125], None: [0.125, 1.125]}


def test_the_curve_is_a_column_for_each_share_of_the_training() -> None:
    out = io.StringIO()
    rows = [ROW, replace(ROW, model="untrained", value=0.1), replace(ROW, step=10, value=0.2)]
    print_curve(rows, total_steps=40, console=Console(file=out, width=20))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["task", "0", "%", "25", "%", "100", "%"] in lines
    assert ["motion", "0.100", "0.200", "0.750"] in lines
    out = io.StringIO()
    print_curve(rows[:2], total_steps=40, console=Console(file=out))
    assert not out.getvalue()


def test_the_rest_of_a_summary_stays_as_it_is(tmp_path: Path) -> None:
    summary = {"recipe": "demo", "stages": {"primary": {"steps": 3, "final_loss": 0.25}}, "evals": []}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    merge_summary(tmp_path, [ROW])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary | {"evals": [ROW.to_json()]}


def test_a_failed_write_leaves_the_old_results_and_no_row_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = append_results(tmp_path, [ROW])
    before = path.read_text()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("evals.whole_files.os.fsync", fail)
    with pytest.raises(OSError, match=r"results\.jsonl cannot be written \(disk full\): make room"):
        append_results(tmp_path, [ROW] * 100)
    assert path.read_text() == before
    assert not list(path.parent.glob("*.tmp"))


def test_a_last_line_that_is_torn_costs_its_own_row_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = append_results(tmp_path, [replace(ROW, digest="a"), replace(ROW, digest="b")])
    path.write_text(path.read_text()[:-30])
    assert list(rows_by_digest(tmp_path)) == ["a"]
    assert "results.jsonl: its last line is torn and is left out" in caplog.text
    append_results(tmp_path, [replace(ROW, digest="c")])
    assert list(rows_by_digest(tmp_path)) == ["a", "c"]
    path.write_text(path.read_text().rstrip("\n"))  # whole, though its end of line is missing
    append_results(tmp_path, [replace(ROW, digest="d")])
    assert list(rows_by_digest(tmp_path)) == ["a", "c", "d"]
    path.write_text("torn\n" + path.read_text())
    with pytest.raises(ResultsError, match="line 1 is no row"):
        rows_by_digest(tmp_path)


def test_whoever_reads_meanwhile_sees_a_whole_file(tmp_path: Path) -> None:
    """A file opened before is the old one to its end, never a mixture."""
    for write, path in (
        (append_results, tmp_path / "evals" / "results.jsonl"),
        (merge_summary, tmp_path / "summary.json"),
    ):
        before = write(tmp_path, [ROW]).read_text()
        with path.open() as reader:
            write(tmp_path, [replace(ROW, step=1)])
            assert reader.read() == before


def test_a_summary_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ResultsError, match=r"summary\.json is not JSON"):
        merge_summary(tmp_path, [ROW])
    (tmp_path / "summary.json").write_text(json.dumps({"evals": [{"task": "motion"}]}))
    with pytest.raises(ResultsError, match="none of this version"):
        merge_summary(tmp_path, [ROW])


def test_a_cell_is_mean_and_sample_deviation() -> None:
    assert format_cell([0.9, 1.0, 1.1]) == "1.000 ± 0.100"
    assert format_cell([0.5]) == "0.500"


def test_whoever_is_as_good_as_the_trained_encoder_is_named() -> None:
    rows = [
        ROW,
        replace(ROW, model="rgb", value=0.75),
        replace(ROW, model="untrained", value=0.2),
        replace(ROW, task="depth", higher_is_better=False, value=0.5),
        replace(ROW, task="depth", higher_is_better=False, value=0.4, model="untrained"),
        replace(ROW, task="depth", higher_is_better=False, value=0.6, model="rgb"),
    ]
    assert ahead_of(rows) == {"rgb": ["motion"], "untrained": ["depth"]}


STAGES = [
    ROW,
    replace(ROW, model="untrained", value=0.2),
    replace(ROW, model="rgb", value=0.72),
    replace(ROW, step=5),
    replace(ROW, stage="cooldown", value=0.7),
    replace(ROW, stage="distill", value=0.71),
    replace(ROW, stage="distill", model="untrained", value=0.8),
]


def test_stages_of_a_chain_stand_beside_each_other() -> None:
    table = beside_each_other(STAGES)
    assert columns(table) == ["primary", "cooldown", "distill", "untrained distill", "untrained", "rgb"]
    assert [row.value for row in table if row.model == "primary"] == [ROW.value], "without its checkpoints"
    text = io.StringIO()
    print_table(STAGES, console=Console(file=text, width=200))
    assert "primary is as good as cooldown" in text.getvalue()


def test_a_stage_is_compared_with_the_one_before_and_its_own_references() -> None:
    """ROW is the primary stage's 0.75."""
    pairs = {tuple(line.split(" or better")[0].split(" is as good as ")) for line in not_ahead(STAGES)}
    assert pairs == {
        ("primary", "cooldown"),
        ("rgb", "cooldown"),
        ("rgb", "distill"),
        ("untrained distill", "distill"),
    }


def test_the_table_shows_every_task_and_model_in_full_on_a_narrow_terminal() -> None:
    models = ("rgb_difference", "trained", "a_new_model", "untrained", "rgb")
    rows = [replace(ROW, model=model, seed=seed, value=0.125) for model in models for seed in (0, 1)]
    rows.append(replace(ROW, task="direction_segmentation_moving", value=0.25))
    text = io.StringIO()
    print_table(rows, title="all of it", console=Console(file=text, width=40))
    lines = [line for line in text.getvalue().splitlines() if line.strip()]
    assert lines[1].split() == ["task", "metric", "trained", "a_new_model", "untrained", "rgb", "rgb_difference"]
    assert lines[3].split() == ["motion", "accuracy", *["0.125", "±", "0.000"] * 5]
    assert lines[4].split() == ["direction_segmentation_moving", "accuracy", "0.250"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task("t", "knn", "x", ("a", "b"), "tokens"), "readout='tokens' does not fit kind='knn'"),
        (lambda: Task("t", "segmentation", "x", ("a", "b"), "mean"), "reads tokens"),
        (lambda: Task("t", "knn", "x", ("a", "a"), "mean"), "two different names"),
        (
            lambda: Task("t", "segmentation", "x", ("a", "b"), "tokens", focus=Focus("f", ("c",))),
            r"focus names \['c'\]",
        ),
        (lambda: EvalConfig(seeds=()), "give at least one"),
        (lambda: EvalConfig(seeds=(1, 1)), "without repeats"),
        (lambda: FitConfig(steps=0), "must be positive"),
        (lambda: KnnConfig(temperature=0), "temperature positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
