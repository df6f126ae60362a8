"""A checkpoint is whole or not there, and what is damaged or does not fit is refused by name."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from vjepa.train import checkpoint
from vjepa.train.checkpoint import CheckpointConfig, CheckpointError
from vjepa.train.distributed import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def state(fill: float, size: int = 8) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((size,), fill), "bias": torch.full((2,), fill)},
        "optimizer": {"state.weight.step": torch.tensor(fill), "param_groups.weight.lr": fill},
    }


def save(root: Path, step: int, *, keep: int = 4, size: int = 8) -> Path:
    return checkpoint.save(root, step, state(float(step), size), {"step": step}, ALONE, CheckpointConfig(keep=keep))


def load(path: Path, into: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    into = state(0.0) if into is None else into
    return into, checkpoint.load(path, into, ALONE)


def steps(root: Path) -> list[int]:
    return [step for step, _ in checkpoint.committed(root)]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    loaded, meta = load(save(tmp_path, 7))
    assert meta == {"step": 7}
    assert loaded["model"]["weight"].tolist() == [7.0] * 8
    assert loaded["optimizer"]["param_groups.weight.lr"] == 7.0


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    path = save(tmp_path, 12000)
    assert path.name == "step_00012000"
    assert {entry.name for entry in path.iterdir()} == {"dcp", "meta.json", "manifest.sha256", "COMMITTED"}
    check = subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=path, capture_output=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("victim", ["dcp/__0_0.distcp", "dcp/.metadata", "meta.json", "manifest.sha256"])
def test_one_flipped_bit_is_found_and_its_file_named(tmp_path: Path, victim: str) -> None:
    path = save(tmp_path, 5)
    data = bytearray((path / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (path / victim).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"step_00000005 is damaged: {victim}"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "dcp" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"dcp/__0_0\.distcp is missing"):
        load(path)


def test_keys_that_do_not_fit_are_listed_both_ways(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    wanted = state(0.0)
    del wanted["model"]["bias"]
    wanted["model"]["gain"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"1 missing, 1 extra") as found:
        load(path, wanted)
    assert "missing in the checkpoint: model.gain" in str(found.value)
    assert "not in this run: model.bias" in str(found.value)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*\[8\].*\[9\].* model\.weight"):
        load(path, state(0.0, size=9))


def test_a_module_is_loaded_from_the_part_that_holds_it(tmp_path: Path) -> None:
    """Evaluations of a run's checkpoints need neither its optimizer nor its predictor."""
    trained, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    stored = {f"target.encoder.{name}": tensor for name, tensor in trained.state_dict().items()}
    path = checkpoint.save(tmp_path, 3, {"model": stored | {"other": torch.zeros(5)}}, {}, ALONE, CheckpointConfig())
    checkpoint.load_module(path, fresh, "target.encoder")
    assert torch.equal(fresh.weight, trained.weight)
    assert torch.equal(fresh.bias, trained.bias)
    with pytest.raises(CheckpointError, match=r"has no model\.encoder\.bias \(2 missing in all\)"):
        checkpoint.load_module(path, fresh, "encoder")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load_module(path, torch.nn.Linear(4, 2), "target.encoder")
    (path / "dcp" / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load_module(path, fresh, "target.encoder")


def test_the_newest_keep_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [15, 20]
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000015", "step_00000020"}
    assert checkpoint.newest(tmp_path, ALONE) == (20, tmp_path / "step_00000020")


def test_without_its_committed_mark_a_checkpoint_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "COMMITTED").unlink()
    assert checkpoint.newest(tmp_path, ALONE) == (5, tmp_path / "step_00000005")
    save(tmp_path, 10)  # and it is written again
    assert steps(tmp_path) == [5, 10]


def test_damaged_checkpoints_are_set_aside_and_the_newest_intact_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    for step in (10, 15):
        (tmp_path / f"step_{step:08d}" / "dcp" / "__0_0.distcp").write_bytes(b"torn")
    assert checkpoint.newest(tmp_path, ALONE) == (5, tmp_path / "step_00000005")
    for step in (10, 15):
        assert f"step_{step:08d} is damaged (dcp/__0_0.distcp does not have the content" in caplog.text
        assert (tmp_path / f"step_{step:08d}.damaged" / "meta.json").is_file(), "nothing is removed"
    assert steps(tmp_path) == [5]
    (tmp_path / "step_00000005" / "meta.json").unlink()
    for _ in range(2):  # nor does the next attempt take it for a new run
        with pytest.raises(
            CheckpointError, match=r"no intact checkpoint, step_00000015\.damaged and 2 more are damaged"
        ):
            checkpoint.newest(tmp_path, ALONE)


def test_checkpoints_of_which_none_is_complete_are_not_taken_for_a_new_run(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, step) / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000010 and 1 more have no COMMITTED file.*Put it back"):
        checkpoint.newest(tmp_path, ALONE)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def die_half_way(path: Path, *arguments: Any, **keywords: Any) -> None:
        (Path(path) / "meta.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [10]
    checkpoint.clean_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


def test_no_checkpoint_is_newest_in_an_empty_folder(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, ALONE) is None
    assert checkpoint.newest(tmp_path / "absent", ALONE) is None


@pytest.mark.parametrize("dies_in", ["os.fsync", "pathlib.Path.rename", "json.dumps"])
def test_an_interrupted_save_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    save(tmp_path, 5)

    def die(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt  # passes `except Exception`, as a kill does

    with monkeypatch.context() as patch:
        patch.setattr(dies_in, die)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            save(tmp_path, 10)
    assert steps(tmp_path) == [5]
    assert load(tmp_path / "step_00000005")[0]["model"]["bias"].tolist() == [5.0, 5.0]
    checkpoint.clean_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_the_same_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = checkpoint.save(tmp_path, 5, state(6.0), {"step": 5}, ALONE, CheckpointConfig())
    assert load(path)[0]["model"]["bias"].tolist() == [6.0, 6.0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000005"]


def test_a_kill_while_the_same_step_is_saved_again_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def die_half_way(path: Path, *arguments: Any, **keywords: Any) -> None:
        (Path(path) / "dcp" / ".metadata").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 5)
    for _, path in checkpoint.committed(tmp_path):
        load(path)


def test_a_full_disk_is_named_and_costs_no_committed_checkpoint(small_disk: Path) -> None:
    save(small_disk, 5)
    with pytest.raises(CheckpointError, match=r"step_00000010.*disk or quota.*is full: free space.*--resume"):
        save(small_disk, 10, size=1_000_000)
    assert [path.name for path in small_disk.iterdir()] == ["step_00000005"]
    load(small_disk / "step_00000005")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(CheckpointError, match=r"checkpoints/step_00000005 could not be written: .*checkpoints"):
        save(tmp_path / "checkpoints", 5)


def test_meta_is_readable_without_torch(tmp_path: Path) -> None:
    assert json.loads((save(tmp_path, 3) / "meta.json").read_text()) == {"step": 3}


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"milestone_every": 0}])
def test_no_checkpoints_at_all_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        CheckpointConfig(**wrong)
