"""A shard folder behind HTTP or S3: range reads that are repeated, checked and kept in the local cache.

A failure of the network is never a bad sample: it is repeated, then stops the run. A record whose sha256 is wrong even
when it is read again is a bad sample, as on a local disk. Every record's sha256 is checked, whatever `verify_bytes`
says: otherwise a bit that flipped on the way would look like a broken video.
"""

import hashlib
import importlib.util
import posixpath
import re
import urllib.parse
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from data_pipeline.cache import RecordCache
from data_pipeline.counters import Counters
from data_pipeline.errors import ShardError
from data_pipeline.folders import damaged, scheme
from data_pipeline.per_process import PerProcess
from data_pipeline.retries import RemoteConfig, persist
from data_pipeline.s3 import Bucket
from data_pipeline.web import PastEnd, Reply, Web, check_address

T = TypeVar("T")
R = TypeVar("R")
_REDO = "upload the shard folder again, whole"
_EXTRA = "pip install 'vjepa-pipeline[remote]' (or: pip install 'urllib3>=2.2,<3' botocore)"


class RemoteFolder:
    """A folder at `http(s)://HOST/FOLDER`, `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`.

    Raises ShardError for an address that cannot work and where the libraries are missing.
    """

    is_remote = True
    checked_at_opening = 16  # shows a wrong address, refused access, a half-finished upload; a request each

    def __init__(self, url: str, policy: RemoteConfig, cache: RecordCache | None, counters: Counters):
        self.url = re.sub(r"^(\w+):/+", r"\1://", url).rstrip("/")  # pathlib makes one slash of two
        check_address(self.url)
        self._policy, self._cache, self._counters = policy, cache, counters
        self._webs: PerProcess[Web] = PerProcess()
        self._bucket = Bucket(self.url, policy) if scheme(url) in ("s3", "gs") else None
        _check_libraries(self.url, bucket=self._bucket is not None)

    def call(self, name: str) -> str:
        """See `Folder`."""
        parts = urllib.parse.urlsplit(self.url)  # a view names its tars as ../OTHER/NAME.tar
        return parts._replace(path=posixpath.normpath(posixpath.join(parts.path or "/", name))).geturl()

    def manifest(self, name: str) -> bytes:
        """See `Folder`."""
        return self._read(name).data

    def size(self, name: str) -> int:
        """See `Folder`; read off the answer to a request for the first byte."""
        try:
            return self._read(name, 0, 1).total
        except PastEnd:
            return 0

    def index(self, name: str, sha256: str) -> bytes:
        """See `Folder`."""
        content = self._cache.get(sha256, self._counters) if self._cache else None
        if content is None:
            content = self._checked(lambda: self._read(name).data, sha256)
            if content is None:
                raise ShardError(f"{self.call(name)}: differs from the sha256 in the manifest, twice; {_REDO}")
            if self._cache:
                self._cache.put(sha256, content, self._counters, always=True)
        return content

    def record(self, row: dict[str, Any], tar_bytes: int, verify: bool) -> bytes:
        """See `Folder`; the sha256 is checked in any case."""
        sha256 = row["sha256"]
        data = self._cache.get(sha256, self._counters) if self._cache else None
        if self._cache:
            self._counters.add(**{"cache_misses" if data is None else "cache_hits": 1})
        if data is None:
            data = self._checked(lambda: self._part(row, tar_bytes), sha256)
            if data is None:
                raise damaged(row)
            if self._cache:
                self._cache.put(sha256, data, self._counters)
        return data

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """See `Folder`; the first failure is raised without waiting for what has not begun."""
        with ThreadPoolExecutor(self._policy.parallel) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """See `Folder`."""
        self._webs.forget()

    def _part(self, row: dict[str, Any], tar_bytes: int) -> bytes:
        where = self.call(row["shard"])
        try:
            reply = self._read(row["shard"], row["offset"], row["size"])
        except PastEnd as error:
            raise ShardError(f"{where}: ends before byte {row['offset']}, which its index names; {_REDO}") from error
        if reply.total != tar_bytes or len(reply.data) < row["size"]:
            raise ShardError(
                f"{where}: {reply.total} bytes, but the manifest says {tar_bytes}: it is damaged, or was replaced "
                f"while it is in use; {_REDO}, and resume"
            )
        return reply.data

    def _checked(self, read: Callable[[], bytes], sha256: str) -> bytes | None:
        """The bytes with this sum, read once more where it differs; None where it still does."""
        for again in (False, True):
            if again:
                self._counters.add(rereads=1)
            data = read()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        return None

    def _read(self, name: str, first: int | None = None, size: int = 0) -> Reply:
        def attempt() -> Reply:
            if self._bucket:
                address = self._bucket.address(urllib.parse.urlsplit(self.call(name)).path.lstrip("/"))
            else:
                address = self.call(urllib.parse.quote(name))
            self._counters.add(requests=1)
            reply = self._webs.get(lambda: Web(self._policy)).get(address, first, size)
            self._counters.add(bytes=len(reply.data))
            return reply

        return persist(attempt, self.call(name), self._policy, lambda: self._counters.add(retries=1))


def _check_libraries(url: str, *, bucket: bool) -> None:
    needed = ("urllib3", "botocore") if bucket else ("urllib3",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ShardError(f"{url}: to read it, {' and '.join(missing)} must be installed: {_EXTRA}")
