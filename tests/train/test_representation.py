"""Measures of the representation are exact on spectra made by hand, and tell collapsed features from healthy ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.train.ranks import on_ranks
from vjepa.nn.rope import grid_positions
from vjepa.train.distributed import init_world
from vjepa.train.representation import (
    alpha_req,
    covariance_rank,
    covariance_spectrum,
    dead_share,
    isotropy,
    lidar,
    parameter_distance,
    participation_ratio,
    position_decodability,
    prediction_nmse,
    spectral_measures,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(num_samples: int, dim: int, seed: int = 0) -> Tensor:
    """[N, D] with mean 0 and the identity as covariance, exactly."""
    z = random(num_samples, dim, seed=seed)
    return torch.linalg.qr(z - z.mean(dim=0))[0] * num_samples**0.5


def with_spectrum(spectrum: list[float], num_samples: int = 200) -> Tensor:
    """Features with these covariance eigenvalues, turned at random, far from the origin."""
    dim = len(spectrum)
    rotation = torch.linalg.qr(random(dim, dim, seed=1))[0]
    return white(num_samples, dim) * torch.tensor(spectrum, dtype=torch.float64).sqrt() @ rotation + 3


def test_the_spectrum_is_that_of_the_centred_covariance() -> None:
    expected = [8.0, 4.0, 2.0, 1.0, 0.0, 0.0]
    z = with_spectrum(expected)
    assert covariance_spectrum(z).tolist() == pytest.approx(expected, abs=1e-10)
    assert covariance_spectrum(z.float()).tolist() == pytest.approx(expected, abs=1e-4)
    assert covariance_spectrum(z)[-1].item() == 0


def test_fewer_samples_than_dimensions_have_as_many_eigenvalues_as_dimensions() -> None:
    z = random(6, 40)
    spectrum = covariance_spectrum(z)
    assert spectrum.shape == (40,)
    assert (spectrum > 0).sum().item() == 5
    assert spectrum.sum().item() == pytest.approx(z.var(dim=0, correction=0).sum().item(), rel=1e-10)


def test_white_features_read_as_full() -> None:
    measures = {name: value.item() for name, value in spectral_measures(white(200, 12)).items()}
    expected = {"covariance_rank": 12, "participation_ratio": 12, "isotropy": 1, "alpha_req": 0}
    assert measures == pytest.approx(expected, abs=1e-9)


def test_measures_of_a_spectrum_by_hand() -> None:
    """p = 1/2, 1/4, 1/8, 1/8: entropy 1.75 bits; sum 16, squares 88; largest 8."""
    spectrum = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    assert covariance_rank(spectrum).item() == pytest.approx(2**1.75, rel=1e-12)
    assert participation_ratio(spectrum).item() == pytest.approx(256 / 88, rel=1e-12)
    assert isotropy(spectrum).item() == pytest.approx(16 / (4 * 8), rel=1e-12)


def test_one_direction_reads_as_one() -> None:
    spectrum = covariance_spectrum(random(50, 1) * random(1, 8, seed=1))
    assert covariance_rank(spectrum).item() == pytest.approx(1)
    assert participation_ratio(spectrum).item() == pytest.approx(1)
    assert isotropy(spectrum).item() == pytest.approx(1 / 8)
    assert alpha_req(spectrum).item() == math.inf


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_a_power_law(alpha: float) -> None:
    z = with_spectrum([10 * i**-alpha for i in range(1, 33)])
    assert alpha_req(covariance_spectrum(z)).item() == pytest.approx(alpha, abs=1e-9)
    bent = covariance_spectrum(z).clone()
    bent[:4] *= 100  # the head lies outside the range, the tail is below the noise floor
    bent[20:] = 0
    assert alpha_req(bent).item() == pytest.approx(alpha, abs=1e-9)
    assert alpha_req(bent, first=1).item() > alpha + 0.1
    assert alpha_req(bent, first=10, last=20).item() == pytest.approx(alpha, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_constant_has_no_spectrum_whatever_the_rounding_of_its_mean(dtype: torch.dtype) -> None:
    z = (1000 * random(1, 16)).to(dtype).expand(333, 16)
    values = {name: value.item() for name, value in spectral_measures(z).items()}
    assert values == {"covariance_rank": 0, "participation_ratio": 0, "isotropy": 0, "alpha_req": math.inf}


def test_rounding_to_fp32_is_not_read_as_features() -> None:
    constant = random(1, 16) + 1e-9 * random(100, 16, seed=1)
    assert covariance_rank(covariance_spectrum(constant)).item() > 12  # in fp64 the noise is there, and reads healthy
    assert covariance_rank(covariance_spectrum(constant.float())).item() == 0


def test_dead_dimensions_are_counted() -> None:
    z = white(100, 8)
    z[:, 2] = 5
    z[:, 3] *= 1e-3
    assert dead_share(z).item() == 2 / 8
    assert dead_share(z, below=1e-4).item() == 1 / 8
    assert dead_share(random(1, 8).expand(10, 8)).item() == 1
    assert dead_share(random(1, 8) + 1e-4 * random(50, 8, seed=1)).item() == 1  # against the uncentred size
    assert dead_share(torch.zeros(10, 8)).item() == 1


def test_lidar_counts_directions_that_tell_clips_apart() -> None:
    """Clips at +-1, +-2, +-3 along three of five axes, views around them alike along all: p = 1/14, 4/14, 9/14."""
    clips = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * torch.tensor([1.0, 2.0, 3.0])  # [8, 3]
    axes = torch.eye(5, dtype=torch.float64)
    views = nn.functional.pad(clips, (0, 2)).double()[:, None] + 0.5 * torch.cat([axes, -axes])  # [8, 10, 5]
    p = [v / 14 for v in (1, 4, 9)]
    assert lidar(views).item() == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-9)


def test_lidar_weighs_directions_by_their_spread_within_clips() -> None:
    """Two axes of equal spread between clips, within clips 1 and 3: eigenvalues 1 / (1 + delta) and 1 / (9 + delta)."""
    clips = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    offsets = torch.tensor([[1.0, 3], [1, -3], [-1, 3], [-1, -3]])
    eigenvalues = [1 / 1.5, 1 / 9.5]
    p = [value / sum(eigenvalues) for value in eigenvalues]
    found = lidar((clips[:, None] + offsets).double(), delta=0.5).item()
    assert found == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-9)


def test_lidar_is_bounded_by_clips_and_is_zero_where_clips_are_the_same() -> None:
    assert 1 < lidar(random(4, 3, 20)).item() <= 3 + 1e-9
    assert lidar(random(1, 3, 20).expand(5, 3, 20)).item() == 0
    assert lidar(random(1, 1, 20).expand(5, 3, 20)).item() == 0


def test_nmse_is_zero_for_truth_one_for_the_mean_and_by_hand_between() -> None:
    target = random(4, 6, 8)
    assert prediction_nmse(target, target).item() == 0
    mean = target.mean(dim=(0, 1)).expand(4, 6, 8)
    assert prediction_nmse(mean, target).item() == pytest.approx(1, rel=1e-12)
    known = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # variances 1 and 4
    assert prediction_nmse(known + 1, known).item() == pytest.approx(1 / 2.5, rel=1e-6)


def test_nmse_of_a_constant_target_is_not_read_as_a_perfect_prediction() -> None:
    constant = random(1, 8).float().expand(20, 8)
    assert prediction_nmse(constant, constant).item() == 1


def test_places_are_decoded_from_features_that_hold_them_and_only_from_those() -> None:
    positions = grid_positions((2, 4, 4), interpolate=False)
    told = positions.double() @ random(3, 16, seed=1) + 0.01 * random(6, 32, 16)
    assert position_decodability(told, positions).item() > 0.99
    half = torch.cat([positions[:, :1].expand(6, 32, 1), random(6, 32, 4)], dim=-1)  # time alone, of three axes
    assert position_decodability(half, positions).item() == pytest.approx(1 / 3, abs=0.1)
    assert abs(position_decodability(random(40, 32, 8), positions).item()) < 0.05


def test_places_are_judged_on_clips_that_were_not_fitted() -> None:
    """As many dimensions as fitted tokens: noise can be fitted exactly, and says nothing of new clips."""
    assert position_decodability(random(4, 32, 64), grid_positions((2, 4, 4), interpolate=False)).item() < 0


def test_features_that_are_one_exact_line_of_place_give_the_ridge_solution_by_hand() -> None:
    """z = x: w = c / (c + ridge c) and R^2 = 1 - (ridge / (1 + ridge))^2; the axes of length one do not count."""
    positions = grid_positions((1, 1, 5), interpolate=False)
    tokens = positions[:, 2:].expand(2, 5, 1)
    assert position_decodability(tokens, positions, ridge=1.0).item() == pytest.approx(1 - 0.25, rel=1e-9)


def test_collapsed_features_know_no_place() -> None:
    positions = grid_positions((2, 2, 2), interpolate=False)
    assert position_decodability(torch.zeros(4, 8, 6), positions).item() == 0
    assert position_decodability(random(1, 1, 6).float().expand(4, 8, 6), positions).item() == pytest.approx(0, abs=0.1)


def test_distance_of_parameters_is_relative_to_the_student() -> None:
    student = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [4.0]])]
    assert parameter_distance(student, student).item() == 0
    assert parameter_distance(student, [0.9 * x for x in student]).item() == pytest.approx(0.1, rel=1e-6)
    moved = [student[0] + torch.tensor([0.0, 1.0]), student[1]]
    assert parameter_distance(student, moved).item() == pytest.approx(0.2, rel=1e-6)
    with pytest.raises(ValueError, match="zip"):
        parameter_distance(student, student[:1])


def sharded_distance() -> float:
    with init_world("cpu") as world:
        student, target = distant_pair()
        for model in (student, target):
            fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
        return parameter_distance(list(student.parameters()), list(target.parameters())).item()


def distant_pair() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(7, 5), nn.Linear(7, 5)


@pytest.mark.distributed
def test_distance_of_shards_is_that_of_the_whole() -> None:
    student, target = distant_pair()
    whole = parameter_distance(list(student.parameters()), list(target.parameters())).item()
    assert on_ranks(2, sharded_distance) == pytest.approx([whole, whole], rel=1e-6)


def test_measures_do_not_depend_on_autocast_and_are_zero_dimensional() -> None:
    z, tokens, target = random(64, 16).float(), random(4, 8, 6).float(), random(4, 8, 6, seed=1).float()
    positions = grid_positions((2, 2, 2), interpolate=False)
    calls = [
        lambda: torch.stack(list(spectral_measures(z).values())).sum(),
        lambda: dead_share(z),
        lambda: lidar(tokens),
        lambda: prediction_nmse(tokens, target),
        lambda: position_decodability(tokens, positions),
    ]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = call()
        assert plain.shape == ()
        assert torch.equal(plain, inside)


def test_features_that_are_not_finite_give_not_a_number() -> None:
    z, tokens = random(64, 16), random(4, 8, 6)
    z[3, 3] = tokens[0, 0, 0] = math.inf
    values = [*spectral_measures(z).values(), dead_share(z), lidar(tokens), prediction_nmse(tokens, tokens)]
    values.append(position_decodability(tokens, grid_positions((2, 2, 2), interpolate=False)))
    assert all(value.isnan() for value in values)


def test_what_cannot_be_meant_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[N, D\].*\[1, 8\]"):
        covariance_spectrum(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="last=9"):
        alpha_req(torch.ones(8), last=9)
    with pytest.raises(ValueError, match=r"q >= 2 views.*\[4, 1, 8\]"):
        lidar(torch.zeros(4, 1, 8))
    with pytest.raises(ValueError, match="delta=0"):
        lidar(torch.zeros(4, 2, 8), delta=0)
    with pytest.raises(ValueError, match="one shape"):
        prediction_nmse(torch.zeros(4, 8), torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"positions \[N, A\].*\[9, 3\]"):
        position_decodability(torch.zeros(4, 8, 6), torch.zeros(9, 3))
