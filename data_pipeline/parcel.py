"""How a worker's micro-batch reaches the training process: through memory that both keep, used again each time.

Sharing every tensor anew, as torch's own queues do, costs fresh pages: 2 to 5 ms of CPU a clip of 16 frames at 256 px,
where a copy into memory that was used before takes 0.2 ms. So a worker has one arena, which grows to its largest
micro-batch, and the training process copies out of it (into page-locked memory for a GPU) before the worker gets more.
"""

import io
import math
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64  # bytes, where a tensor may begin


@dataclass(frozen=True)
class Parcel:
    """A micro-batch whose tensors lie in the worker's arena."""

    rest: bytes
    """All of it but the tensors, pickled."""
    tensors: tuple[tuple[int, torch.dtype, torch.Size], ...]
    """Where each begins in the arena, its type and shape."""
    arena: Tensor | None
    """Shared memory, uint8 `[bytes]`; None: that of the parcel before."""


class Packer:
    """A worker's side; empty in the process it is made in, and when it is pickled."""

    def __init__(self) -> None:
        self._arena: Tensor | None = None

    def __reduce__(self) -> tuple[type["Packer"], tuple[()]]:
        return Packer, ()

    def pack(self, value: Any) -> Parcel:
        """Copy all tensors in `value` into the arena; the parcel before must have been unpacked."""
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(value)
        places, end = [], 0
        for tensor in pickler.tensors:
            places.append((end, tensor.dtype, tensor.shape))
            end += math.ceil(tensor.nbytes / _ALIGN) * _ALIGN
        is_new = self._arena is None or len(self._arena) < end
        if is_new:
            self._arena = torch.empty(end + end // 4, dtype=torch.uint8).share_memory_()
        for tensor, place in zip(pickler.tensors, places, strict=True):
            _part(self._arena, place).copy_(tensor)
        return Parcel(stream.getvalue(), tuple(places), self._arena if is_new else None)


class Unpacker:
    """The training process's side, for one worker after the other in one slot."""

    def __init__(self, *, is_pinned: bool):
        self._is_pinned = is_pinned
        self._arena: Tensor | None = None

    def unpack(self, parcel: Parcel) -> Any:
        """The value that was packed, its tensors in this process's own memory."""
        if parcel.arena is not None:
            self._arena = parcel.arena
        return _Unpickler(io.BytesIO(parcel.rest), [self._taken(place) for place in parcel.tensors]).load()

    def _taken(self, place: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        _, dtype, shape = place
        return torch.empty(shape, dtype=dtype, pin_memory=self._is_pinned).copy_(_part(self._arena, place))


def _part(arena: Tensor | None, place: tuple[int, torch.dtype, torch.Size]) -> Tensor:
    """A tensor's place in the arena."""
    assert arena is not None
    start, dtype, shape = place
    size = math.prod(shape) * dtype.itemsize
    return arena[start : start + size].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and remembers them; one that occurs twice is packed once."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        """See pickle: the tensor's number."""
        if type(obj) is not Tensor or obj.requires_grad or obj.device.type != "cpu":
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]):
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        """See pickle."""
        return self._tensors[pid]
