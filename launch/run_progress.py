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


def read_progress(run_dir: Path, config: Path | None = None) -> Progress:
    """What a run's files say; `config` where the run has not begun and holds none yet."""
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
        alarms=[*_standing(meta, train), *_troubles(run_dir, meta)],
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
    """The last complete rows; the first may be cut by where we begin to read, the last by a writer or a kill."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        begin = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(begin)
        lines = file.read().split(b"\n")[1 if begin else 0 : -1]
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a tail is for people: `--resume` names a broken line
            continue
    return [row for row in rows if "step" in row]


def checkpoints(folder: Path) -> dict[int, Path]:
    """Complete ones, as vjepa.train.checkpoint.committed finds them."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := STEP.match(path.name))}
    return {step: path for step, path in found.items() if (path / "COMMITTED").is_file()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # retired while we look
        return {}


def _standing(meta: dict[str, Any], train: dict[str, Any]) -> list[str]:
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
