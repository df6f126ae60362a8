"""Shards made on the fly; the real clips lie outside the repository and are skipped where absent."""

import tempfile
from pathlib import Path

import hypothesis.configuration
import pytest
from hypothesis import HealthCheck, Phase, settings

from data_pipeline.prepare.synthetic import make_debug_shards

# The same examples in every run, and nothing left in the tree; a failure is made small, which takes long enough.
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "vjepa-hypothesis")
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # of the machine, not of the claim
    database=None,
    phases=_PHASES,
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos and seven images, 32 pixels: odd numbers, so that steps straddle the epochs."""
    return make_debug_shards(tmp_path_factory.mktemp("debug") / "shards", videos=10, images=7, size=32)


@pytest.fixture(scope="session")
def clips(shared: Path) -> Path:
    """The folder of real videos; its folder `odd` holds the odd and the broken ones."""
    return shared / "clips"
