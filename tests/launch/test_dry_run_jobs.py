"""What --dry-run shows of chains and arrays: every script that would be submitted, and SLURM's word on each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.submit import main as submit

SHAPE = ("--cluster", "slurm", "--profile", "example_gpu", "--nodes", "1", "--gpus-per-node", "4", "--mem", "400")


@pytest.fixture(autouse=True)
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that notes what it is asked, and the script."""
    asked, program = tmp_path / "asked", tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\nfor last; do :; done\n'
        'if grep -q "gpus-per-node=4" "$last"; then echo "sbatch: Job 1 to start at now"; else '
        'echo "sbatch: Job 2 to start at dawn"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return asked


def scripts(text: str) -> dict[str, dict[str, str]]:
    """Name of each script that was shown -> its #SBATCH options."""
    parts = re.split(r"^job script, (.*):$", text, flags=re.MULTILINE)[1:]
    return {
        Path(path.partition(" (")[0]).name: dict(
            re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, flags=re.MULTILINE)
        )
        for path, script in zip(parts[::2], parts[1::2], strict=True)
    }


def test_of_a_chain_every_jobs_script_is_shown_and_asked_about_after_the_plan(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits").mkdir()
    chain = ("--stage", "primary,cooldown,evals", "--recipe", "debug", "--eval-every", "5", "--dry-run")
    suites = f"evals={{motion: {{data: {tmp_path / 'digits'}, seeds: 1}}}}"
    assert submit([*chain, *SHAPE, f"run_dir={tmp_path / 'run'}", suites]) == 0
    text = capsys.readouterr().out
    found = scripts(text)
    order = ["primary.sbatch", "primary-checkpoint.sbatch", "cooldown.sbatch", "cooldown-checkpoint.sbatch"]
    assert list(found) == [*order, "evals.sbatch"]
    assert text.index("  primary: 40 steps in") < text.index("job script, ")
    assert text.count("sbatch --test-only: Job 1 to start at now") == 2
    assert text.count("sbatch --test-only: Job 2 to start at dawn") == 3
    assert "cooldown.sbatch (after primary has succeeded):" in text
    assert "launch.checkpoint_evals" in text
    assert len(sbatch.read_text().splitlines()) == 5
    assert "dependency" not in sbatch.read_text()
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_evaluations_ask_for_one_gpu_and_a_share_of_a_node_or_what_the_profile_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits").mkdir()
    chain = ("--stage", "primary,evals", "--recipe", "debug", "--dry-run", f"run_dir={tmp_path / 'run'}")
    suites = f"evals={{motion: {{data: {tmp_path / 'digits'}, seeds: 1}}}}"
    assert submit([*chain, *SHAPE, suites]) == 0
    found = scripts(capsys.readouterr().out)
    assert "exclusive" in found["primary.sbatch"]
    evals = found["evals.sbatch"]
    wanted = {"nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1", "mem": "102400M", "cpus-per-task": "14"}
    assert evals.items() >= wanted.items()
    assert "exclusive" not in evals, "one process does not take a node of eight GPUs"
    profile = tmp_path / "site.yaml"
    profile.write_text(
        "partition: big\ngpus_per_node: 4\nevals: {gpus: 2, cpus: 5, mem_gb: 30, time_min: 20, partition: small}\n"
    )
    assert submit([*chain, "--cluster", "slurm", "--profile", str(profile), suites]) == 0
    found = scripts(capsys.readouterr().out)
    wanted = {"gpus-per-node": "2", "cpus-per-task": "5", "mem": "30720M", "time": "20", "partition": "small"}
    assert found["evals.sbatch"].items() >= wanted.items()
    assert found["primary.sbatch"]["partition"] == "big"


def test_of_a_sweep_the_array_is_shown_with_an_element_and_the_job_behind_it(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("--recipe", "debug", "--sweep", "train.seed=1,2,3", "--method", "grid", "--jobs", "2")
    command = [*sweep, "--dry-run", *SHAPE, f"run_dir={tmp_path / 'sweep'}"]
    assert submit(command) == 0
    text = capsys.readouterr().out
    found = scripts(text)
    assert [name.partition("_")[0] for name in found] == ["runs.sbatch", "01", "gather.sbatch"]
    assert found["runs.sbatch"]["gpus-per-node"] == "4"
    assert found["gather.sbatch"]["gpus-per-node"] == "1", "judging evaluates encoders"
    assert sbatch.read_text().splitlines()[0].startswith("--test-only --array=0,1,2%2 ")
    assert "as 2 others, each with its own order" in text
    assert not (tmp_path / "sweep").exists(), "nothing is written"
    assert submit([*command, "--method", "bisect"]) == 2


def test_of_slices_the_array_is_shown_and_asks_for_no_gpu(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "ingest", "--slices=3", "--dry-run", *SHAPE, "--"]
    assert submit([*words, str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    found = scripts(capsys.readouterr().out)
    assert list(found) == ["ingest.sbatch", "ingest-000-of-003.sbatch", "join.sbatch"]
    assert all("gpus-per-node" not in options for options in found.values())
    assert len(sbatch.read_text().splitlines()) == 3
    assert not (tmp_path / "out").exists()


def test_a_job_that_cannot_start_is_status_2(tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.write_text('#!/bin/sh\necho "sbatch: error: Requested node configuration is not available" >&2; exit 1\n')
    words = ["prepare", "ingest", "--slices=3", "--dry-run", *SHAPE, "--"]
    assert submit([*words, str(tmp_path), f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr()
    assert told.err.count("cannot start") == 1, "once for all"
    assert told.out.count("job script, ") == 3
