"""What every test shares: one thread a process, and the way to the steering material beside the repository."""

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# Results of CPU kernels depend on how they split the work, and parallel test processes share few cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared/` beside the repository: golden values, real clips, references; skips where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"shared/ is not beside the repository ({folder}): golden values and real clips cannot be compared")
    return folder
