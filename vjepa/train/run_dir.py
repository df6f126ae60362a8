"""The run directory: what belongs to a run, who may write to it, and how it is cut back on resume (DESIGN 6)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

log = logging.getLogger(__name__)
LOCK_PATIENCE_S = 15.0
PACKAGES = ("torch", "torchcodec", "av", "webdataset", "omegaconf", "submitit", "xformers", "numpy")


class RunDirError(ValueError):
    """A run directory that must not be used as asked; the message says what to do."""


class RunInUseError(RunDirError):
    """A run directory that another process holds; it may be one that is about to end."""


class RunDir:
    """One run's folder; the main rank alone locks it and writes to it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def refuse_existing(self) -> None:
        """Starting over an existing run would destroy it: only --resume may go on in it."""
        if self.config.exists() or self.checkpoints.exists():
            raise RunDirError(
                f"{self.path} holds a run already: continue it with --resume, or choose another run_dir=..., or move "
                "the folder away"
            )

    def make(self) -> None:
        """Make the folder; one that cannot be made or written is refused."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise RunDirError(
                f"{self.path} cannot be written ({error.strerror}): choose another run_dir=..."
            ) from error

    def lock(self) -> None:
        """Take the run for this process; a run that another live process holds is refused.

        A record lock: forked data workers do not inherit it, and it dies with the process.
        """
        self.make()
        self._lock = (self.path / ".lock").open("a+")
        deadline = time.monotonic() + LOCK_PATIENCE_S  # the process that held it may be dying just now
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    self._lock.seek(0)
                    holder = self._lock.read().strip() or "unknown process"
                    self.close()
                    raise RunInUseError(
                        f"{self.path} is in use by another process ({holder}): two processes must not train into one "
                        "run directory. Stop it first, or choose another run_dir=..."
                    ) from error
                time.sleep(0.2)
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {platform.node()}\n")
        self._lock.flush()

    def close(self) -> None:
        """Let go of the run; the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def describe(self, config_yaml: str, source_folder: Path) -> None:
        """Write config.yaml, append to command.txt, and record versions, devices and the state of the source.

        A resumed run keeps the record of each of its starts: environment.json, environment_2.json, ...
        """
        write_text(self.config, config_yaml)
        with (self.path / "command.txt").open("a") as file:
            file.write(shlex.join([sys.executable, *sys.orig_argv[1:]]) + "\n")
        starts = len(list(self.path.glob("environment*.json"))) + 1
        name = "environment.json" if starts == 1 else f"environment_{starts}.json"
        write_text(self.path / name, json.dumps(environment(source_folder), indent=2) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop metrics and bad samples that were logged after `step`: they will be logged again."""
        if step and not self.metrics.exists():
            log.warning(
                "%s is gone, and with it the rows up to step %d: the run goes on without them", self.metrics, step
            )
        for path in (self.metrics, self.bad_samples):
            if path.exists():
                cut_jsonl(path, lambda row: row["step"] <= step)


def cut_jsonl(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite a jsonl file with the rows to keep; a last line torn by a kill is dropped."""
    lines = path.read_bytes().splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if keep(json.loads(line)):
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise RunDirError(
                f"{path}, line {number} is no row of a step ({type(error).__name__}: {error}): repair or remove the "
                "line, then --resume"
            ) from error
    write_text(path, "".join(line + "\n" for line in kept))


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def environment(source_folder: Path) -> dict[str, Any]:
    """Versions, devices and the git state of `source_folder`: what a result depends on besides its configuration.

    A snapshot of a checkout has its state in source.json.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpu_count": os.cpu_count(),
        "source": str(source_folder),
        **_source_state(source_folder),
    }


def _source_state(folder: Path) -> dict[str, Any]:
    if (folder / "source.json").is_file():
        return json.loads((folder / "source.json").read_text())
    return {"git_sha": _git(folder, "rev-parse", "HEAD"), "git_diff": _git(folder, "diff", "HEAD")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("git state not recorded: %s", error)
        return None
    return result.stdout.strip() if result.returncode == 0 else None
