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
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster_profile import ClusterProfile
from launch.config import RunConfig
from launch.job_order import JobOrder, job_folder, note_job, write_whole
from launch.planned_job import PlannedJob, Shown, show
from launch.prepare import prepare_data
from launch.processes import Trainings
from launch.resubmit import sbatch
from launch.search import SweepError, Trial, Values
from launch.slurm_chain import Submission, processors
from launch.sweep import Sweep, run_name
from launch.sweep_record import Record
from launch.sweep_runs import RealRuns, sweep_values
from vjepa.train.run_dir import RunDir

OF_ONE = ("#SBATCH --job-name", "#SBATCH --output")  # lines of an element's script that the array has its own of


@dataclass(frozen=True)
class PlannedArray:
    """Jobs of one shape as one array, of which `indices` are to run, `at_once` at a time."""

    name: str
    elements: Sequence[PlannedJob]
    indices: Sequence[int]
    at_once: int

    @property
    def order(self) -> JobOrder:
        """An element's, under the name of the whole."""
        first = self.elements[0].order
        return replace(first, stage=self.name, run_dir=first.root)

    @property
    def options(self) -> tuple[str, ...]:
        return (f"--array={','.join(map(str, self.indices))}%{self.at_once}",)

    def text(self) -> str:
        """The script, whose element i starts the script of elements[i]; all of them ask for the same."""
        head = [line for line in self.elements[0].text().splitlines() if line.startswith("#SBATCH")]
        head = [line for line in head if not line.startswith(OF_ONE)]
        folder, scripts = self.order.folder, [str(element.script) for element in self.elements]
        quoted = shlex.quote(str(folder))
        return "\n".join(
            [
                "#!/bin/bash",
                f"# {len(scripts)} jobs as one array; each has a script of its own, which can be run alone",
                *head,
                f"#SBATCH --job-name={self.name}",
                f"#SBATCH --output={folder}/%A_%a.out",
                f"scripts=({shlex.join(scripts)})",
                'script="${scripts[$SLURM_ARRAY_TASK_ID]}"',
                "# the number by which SLURM knows this element alone: its plain one may be that of the whole array",
                'export VJEPA_ELEMENT="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
                f'mkdir -p {quoted}/"$SLURM_JOB_ID" && ln -sfn "$SLURM_JOB_ID" {quoted}/"$VJEPA_ELEMENT"',
                "unset ${!SLURM_ARRAY_@}  # submitit would look for its files under another number",
                'exec bash "$script"',
                "",
            ]
        )

    def submit(self) -> str:
        """Write the scripts of all elements and queue the array; its number."""
        for element in self.elements:
            element.write()
        script = self.order.file("sbatch")
        write_whole(script, self.text())
        job = sbatch(script, *self.options)
        note_job(self.order.root, self.order.row() | {"array": len(self.elements), "at_once": self.at_once}, job, None)
        return job


@dataclass(frozen=True)
class ArrayJobs:
    """An array, where anything of it is left to be done, and the job behind it."""

    array: PlannedArray | None
    last: PlannedJob
    when: str
    """What the last job waits for: `afterok`, that all elements succeed; `afterany`, that all end."""

    def submit(self) -> tuple[str | None, str]:
        """Queue both; their numbers."""
        array = None if self.array is None else self.array.submit()
        return array, self.last.submit_behind(array, when=self.when)

    def dry_run(self) -> int:
        """Print the scripts of the array, of its first element and of the last job, and what SLURM says to them."""
        scripts = [Shown(self.last.script, self.last.text(), note="after the array" if self.array else "")]
        if self.array is not None:
            first, *others = (self.array.elements[index] for index in self.array.indices)
            alike = f", as {len(others)} others, each with its own order" if others else ""
            scripts = [
                Shown(self.array.order.file("sbatch"), self.array.text(), self.array.options, "the array"),
                Shown(first.script, first.text(), note=f"started by the array{alike}"),
                *scripts,
            ]
        return show(scripts)


# -------------------------------------------------------------------------------------------------------------- sweeps


def submit_sweep(sweep: Sweep, profile: ClusterProfile, profile_name: str, *, jobs: int, resume: bool) -> list[str]:
    """The runs of a grid or of draws as an array, and a job that judges them into sweep.json; what to tell people."""
    sweep, configs = _checked(sweep, profile, resume=resume)
    prepare_data(next(iter(configs.values())))  # once, before runs that would all make it
    submission = Submission.begin(sweep.folder, profile, profile_name)
    planned = _plan_sweep(sweep, configs, submission, jobs=jobs)
    _pickled(sweep).write_bytes(pickle.dumps(sweep))
    array, last = planned.submit()
    left = [] if planned.array is None else planned.array.indices
    lines = [] if array is None else [f"job {array}: {len(left)} runs of {sweep.steps} steps, {jobs} at a time"]
    return [*lines, f"job {last}: judges them into {sweep.folder}/sweep.json"]


def dry_run_sweep(sweep: Sweep, profile: ClusterProfile, profile_name: str, *, jobs: int, resume: bool) -> int:
    """What `submit_sweep` would submit; status 2 where SLURM cannot start it."""
    sweep, configs = _checked(sweep, profile, resume=resume)
    return _plan_sweep(sweep, configs, Submission.plan(sweep.folder, profile, profile_name), jobs=jobs).dry_run()


def _checked(sweep: Sweep, profile: ClusterProfile, *, resume: bool) -> tuple[Sweep, dict[str, RunConfig]]:
    """The sweep in its absolute folder and the configurations of its runs; what cannot be run is refused."""
    if sweep.method == "bisect":
        raise SweepError(
            "--method bisect decides after every run which one is next, and would queue for each of them: use --method "
            "grid or random with --cluster slurm, or run the bisection with --cluster local inside one job"
        )
    sweep = replace(sweep, folder=sweep.folder.resolve())
    Record(sweep, resume=resume)  # refuses another sweep's folder
    names = {run_name(index, values): values for index, values in enumerate(sweep.planned())}
    configs = {name: sweep.config(values, name) for name, values in names.items()}
    for config in configs.values():
        config.check(profile.world)
    return sweep, configs


def _plan_sweep(sweep: Sweep, configs: Mapping[str, RunConfig], submission: Submission, *, jobs: int) -> ArrayJobs:
    """The runs that are not finished, and the job that judges all."""
    elements = [submission.training(config, name) for name, config in configs.items()]
    left = [index for index, name in enumerate(configs) if not (sweep.folder / name / "summary.json").is_file()]
    array = PlannedArray("runs", elements, left, jobs) if left else None
    share = submission.profile.evals
    at_once = str(processors(submission.profile.of_one_process(share)))
    command = [sys.executable, "-m", "launch.job_array", str(_pickled(sweep)), at_once]
    return ArrayJobs(array, submission.plain_command(sweep.recipe, "gather", share, [command]), "afterany")


def _pickled(sweep: Sweep) -> Path:
    return job_folder(sweep.folder) / "sweep.pkl"


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


def main(argv: Sequence[str]) -> None:
    path, jobs = argv
    gather(pickle.loads(Path(path).read_bytes()), jobs=int(jobs))


if __name__ == "__main__":
    main(sys.argv[1:])
