"""Features of records, live or out of files on a disk: whoever trains on them does not see which.

A file is known by what its features were computed from: the weights, the record's content, and the view of it. So a
cache may be shared by runs and ranks, is never out of date, and may be deleted at any time. One file of safetensors a
record, mapped into memory when it is read: what is held is one batch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evals.features import EncoderFeatures, FeatureSource, finite
from vjepa.nn.encoder import Encoder
from vjepa.train.distributed import ALONE, World

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GIB = 1024**3
FEATURES = "features"  # name of the tensor in a file
CLIPS_VERSION = 1  # of the code that decodes, resizes and cuts clips: raised when it makes other pixels of a file
log = logging.getLogger(__name__)


class CacheError(ValueError):
    """The cache cannot be written; the message says where, how much is missing, and what to do."""


@dataclass(frozen=True)
class Request:
    """One clip whose features are wanted: what they depend on, and how the clip is read where they are not there."""

    content: str
    """Digest of the record's bytes."""
    view: str
    """All that was done to it: frames, size, crop, flip."""
    read: Callable[[], Tensor] = field(compare=False)
    """uint8 [C, T, H, W]."""


class Store(Protocol):
    """Tensors by key; `get` is None for those that are not there, `put` False where there is no room."""

    def holds(self, key: str) -> bool: ...
    def get(self, key: str) -> Tensor | None: ...
    def put(self, key: str, features: Tensor) -> bool: ...


class Features(Protocol):
    """Tokens of clips, wherever they come from."""

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        """Clips of one size -> [B, t, h, w, D] on the CPU."""
        ...


@dataclass(frozen=True)
class LiveFeatures:
    """Tokens computed when they are asked for, in `dtype` like those of a cache, so that both give the same numbers."""

    source: FeatureSource
    dtype: Dtype = "float32"

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        with torch.no_grad():
            tokens = self.source.tokens(torch.stack([each.read() for each in requests])).to(DTYPES[self.dtype])
        return tokens if self.dtype == "float32" else finite(tokens, self.source.name)  # float16 overflows


@dataclass(frozen=True)
class CachedFeatures:
    """Tokens out of a cache; those that are not there are computed together, and put there."""

    live: LiveFeatures
    cache: Store
    identity: str
    """Of the source, see `source_identity`."""

    @classmethod
    def of(cls, source: FeatureSource, cache: Store, *, dtype: Dtype = "float32") -> CachedFeatures:
        return cls(LiveFeatures(source, dtype), cache, source_identity(source))

    def key(self, request: Request) -> str:
        parts = (CLIPS_VERSION, self.identity, request.content, request.view, self.live.dtype)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        keys = [self.key(request) for request in requests]
        found = [self.cache.get(key) for key in keys]
        missing = [index for index, features in enumerate(found) if features is None]
        if missing:
            computed = self.live([requests[index] for index in missing])
            for index, features in zip(missing, computed, strict=True):
                found[index] = features
                self.cache.put(keys[index], features)
        return torch.stack([features for features in found if features is not None])

    def fill(self, requests: Sequence[Request], *, batch_size: int = 16, world: World = ALONE) -> None:
        """Compute what is not there, each rank its own share, and wait for the others."""
        mine = [request for request in requests[world.rank :: world.size] if not self.cache.holds(self.key(request))]
        for first in range(0, len(mine), batch_size):
            self(mine[first : first + batch_size])
        world.barrier()


def open_features(
    source: FeatureSource,
    folder: Path | str | None,
    *,
    max_gib: float = 50.0,
    dtype: Dtype = "float32",
    world: World = ALONE,
) -> Features:
    """Features live, or cached in `folder` where one is given: `max_gib` on the disk, over all ranks."""
    if folder is None:
        return LiveFeatures(source, dtype)
    cache = FeatureCache(Path(folder), max_bytes=int(max_gib * GIB), writers=world.size)
    return CachedFeatures.of(source, cache, dtype=dtype)


def kept_features(source: FeatureSource, *, max_gib: float, dtype: Dtype = "float32") -> CachedFeatures:
    """Features that this process computes once and holds, up to `max_gib`, under keys that name no source."""
    return CachedFeatures(LiveFeatures(source, dtype), MemoryStore(int(max_gib * GIB)), identity="")


@dataclass
class MemoryStore:
    """Tensors in memory, up to a number of bytes; what comes after that is not kept."""

    max_bytes: int
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _bytes: int = field(default=0, init=False)

    def holds(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Tensor | None:
        return self._kept.get(key)

    def put(self, key: str, features: Tensor) -> bool:
        """Keep a tensor; False where there is no room for it."""
        if self._bytes + features.nbytes > self.max_bytes:
            return False
        self._kept[key] = features.clone()  # a view would hold its whole batch
        self._bytes += features.nbytes
        return True


# ------------------------------------------------------------------------------------------------------------ files


@dataclass
class FeatureCache:
    """Tensors by key under a folder, up to a number of bytes; files appear whole or not at all.

    A cache that is full takes nothing more and says so once; what it lacks is computed each time it is wanted.
    """

    folder: Path
    max_bytes: int = 50 * GIB
    writers: int = 1
    """Processes that fill it together: each takes an equal part of the room that is left."""
    bytes: int = field(default=0, init=False)
    """On the disk: counted when the cache is opened, and what this process has written since."""
    _room: float = field(default=0, init=False)
    _written: int = field(default=0, init=False)
    _is_full: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.max_bytes < 0 or self.writers < 1:
            raise ValueError(f"max_bytes={self.max_bytes} must not be negative, writers={self.writers} at least 1")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cache {self.folder} cannot be made ({error}): name another folder") from error
        self.bytes = sum(path.stat().st_size for path in self.folder.glob("??/*.safetensors"))
        self._room = max(0, self.max_bytes - self.bytes) / self.writers

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> Tensor | None:
        """The tensor, mapped from its file; None where it is not there or is damaged, which is then removed."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(FEATURES)
        except SafetensorError as error:
            log.warning("cache: %s is damaged (%s) and is computed anew", path, error)
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, features: Tensor) -> bool:
        """Keep a tensor; False where there is no room for it. Raises CacheError where the disk is full."""
        data = save({FEATURES: features.contiguous()})
        if self._written + len(data) > self._room:
            self._say_full(len(data))
            return False
        self._write(self.path(key), data)
        self.bytes += len(data)
        self._written += len(data)
        return True

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CacheError(
                f"cache {self.folder}: no room on the disk for {len(data)} bytes after {self.bytes / GIB:.2f} GiB. "
                "Delete files there (any may go), set a smaller cache.max_gib, or do without a cache"
            ) from error

    def _say_full(self, wanted: int) -> None:
        if not self._is_full:
            log.warning(
                "cache %s is full: %.2f of %.2f GiB, a record takes %d bytes; what is not there is computed each time. "
                "A larger cache.max_gib or an emptier folder avoids that",
                self.folder,
                self.bytes / GIB,
                self.max_bytes / GIB,
                wanted,
            )
        self._is_full = True


# --------------------------------------------------------------------------------------------------------- identity


def source_identity(source: FeatureSource) -> str:
    """What a source's features depend on, as a digest: an encoder's weights and settings, or a dataclass's fields.

    The name of a source is not part of it: two names of one encoder share their features. A source of another kind says
    it by an attribute `identity`; one without is refused.
    """
    if isinstance(identity := getattr(source, "identity", None), str):
        return identity
    if isinstance(source, EncoderFeatures):
        return encoder_identity(source.encoder)
    if is_dataclass(source) and not any(callable(value) for value in vars(source).values()):
        return f"{type(source).__module__}.{type(source).__qualname__} {json.dumps(asdict(source), sort_keys=True)}"
    raise ValueError(
        f"features of {source.name} cannot be cached: {type(source).__name__} does not say what they depend on. Give "
        "it an attribute `identity`, a digest of its weights and settings"
    )


def encoder_identity(encoder: Encoder) -> str:
    """A digest of an encoder's configuration and weights."""
    return module_identity(encoder, asdict(encoder.config))


def module_identity(module: torch.nn.Module, config: Any) -> str:
    """A digest of a module's configuration, as JSON, and its weights."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
