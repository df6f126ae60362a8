"""Shards made on the fly; the real clips lie outside the repository and are skipped where absent."""

from pathlib import Path

import pytest

from data_pipeline.prepare.synthetic import make_debug_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos and seven images, 32 pixels: odd numbers, so that steps straddle the epochs."""
    return make_debug_shards(tmp_path_factory.mktemp("debug") / "shards", videos=10, images=7, size=32)


@pytest.fixture(scope="session")
def clips(shared: Path) -> Path:
    """The folder of real videos; its folder `odd` holds the odd and the broken ones."""
    return shared / "clips"
