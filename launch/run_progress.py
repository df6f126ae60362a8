"""How far a training is, from the files of its run: steps, loss, time to go, health. Without torch: in a moment."""

from __future__ import annotations

import fcntl
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

TAIL_BYTES = 1 << 19  # of metrics.jsonl: some hundred rows
TIMED_ROWS = 50  # whose median step is the speed
STEP = re.compile(r"step_(\d{8,})$")
ALARM = re.compile(r"ALARM at step (\d+): (.*)")  # as vjepa.train.record says it in rank 0's log
IN_A_ROW = "evaluations in a row"  # in alarms of collapse, which are said again at every evaluation while they stand


@dataclass(frozen=True)
class Progress:
    """Of one training."""

    step: int = 0
    steps: int | None = None
    loss: float | None = None
    step_seconds: float | None = None
    checkpoint: int | None = None
    """Steps of the newest complete one."""
    alarms: list[str] = field(default_factory=list)
    is_finished: bool = False

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last steps; without queues, requeues and saves."""
        if self.steps is None or self.step_seconds is None:
            return None
        return (self.steps - self.step) * self.step_seconds


def read_progress(run_dir: Path, config: Path | None = None, log: Path | None = None) -> Progress:
    """What a run's files say; `config` where the run has not begun and holds none yet, `log` is that of rank 0."""
    settings = _settings(run_dir / "config.yaml") or (_settings(config) if config is not None else {})
    train = settings.get("train", {})
    rows = _last_rows(run_dir / "metrics.jsonl")
    found = checkpoints(run_dir / "checkpoints")
    meta = _json(found[max(found)] / "meta.json") if found else {}
    seconds = [row["step_seconds"] for row in rows[-TIMED_ROWS:] if "step_seconds" in row]
    return Progress(
        step=rows[-1]["step"] if rows else max(found, default=0),
        steps=train.get("steps"),
        loss=rows[-1].get("loss") if rows else None,
        step_seconds=statistics.median(seconds) if seconds else None,
        checkpoint=max(found, default=None),
        alarms=[*_standing(meta, train, rows, max(found, default=0), log), *_troubles(run_dir, meta)],
        is_finished=(run_dir / "exports" / str(settings.get("stage")) / "config.json").is_file(),
    )


def is_held(run_dir: Path) -> str | None:
    """Who trains into a run directory now (`pid 17 on HOST`); None where nobody does."""
    lock = run_dir / ".lock"
    if not lock.is_file():
        return None
    with lock.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back at once
        except OSError:
            file.seek(0)
            return file.read().strip() or "another process"
    return None


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last complete rows."""
    rows = []
    for line in _last_lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError:  # a tail is for people: `--resume` names a broken line
            continue
    return [row for row in rows if "step" in row]


def _last_lines(path: Path) -> list[bytes]:
    """The last complete lines; the first may be cut by where we begin to read, the last by a writer or a kill."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        begin = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(begin)
        return file.read().split(b"\n")[1 if begin else 0 : -1]


def checkpoints(folder: Path) -> dict[int, Path]:
    """Complete ones, as vjepa.train.checkpoint.committed finds them."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := STEP.match(path.name))}
    return {step: path for step, path in found.items() if (path / "COMMITTED").is_file()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # retired while we look
        return {}


def _standing(
    meta: dict[str, Any], train: dict[str, Any], rows: list[dict[str, Any]], checkpoint: int, log: Path | None
) -> list[str]:
    """Collapse alarms that stand at the last evaluation, and what else was said since the newest checkpoint."""
    evaluated = max((row["step"] for row in rows if any(key.startswith("diag/") for key in row)), default=0)
    raised = {} if log is None else _raised(log, after=checkpoint)
    said = [f"{text} (step {step})" for step, texts in raised.items() for text in texts if IN_A_ROW not in text]
    if evaluated <= checkpoint or log is None:
        return [*_standing_at_checkpoint(meta, train), *said]
    return [*(text for text in raised.get(evaluated, []) if IN_A_ROW in text), *said]


def _raised(log: Path, *, after: int) -> dict[int, list[str]]:
    """The alarms in a log of rank 0 by their step; a step that a restart has made again counts once."""
    found: dict[int, list[str]] = {}
    for line in _last_lines(log):
        if match := ALARM.search(line.decode(errors="replace")):
            step, text = int(match[1]), match[2].strip()
            found = {other: texts for other, texts in found.items() if other <= step}
            if step > after and text not in found.setdefault(step, []):
                found[step].append(text)
    return found


def _standing_at_checkpoint(meta: dict[str, Any], train: dict[str, Any]) -> list[str]:
    """Collapse alarms that stood at the newest checkpoint: its measures broke their rules so many times in a row."""
    state = meta.get("recorder", {}).get("alarms", {})
    consecutive = train.get("alarms", {}).get("consecutive", 2)
    return [
        f"collapse: {name} breaks its rule since step {state.get('since', {}).get(name, 0):.0f}"
        for name, strikes in state.get("strikes", {}).items()
        if strikes >= consecutive
    ]


def _troubles(run_dir: Path, meta: dict[str, Any]) -> list[str]:
    """What was not sound and is written down: steps, roll backs, samples, hanging ranks."""
    found = []
    if incidents := sorted(path.name for path in run_dir.glob("incidents/step_*")):
        found.append(f"{len(incidents)} steps that were not sound ({run_dir}/incidents, the last {incidents[-1]})")
    if meta.get("roll_backs"):
        found.append(f"{meta['roll_backs']} roll backs")
    if skipped := meta.get("recorder", {}).get("health", {}).get("skipped"):
        found.append(f"{skipped:.0f} steps skipped")
    if bad := _count_lines(run_dir / "bad_samples.jsonl"):
        found.append(f"{bad} bad samples replaced (bad_samples.jsonl)")
    if stacks := [path.name for path in run_dir.glob("stacks/*.txt") if path.stat().st_size]:
        found.append(f"{len(stacks)} ranks have reported that they hung ({run_dir}/stacks)")
    return found


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
