"""A debug run inside the test process, on shards that all tests share."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from data_pipeline.prepare.synthetic import make_debug_shards
from launch.config import load_config
from launch.train import train
from vjepa.train.signals import StopFlag

DebugRun = Callable[..., Path]


@pytest.fixture(scope="session")
def debug_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_debug_shards(tmp_path_factory.mktemp("shards") / "debug")


@pytest.fixture(scope="session")
def debug_run(debug_shards: Path) -> DebugRun:
    """`debug_run(run_dir, "key=value", ..., resume=False)` trains the debug recipe and returns the run's folder."""

    def run(
        run_dir: Path,
        *overrides: str,
        resume: bool = False,
        stop: StopFlag | None = None,
        options: Sequence[str] = (),
    ) -> Path:
        sources = [f"data.{modality}.sources.debug.path={debug_shards}" for modality in ("video", "image")]
        wanted = ["data.workers=0", f"run_dir={run_dir}", *sources, *overrides]
        config = load_config("debug", "primary", wanted, options=options)
        train(config, resume=resume, stop=stop or StopFlag())
        return run_dir

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system needs root: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
