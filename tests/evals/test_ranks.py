"""The command on two ranks: the numbers of one process, written once; a rank that fails ends all."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import pytest

from evals.run import main
from evals.tasks import tracking
from evals.videos import DatasetError
from tests.evals.dense_scenes import write_camvid
from tests.evals.rows import rows_of
from tests.evals.test_probe_task import render
from tests.evals.test_run import write_davis
from tests.train.ranks import on_ranks

CAMVID = ["fit.steps=4", "fit.warmup_steps=1", "fit.batch_size=4", "fit.lrs=[0.01,0.001]", "head.kind=attentive"]
CAMVID += ["head.depth=1", "head.width=32", "dropout=0.1", "view.edges=resize", "view.crop=[48,64]"]
PROBE = ["data.name=folders", "clips.frames=4", "clips.frame_step=1", "clips.size=32", "clips.segments=1"]
PROBE += ["head.depth=2", "head.num_heads=4", "grid.lr=[1e-2,1e-4]", "grid.weight_decay=[.1]", "schedule.epochs=1"]
PROBE += ["schedule.batch_size=4", "data.held_out=.3", "score_batch=2"]
KEYS = [
    *(f"camvid.{each}" for each in CAMVID),
    *(f"ssv2.{each}" for each in PROBE),
    "davis2017.propagation.short_side=64",
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_camvid(root / "camvid", {"train": 7, "test": 3})
    write_davis(root / "davis2017")
    render(root / "ssv2", train=4, validation=1)
    return root


def command(sets: Path, out: Path) -> tuple[int, str, str]:
    """Status and what was printed, where it was run."""
    asked = ["--model", "untrained:vit_debug", "--suite", "camvid,davis2017,ssv2", "--out", str(out), "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
        status = main([*asked, f"data.root={sets}", *KEYS])
    return status, printed.getvalue(), said.getvalue()


def both(sets: Path, out: Path) -> list[tuple[int, str, str]]:
    """Measured, and once more."""
    return [command(sets, out), command(sets, out)]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


@pytest.mark.distributed
def test_two_ranks_measure_what_one_process_measures(sets: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert command(sets, alone)[0] == 0
    first, second = on_ranks(2, both, sets, shared)
    expected = {(row.task, row.model): row.value for row in rows_of(alone)}
    rows = rows_of(shared)
    assert {task for task, _ in expected} >= {"attentive_segmentation_camvid", "tracking_davis2017", "attentive_ssv2"}
    assert {(row.task, row.model): row.value for row in rows} == pytest.approx(expected, abs=2e-3)
    assert len(rows) == len(expected), "written once"
    assert {row.digest for row in rows} == {row.digest for row in rows_of(alone)}, "however many ranks there were"
    masks = {name: data for name, data in files(alone).items() if name.startswith("masks")}
    assert {name: data for name, data in files(shared).items() if name.startswith("masks")} == masks
    assert set(files(shared)) == set(files(alone))
    assert [status for status, _, _ in (*first, *second)] == [0] * 4
    assert "attentive_ssv2" in first[0][1]
    assert first[1][2].count("done before") == 10
    assert [printed for _, printed, _ in second] == ["", ""], "the main rank prints"


def failing(sets: Path, out: Path) -> tuple[int, str]:
    """The second rank finds one of its videos broken while the first waits for it."""

    def broken(video: object, *rest: object) -> object:
        raise DatasetError("down/00002.jpg is damaged")

    is_second = os.environ["RANK"] == "1"
    with mock.patch.object(tracking, "score_video", broken) if is_second else contextlib.nullcontext():
        status, _, said = command(sets, out)
    return status, said


@pytest.mark.distributed
def test_a_rank_that_fails_ends_all_and_says_why(sets: Path, tmp_path: Path) -> None:
    (first, words), (second, reason) = on_ranks(2, failing, sets, tmp_path)
    assert (first, second) == (2, 2)
    assert "error: rank 1: davis2017, untrained_vit_debug: down/00002.jpg is damaged" in reason
    assert "error: rank 0: another rank ended" in words
