"""A run saved in shards on two ranks goes on with any number of ranks, each working on its own clips only."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.benchmarks.campaign import numbers
from tests.train.elastic import Witness, digest, witness
from tests.train.ranks import on_ranks
from tests.train.test_two_ranks import rows

pytestmark = pytest.mark.distributed
SAVED, STEPS, BATCH = 5, 10, 12
SIZES = (1, 2, 3)
SETTINGS = (f"train.steps={STEPS}", "train.parallel.mode=fsdp")


@dataclass(frozen=True)
class Continued:
    """A run that went on from step SAVED, and what each rank made of it."""

    run_dir: Path
    ranks: list[Witness]


@pytest.fixture(scope="module")
def saved(debug_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps on two ranks in shards, without a break."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    on_ranks(2, witness, run_dir, debug_shards, *SETTINGS)
    return run_dir


@pytest.fixture(scope="module")
def continued(saved: Path, debug_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Continued]:
    """The run as it goes on from step SAVED, by the number of ranks."""
    found = {}
    for size in SIZES:
        run_dir = tmp_path_factory.mktemp(f"on{size}") / "run"
        shutil.copytree(saved, run_dir)
        shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:08d}")
        found[size] = Continued(run_dir, on_ranks(size, witness, run_dir, debug_shards, *SETTINGS, "--resume"))
    return found


def digest_on_disk(path: Path) -> str:
    """Of the target encoder in a checkpoint, read by torch alone."""
    reader, prefix = FileSystemReader(path / "dcp"), "model.target.encoder."
    everything = reader.read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in everything.items() if isinstance(entry, TensorStorageMetadata)}
    state = {name: torch.empty(entry.size) for name, entry in stored.items() if name.startswith(prefix)}
    state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return digest({name.removeprefix(prefix): tensor for name, tensor in state.items()})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("size", SIZES)
def test_the_target_encoder_is_loaded_exactly_as_it_was_saved(
    size: int, saved: Path, continued: dict[int, Continued]
) -> None:
    on_disk = [digest_on_disk(saved / "checkpoints" / f"step_{step:08d}") for step in (SAVED, STEPS)]
    assert on_disk[0] != on_disk[1], "the digest sees what training changes"
    assert continued[size].ranks[0].target == on_disk[0]


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_holds_its_share_of_the_target_encoder(size: int, continued: dict[int, Continued]) -> None:
    held, whole = [rank.held for rank in continued[size].ranks], continued[1].ranks[0].held
    assert len(held) == size
    assert sum(held) == whole
    assert all(share > whole / size / 2 for share in held)


@pytest.mark.parametrize("size", SIZES)
def test_the_next_losses_are_those_of_the_run_without_a_break(
    size: int, saved: Path, continued: dict[int, Continued]
) -> None:
    found, wanted = rows(continued[size].run_dir), rows(saved)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for mine, theirs in zip(found[SAVED:], wanted[SAVED:], strict=True):
        losses = [name for name in theirs if name.startswith("loss")]
        assert {name: mine[name] for name in losses} == pytest.approx(
            {name: theirs[name] for name in losses}, abs=2e-6, rel=0
        ), f"step {mine['step']}"


def test_on_as_many_ranks_as_before_no_bit_changes(saved: Path, continued: dict[int, Continued]) -> None:
    again = continued[2].run_dir
    for mine, theirs in zip(rows(again), rows(saved), strict=True):
        assert numbers(mine) == numbers(theirs)
    weights = "exports/primary/model.safetensors"
    assert (again / weights).read_bytes() == (saved / weights).read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_the_ranks_together_see_each_ordinal_of_every_step_once(size: int, continued: dict[int, Continued]) -> None:
    """Counted where clips reach the objective."""
    ranks = continued[size].ranks
    seen = Counter(place for rank in ranks for place in rank.clips)
    wanted = {
        (modality, step, step * BATCH + i)
        for modality in ("video", "image")
        for step in range(SAVED, STEPS)
        for i in range(BATCH)
    }
    assert seen == Counter(wanted)
    assert [rank.num_seen for rank in ranks] == [len(wanted) // size] * size


def test_an_ordinal_is_the_same_clip_on_whichever_rank(continued: dict[int, Continued]) -> None:
    alone = continued[1].ranks[0].clips
    assert len(set(alone.values())) > len(alone) // 2, "clips differ from each other"
    for size in SIZES[1:]:
        for rank in continued[size].ranks:
            assert rank.clips == {place: alone[place] for place in rank.clips}
