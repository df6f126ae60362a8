"""What a job's script does when its ranks have ended: python -m launch.after_job STAGE.json STATUS."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The status that the job ends with: srun's."""
    _order, status = argv
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
