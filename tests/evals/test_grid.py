"""A grid of heads over one reading of the features: deterministic, resumable, the same on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.grid import (
    SGD,
    AdamW,
    ChannelDropout,
    Draws,
    GridStateError,
    HeadGrid,
    Schedule,
    Setting,
    StateFile,
    choose,
    fit_grid,
    grid,
    score_heads,
)
from evals.metrics import ConfusionMatrix
from tests.train.ranks import on_ranks
from vjepa.objectives.projector import GlobalBatchNorm
from vjepa.train.distributed import ALONE, World, init_world

SETTINGS = grid([1e-2, 1e-3], [0.0, 0.1])
STEPS = 12


class Head(nn.Module):
    """Dropout, batch normalisation, a linear layer: everything that could differ between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm, self.linear = ChannelDropout(0.3), GlobalBatchNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.drop(x)))


def samples() -> tuple[Tensor, Tensor]:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return features, (features[:, 0] > 0).long() + (features[:, 1] > 0).long()


def batches(world: World = ALONE) -> Callable[[int], tuple[Tensor, Tensor]]:
    features, labels = samples()
    draws = Draws(len(features), 8, seed=3)

    def at(step: int) -> tuple[Tensor, Tensor]:
        rows = [draws.sample(ordinal) for ordinal in draws.ordinals(step, world)]
        return features[rows], labels[rows]

    return at


def loss(outputs: Tensor, labels: Tensor, *, step: int) -> Tensor:
    return F.cross_entropy(outputs, labels)


def fit(world: World = ALONE, **changes: Any) -> HeadGrid:
    options: dict[str, Any] = {"steps": STEPS, "schedule": Schedule(4), "optim": AdamW(clip_grad=1.0), "seed": 5}
    return fit_grid(Head, changes.pop("settings", SETTINGS), batches(world), loss, world=world, **options | changes)


def weights(found: HeadGrid) -> list[Tensor]:
    return [torch.cat([value.flatten() for value in head.state_dict().values()]) for head in found.heads]


def test_the_same_seed_gives_the_same_heads_and_another_seed_others() -> None:
    first, again, other = fit(), fit(), fit(seed=6)
    assert all(torch.equal(*pair) for pair in zip(weights(first), weights(again), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(weights(first), weights(other), strict=True))


def test_the_surrounding_generator_neither_matters_nor_moves() -> None:
    torch.manual_seed(1)
    first, after = fit(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(weights(fit())[0], weights(first)[0])


def test_a_head_in_a_grid_is_the_head_that_is_trained_alone() -> None:
    together = weights(fit())
    for place, setting in enumerate(SETTINGS):
        assert torch.equal(weights(fit(settings=[setting]))[0], together[place])


def test_an_update_is_that_of_adamw_at_the_scheduled_rate() -> None:
    head = nn.Linear(6, 3)
    torch.manual_seed(5)
    expected = nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.5)
    at, schedule = batches(), Schedule(2, start=0.5)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.5, 0.75, 1.0)[step]
        optimizer.zero_grad()
        features, labels = at(step)
        F.cross_entropy(expected(features), labels).backward()
        optimizer.step()
    found = fit_grid(
        lambda: nn.Linear(6, 3), [Setting(1e-2, 0.5)], at, loss, steps=STEPS, schedule=schedule, seed=5, until=3
    )
    torch.testing.assert_close(found.heads[0].state_dict(), expected.state_dict())
    assert not torch.equal(head.weight, expected.weight)


def test_an_update_is_that_of_momentum_where_it_is_asked_for() -> None:
    torch.manual_seed(5)
    expected = nn.Linear(6, 3)
    speeds = [torch.zeros_like(each) for each in expected.parameters()]
    at = batches()
    for step in range(3):
        features, labels = at(step)
        gradients = torch.autograd.grad(F.cross_entropy(expected(features), labels), list(expected.parameters()))
        with torch.no_grad():
            for weights_of, speed, gradient in zip(expected.parameters(), speeds, gradients, strict=True):
                speed.mul_(0.8).add_(gradient + 0.5 * weights_of)
                weights_of -= 1e-2 * Schedule().at(step, STEPS) * speed
    found = fit_grid(
        lambda: nn.Linear(6, 3), [Setting(1e-2, 0.5)], at, loss, steps=STEPS, seed=5, until=3, optim=SGD(0.8)
    )
    torch.testing.assert_close(found.heads[0].state_dict(), expected.state_dict())


def test_schedules_warm_up_and_fall_as_a_cosine() -> None:
    schedule = Schedule(10, start=0.1, final=0.01)
    assert [schedule.at(step, 110) for step in (0, 5, 10, 60, 110)] == pytest.approx([0.1, 0.55, 1, 0.505, 0.01])
    assert Schedule(10, start=0.2, warmup="cosine").at(5, 20) == pytest.approx(0.6)
    assert Schedule().at(0, 10) == 1
    assert Schedule(4).at(0, 10) == 0


def test_a_stopped_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.pt", every=2)
    assert fit(state=state, until=5).step == 5
    resumed = fit(state=state)
    assert all(torch.equal(*pair) for pair in zip(weights(resumed), weights(fit()), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_is_read_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of steps on a GPU would make every update of AdamW wait for it; a copy of all heads may not fit there."""
    state, load, places = StateFile(tmp_path / "state.pt"), torch.load, list[object]()
    fit(state=state, until=2)
    monkeypatch.setattr(torch, "load", lambda *args, **options: (places.append(options), load(*args, **options))[1])
    fit(state=state)
    assert places == [{"map_location": "cpu", "weights_only": True}]


def test_a_resumed_fit_repeats_no_step(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.pt", every=4)
    seen: list[int] = []
    fit(state=state, until=6)
    fit(state=state, on_step=lambda found: seen.append(found.step))
    assert seen == list(range(7, STEPS + 1))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos: No space")])
def test_a_failed_saving_leaves_the_old_state(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has an error of its own for a disk that is full."""
    state = StateFile(tmp_path / "state.pt", every=4)
    fit(state=state, until=4)
    before = state.path.read_bytes()

    def fail(value: object, file: Any) -> None:
        file.write(b"half a state")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"state\.pt: the state of the fit cannot be written .*No space"):
        fit(state=state, until=8)
    assert state.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_of_another_fit_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.pt")
    fit(state=state, until=1)
    with pytest.raises(GridStateError, match="seed was 5, now 6"):
        fit(state=state, seed=6)
    with pytest.raises(GridStateError, match=r"settings was lr 0\.01, weight decay 0"):
        fit(state=state, settings=[Setting(1, 0)])
    state.path.write_bytes(state.path.read_bytes()[:100])
    with pytest.raises(GridStateError, match="delete it to fit anew"):
        fit(state=state)


def test_a_head_that_diverges_disturbs_no_other() -> None:
    wild = fit(settings=[SETTINGS[0], Setting(1e38, 0.0)])
    assert torch.equal(weights(wild)[0], weights(fit())[0])
    assert not weights(wild)[1].isfinite().all()


def test_every_sample_is_drawn_once_a_pass_whatever_the_ranks() -> None:
    draws = Draws(10, 4, seed=1)
    drawn = [draws.sample(ordinal) for step in range(5) for ordinal in draws.ordinals(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    ranks = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    assert [ordinal for rank in ranks for ordinal in draws.ordinals(3, rank)] == list(draws.ordinals(3))
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        draws.ordinals(0, World(0, 3, torch.device("cpu")))


def test_dropout_takes_whole_channels_and_keeps_the_mean() -> None:
    x = ChannelDropout(0.25)(torch.ones(64, 3, 5, 32))
    assert torch.equal(x, x[:, :1, :1].expand_as(x))
    assert x.unique().tolist() == pytest.approx([0, 4 / 3])
    assert x.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(ChannelDropout(0.25).eval()(x), x)


class Counts(ConfusionMatrix):
    """A meter over scores."""

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, predicted: Tensor, labels: Tensor) -> Counts:
        super().update(predicted.argmax(dim=1), labels)
        return self


def test_heads_learn_and_are_scored_by_one_reading() -> None:
    found = fit(steps=200)
    features, labels = samples()
    meters = score_heads(found.heads, [(features[:20], labels[:20]), (features[20:], labels[20:])], Counts)
    assert max(meter.accuracy() for meter in meters) > 0.8  # the commonest class has half
    expected = (found.heads[0](features).argmax(dim=1) == labels).float().mean().item()
    assert meters[0].accuracy() == pytest.approx(expected)


def test_the_head_is_chosen_on_held_out_data_and_the_maximum_stands_beside_it() -> None:
    choice = choose([0.5, 0.7, float("nan")], [0.9, 0.6, 0.95])
    assert (choice.index, choice.value) == (1, 0.6)
    assert (choice.max_index, choice.max_over_heads) == (2, 0.95)
    lower = choose([0.5, 0.7], [0.9, 0.6], higher_is_better=False)
    assert (lower.value, lower.max_over_heads) == (0.9, 0.6)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be positive"):
        Setting(0, 0)
    with pytest.raises(ValueError, match="at least one of each"):
        grid([], [0.1])
    with pytest.raises(ValueError, match="clip_grad=0"):
        AdamW(clip_grad=0)
    with pytest.raises(ValueError, match="momentum=1 must lie in"):
        SGD(momentum=1)


def on_this_rank() -> tuple[list[Tensor], int]:
    """Heads fitted on one of two ranks, and how many places the scores of both counted."""
    with init_world("cpu") as world:
        found = fit(world)
        features, labels = samples()
        mine = slice(world.rank, None, world.size)
        meters = score_heads(found.heads, [(features[mine], labels[mine])], Counts, world=world)
        return weights(found), int(meters[0].counts.sum())


@pytest.mark.distributed
def test_two_ranks_learn_what_one_process_learns() -> None:
    expected = weights(fit())
    for found, counted in on_ranks(2, on_this_rank):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert counted == 40
