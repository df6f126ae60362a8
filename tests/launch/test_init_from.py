"""A new run from weights begins at step 0 with them, and says which it took."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vjepa
from launch.config import load_config
from launch.init_from import load_initial_weights
from launch.train import train
from vjepa.config import ConfigError, build_models
from vjepa.hub import WeightsError
from vjepa.nn.encoder import Encoder
from vjepa.objectives import build_objective
from vjepa.objectives.jepa import JEPA
from vjepa.train import checkpoint
from vjepa.train.checkpoint import CheckpointError
from vjepa.train.signals import StopFlag


def objective(*overrides: str, seed: int = 5) -> JEPA:
    config = load_config("debug", "primary", ["run_dir=unused", *overrides])
    return JEPA(config.objective, *build_models(config.model, config.predictor, seed=seed))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("source") / "run"
    train(load_config("debug", "primary", [f"run_dir={run}", *SHORT]), resume=False, stop=StopFlag())
    return run


SHORT = ("train.steps=2", "data.workers=0")


def test_a_run_gives_encoder_predictor_and_target(source: Path) -> None:
    filled, fresh = objective(), objective()
    said = load_initial_weights(filled, source)
    assert said == f"encoder, predictor and target of {source / 'checkpoints/step_00000002'}"
    exported = vjepa.from_pretrained(source / "exports/primary").state_dict()
    target, encoder = filled.exported.state_dict(), filled.encoder.state_dict()
    assert all(torch.equal(target[name], exported[name]) for name in exported)
    assert not torch.equal(encoder["blocks.0.mlp.fc1.weight"], target["blocks.0.mlp.fc1.weight"]), "two sets of weights"
    name = "predictor.masked_head.weight"
    assert not torch.equal(filled.state_dict()[name], fresh.state_dict()[name])
    again = objective()
    load_initial_weights(again, source / "checkpoints/step_00000002")
    assert all(torch.equal(value, filled.state_dict()[name]) for name, value in again.state_dict().items())


def test_exported_weights_fill_encoder_and_target_and_leave_the_predictor(source: Path) -> None:
    filled, fresh = objective(), objective()
    assert load_initial_weights(filled, source / "exports/primary") == f"encoder and target of {source}/exports/primary"
    exported = vjepa.from_pretrained(source / "exports/primary").state_dict()
    for encoder in (filled.encoder, filled.exported):
        assert all(torch.equal(value, exported[name]) for name, value in encoder.state_dict().items())
    assert fresh.predictor is not None
    assert filled.predictor is not None
    before = fresh.predictor.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in filled.predictor.state_dict().items())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", seed=9), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def taught(source: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two steps: with the encoder's average as target, and by a frozen teacher with and without an average."""
    runs = {"ema": source}
    for name, average in (("none", "null"), ("average", "0.9")):
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        asked = [f"run_dir={runs[name]}", *SHORT, *frozen(teacher), f"objective.average={average}"]
        train(load_config("debug", "primary", asked), resume=False, stop=StopFlag())
    return runs


def frozen(teacher: Path) -> tuple[str, ...]:
    return ("objective.target=frozen", f"objective.teacher.path={teacher}")


def student(*overrides: str) -> JEPA:
    config = load_config("debug", "primary", ["run_dir=unused", *overrides])
    return build_objective(config.objective, config.model, config.predictor, seed=5)


@pytest.mark.parametrize(
    ("start", "wanted", "said"),
    [
        ("average", "average", "encoder, predictor and average of "),
        ("ema", "average", "encoder, predictor and target (as average) of "),
        ("average", "ema", "encoder, predictor and average (as target) of "),
        ("none", "average", "encoder and predictor of "),
        ("none", "ema", "encoder and predictor of "),
        ("average", "none", "encoder and predictor of "),
    ],
)
def test_what_follows_the_encoder_goes_on_from_what_followed_it_or_begins_as_it(
    start: str, wanted: str, said: str, taught: dict[str, Path], source: Path
) -> None:
    """The teacher of this recipe is another one than that of the run, of the same shapes: it stays."""
    other = source / "exports/primary"
    overrides = {"ema": (), "none": frozen(other), "average": (*frozen(other), "objective.average=0.9")}[wanted]
    filled = student(*overrides)
    told = load_initial_weights(filled, taught[start])
    path = taught[start] / "checkpoints/step_00000002"
    assert told.startswith(f"{said}{path}")
    assert ("begins as the encoder" in told) is (start == "none")
    run = load_config("debug", "primary", ["run_dir=unused"])
    trained, _ = build_models(run.model, run.predictor, seed=0)
    checkpoint.load_module(path, trained, "encoder")
    assert_equal(filled.encoder, trained)
    if wanted != "none":
        exported = vjepa.from_pretrained(taught[start] / "exports/primary")
        assert_equal(filled.exported, exported)
    if wanted != "ema":
        assert filled.target_encoder is not None
        assert_equal(filled.target_encoder, vjepa.from_pretrained(other))


@pytest.mark.parametrize(("start", "followed"), [("ema", "target"), ("none", None)])
def test_an_older_checkpoint_which_does_not_say_what_it_exports_is_read_by_its_target(
    start: str, followed: str | None, taught: dict[str, Path], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "read_meta", lambda _: {})
    filled = student() if start == "ema" else student(*frozen(teacher), "objective.average=0.9")
    told = load_initial_weights(filled, taught[start])
    assert told.startswith("encoder, predictor and target of " if followed else "encoder and predictor of ")
    assert_equal(filled.exported, vjepa.from_pretrained(taught[start] / "exports/primary"))


def test_an_export_fills_the_average_too(source: Path, teacher: Path) -> None:
    filled = student(*frozen(teacher), "objective.average=0.9")
    told = load_initial_weights(filled, source / "exports/primary")
    assert told == f"encoder and average of {source}/exports/primary"
    for encoder in (filled.encoder, filled.exported):
        assert_equal(encoder, vjepa.from_pretrained(source / "exports/primary"))


def assert_equal(found: Encoder, wanted: Encoder) -> None:
    theirs = wanted.state_dict()
    assert [name for name, value in found.state_dict().items() if not torch.equal(value, theirs[name])] == []


def test_the_predictor_of_an_export_comes_where_it_is_asked_for(source: Path) -> None:
    filled, fresh, export = objective(), objective(), source / "exports/primary"
    assert load_initial_weights(filled, export, predictor=True) == f"encoder, target and predictor of {export}"
    stored = vjepa.hub.predictor_from_pretrained(export)
    assert stored is not None
    assert filled.predictor is not None
    mine = filled.predictor.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in stored.state_dict().items())
    with pytest.raises(WeightsError, match=r"predictor of .* is another one: depth=1 here, 2 there"):
        load_initial_weights(objective("predictor.depth=1"), export, predictor=True)
    assert fresh.predictor is not None


def test_the_optimizer_goes_on_where_it_is_asked_to(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step with the averages of the run before is another step than one that begins without."""
    rates = ("train.optim.lr.start=1e-3", "train.optim.lr.warmup_steps=0", "train.steps=1", "data.workers=0")
    weights: dict[str, torch.Tensor] = {}
    for name in ("fresh", "carry"):
        asked = [f"run_dir={tmp_path / name}", *rates, f"init_from={source}", f"init_optimizer={name}"]
        train(load_config("debug", "primary", asked), resume=False, stop=StopFlag())
        path = tmp_path / name / "exports/primary"
        weights[name] = vjepa.from_pretrained(path).state_dict()["blocks.0.mlp.fc1.weight"]
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert '"lr": 0.001' in rows[0], "the rate is the new run's own"
    assert f"going on with the optimizer of {source}/checkpoints/step_00000002" in capsys.readouterr().out
    assert not torch.equal(weights["fresh"], weights["carry"])
    export = source / "exports/primary"
    asked = [f"run_dir={tmp_path / 'export'}", *rates, f"init_from={export}", "init_optimizer=carry"]
    train(load_config("debug", "primary", asked), resume=False, stop=StopFlag())
    assert "going on with the optimizer of" in capsys.readouterr().out, "an export lies in its run"
    shutil.copytree(export, tmp_path / "weights")
    asked = [f"run_dir={tmp_path / 'none'}", *rates, f"init_from={tmp_path / 'weights'}", "init_optimizer=carry"]
    with pytest.raises(ConfigError, match="exported weights hold no optimizer"):
        train(load_config("debug", "primary", asked), resume=False, stop=StopFlag())
    other = [
        f"run_dir={tmp_path / 'other'}",
        *rates,
        f"init_from={source}",
        "init_optimizer=carry",
        "objective.terms.context_prediction=null",
    ]
    with pytest.raises(CheckpointError, match=r"the optimizer of checkpoint .*context_head.*not trained here"):
        train(load_config("debug", "primary", other), resume=False, stop=StopFlag())


def test_the_run_begins_at_its_first_step_and_resumes_its_own(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"run_dir={tmp_path / 'run'}", *SHORT, f"init_from={source}"]
    train(load_config("debug", "primary", asked), resume=False, stop=StopFlag())
    assert f"starting from encoder, predictor and target of {source}" in capsys.readouterr().out
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    first = (source / "metrics.jsonl").read_text().splitlines()[0]
    assert rows[0].split('"loss": ')[1][:8] != first.split('"loss": ')[1][:8], (
        "from other weights than the initial ones"
    )
    train(load_config("debug", "primary", asked), resume=True, stop=StopFlag())
    assert "starting from" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "overrides", "error", "told"),
    [
        (lambda run: run / "nowhere", (), ConfigError, "is no run with a checkpoint, no exported folder"),
        (lambda run: run, ("model.depth=6", "model.levels=[6]"), CheckpointError, "has no model\\."),
        (lambda run: run / "exports/primary", ("model.patch_size=8",), WeightsError, "wrong shape: tokenizer"),
    ],
    ids=["nothing there", "another depth", "another patch size"],
)
def test_what_does_not_fit_is_refused(
    source: Path, place: Callable[[Path], Path], overrides: tuple[str, ...], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        load_initial_weights(objective(*overrides), place(source))
