"""Two ranks compute what one process computes, and stop together."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vjepa
from vjepa.train.run_dir import RunDir

pytestmark = pytest.mark.distributed
REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
Outcomes = list[dict[str, tuple[int, str]]]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*TORCHRUN, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> Tensor:
    """Of the exported encoder and, where the run has one, its predictor."""
    export = run_dir / "exports" / "primary"
    networks = [vjepa.from_pretrained(export), vjepa.hub.predictor_from_pretrained(export)]
    states = [network.state_dict() for network in networks if network is not None]
    return torch.cat([state[name].flatten() for state in states for name in sorted(state)])


@pytest.fixture(scope="module")
def one_process(debug_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_run(tmp_path_factory.mktemp("one") / "run", "train.steps=20")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    done = torchrun("-m", "launch.train", "--recipe", "debug", f"run_dir={folder}", "train.steps=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout
    return folder


@pytest.fixture(scope="module")
def troubles(one_process: Path, debug_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcomes]:
    """The folder of `two_ranks.py`'s scenarios and what each rank made of them."""
    out = tmp_path_factory.mktemp("troubles")
    shutil.copytree(one_process, out / "one_process")
    for step in (15, 20):
        shutil.rmtree(out / "one_process" / "checkpoints" / f"step_{step:08d}")
    with closing(RunDir(out / "held")) as held:
        held.lock()
        done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(out), str(debug_shards))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_equal_runs(found: Path, wanted: Path) -> None:
    assert [row["step"] for row in rows(found)] == list(range(1, 21))
    for mine, theirs in zip(rows(found), rows(wanted), strict=True):
        for name in [name for name in theirs if name.startswith("loss")]:
            assert mine[name] == pytest.approx(theirs[name], abs=2e-6), f"{name} at step {mine['step']}"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    difference = (weights(found) - weights(wanted)).norm() / weights(wanted).norm()
    assert difference < 1e-5


def test_two_ranks_give_the_losses_and_weights_of_one_process(two_ranks: Path, one_process: Path) -> None:
    assert_equal_runs(two_ranks, one_process)


def test_both_ranks_count_their_samples(two_ranks: Path) -> None:
    meta = json.loads((two_ranks / "checkpoints" / "step_00000020" / "meta.json").read_text())
    assert meta["world_size"] == 2
    assert meta["recorder"]["samples_seen"] == 20 * 24


def test_diagnostics_of_two_ranks_cover_all_levels(two_ranks: Path, one_process: Path) -> None:
    names = {name for name in rows(one_process)[-1] if name.startswith("diag/")}
    assert names
    assert names == {name for name in rows(two_ranks)[-1] if name.startswith("diag/")}


def test_a_run_of_one_process_goes_on_with_two_ranks(troubles: tuple[Path, Outcomes], one_process: Path) -> None:
    out, outcomes = troubles
    assert [rank["resumed"][0] for rank in outcomes] == [0, 0]
    assert_equal_runs(out / "one_process", one_process)
    assert rows(out / "one_process")[9] == rows(one_process)[9]  # the row of the checkpoint is the old one


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("existing", "holds a run already: continue it with --resume"),
        ("held", "is in use by another process"),
        ("uneven", "train.batch.video=13 is the global batch and must divide by the 2 ranks"),
    ],
)
def test_what_the_main_rank_refuses_ends_both_with_its_words(
    troubles: tuple[Path, Outcomes], trouble: str, told: str
) -> None:
    for status, error in (rank[trouble] for rank in troubles[1]):
        assert status == 1
        assert told in error
        assert "Traceback" not in error


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_names_its_samples(
    troubles: tuple[Path, Outcomes],
) -> None:
    out, outcomes = troubles
    for status, error in (rank["poisoned"] for rank in outcomes):
        assert status == 1
        assert "step 3: " in error
        assert "not finite, on rank(s) [1]" in error
    told = json.loads((out / "poisoned" / "incidents/step_00000003/incident.json").read_text())
    assert list(told["keys"]) == ["1"]
    assert len(told["keys"]["1"]) == 12
    assert [row["step"] for row in rows(out / "poisoned")] == [1, 2]
    assert not (out / "poisoned" / "checkpoints").exists()


def test_what_one_rank_cannot_use_both_skip_or_go_back_from(troubles: tuple[Path, Outcomes]) -> None:
    out, outcomes = troubles
    for policy in ("skip", "roll_back"):
        assert [rank[policy] for rank in outcomes] == [[0, ""], [0, ""]]
        assert [row["step"] for row in rows(out / policy)] == list(range(1, 21))
        incident = json.loads((out / policy / "incidents" / "step_00000008" / "incident.json").read_text())
        assert list(incident["keys"]) == ["1"]
        assert (out / policy / "incidents" / "step_00000008" / "rank_1.pt").is_file()
    assert [row["step"] for row in rows(out / "skip") if "skipped" in row] == [8]
    meta = json.loads((out / "roll_back" / "checkpoints" / "step_00000020" / "meta.json").read_text())
    assert (meta["roll_backs"], meta["detour"]) == (1, 3)
    first, second = (rank["weights"][1].split() for rank in outcomes)
    assert first == second, "each rank's own copy is the other's"
    assert len(set(first)) == 2
