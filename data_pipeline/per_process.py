"""Values that every process makes for itself: connections, threads and locks do not survive a fork or a pickle."""

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """One value per process, made at first use."""

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def __reduce__(self) -> tuple[type["PerProcess[T]"], tuple[()]]:
        return PerProcess, ()

    def get(self, make: Callable[[], T]) -> T:
        """This process's value; where two threads make it at once, both are given the same one."""
        pid = os.getpid()
        found = self._values.get(pid)
        return self._values.setdefault(pid, make()) if found is None else found

    def made(self) -> T | None:
        """This process's value, if it was made."""
        return self._values.get(os.getpid())

    def forget(self) -> None:
        """Drop this process's value; the next `get` makes another."""
        self._values.pop(os.getpid(), None)
