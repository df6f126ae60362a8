"""Plain WebDataset tars as an endless stream: any tars, no index, and a resume that is statistical, not exact.

Every process reads tars drawn at random, with replacement, through webdataset's shuffle buffer. The mixture, ordinals,
crops and bad records are as for other sources; only *which* record an ordinal gets depends on the process that asks.
Where the data can be ingested, a shard folder is the better source.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import random
import tarfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.counters import Counters
from data_pipeline.errors import RecordError, ShardError
from data_pipeline.files import SUFFIXES
from data_pipeline.incoming import PIPE, Incoming, open_incoming
from data_pipeline.per_process import PerProcess
from data_pipeline.plan import hash64
from data_pipeline.retries import Permanent, RemoteConfig, Transient, persist
from data_pipeline.web import Web

_OWN_METADATA = {"key", "modality"}  # in the JSON of a shard that ingest wrote
_BLAME = "The shard, its server or its command failed; mend or remove it and resume the run"
_FAILURES = (Permanent, tarfile.TarError, OSError, EOFError, ValueError)
_Sample = dict[str, Any]  # as webdataset has it: __key__, __url__ and bytes by suffix


@dataclass
class StreamConfig:
    """How plain WebDataset tars are read."""

    samples: int = 1_000_000_000
    """Records the source is said to hold, for epochs and mixtures: nobody counts them."""
    buffer: int = 100
    """Records each worker holds and draws from; their bytes are its memory. 1 leaves a shard's order as it is."""

    def __post_init__(self) -> None:
        for name in ("samples", "buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"stream.{name}={getattr(self, name)!r}: must be at least 1")


def is_stream(path: str | Path) -> bool:
    """Whether this names tars themselves (`...{0000..0099}.tar`, `pipe:COMMAND`), not a folder with an index."""
    parts = str(path).split("::")
    return any(part.startswith(PIPE) or part.partition("?")[0].endswith(".tar") for part in parts)


class Stream:
    """The records of one modality in plain WebDataset tars, one endless stream for each process.

    `read` takes an index as other sources do; of all indices only the first that a process asks for means something:
    with `key` it seeds that process's order. Ranks, workers and resumed runs ask for different ones, so none of them
    repeats what another reads but by chance.

    Args:
        path: `pipe:COMMAND`, `http(s)://HOST/NAME.tar` or local tars, with `{0000..0099}` for many, several with `::`
            between. A sample is `KEY.mp4` (or another suffix of the modality) beside `KEY.json`.
        modality: `video` or `image`, told apart by suffix.
        config: nominal length, shuffle buffer.
        key: seed of the order, of (seed, modality, source name).
        remote: time-outs and retries, of local tars and commands too.
        counters: where reading is counted.

    Labels: an object in `KEY.json`; where ingest wrote the tar, that record's metadata.

    Raises ShardError for an address that cannot work and for local tars that are not there.
    """

    total_bytes = 0
    """Unknown."""

    def __init__(
        self,
        path: str,
        modality: str,
        config: StreamConfig,
        *,
        key: int,
        remote: RemoteConfig | None = None,
        counters: Counters | None = None,
    ):
        self.urls = _expand(path)
        self.config = config
        self.counters = counters or Counters()
        self._modality, self._key = modality, key
        self._remote = remote or RemoteConfig()
        self._records: PerProcess[Iterator[_Sample]] = PerProcess()
        self._rows: PerProcess[dict[str, Any]] = PerProcess()

    def __len__(self) -> int:
        return self.config.samples

    @property
    def is_remote(self) -> bool:
        """Whether records come over the network, or may."""
        return any(_is_remote(url) for url in self.urls)

    @property
    def fingerprint(self) -> str:
        """A sum over the names of the tars, wherever they lie, and over the commands."""
        names = [url if url.startswith(PIPE) else url.rpartition("/")[2] for url in self.urls]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def row(self, index: int) -> dict[str, Any]:
        """What is known of the record that this process read last, whatever the index: there is no other."""
        return self._rows.made() or {"key": f"{index} of a stream"}

    def read(self, index: int, *, verify: bool = False) -> tuple[bytes, dict[str, Any]]:
        """The next record of this process's stream. There is nothing to verify.

        Raises RecordError where this record has no media or no readable metadata, RemoteError where a tar cannot be
        read for longer than `remote` allows.
        """
        started = time.perf_counter()
        try:
            sample = next(self._records.get(lambda: self._endless(index)))
        except BaseException:
            self._records.forget()  # a generator that has raised is at its end
            raise
        finally:
            self.counters.add(records=1, wait_seconds=time.perf_counter() - started)
        self._rows.forget()
        row = self._rows.get(lambda: {"key": sample["__key__"], "shard": sample["__url__"]})
        return self._media(sample), row | _metadata(sample) | row

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Nothing: the next records are those that come next."""

    def close(self) -> None:
        """End this process's stream, with what sends it."""
        self._records.forget()

    def _endless(self, first: int) -> Iterator[_Sample]:
        from webdataset.filters import shuffle  # imports torch
        from webdataset.shardlists import ResampledShards

        seed = hash64(self._key, first)
        shards = ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
        samples = (sample for shard in shards for sample in self._shard(shard["url"]))
        size = self.config.buffer
        return iter(shuffle(size, initial=max(1, size // 4), rng=random.Random(seed))(samples))

    def _shard(self, url: str) -> Iterator[_Sample]:
        """A tar's samples; where reading fails, it is opened again and what was delivered is passed over."""
        opened: Iterator[_Sample] | None = None
        delivered = 0

        def attempt() -> _Sample | None:
            nonlocal opened
            if opened is None:
                opened = itertools.islice(self._tar(url), delivered, None)
            try:
                return next(opened, None)
            except _FAILURES as error:
                opened = None
                raise _again(error) from error
            except Transient:
                opened = None
                raise

        def retried() -> None:
            self.counters.add(retries=1)

        while (sample := persist(attempt, _shown(url), self._remote, retried, blame=_BLAME)) is not None:
            delivered += 1
            yield sample
        if not delivered:
            raise ShardError(f"{_shown(url)}: holds no samples; remove it from the source")

    def _tar(self, url: str) -> Iterator[_Sample]:
        """A tar's samples, once; Transient, Permanent or what tarfile raises where it is not whole."""
        from webdataset.tariterators import group_by_keys

        self.counters.add(requests=1)
        suffixes = {suffix[1:] for suffix in SUFFIXES[self._modality]} | {"json"}
        with contextlib.closing(open_incoming(url, Web(self._remote), self._remote)) as incoming:
            yield from group_by_keys(self._members(url, incoming), suffixes=suffixes)

    def _members(self, url: str, incoming: Incoming) -> Iterator[dict[str, Any]]:
        """The files of a tar as webdataset's grouping takes them; its own loop would not see a damaged header."""
        reader: Any = incoming  # of a file object, tarfile needs `read` only
        with tarfile.open(fileobj=reader, mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file:
                    data = file.read()
                    self.counters.add(bytes=len(data) if _is_remote(url) else 0)
                    yield {"fname": member.name, "data": data, "__url__": _shown(url)}
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
            rest: Any = archive.fileobj
            while padding := rest.read(1 << 16):  # to the end, where a command says whether it failed
                if padding.strip(b"\0"):
                    raise Transient("there are bytes after the end of the tar: give every tar an address of its own")

    def _media(self, sample: _Sample) -> bytes:
        for suffix in sample:
            if f".{suffix}" in SUFFIXES[self._modality]:
                return sample[suffix]
        raise RecordError(f"no {self._modality} among its files ({sample['__url__']})")


class _Header(tarfile.TarInfo):
    """A member whose header is whole. Left to itself, tarfile takes a damaged or missing one for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        """See tarfile; Transient for all that is neither a header nor the block of zeros that ends an archive."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end
            raise Transient(f"cut short or damaged: {error} where a tar's next header or its end should be") from error


def _again(error: Exception) -> Transient:
    """Whatever opening and reading a tar meets is tried again: in ten thousand tars none is worth a run at once."""
    if isinstance(error, Permanent):
        return Transient(f"{error}; {error.remedy}")
    return Transient(f"cut short or damaged: {error}")


def _metadata(sample: _Sample) -> dict[str, Any]:
    """What stands in a sample's JSON: the metadata that ingest wrote, or labels."""
    try:
        found = json.loads(sample.get("json", "{}"))
    except ValueError as error:
        raise RecordError(f"its metadata is not JSON ({error}; {sample['__url__']})") from error
    if not isinstance(found, dict):
        raise RecordError(f"its metadata must be a JSON object, not {type(found).__name__} ({sample['__url__']})")
    if found.keys() >= _OWN_METADATA:
        return found
    return {"labels": found} if found else {}


def _expand(path: str) -> list[str]:
    """The addresses a pattern stands for; ShardError for those that cannot be read."""
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(path)
    except ValueError as error:
        raise ShardError(f"{path}: {error}; write {{0000..0099}} for a hundred tars") from error
    for url in urls:
        _check(url)
    return urls


def _check(url: str) -> None:
    if url.startswith(PIPE):
        return
    scheme, separator, _ = url.partition("://")
    if not separator:
        if not Path(url).is_file():
            raise ShardError(f"{url}: no such tar; write {{0000..0099}} with the numbers that there are")
        return
    if scheme not in ("http", "https"):
        raise ShardError(
            f"{url}: a stream reads http(s)://, pipe:COMMAND and local tars; use `pipe:aws s3 cp {url} -`, or ingest "
            "the data and give the shard folder, which is read exactly"
        )
    if urllib.parse.urlsplit(url).password:
        raise ShardError(f"{_shown(url)}: passwords do not belong into an address; put it into ~/.netrc")
    if importlib.util.find_spec("urllib3") is None:
        raise ShardError(f"{url}: to read it, urllib3 must be installed: pip install 'vjepa-pipeline[remote]'")


def _is_remote(url: str) -> bool:
    return url.startswith(PIPE) or "://" in url


def _shown(url: str) -> str:
    """An address for messages, without what may be a secret in it."""
    if url.startswith(PIPE) or "://" not in url:
        return url
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
