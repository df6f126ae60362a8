"""Strict loading: whatever is missing, unexpected or wrongly shaped is listed by name, and nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from vjepa.nn.init import assign


class WeightsError(ValueError):
    """Weights that do not fit: the message lists missing, unexpected and wrongly shaped keys."""


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load `state` into `module`; any difference in keys or shapes is a WeightsError that lists it."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [f"unexpected: {name} {tuple(value.shape)}" for name, value in state.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise WeightsError(listing(f"{source} does not fit {type(module).__name__}", problems))
    for name, tensor in module.state_dict().items():
        assign(tensor, state[name])


def listing(title: str, problems: Sequence[str], most: int = 20) -> str:
    """A title, how many problems there are, and the first of them, a line each."""
    shown = [*problems[:most], *([f"and {len(problems) - most} more"] if len(problems) > most else [])]
    return f"{title}: {len(problems)} problems\n" + "\n".join(f"  {line}" for line in shown)


Names = Sequence[tuple[str, str]]
T = TypeVar("T")


def rename(state: Mapping[str, T], names: Names) -> dict[str, T]:
    """`state` with the first prefix of `names` that fits each key replaced; other keys stay, to be found by name later.

    names: pairs of (prefix as it is, prefix as it shall be).
    """

    def renamed(key: str) -> str:
        for old, new in names:
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    return {renamed(key): value for key, value in state.items()}


def swapped(names: Names) -> Names:
    """The pairs of `names` the other way round."""
    return [(new, old) for old, new in names]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, then put it there whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
