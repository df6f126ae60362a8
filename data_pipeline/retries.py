"""When to ask a server again, and when to stop."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.errors import RemoteError, ShardError

T = TypeVar("T")
_JITTER = random.SystemRandom()  # forked workers must not wait in step; nothing that is learned depends on it


class Transient(Exception):
    """Trying again can help; the server asks for `wait` seconds of peace (0: it did not say)."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Permanent(Exception):
    """Trying again cannot help; `remedy` says what can."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


@dataclass
class RemoteConfig:
    """How sources behind HTTP and S3 are read. Never changes the samples."""

    timeout: float = 20.0
    """Seconds without a connection or without a byte after which an attempt has failed."""
    slowest: float = 0.1
    """MB/s; an answer that comes slower than this (after `timeout` seconds) is cut off and asked for again."""
    attempts: int = 8
    """Requests for the same bytes before the run stops."""
    backoff: float = 0.5
    """Seconds before the first repetition, doubled for each further one; a random half of it is left out."""
    longest_wait: float = 30.0
    """Seconds that one such pause, or a server's Retry-After, may last at most."""
    give_up: float = 240.0
    """Seconds after which no further attempt is begun; with `timeout` less than data.worker_timeout."""
    parallel: int = 8
    """Requests at once of each process: a worker asks for a micro-batch's records together."""
    endpoint: str | None = None
    """Address of an S3-compatible store; null: $AWS_ENDPOINT_URL_S3, the AWS profile, or AWS itself."""
    anonymous: bool = False
    """Read public buckets without credentials."""

    def __post_init__(self) -> None:
        for name in ("timeout", "slowest", "longest_wait", "give_up"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"remote.{name}={value!r}: must be a positive number")
        if not (math.isfinite(self.backoff) and self.backoff >= 0):
            raise ValueError(f"remote.backoff={self.backoff!r}: must not be negative (seconds)")
        for name in ("attempts", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"remote.{name}={getattr(self, name)!r}: must be at least 1")


_BLAME = "The network or the server failed, the record is not to blame; resume the run when it answers again"


def persist(
    attempt: Callable[[], T], what: str, policy: RemoteConfig, retried: Callable[[], None], blame: str = _BLAME
) -> T:
    """The result of `attempt`, repeated while it raises Transient; `retried` is called before each repetition.

    Raises ShardError at once for what is Permanent, RemoteError when attempts or time are used up; both name `what`.
    """
    reasons: list[str] = []
    started = time.monotonic()
    while True:
        try:
            return attempt()
        except Permanent as error:
            raise ShardError(f"{what}: {error}; {error.remedy}") from error
        except Transient as error:
            reasons.append(str(error))
            pause = _pause(len(reasons), error.wait, policy)
        took = time.monotonic() - started
        if len(reasons) >= policy.attempts or took + pause > policy.give_up:
            kinds = "; ".join(dict.fromkeys(reasons))
            raise RemoteError(
                f"{what}: not to be had in {len(reasons)} attempts over {took:.1f} s ({kinds}). {blame} "
                "(data.remote.attempts and data.remote.give_up say how long to insist)"
            )
        time.sleep(pause)
        retried()


def _pause(failures: int, asked: float, policy: RemoteConfig) -> float:
    doubled = policy.backoff * 2.0 ** min(failures - 1, 30)
    return min(policy.longest_wait, max(asked, doubled * _JITTER.uniform(0.5, 1.0)))
