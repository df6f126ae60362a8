"""Reading ahead: a few threads fetch a micro-batch's records while the first of them are being decoded."""

import queue
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls under way, by key. The threads are daemons: a process may end while one waits for a dead server."""

    def __init__(self, threads: int):
        self._jobs: queue.SimpleQueue[tuple[Future[T], Callable[[], T]]] = queue.SimpleQueue()
        self._under_way: dict[Hashable, Future[T]] = {}
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def start(self, key: Hashable, call: Callable[[], T]) -> None:
        """Begin `call`, unless one with this key is under way."""
        if key not in self._under_way:
            future: Future[T] = Future()
            self._under_way[key] = future
            self._jobs.put((future, call))

    def take(self, key: Hashable) -> Future[T] | None:
        """The call begun with this key, to be waited for; None where there is none."""
        return self._under_way.pop(key, None)

    def clear(self) -> None:
        """Forget what nobody took: what has not begun never will."""
        for future in self._under_way.values():
            future.cancel()
        self._under_way.clear()

    def _work(self) -> None:
        while True:
            future, call = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
