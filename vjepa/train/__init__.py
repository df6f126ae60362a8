"""How it is learned: trainer, optimizer, schedules, checkpoints, metrics, diagnostics."""
