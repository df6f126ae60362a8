"""`evals.embed` that kills itself after so many batches: `python embed_and_die.py BATCHES ARGUMENTS...`."""

import os
import signal
import sys

from evals import embed_rows
from evals.embed import main

embed_rows.COMMIT_SECONDS = 0.0
left = int(sys.argv[1])
write = embed_rows.RowWriter.add


def add(writer: embed_rows.RowWriter, rows: object) -> None:
    global left
    if left == 0:
        writer._file.write(b"half a row")  # a kill leaves what the journal does not know of
        writer._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(writer, rows)  # pyright: ignore[reportArgumentType]


setattr(embed_rows.RowWriter, "add", add)  # noqa: B010
sys.exit(main(sys.argv[2:]))
