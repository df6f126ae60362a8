"""Many jobs of one kind as one SLURM array: the runs of a sweep, the parts of a data preparation.

Every element has an order and a job script of its own, as a single job has (slurm_submit.py), with its supervisor and
its restarts; the array's script does no more than start the one of its index. At most `--jobs` elements run at a time.
A last job, behind the array, gathers or joins what the elements have left.
"""

from __future__ import annotations

import pickle
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from launch.cluster_profile import ClusterProfile
from launch.command_task import CommandTask
from launch.job_order import JobOrder, note_job, write_whole
from launch.prepare import prepare_data
from launch.processes import Trainings
from launch.resubmit import sbatch
from launch.search import SweepError, Trial, Values
from launch.slurm_chain import Submission, processors, write_script
from launch.sweep import Sweep, run_name
from launch.sweep_record import Record
from launch.sweep_runs import RealRuns, sweep_values
from vjepa.config import ConfigError
from vjepa.train.run_dir import RunDir

OF_ONE = ("#SBATCH --job-name", "#SBATCH --output")  # lines of an element's script that the array has its own of


def submit_array(
    submission: Submission,
    name: str,
    scripts: Sequence[Path],
    *,
    profile: ClusterProfile,
    indices: Sequence[int],
    at_once: int,
) -> str:
    """One array over job scripts, of which `indices` are to run, `at_once` at a time; its number."""
    folder = submission.root / "job"
    script = folder / f"{name}.sbatch"
    write_whole(script, array_script(name, folder, scripts))
    job = sbatch(script, f"--array={','.join(map(str, indices))}%{at_once}")
    row = _row(submission, name, script, profile) | {"array": len(scripts), "at_once": at_once}
    note_job(submission.root, row, job, None)
    return job


def array_script(name: str, folder: Path, scripts: Sequence[Path]) -> str:
    """The script of an array whose element i is scripts[i]; all of them ask for the same."""
    head = [line for line in scripts[0].read_text().splitlines() if line.startswith("#SBATCH")]
    head = [line for line in head if not line.startswith(OF_ONE)]
    quoted = shlex.quote(str(folder))
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {len(scripts)} jobs as one array; each has a script of its own, which can be run alone",
            *head,
            f"#SBATCH --job-name={name}",
            f"#SBATCH --output={folder}/%A_%a.out",
            f"scripts=({' '.join(shlex.quote(str(script)) for script in scripts)})",
            'script="${scripts[$SLURM_ARRAY_TASK_ID]}"',
            "# the number by which SLURM knows this element alone: its plain one may be that of the whole array",
            'export VJEPA_ELEMENT="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            f'mkdir -p {quoted}/"$SLURM_JOB_ID" && ln -sfn "$SLURM_JOB_ID" {quoted}/"$VJEPA_ELEMENT"',
            "unset ${!SLURM_ARRAY_@}  # submitit would look for its files under another number",
            'exec bash "$script"',
            "",
        ]
    )


def _row(submission: Submission, stage: str, script: Path, profile: ClusterProfile) -> dict[str, object]:
    return {
        "stage": stage,
        "script": str(script),
        "snapshot": submission.snapshot,
        "run_dir": str(submission.root),
        "profile": submission.profile_name,
        "nodes": profile.nodes,
        "tasks_per_node": profile.ranks_per_node,
        "gpus_per_node": profile.gpus_per_node,
        "array": None,
    }


def submit_last(
    submission: Submission, order: JobOrder, command: Sequence[str], array: str | None, *, when: str
) -> str:
    """The job behind the array: `afterok` or `afterany`."""
    profile = submission.shape(is_command=True)
    order.write()
    write_script(order, profile, CommandTask(order.file("json"), [command]))
    behind = () if array is None else (f"--dependency={when}:{array}", "--kill-on-invalid-dep=yes")
    job = sbatch(order.file("sbatch"), *behind)
    row = _row(submission, order.stage, order.file("sbatch"), profile) | {"when": when}
    note_job(submission.root, row, job, array)
    return job


# -------------------------------------------------------------------------------------------------------------- sweeps


def submit_sweep(sweep: Sweep, profile: ClusterProfile, profile_name: str, *, jobs: int, resume: bool) -> list[str]:
    """The runs of a grid or of draws as an array, and a job that judges them into sweep.json; what to tell people."""
    if sweep.method == "bisect":
        raise SweepError(
            "--method bisect decides after every run which one is next, and would queue for each of them: use --method "
            "grid or random with --cluster slurm, or run the bisection with --cluster local inside one job"
        )
    sweep = replace(sweep, folder=sweep.folder.resolve())
    Record(sweep, resume=resume)  # refuses another sweep's folder
    points = sweep.planned()
    names = [run_name(index, values) for index, values in enumerate(points)]
    configs = [sweep.config(values, name) for name, values in zip(names, points, strict=True)]
    for config in configs:
        config.check(profile.world)
    left = [index for index, name in enumerate(names) if not (sweep.folder / name / "summary.json").is_file()]
    prepare_data(configs[0])  # once, before runs that would all make it
    submission = Submission.begin(sweep.folder, profile, profile_name)
    scripts = []
    for name, config in zip(names, configs, strict=True):
        order, task = submission.write_training(config, name)
        write_script(order, profile, task)
        scripts.append(order.file("sbatch"))
    array = submit_array(submission, "runs", scripts, profile=profile, indices=left, at_once=jobs) if left else None
    pickled = submission.root / "job" / "sweep.pkl"
    pickled.write_bytes(pickle.dumps(sweep))
    order = replace(submission.order(configs[0], "gather", is_command=True), run_dir=str(submission.root))
    command = [sys.executable, "-m", "launch.job_array", str(pickled), str(processors(profile))]
    last = submit_last(submission, order, command, array, when="afterany")
    lines = [] if array is None else [f"job {array}: {len(left)} runs of {sweep.steps} steps, {jobs} at a time"]
    return [*lines, f"job {last}: judges them into {sweep.folder}/sweep.json"]


class FinishedRuns(RealRuns):
    """Judges runs that jobs have trained; one that is not finished has failed."""

    def __call__(self, name: str, values: Values) -> Trial:
        if not (self.sweep.folder / name / "summary.json").is_file():
            return Trial(values, "failed", None, note="its job did not finish: see `submit.py status`")
        return super().__call__(name, values)


def gather(sweep: Sweep, *, jobs: int) -> None:
    """sweep.json and the table of a sweep whose runs were jobs."""
    with closing(RunDir(sweep.folder)) as held, Trainings() as trainings:
        held.lock()
        sweep_values(Record(sweep, resume=True), FinishedRuns(sweep, trainings), jobs=jobs)


# --------------------------------------------------------------------------------------------------------- preparation


def submit_slices(
    tool: str,
    arguments: Sequence[str],
    count: int,
    profile: ClusterProfile,
    profile_name: str,
    *,
    out: Path,
    jobs: int,
) -> list[str]:
    """A preparation tool over `count` parts as an array, and a job that joins them; what to tell people."""
    submission = Submission.begin(out, profile, profile_name)
    shape = submission.shape(is_command=True)
    base = [sys.executable, "-m", f"data_pipeline.prepare.{tool}", *arguments]
    if not any(word.startswith("--jobs") for word in arguments):
        base.append(f"--jobs={processors(profile)}")
    scripts = []
    for index in range(count):
        order = submission.plain_order(tool, f"{tool}-{index:03d}-of-{count:03d}")
        order.write()
        write_script(order, shape, CommandTask(order.file("json"), [[*base, "--quiet", f"--shard={index}/{count}"]]))
        scripts.append(order.file("sbatch"))
    array = submit_array(submission, tool, scripts, profile=shape, indices=range(count), at_once=jobs)
    # The part that ends last joins them, unless two ended together or on a file system that shows things late.
    order = submission.plain_order(tool, "join")
    last = submit_last(submission, order, [*base, "--quiet", f"--shard=0/{count}"], array, when="afterok")
    return [
        f"job {array}: {tool} in {count} parts, {jobs} at a time",
        f"job {last}: joins them in {out}",
        f"what is going on: python launch/submit.py status {out}",
    ]


def check_tool(tool: str, arguments: Sequence[str], count: int) -> Path:
    """Refuse what the tool itself would refuse in every job; where its output goes."""
    from importlib import import_module

    if tool not in TOOLS:
        raise ConfigError(f"prepare {tool}: tools that work in parts are {', '.join(TOOLS)}")
    if count < 2:
        raise ConfigError(f"--slices {count} must be at least 2: run python -m data_pipeline.prepare.{tool} for one")
    tool_parser = import_module(f"data_pipeline.prepare.{tool}")._parser()  # what it is given is read by itself
    try:
        parsed = tool_parser.parse_args([*arguments, f"--shard=0/{count}"])
    except SystemExit:
        raise ConfigError(f"prepare {tool}: its arguments are not right, see above") from None
    return Path(parsed.out)


TOOLS: Mapping[str, str] = {
    "ingest": "videos and images to shards",
    "dedup": "near-duplicates left out",
    "filter": "records left out by what they measure",
}


def main(argv: Sequence[str]) -> None:
    path, jobs = argv
    gather(pickle.loads(Path(path).read_bytes()), jobs=int(jobs))


if __name__ == "__main__":
    main(sys.argv[1:])
