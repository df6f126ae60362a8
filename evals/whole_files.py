"""Files of results that appear whole or not at all, and errors of the disk that say which file and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the disk inside says which file it is about, which a full disk does not, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): make room there, or name another folder") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes its name when all of it is on the disk: readers see the old or the new one.

    Folders above are made. What is raised inside leaves the old file, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
