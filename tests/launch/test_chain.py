"""Chains are planned together: what a later stage would refuse is refused before the first one starts."""

from pathlib import Path

import pytest

from evals.protocol import Row
from evals.results import merge_summary
from evals.suites import SUITES
from launch.chain import ChainRequest, plan_chain, read_stages
from launch.config import RECIPES
from launch.job_words import duration, how_ended, why_pending
from launch.status import StatusError, read_status
from launch.submit import main as submit
from vjepa import create_model
from vjepa.config import ConfigError
from vjepa.hub import save_pretrained
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


def test_a_stage_may_follow_an_earlier_one_than_the_last(tmp_path: Path) -> None:
    student = ["cooldown.model.depth=2", "cooldown.init_from=null"]
    stages = ("primary", "cooldown", "again")
    (recipes := tmp_path / "recipes" / "debug").mkdir(parents=True)
    for path in (RECIPES / "debug").glob("*.yaml"):
        (recipes / path.name).write_text(path.read_text())
    (recipes / "again.yaml").write_text("extends: cooldown.yaml\nfollows: {teacher: primary, start: cooldown}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.config.RECIPES", tmp_path / "recipes")
        asked = request(tmp_path / "run", *student, "again.model.depth=2", stages=stages)
        again = plan_chain(asked, resume=False).configs["again"]
        with pytest.raises(ConfigError, match="no stage primary comes before it"):
            plan_chain(request(tmp_path / "run", "cooldown.objective.teacher.path=x", stages=stages[1:]), resume=False)
    assert again.objective.teacher.path == str(tmp_path / "run" / "primary" / "exports" / "primary")
    assert again.init_from == str(tmp_path / "run" / "cooldown" / "exports" / "cooldown")


def test_a_moving_teacher_goes_on_from_the_run_before_it(tmp_path: Path) -> None:
    ema = ("cooldown.objective.target=ema", "cooldown.init_optimizer=carry")
    assert plan_chain(request(tmp_path, *ema), resume=False).configs["cooldown"].init_from == str(tmp_path / "primary")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cooldown.init_predictor=true", "cooldown.predictor.depth=1"], "stage cooldown: .*depth=1 here, 2 there"),
        (["cooldown.init_predictor=true", "cooldown.init_from=null"], "init_predictor=true needs init_from"),
        (["cooldown.init_optimizer=carry", "cooldown.init_from=null"], "init_optimizer=carry needs init_from"),
        (["cooldown.follows={pupil: primary}"], "follows.pupil is unknown"),
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


def test_weights_that_are_there_already_are_checked_before_the_first_stage(tmp_path: Path) -> None:
    other = save_pretrained(create_model("vit_debug", levels=(1, 3)), tmp_path / "other")
    alike = save_pretrained(create_model("vit_debug"), tmp_path / "alike")
    cases = {
        f"cooldown.init_from={other}": ["cooldown.objective.target=ema"],
        f"cooldown.init_from={alike}": ["cooldown.init_optimizer=carry"],
        "cooldown.predictor.depth=1": ["cooldown.objective.target=ema"],
    }
    for text, more in cases.items():
        with pytest.raises(ConfigError, match="stage cooldown: "):
            plan_chain(request(tmp_path / "run", text, *more), resume=False)
    assert plan_chain(request(tmp_path / "run", f"cooldown.init_from={alike}"), resume=False)


def test_a_predictor_without_a_head_for_visible_tokens_is_known_beforehand(tmp_path: Path) -> None:
    without = "primary.objective.terms.context_prediction=null"
    with pytest.raises(ConfigError, match="has no head for visible tokens"):
        plan_chain(request(tmp_path, without, "cooldown.init_predictor=true"), resume=False)


def test_a_stage_that_a_resume_begins_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    plan_chain(request(tmp_path, "cooldown.train.steps=7"), resume=False).begin()
    assert plan_chain(request(tmp_path), resume=True).configs["cooldown"].train.steps == 7
    again = plan_chain(request(tmp_path, "cooldown.train.steps=8"), resume=True)
    assert again.configs["cooldown"].train.steps == 8, "the command is on top"


def test_a_plan_for_a_card_is_of_one_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--stage", "primary,cooldown", "--recipe", "debug", "--dry-run", f"run_dir={tmp_path}", "--gpus"]
    assert submit([*command, "8"]) == 2
    assert "plan one training: give --stage one stage" in capsys.readouterr().err
    assert submit(command[:-1]) == 0
    assert "cooldown: 10 steps" in capsys.readouterr().out


def test_evaluations_are_over_when_every_suite_has_been_asked(tmp_path: Path) -> None:
    suites = "evals={motion: {data: D}, fine_motion: {data: D}}".replace("D", str(tmp_path))
    chain = plan_chain(request(tmp_path / "run", suites, stages=("primary", "evals")), resume=False)
    for suite in ("motion", "fine_motion"):
        assert not chain.is_finished("evals")
        tasks = [task.name for task in SUITES[suite].tasks]
        rows = [Row("primary", task, "linear", "accuracy", True, "trained", 0, 0.5) for task in tasks]
        merge_summary(tmp_path / "run", rows)
    assert chain.is_finished("evals")


def test_stages_that_do_not_exist_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'debug' has no stage 'destil'"):
        plan_chain(request(tmp_path, stages=("primary", "destil")), resume=False)
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
