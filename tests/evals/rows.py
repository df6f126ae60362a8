"""What a command of the evaluations left behind."""

import json
from pathlib import Path

from evals.protocol import Row


def rows_of(out: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in (out / "evals" / "results.jsonl").read_text().splitlines()]
