"""Timers of the operating system that act without the interpreter, even while an extension holds its lock.

faulthandler has such a timer too, but it ends a process with status 1 only, and a forked child that ends in the
ordinary way waits for its thread for ever. These are the kernel's (POSIX `timer_create`): a child does not inherit
them, and arming one costs a few microseconds. Linux on 64 bits only.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CLOCK_MONOTONIC = 1
_BY_SIGNAL, _BY_THREAD = 0, 2


class _Event(ctypes.Structure):
    """`struct sigevent`: what happens when the timer runs out."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("reserved", ctypes.c_char * 32),
    )


class _Setting(ctypes.Structure):
    """`struct itimerspec`: an interval (here none) and the time to go."""

    _fields_ = (("every", ctypes.c_long * 2), ("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Timer:
    """One timer, not armed yet; it acts once each time it is armed. OSError where the system has none."""

    def __init__(self, event: _Event) -> None:
        self._library = _library()
        self._id = ctypes.c_void_p()
        if self._library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)):
            raise OSError(ctypes.get_errno(), f"timer_create: {os.strerror(ctypes.get_errno())}")

    @classmethod
    def signalling(cls, signum: int) -> Timer:
        """Sends `signum` to this process."""
        return cls(_Event(signal=signum, notify=_BY_SIGNAL))

    @classmethod
    def calling(cls, function: str, argument: int) -> Timer:
        """Calls a function of the C library with one number or address, in a thread of the C library's own."""
        address = ctypes.cast(getattr(_library(), function), ctypes.c_void_p).value
        return cls(_Event(value=argument, notify=_BY_THREAD, function=address))

    def arm(self, seconds: float) -> None:
        """Act so many seconds from now, and not when it was to act before; 0 disarms."""
        setting = _Setting(seconds=int(seconds), nanoseconds=int(seconds % 1 * 1e9))
        if self._library.timer_settime(self._id, 0, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), f"timer_settime: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """Never act again. In a forked child there is nothing to do."""
        self._library.timer_delete(self._id)


def _library() -> ctypes.CDLL:
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError("timers are for Linux on 64 bits")
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "timer_create"):
        return library
    return ctypes.CDLL("librt.so.1", use_errno=True)  # glibc before 2.34
