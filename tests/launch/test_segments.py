"""What the supervisor makes of the end of a job's ranks: pure functions, no SLURM."""

import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from launch import after_job
from launch.after_job import Situation
from launch.job_order import JobOrder
from launch.segments import (
    Decision,
    Ended,
    NoteKind,
    Outcome,
    Segment,
    SegmentKind,
    append_segment,
    decide,
    hung_ranks,
    judge,
    newest_checkpoint,
    read_outcomes,
    read_segments,
    write_outcome,
)

PLACES = {0: "tn1", 1: "tn1", 2: "tn2", 3: "tn2"}
TERM, USR2, KILL = signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL


def note(rank: int, kind: NoteKind, text: str = "", *, at: float = 0.0, **more: object) -> Outcome:
    return Outcome("7", 0, rank, PLACES[rank], kind, text, None, at, **more)  # pyright: ignore[reportArgumentType]


def stopped(rank: int, signum: int) -> Outcome:
    return replace(note(rank, "interrupted", signal.Signals(signum).name, signum=signum), step=12)


def segment(
    restart: int = 0, kind: SegmentKind = "crashed", step: int | None = 5, culprit: str | None = None
) -> Segment:
    nodes = ["tn1", "tn2"]
    return Segment("7", restart, "primary", nodes, 0.0, 1.0, 1, kind, "", 0, step, "", [], culprit)


def end(status: int, *outcomes: Outcome, hung: dict[int, str] | None = None, is_preempted: bool = False) -> Ended:
    return judge(status, outcomes, PLACES, hung=hung or {}, is_preempted=is_preempted)


# ----------------------------------------------------------------------------------------------------- how it has ended


def test_all_ranks_done_is_done_even_where_one_falls_over_its_own_feet_afterwards() -> None:
    notes = [note(rank, "done") for rank in PLACES]
    assert end(0, *notes).kind == "done"
    assert end(134, *notes).kind == "done"


def test_an_srun_without_fault_is_not_believed_where_ranks_left_no_word() -> None:
    assert end(0).kind == "crashed"
    found = end(0, *(note(rank, "done") for rank in (0, 1, 2)))
    assert (found.kind, found.culprit) == ("crashed", "tn2")
    assert found.reason == "rank 3 on tn2 ended without a word; srun's status is 0"


def test_notes_that_come_late_over_a_network_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = [note(rank, "done") for rank in PLACES]
    looks = [notes[:2], notes[:2], notes]
    monkeypatch.setattr(after_job, "read_outcomes", lambda *_: looks.pop(0))
    monkeypatch.setattr(after_job, "POLL_S", 0.0)
    order = cast(JobOrder, SimpleNamespace(folder=Path(), world=len(PLACES)))
    situation = Situation("7", 0, ["tn1", "tn2"], "RUNNING", False, [])
    assert after_job._wait_for_notes(order, 0, situation) == notes
    looks[:] = [notes[:2]]
    assert after_job._wait_for_notes(order, 1, situation) == notes[:2], "a failed rank leaves none"


def test_a_refused_configuration_is_refused_whatever_srun_did_to_the_others() -> None:
    found = end(143, note(0, "refused", "train.batch.video=7"), *(stopped(rank, TERM) for rank in (1, 2, 3)))
    assert found == Ended("refused", "rank 0 on tn1: train.batch.video=7")


@pytest.mark.parametrize("signum", [USR2, TERM])
def test_ranks_that_agreed_to_stop_were_interrupted(signum: int) -> None:
    found = end(128 + signum, *(stopped(rank, signum) for rank in PLACES))
    assert found == Ended("interrupted", f"{signal.Signals(signum).name} at step 12")


def test_a_rank_that_fails_is_the_reason_not_those_that_srun_ends_for_it() -> None:
    others = [stopped(rank, TERM) for rank in (0, 1, 3)]
    found = end(143, note(2, "error", "OSError: [Errno 5] Input/output error"), *others)
    assert (found.kind, found.culprit) == ("error", "tn2")
    found = end(143, *others)  # rank 2 without a word
    assert (found.kind, found.culprit) == ("crashed", "tn2")
    assert "rank 2 on tn2 ended without a word; srun's status is 143 (SIGTERM)" in found.reason


def test_a_lost_connection_is_the_echo_of_another_ranks_end() -> None:
    lost = [note(rank, "error", "[gloo] Connection closed by peer [127.0.0.1]:4", at=1.0) for rank in (0, 2, 3)]
    assert end(137, *lost).culprit == "tn1"
    found = end(1, *lost, note(1, "error", "OSError: no space", at=2.0))
    assert found == Ended("error", "rank 1 on tn1: OSError: no space", "tn1")


def test_what_several_nodes_say_alike_is_no_nodes_fault() -> None:
    found = end(1, *(note(rank, "error", "step 9: the loss is nan", at=rank) for rank in PLACES))
    assert found == Ended("error", "rank 0 on tn1: step 9: the loss is nan", None)


def test_an_announced_preemption_is_no_crash_even_of_ranks_without_a_word() -> None:
    assert end(143).kind == "crashed"
    assert end(143, is_preempted=True).kind == "interrupted"
    some = [stopped(0, TERM), note(1, "error", "Connection reset by peer")]
    assert end(143, *some, is_preempted=True).kind == "interrupted"


def test_a_user_signal_comes_from_slurm_alone() -> None:
    assert end(128 + USR2).kind == "interrupted"  # before the ranks could take it
    some = [stopped(0, USR2), note(1, "error", "Connection closed by peer")]
    assert end(140, *some).kind == "interrupted"


def test_ranks_that_their_watchdogs_ended_were_hung_and_the_silent_one_is_named() -> None:
    said: dict[int, str] = dict.fromkeys((0, 1, 2), "no progress for 5.1 s in backward of step 7")
    found = end(137, note(3, "error", "Connection closed by peer"), hung=said)
    assert (found.kind, found.culprit) == ("hung", "tn2")
    assert found.reason == (
        "rank 0 on tn1: no progress for 5.1 s in backward of step 7; nothing was heard of rank 3 on tn2"
    )
    assert end(75, hung=dict.fromkeys(PLACES, "no progress")).culprit is None


def test_a_node_that_went_down_is_the_reason() -> None:
    notes = [note(rank, "error", "Connection closed by peer") for rank in (0, 1)]
    assert judge(137, notes, PLACES, hung={}, down=["tn2"]) == Ended("lost", "tn2 went down", "tn2")


def test_preflight_names_the_one_node_at_fault_and_none_where_all_are() -> None:
    notes = [note(rank, "preflight", "tn2: no GPU", culprit="tn2") for rank in (0, 2)]
    assert end(1, *notes) == Ended("preflight", "rank 0 on tn1: tn2: no GPU", "tn2")
    assert end(1, notes[0], replace(notes[1], culprit="tn1")).culprit is None
    assert judge(1, [note(0, "preflight", "x", culprit="tn1")], {0: "tn1"}, hung={}).culprit is None


# --------------------------------------------------------------------------------------------------------- what follows


def after(
    kind: SegmentKind, now: Segment, *history: Segment, culprit: str | None = None, restarts: int = 20
) -> Decision:
    ended = Ended(kind, "because", culprit)
    return decide(ended, now, history, max_restarts=restarts, max_crashes=3)


def test_what_is_done_or_refused_is_not_started_again() -> None:
    assert after("done", segment()).action == "finish"
    found = after("refused", replace(segment(), status=2))
    assert (found.action, found.status) == ("stop", 2)


def test_interruptions_are_requeued_any_number_of_times_up_to_the_cap() -> None:
    history = [segment(number, "interrupted", step=0) for number in range(19)]
    assert after("interrupted", segment(19, step=0), *history).action == "requeue"
    found = after("interrupted", segment(20), *history)
    assert (found.action, found.status) == ("stop", 1)
    assert "max_restarts=20" in found.reason


def test_the_third_failure_without_a_newer_checkpoint_is_the_last() -> None:
    assert after("crashed", segment(0)).action == "requeue"
    assert after("hung", segment(1), segment(0)).action == "requeue"
    found = after("error", segment(2), segment(0), segment(1, "hung"))
    assert (found.action, found.status) == ("stop", 1)
    assert found.reason.startswith("3 failures without a newer checkpoint (max_crashes=3, newest checkpoint step 5)")
    assert found.reason.endswith("last: because")


def test_a_newer_checkpoint_begins_the_count_anew_and_an_interruption_does_not() -> None:
    assert after("crashed", segment(2, step=10), segment(0), segment(1)).action == "requeue"
    between = segment(1, "interrupted")
    assert after("crashed", segment(3), segment(0), between, segment(2)).action == "stop"


def test_a_stage_without_checkpoints_is_counted_too() -> None:
    history = [segment(0, step=None), segment(1, step=None)]
    assert after("crashed", segment(2, step=None), *history).action == "stop"


def test_a_node_that_ended_two_segments_is_avoided_from_then_on() -> None:
    first = segment(0, step=1, culprit="tn2")
    assert after("crashed", segment(1, step=2), first, culprit="tn1").excluded == ()
    assert after("crashed", segment(1, step=2), first, culprit="tn2").excluded == ("tn2",)
    second = segment(1, step=2, culprit="tn2")
    assert after("interrupted", segment(2, step=3), first, second).excluded == ("tn2",)


# ------------------------------------------------------------------------------------------------------------- records


def test_notes_and_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [stopped(0, USR2), note(2, "preflight", "tn2: disk", culprit="tn2")]
    for outcome in written:
        write_outcome(tmp_path, outcome)
    assert read_outcomes(tmp_path, "7", 0, 4) == written
    assert read_outcomes(tmp_path, "7", 1, 4) == []
    lines = [segment(0), segment(1), replace(segment(0), job="8"), replace(segment(1), decision="stopped")]
    for line in lines:
        append_segment(tmp_path, line)
    assert read_segments(tmp_path, "7") == [lines[0], lines[3]]  # a later line of the same start counts
    assert len(read_segments(tmp_path)) == 3


def test_the_newest_checkpoint_is_one_that_is_complete(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == 0
    for name, is_complete in (("step_00000005", True), ("step_00000010", False), ("step_00000015.damaged", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if is_complete:
            (tmp_path / "checkpoints" / name / "COMMITTED").touch()
    assert newest_checkpoint(tmp_path) == 5


def test_only_hangs_of_this_segment_are_read_from_the_stacks(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    text = "=== {} rank 1 on tn1: no progress for {} in forward of step 3\nThread 0x1\n=== end of these stacks\n"
    now = time.time()
    stamps = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now - age)) for age in (500, 1)]
    (tmp_path / "stacks/rank_1.txt").write_text(text.format(stamps[0], "9 s") + text.format(stamps[1], "5 s"))
    (tmp_path / "stacks/rank_0.txt").write_text(text.format(stamps[0], "9 s"))
    later = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now + 9))
    with (tmp_path / "stacks/rank_1.txt").open("a") as file:
        file.write(text.format(later, "14 s"))  # gives up
    woken = text.replace("rank 1 on", "rank 2 on").format(later, "14 s")
    (tmp_path / "stacks/rank_2.txt").write_text(woken)
    assert hung_ranks(tmp_path, now - 100) == {1: "no progress for 5 s in forward of step 3"}
