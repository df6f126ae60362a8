"""The command on two ranks: the numbers of one process, written once; a rank that fails ends all."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

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
PROBE += ["head.depth=1", "head.num_heads=4", "grid.lr=[1e-2,1e-4]", "grid.weight_decay=[.1]", "schedule.epochs=1"]
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


def command(sets: Path, out: Path, *more: str) -> tuple[int, str, str]:
    """Status and what was printed, where it was run."""
    asked = ["--model", "untrained:vit_debug", "--suite", "camvid,davis2017,ssv2", "--out", str(out), "--device", "cpu"]
    states = [f"camvid.fit.state={out / 'heads'}", f"ssv2.state={out / 'heads'}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
        status = main([*asked, f"data.root={sets}", *KEYS, *states, *more])
    return status, printed.getvalue(), said.getvalue()


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def weights(state: Path) -> list[dict[str, torch.Tensor]]:
    """The matrices of every head: biases and scales before a batch norm have no gradient but rounding, of which Adam
    makes whole steps.
    """
    heads = torch.load(state, weights_only=True)["heads"]
    return [{name: value for name, value in head.items() if value.ndim > 1} for head in heads]


def far_apart(heads: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> float:
    """The largest distance of two matrices, by their norm: single weights whose gradient is next to nothing differ."""
    pairs = [(head[name], other[name]) for head, other in zip(heads, others, strict=True) for name in head]
    return max(((one - two).norm() / two.norm()).item() for one, two in pairs)


@pytest.fixture(scope="module")
def shared(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """What two ranks left behind, and what each printed."""
    out = tmp_path_factory.mktemp("shared")
    return out, on_ranks(2, command, sets, out)


@pytest.mark.distributed
def test_two_ranks_measure_what_one_process_measures(
    sets: Path, shared: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path
) -> None:
    assert command(sets, tmp_path)[0] == 0
    out, ((first, table, _), (second, *nothing)) = shared
    expected = {(row.task, row.model): row.value for row in rows_of(tmp_path)}
    rows = rows_of(out)
    assert {task for task, _ in expected} >= {"attentive_segmentation_camvid", "tracking_davis2017", "attentive_ssv2"}
    assert {(row.task, row.model): row.value for row in rows} == pytest.approx(expected, abs=2e-3)
    assert len(rows) == len(expected), "written once"
    assert {row.digest for row in rows} == {row.digest for row in rows_of(tmp_path)}, "however many ranks there were"
    states = sorted(path.name for path in (out / "heads").iterdir())
    assert len(states) == 4
    for name in states:
        ours, alone = (weights(folder / "heads" / name) for folder in (out, tmp_path))
        assert far_apart(ours, alone) < 5e-3
    assert set(files(out)) == set(files(tmp_path))
    masks = [name for name in files(out) if name.startswith("masks")]
    assert [files(out)[name] for name in masks] == [files(tmp_path)[name] for name in masks]
    assert (first, second) == (0, 0)
    assert "attentive_ssv2" in table
    assert nothing[0] == "", "the main rank prints the table"


def failing(sets: Path, out: Path) -> tuple[int, str]:
    """The second rank finds one of its videos broken while the first waits for it."""

    def broken(video: object, *rest: object) -> object:
        raise DatasetError("down/00002.jpg is damaged")

    is_second = os.environ["RANK"] == "1"
    with mock.patch.object(tracking, "score_video", broken) if is_second else contextlib.nullcontext():
        status, _, said = command(sets, out, "davis2017.propagation.context=3")
    return status, said


@pytest.mark.distributed
def test_what_was_measured_is_taken_and_a_rank_that_fails_ends_all(
    sets: Path, shared: tuple[Path, list[tuple[int, str, str]]]
) -> None:
    (first, words), (second, reason) = on_ranks(2, failing, sets, shared[0])
    assert words.count("done before") == 3, "of camvid; another recipe of tracking is measured, and fails"
    assert (first, second) == (2, 2)
    assert "error: rank 1: davis2017, untrained_vit_debug: down/00002.jpg is damaged" in reason
    assert "error: rank 0: another rank ended" in words
