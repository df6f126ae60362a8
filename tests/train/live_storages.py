"""A second opinion on memory: the real step under FakeTensorMode, every live storage counted, FSDP's resizing too.

It shares nothing with vjepa/train/memory_trace.py but torch: no sections, no short models, no extrapolation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """`live` and `peak` bytes of all storages made since it was entered, and of those it was told."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        for tensor in known:
            self.see(tensor)

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_
        tracker = self

        def resize(storage: Any, size: int) -> Any:
            result = tracker._resize(storage, size)
            tracker.update(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # pyright: ignore[reportAttributeAccessIssue]
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: Tensor) -> None:
        local = getattr(tensor, "_local_tensor", None)
        self.update((tensor if local is None else local).untyped_storage())

    def update(self, storage: Any) -> None:
        if storage not in self._sizes:
            size = [0]
            self._sizes[storage] = size
            weakref.finalize(storage, self._free, size)
        size = self._sizes[storage]
        self.live += storage.nbytes() - size[0]
        size[0] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _free(self, size: list[int]) -> None:
        self.live -= size[0]
