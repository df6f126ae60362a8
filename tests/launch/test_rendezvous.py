"""Ranks meet whatever is on the ports, in a stated time, and who does not come is named."""

from __future__ import annotations

import contextlib
import random
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from launch.rendezvous import Place, RendezvousError, meet, nodes_of_ranks, task_counts


def place(rank: int, size: int, *, job: str = "7", restart: int = 0) -> Place:
    return Place(job=job, restart=restart, rank=rank, size=size, local_rank=rank, node="localhost")


def gather(folder: Path, places: list[Place], *, seconds: float = 120.0) -> list[Future[Store | None]]:
    """Each place in a thread of its own; all have ended."""
    with ThreadPoolExecutor(len(places)) as threads:
        return [threads.submit(meet, folder, each, seconds=seconds) for each in places]


def test_all_ranks_share_one_store(tmp_path: Path) -> None:
    stores = [future.result() for future in gather(tmp_path, [place(rank, 3) for rank in range(3)])]
    assert all(stores)
    stores[0].set("word", "said")  # pyright: ignore[reportOptionalMemberAccess]
    assert stores[2].get("word") == b"said"  # pyright: ignore[reportOptionalMemberAccess]


def test_one_rank_needs_nobody(tmp_path: Path) -> None:
    assert meet(tmp_path / "none", place(0, 1), seconds=1.0) is None
    assert not (tmp_path / "none").exists()


def test_two_jobs_at_once_and_the_starts_of_one_job_do_not_meet(tmp_path: Path) -> None:
    jobs = [("7", 0), ("8", 0), ("7", 1)]
    places = [place(rank, 2, job=job, restart=restart) for job, restart in jobs for rank in range(2)]
    stores = [future.result() for future in gather(tmp_path, places)]
    for number, store in enumerate(stores[::2]):
        store.set("whose", str(number))  # pyright: ignore[reportOptionalMemberAccess]
    found = [store.get("whose") for store in stores[1::2]]  # pyright: ignore[reportOptionalMemberAccess]
    assert found == [b"0", b"1", b"2"]


def test_a_port_that_is_taken_is_not_the_one_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that submitit derives from the job's number, for example; and MASTER_PORT says nothing."""
    derived = random.Random("7").randint(20_000, 60_000)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(derived))
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):  # another process has it, which is as well
            taken.enter_context(socket.create_server(("", derived)))
        stores = [future.result() for future in gather(tmp_path, [place(0, 2), place(1, 2)])]
    assert stores[0].port != derived  # pyright: ignore


def test_a_rank_that_does_not_come_is_named_to_all_that_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.rendezvous.nodes_of_ranks", lambda: {0: "tn1", 1: "tn1", 2: "tn2", 3: "tn2"})
    for future in gather(tmp_path, [place(0, 4), place(1, 4), place(3, 4)], seconds=4.0):
        with pytest.raises(RendezvousError, match=r"^rank 2 on tn2 did not come within 4 s; 3 of 4 ranks did$"):
            future.result()


def test_a_missing_rank_0_is_named_with_what_to_look_at(tmp_path: Path) -> None:
    (future,) = gather(tmp_path, [place(1, 2)], seconds=0.5)
    with pytest.raises(
        RendezvousError, match=r"rank 1 on localhost did not reach rank 0 .* file system that all nodes"
    ):
        future.result()


def test_ranks_are_given_to_nodes_as_slurm_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_counts("2(x3),1") == [2, 2, 2, 1]
    monkeypatch.setattr("launch.rendezvous.host_names", lambda nodes: ["a", "b"] if nodes == "[a-b]" else [])
    step = {"SLURM_STEP_NODELIST": "[a-b]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert nodes_of_ranks(step) == {0: "a", 1: "a", 2: "b"}
    assert nodes_of_ranks({}) == {}
