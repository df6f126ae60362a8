"""Before the first step: what is wrong is said by all ranks, with the node's name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline.prepare.synthetic import make_debug_shards
from launch import preflight
from launch.config import RunConfig, load_config
from launch.preflight import PreflightError, Report, compare, judge_sums
from launch.rendezvous import Place
from launch.train import main as train
from tests.train.ranks import on_ranks
from vjepa.train.distributed import World, init_world

SAME = {"torch": "2.13", "code": "abc"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_debug_shards(tmp_path_factory.mktemp("shards") / "debug", videos=12, images=12)


def debug(run_dir: Path, shards: Path, *more: str) -> RunConfig:
    sources = [f"data.{modality}.sources.debug.path={shards}" for modality in ("video", "image")]
    return load_config("debug", "primary", [f"run_dir={run_dir}", *sources, *more])


def place(rank: int, size: int = 1) -> Place:
    return Place(job="1", restart=0, rank=rank, size=size, local_rank=0, node=f"tn{rank + 1}")


# --------------------------------------------------------------------------------------------------------- on one node


def test_a_sound_node_passes_and_leaves_nothing_behind(tmp_path: Path, shards: Path) -> None:
    text = preflight.check_nodes(debug(tmp_path, shards, "prepare.debug=none"), place(0), None)
    assert text.startswith("preflight: 1 rank(s) on 1 node(s) are fit, clocks within 0.00 s")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match=r"tn1: .*file/run/checkpoints cannot be written: Not a directory"):
        preflight.check_nodes(debug(tmp_path / "file/run", shards), place(0), None)


def test_a_disk_without_room_for_the_checkpoints_is_named(tmp_path: Path, shards: Path) -> None:
    config = debug(tmp_path, shards, "train.checkpoint.keep=100000000")
    with pytest.raises(PreflightError, match="GB free, and the checkpoints to come need"):
        preflight.check_nodes(config, place(0), None)


def test_a_checkpoint_is_as_large_as_was_said(tmp_path: Path, shards: Path) -> None:
    arguments = [f"data.{modality}.sources.debug.path={shards}" for modality in ("video", "image")]
    assert train(["--recipe", "debug", f"run_dir={tmp_path}", "train.steps=1", "data.workers=0", *arguments]) == 0
    found = sum(path.stat().st_size for path in (tmp_path / "checkpoints/step_00000001").rglob("*"))
    config = debug(tmp_path, shards)
    assert preflight.checkpoint_bytes(config) == pytest.approx(found, rel=0.2)
    size = preflight.checkpoint_bytes(config)
    assert [preflight.needed_bytes(config, there) / size for there in (0, 3, 9)] == [5, 2, 1]


def test_data_that_are_not_there_are_named_and_those_still_to_be_made_are_not_asked_for(tmp_path: Path) -> None:
    config = debug(tmp_path, tmp_path / "nothing", "prepare.debug=none")
    with pytest.raises(PreflightError, match=r"tn1: ShardError: .*nothing/manifest\.json: no such file"):
        preflight.check_nodes(config, place(0), None)
    preflight.check_nodes(debug(tmp_path, tmp_path / "nothing"), place(0), None)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(PreflightError, match="no GPU for local rank 3: torch sees 0, visible devices: 0"):
        preflight.check_device("cuda", 3)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    with pytest.raises(PreflightError, match="no GPU for local rank 0"):
        preflight.check_device("auto", 0)
    preflight.check_device("cpu", 0)


def test_a_look_that_hangs_is_a_fault() -> None:
    hang = threading.Event()
    with pytest.raises(PreflightError, match=r"within 0\.05 s"):
        preflight.within(0.05, hang.wait)
    hang.set()


# -------------------------------------------------------------------------------------------------------- many reports


def reports(count: int = 4) -> list[Report]:
    return [Report(rank, f"tn{rank + 1}", [], SAME, 100.0 + rank / 10) for rank in range(count)]


def faults(found: list[Report]) -> dict[str, str]:
    return {fault.node: fault.text for fault in compare(found)}


def test_nodes_that_agree_have_no_fault() -> None:
    assert compare(reports()) == []


def test_the_one_that_differs_is_named() -> None:
    found = reports()
    found[2] = replace(found[2], clock=160.0, versions=SAME | {"torch": "2.12"})
    both = [str(fault) for fault in compare(found)]
    assert both == [
        "tn3: its clock is +59.9 s from the others' (at most 5 s)",
        "tn3: torch is 2.12, 2.13 on 3 of 4 nodes",
    ]


def test_without_a_majority_both_are_named() -> None:
    found = reports(2)
    assert faults([found[0], replace(found[1], clock=0.0)]).keys() == {"tn1", "tn2"}
    assert faults([found[0], replace(found[1], versions={"torch": "2.13"})]) == {
        "tn1": "code is abc",
        "tn2": "code is none",
    }


# ----------------------------------------------------------------------------------------------------------- two ranks


def fly(root: Path, shards: Path, what: str) -> tuple[str, str | None]:
    """One of two ranks, on nodes of their own, with something wrong with the second."""
    rank = int(os.environ["RANK"])
    here, is_bad = place(rank, 2), rank == 1
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    if what == "clock":  # of both, for a busy machine lets one of them look seconds later
        assert preflight.exchange.__kwdefaults__
        preflight.exchange.__kwdefaults__["clock"] = lambda: 1000.0 - 60 * is_bad
    if what == "code" and is_bad:
        preflight.hash_code = lambda folder: "other"
    run_dir = root / "file" if what == "disk" and is_bad else root / "run"
    try:
        return preflight.check_nodes(debug(run_dir, shards, "prepare.debug=none"), here, store), None
    except PreflightError as error:
        return str(error), error.culprit


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "text", "culprit"),
    [
        ("nothing", "preflight: 2 rank(s) on 2 node(s) are fit", None),
        ("disk", "tn2: {root}/file/checkpoints cannot be written: Not a directory", "tn2"),
        ("clock", "tn1: clocks are 60.0 s apart", None),
        ("code", "tn2: code is other", None),
    ],
)
def test_all_ranks_come_to_the_same_verdict(
    what: str, text: str, culprit: str | None, tmp_path: Path, shards: Path
) -> None:
    (tmp_path / "file").touch()
    first, second = on_ranks(2, fly, tmp_path, shards, what)
    assert text.format(root=tmp_path) in first[0]
    assert first[1] == second[1] == culprit
    if what != "nothing":  # there the seconds differ
        assert first == second


def reduce(is_wrong: bool) -> str:
    """A rank whose sums are wrong where asked for."""
    with init_world("cpu") as world:
        if is_wrong and world.rank == 1:
            right: Callable[[Any, Any], Any] = World.sum
            World.sum = lambda self, values: right(self, values) + 1  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return preflight.check_all_reduce(world)
        except PreflightError as error:
            return str(error)


@pytest.mark.distributed
def test_an_all_reduce_is_timed_and_a_wrong_one_is_found_by_all() -> None:
    right = on_ranks(2, reduce, False)
    assert all(text.startswith("preflight: all-reduce of 4 MiB over 2 rank(s) is right") for text in right)
    first, second = on_ranks(2, reduce, True)
    assert first == second
    assert "an all-reduce gave a wrong sum on rank 1 on " in first


def test_a_wrong_sum_on_one_node_is_that_nodes_fault() -> None:
    judge_sums([(True, "tn1"), (True, "tn2")])
    with pytest.raises(PreflightError) as caught:
        judge_sums([(True, "tn1"), (False, "tn2"), (False, "tn2")])
    assert caught.value.culprit == "tn2"
