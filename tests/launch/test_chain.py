"""Chains are planned together: what a later stage would refuse is refused before the first one starts."""

from pathlib import Path

import pytest

from launch.chain import ChainRequest, plan_chain, read_stages
from launch.job_words import duration, how_ended, why_pending
from launch.status import StatusError, read_status
from vjepa.config import ConfigError
from vjepa.train.run_dir import RunDirError

STAGES = ("primary", "cooldown")


def request(folder: Path, *overrides: str, stages: tuple[str, ...] = STAGES) -> ChainRequest:
    return ChainRequest("debug", stages, overrides=(f"run_dir={folder}", *overrides))


def test_a_stage_starts_from_the_export_before_it_which_is_its_teacher(tmp_path: Path) -> None:
    chain = plan_chain(request(tmp_path, "train.seed=3", "cooldown.train.steps=4"), resume=False)
    export = str(tmp_path / "primary" / "exports" / "primary")
    cooldown = chain.configs["cooldown"]
    assert (cooldown.init_from, cooldown.objective.teacher.path) == (export, export)
    assert [(config.train.seed, config.train.steps) for config in chain.configs.values()] == [(3, 40), (3, 4)]
    assert cooldown.summary_folder() == tmp_path


def test_a_student_of_another_shape_or_a_recipe_that_says_so_begins_anew(tmp_path: Path) -> None:
    other = plan_chain(request(tmp_path, "cooldown.model.depth=2"), resume=False)
    said = plan_chain(request(tmp_path, "cooldown.init_from=null"), resume=False)
    assert other.configs["cooldown"].init_from is None
    assert said.configs["cooldown"].init_from is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cooldown.model.patch_size=8"], "stage cooldown: objective.teacher.path=.*primary: its patch_size is 16"),
        (["cooldown.train.batch.video=7"], "stage cooldown: .*must divide by the 4 ranks"),
        (["cooldwn.train.steps=3"], "cooldwn is neither a stage of this chain"),
        (["cooldown.run_dir=x"], "give run_dir=... for the whole"),
        (["cooldown.init_from=/nowhere"], "stage cooldown: init_from=/nowhere is not there"),
    ],
)
def test_a_broken_later_stage_is_refused_and_nothing_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_chain(request(tmp_path / "run", *overrides), resume=False, world=lambda config: 4)
    assert not (tmp_path / "run").exists()


def test_stages_that_do_not_exist_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'debug' has no stage 'distill'"):
        plan_chain(request(tmp_path, stages=("primary", "distill")), resume=False)
    with pytest.raises(ConfigError, match="no training names an evaluation"):
        plan_chain(request(tmp_path, stages=("primary", "evals")), resume=False)
    for text in ("primary,evals,cooldown", "primary,,evals", "primary,primary"):
        with pytest.raises(ConfigError, match="--stage"):
            read_stages(text)


def test_a_stage_that_was_begun_needs_resume(tmp_path: Path) -> None:
    (tmp_path / "cooldown" / "checkpoints").mkdir(parents=True)
    with pytest.raises((ConfigError, RunDirError), match="continue it with --resume"):
        plan_chain(request(tmp_path), resume=False)


def test_reasons_and_times_are_said_in_words(tmp_path: Path) -> None:
    assert why_pending("Resources")[0].startswith("it is next in line")
    assert "account has used up its hours" in why_pending("AssocGrpCPUMinutesLimit")[0]
    assert "reserved" in why_pending("ReqNodeNotAvail, UnavailableNodes:tn1")[0]
    assert why_pending("Whatever")[0] == "SLURM says Whatever"
    assert how_ended("CANCELLED by 7") == "was cancelled by user 7"
    assert [duration(s) for s in (40, 3660, 29 * 86400)] == ["40 s", "1 h 01 min", "29 d 0 h"]
    with pytest.raises(StatusError, match="is no run"):
        read_status(tmp_path)
