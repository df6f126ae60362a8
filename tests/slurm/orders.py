"""Orders of jobs that train nothing: what the supervisor reads."""

from __future__ import annotations

from pathlib import Path

from launch.job_order import JobOrder


def order_in(folder: Path, *, nodes: int, tasks_per_node: int, snapshot: Path, max_restarts: int = 20) -> JobOrder:
    """Of a run in `folder`; not yet written."""
    return JobOrder(
        root=str(folder),
        run_dir=str(folder),
        stage="primary",
        recipe="none",
        snapshot=str(snapshot),
        code_hash="",
        profile="private_test",
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        gpus_per_node=0,
        max_restarts=max_restarts,
        max_crashes=3,
        rendezvous_s=60,
        signal_delay_s=60,
    )
