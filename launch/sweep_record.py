"""What a sweep leaves: DIR/sweep.json after every run, lines and a table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launch.search import SweepError, Trial, Values
from launch.sweep import Sweep
from vjepa.train.run_dir import write_text


class Record:
    """DIR/sweep.json and what is printed: every run with its values, health, score and what follows from it."""

    def __init__(self, sweep: Sweep, *, resume: bool) -> None:
        self.sweep, self.path = sweep, sweep.folder / "sweep.json"
        self._runs: dict[str, dict[str, Any]] = {}
        self._before: dict[str, dict[str, Any]] = {}
        self._read(resume)

    def _read(self, resume: bool) -> None:
        if not self.path.is_file():
            return
        if not resume:
            raise SweepError(f"{self.path} exists: continue that sweep with --resume, or choose another run_dir=...")
        try:
            stored = json.loads(self.path.read_text())
            before, self._before = stored["settings"], stored["runs"]
        except (ValueError, KeyError) as error:
            raise SweepError(f"{self.path} is not readable ({error!r}): move it away; finished runs stay") from error
        now = self.sweep.settings()
        if changed := [f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            raise SweepError("--resume goes on with the same sweep, but the command changes " + "; ".join(changed))

    def finished(self) -> dict[str, Trial]:
        """Runs of an earlier segment that need not be run again; failed ones are tried again."""
        trials = {name: _trial(entry) for name, entry in self._before.items()}
        return {name: trial for name, trial in trials.items() if trial.status == "finished"}

    @property
    def trials(self) -> list[Trial]:
        return [_trial(entry) for entry in self._runs.values()]

    def add(self, name: str, trial: Trial, decision: str) -> None:
        """Print a run's line and write it down."""
        self._runs[name] = asdict(trial) | {"decision": decision}
        print(f"  {words(dict(trial.values))}: {describe(trial)}" + (f"; {decision}" if decision else ""), flush=True)
        self._write(None)

    def _write(self, chosen: dict[str, Any] | None) -> None:
        # Runs of an earlier segment that were not reached again stay until they are.
        runs = self._before | self._runs
        content = {"settings": self.sweep.settings(), "runs": dict(sorted(runs.items())), "chosen": chosen}
        self.sweep.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(content, indent=2) + "\n")

    def close(self, best: Trial | None) -> None:
        """Print the table and the choice."""
        print(f"\n{table(self.trials)}")
        failed = [name for name, entry in self._runs.items() if entry["status"] == "failed"]
        if failed:
            print(f"failed: {', '.join(failed)} (logs: {self.sweep.folder}/NAME/log.txt; --resume tries them again)")
        if best is None:
            print("no run is healthy: widen the range, train longer (--steps), or look at the alarms above")
            self._write(None)
            return
        values = dict(best.values)
        command = self.sweep.command(values)
        self._write({"values": values, "score": best.score, "command": command})
        print(f"chosen: {words(values)} (score {best.score:.4f} of {len(self.trials)} runs); train with it: {command}")


def words(values: Values) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _trial(entry: dict[str, Any]) -> Trial:
    fields: dict[str, Any] = {name: value for name, value in entry.items() if name != "decision"}
    fields["alarms"] = None if entry["alarms"] is None else tuple(entry["alarms"])
    return Trial(**fields)


def describe(trial: Trial) -> str:
    """Health and score in words."""
    if trial.status == "failed":
        return f"FAILED ({trial.note})"
    score = "no score" if trial.score is None else f"score {trial.score:.4f}"
    return f"{health(trial)}, {score}, {trial.seconds:.0f} s"


def health(trial: Trial) -> str:
    if trial.alarms is None:
        return "health not judged (too few evaluations after the warm-up of the alarms)"
    if not trial.alarms:
        return "healthy"
    shown = ", ".join(trial.alarms[:2]) + (", ..." if len(trial.alarms) > 2 else "")
    return f"unhealthy ({len(trial.alarms)} alarms: {shown})"


def table(trials: Sequence[Trial]) -> str:
    """All runs in the order of their values, each with its scores."""
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.scores))
    rows = [["run", "health", "score", *tasks]]
    for trial in sorted(trials, key=lambda trial: [_order(value) for value in trial.values.values()]):
        state = {None: "not judged", (): "healthy"}.get(trial.alarms, f"{len(trial.alarms or ())} alarms")
        score = "" if trial.score is None else f"{trial.score:.4f}"
        cells = [f"{trial.scores[task]:.3f}" if task in trial.scores else "" for task in tasks]
        rows.append([words(dict(trial.values)), "failed" if trial.status == "failed" else state, score, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _order(value: str) -> tuple[bool, float, str]:
    """Numbers by their size, before words."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value
