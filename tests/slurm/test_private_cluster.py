"""The private cluster does what the other tests take for granted."""

from pathlib import Path

import pytest

from tests.slurm.conftest import PrivateCluster, command, wait_until

pytestmark = pytest.mark.slurm


def test_two_nodes_run_a_job_and_remember_it(cluster: PrivateCluster, tmp_path: Path) -> None:
    script = 'srun --nodes=2 --ntasks=4 bash -c "echo $SLURM_PROCID on $(hostname)"'
    job = command("sbatch", "--parsable", "-N2", "-n4", "-o", tmp_path / "out.txt", f"--wrap={script}")
    assert cluster.over(job) == ["COMPLETED"]
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 4
    wait_until(lambda: command("sacct", "-X", "-n", "-P", "-j", job, "-o", "State") == "COMPLETED", "sacct is late")
