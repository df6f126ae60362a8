"""The code that a job runs: a copy made at submission, uncommitted edits included, that later edits do not reach.

The standard library alone: every rank checks that it runs this copy and no other before anything is imported from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vjepa", "data_pipeline", "evals", "launch")
FILES = ("pyproject.toml",)
SOURCE = "source.json"
"""Beside the copied packages: where they come from, their git state, their hash."""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


class OtherCodeError(ValueError):
    """A job that would run code other than its snapshot."""


def snapshot_path(folder: Path) -> Path:
    """Where a snapshot taken now would lie: `folder`/code/TIME."""
    return folder / "code" / time.strftime("%Y%m%d-%H%M%S")


def take_snapshot(path: Path) -> str:
    """Copy the code that runs here to `path`; its hash. A snapshot is never changed once it is there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, unfinished / name, ignore=LEFT_OUT)
    for name in FILES:
        shutil.copy2(ROOT / name, unfinished / name)
    code_hash = hash_code(unfinished)
    (unfinished / SOURCE).write_text(json.dumps(_source() | {"code_hash": code_hash}, indent=2) + "\n")
    unfinished.rename(path)
    return code_hash


def hash_code(folder: Path | str) -> str:
    """One digest of every source and recipe under the packages of `folder`: path and content."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        for path in sorted((Path(folder) / name).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def refuse_other_code(snapshot: Path | str) -> None:
    """Raise OtherCodeError where this process has imported `launch` from anywhere but the snapshot."""
    if Path(snapshot).resolve() != ROOT:
        raise OtherCodeError(
            f"the job was submitted with the code in {snapshot}, but Python imports {ROOT}: start the job by its "
            "script, and let nothing on the nodes put another folder before PYTHONPATH"
        )


def _source() -> dict[str, str | None]:
    """Where the copy comes from; a job that submits jobs passes on what its own snapshot says."""
    if (ROOT / SOURCE).is_file():
        return json.loads((ROOT / SOURCE).read_text())
    return {"checkout": str(ROOT), "git_sha": _git("rev-parse", "HEAD"), "git_diff": _git("diff", "HEAD")}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None  # not a checkout: the hash says which code it is
    return done.stdout.strip() if done.returncode == 0 else None
