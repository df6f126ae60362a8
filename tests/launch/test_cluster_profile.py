"""What a cluster's profile may say, and what is refused before anything is queued."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from launch.cluster_profile import CLUSTERS, ClusterProfile, load_profile, minutes
from launch.destination import choose_recipe, choose_site
from launch.submit import load_for, parser
from launch.submit import main as submit
from vjepa.config import ConfigError, read_recipe


@pytest.fixture(autouse=True)
def no_profile_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VJEPA_CLUSTER", raising=False)


def test_the_example_says_every_key_there_is() -> None:
    said = set(read_recipe(CLUSTERS / "example_gpu.yaml"))
    assert said == {field.name for field in fields(ClusterProfile)}


def test_a_profile_has_one_rank_for_each_gpu_unless_it_says_otherwise() -> None:
    assert load_profile("example_gpu").world == 32 * 8
    assert load_profile("private_test").world == 4
    assert load_profile("example_gpu", ["nodes=2", "tasks_per_node=1"]).world == 2
    assert ClusterProfile().world == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["partitoin=gpu"], "partitoin"),
        (["nodes=0"], "nodes=0 must be at least 1"),
        (["gpus_per_node=many"], "gpus_per_node"),
        (["signal_delay_s=20"], "signal_delay_s=20 must be at least 60"),
        (["data.sound.mine=/shards"], "data.sound is unknown"),
        (["extra.open-mode=truncate"], "extra.open-mode is set by the job script itself"),
    ],
)
def test_a_mistake_is_named_with_its_key(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster profile private_test: .*{words}"):
        load_profile("private_test", overrides)


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'example_gpu'.*private_test"):
        load_profile("exampel_gpu")


def test_a_profile_may_be_any_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {CLUSTERS}/example_gpu.yaml\nnodes: 4\n")
    assert load_profile(str(path)).world == 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("45:30", 46), ("1:30:00", 90), ("2-12", 60 * 60), ("1-00:30:00", 1470), ("1-01:05", 1505)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_a_time_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--time 2h"):
        minutes("2h")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "private_test", "--nodes", "5", "--tasks-per-node", "1"], ["train.batch.video=12", "5"]),
        (["--profile", "private_test", "trian.steps=3"], ["trian"]),
        (["--profile", "private_test", "--nodes", "many"], ["nodes", "many"]),
        (["--profile", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["--profile", "private_test", "--stage", "destil"], ["no stage 'destil'"]),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--recipe", "debug", "--cluster", "slurm", *arguments, f"run_dir={tmp_path}/run"]
    assert submit(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_flags_for_a_cluster_are_refused_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["--recipe", "debug", "--cluster", "local", "--nodes", "2", f"run_dir={tmp_path}"]) == 2
    assert "(asked for), and nodes=2 is for a cluster" in capsys.readouterr().err


def fake_sbatch(folder: Path) -> str:
    """A PATH on which there is an sbatch; the test ends before it would be called."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    return f"{folder}/bin:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("variable", "is_there", "cluster", "why"),
    [
        ("private_test", True, "slurm", "sbatch is on PATH and $VJEPA_CLUSTER names a cluster; "),
        (None, True, "local", "neither --profile nor $VJEPA_CLUSTER is set; "),
        ("private_test", False, "local", "there is no sbatch on PATH; profile private_test is not used; "),
    ],
)
def test_auto_takes_a_cluster_that_is_there_and_named(
    variable: str | None, is_there: bool, cluster: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", fake_sbatch(tmp_path) if is_there else str(tmp_path))
    if variable is not None:
        monkeypatch.setenv("VJEPA_CLUSTER", variable)
    site = choose_site(parser().parse_intermixed_args([]))
    assert site.cluster == cluster
    assert site.why.startswith(why)
    assert "--cluster local" in site.why or "--cluster slurm --profile NAME" in site.why


def test_a_profile_that_names_data_makes_the_largest_recipe_the_default(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        f"extends: {CLUSTERS}/example_gpu.yaml\ndata: {{video: {{mine: /shards/v}}, image: {{mine: /shards/i}}}}\n"
    )
    arguments = parser().parse_intermixed_args(["--cluster", "slurm", "--profile", str(path)])
    site = choose_site(arguments)
    arguments.recipe, why = choose_recipe(None, site)
    assert arguments.recipe == "vit_gigantic"
    assert "names data" in why
    config = load_for(site, arguments, is_recipe_asked=False)
    assert config.data.video.sources["mine"].path == "/shards/v"
    assert config.data.image.sources["mine"].path == "/shards/i"
    arguments.recipe, arguments.overrides = "debug", ["train.batch.video=3072", "train.batch.image=4608"]
    assert list(load_for(site, arguments, is_recipe_asked=True).data.video.sources) == ["debug"]
