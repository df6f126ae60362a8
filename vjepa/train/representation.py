"""How rich is the representation? Further measures of features, beside the alarms' few in `diagnostics`.

Pure functions in fp64 whatever autocast says, on the device, of detached features; not a number where a feature is
not finite. Measures of a spectrum take `covariance_spectrum`, so that one decomposition serves all; `information` takes
everything that one matrix of features is asked.

All that is built on centred covariance is scale-free: tiny isotropic noise around a constant reads as healthy. The
noise floor removes what is below the rounding of the features' own dtype and no more. Read these beside
`diagnostics.feature_std` and `mean_cosine`, and compare them along one run, with the same number of samples (several
times D, or the spectrum's tail is that of sampling): no absolute threshold holds for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vjepa.train import diagnostics

TINY = torch.finfo(torch.float64).tiny


def covariance_spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of the covariance (z - mean)^T (z - mean) / N of features z: [N, D], in falling order: [D] fp64.

    Below the noise floor they are 0: the rounding of the decomposition, D * eps64 * largest, or of the features,
    (eps of their dtype / 2)^2 * mean square. So a constant has spectrum 0, though its mean is rounded.
    """
    samples = _rows(z)
    return _above_noise(_eigenvalues(_gram(samples - samples.mean(dim=0))), samples, z.dtype)


def covariance_rank(spectrum: Tensor) -> Tensor:
    """exp(-sum_i p_i ln p_i), p = spectrum / its sum: the effective rank (Roy and Vetterli 2007) of the covariance.

    From 1 to D; 0 where nothing varies. D for white features, as many as there are equal directions. It weighs squares
    of singular values and so falls sooner than RankMe; halving within a run is a sign of dimensional collapse.
    Complete collapse onto noise reads as healthy.
    """
    return _where_it_varies(spectrum, _exp_entropy(spectrum))


def participation_ratio(spectrum: Tensor) -> Tensor:
    """(sum_i l_i)^2 / sum_i l_i^2, from 1 to D; 0 where nothing varies (Gao et al. 2017; Renyi-2 effective rank).

    The number of directions that carry most variance: at most `covariance_rank`, and lower where a few directions
    dominate. IsoScore (arXiv 2108.07344) is (it - 1) / (D - 1). Falls to 1 in dimensional collapse.
    """
    total = spectrum.sum()
    return _where_it_varies(spectrum, total.square() / spectrum.square().sum().clamp_min(TINY))


def isotropy(spectrum: Tensor) -> Tensor:
    """sum_i l_i / (D * l_1), from 1 / D to 1; 0 where nothing varies (NESum, He and Ozay, ICML 2022, over D).

    Mean variance over the greatest: 1 for white features (SIGReg's and VICReg's aim), 1 / D where one direction has it
    all. Encoders with an EMA target live far below 1 and are well.
    """
    return _where_it_varies(spectrum, spectrum.mean() / spectrum[0].clamp_min(TINY))


def alpha_req(spectrum: Tensor, *, first: int = 5, last: int | None = None) -> Tensor:
    """alpha of l_i ~ i^-alpha, by least squares of ln l_i over ln i, i counted from 1, `first` and `last` included
    (alpha-ReQ, Agrawal et al., NeurIPS 2022).

    From 0 for white features upwards; near 1 in the encoders that did best there. Well above 1: few dimensions hold
    nearly all, dimensional collapse. Infinite where fewer than two eigenvalues in the range are above the noise floor.
    The head of a spectrum follows no power law, hence `first`; compare runs on one range only.
    """
    last = len(spectrum) if last is None else last
    if not 1 <= first < last <= len(spectrum):
        raise ValueError(f"first={first} and last={last} must satisfy 1 <= first < last <= D = {len(spectrum)}")
    part = spectrum[first - 1 : last]
    x = torch.arange(first, last + 1, device=spectrum.device, dtype=torch.float64).log()
    counts = (part != 0).double()  # nan counts, and carries through
    y = torch.where(part != 0, part, 1).log()
    number = counts.sum().clamp_min(1)
    x, y = x - (counts * x).sum() / number, y - (counts * y).sum() / number
    slope = (counts * x * y).sum() / (counts * x.square()).sum().clamp_min(TINY)
    return torch.where(counts.sum() < 2, torch.inf, -slope)


SPECTRAL: dict[str, Callable[[Tensor], Tensor]] = {
    "covariance_rank": covariance_rank,
    "participation_ratio": participation_ratio,
    "isotropy": isotropy,
    "alpha_req": lambda spectrum: alpha_req(spectrum, first=min(5, len(spectrum) - 1)),
}
INFORMATION = ("scale", "feature_std", "mean_cosine", "rankme", *SPECTRAL, "dead_share")  # names of `information`


def spectral_measures(z: Tensor) -> dict[str, Tensor]:
    """The measures of the covariance spectrum of features z: [N, D], D >= 2, by name, from one decomposition."""
    spectrum = covariance_spectrum(z)
    return {name: measure(spectrum) for name, measure in SPECTRAL.items()}


def information(z: Tensor) -> dict[str, Tensor]:
    """All that is asked of one matrix of features z: [N, D], D >= 2, by the names of `INFORMATION`.

    One call decomposes the uncentred and the centred Gram matrix; the measures of a spectrum share it.
    """
    samples = _rows(z)
    uncentred, centred = _eigenvalues(torch.stack([_gram(samples), _gram(samples - samples.mean(dim=0))]))
    spectrum = _above_noise(centred, samples, z.dtype)
    return {
        "scale": feature_scale(z),
        "feature_std": diagnostics.feature_std(z),
        "mean_cosine": diagnostics.mean_cosine(z),
        "rankme": _exp_entropy(uncentred.sqrt()),
        **{name: measure(spectrum) for name, measure in SPECTRAL.items()},
        "dead_share": dead_share(z),
    }


def feature_scale(z: Tensor) -> Tensor:
    """Root mean square of all entries of features z: [N, D]. 1 by definition for layer-normed targets.

    What all scale-free measures are read beside: near 0 they describe noise. It may grow without bound where no norm
    follows, which is no collapse.
    """
    return _rows(z).square().mean().sqrt()


def dead_share(z: Tensor, *, below: float = 0.01) -> Tensor:
    """Share of dimensions j with std_n(z_nj) <= below * rms(z), rms over all of z: [N, D]; from 0 to 1.

    Relative to the uncentred rms, so that features that are constant up to `below` have share 1; for layer-normed
    targets rms is 1 and the bound absolute. Healthy: near 0. VICReg names the failure (arXiv 2105.04906, section 1).
    """
    samples = _rows(z)
    std = samples.std(dim=0, correction=0)
    is_dead = std <= below * samples.square().mean().sqrt()
    return torch.where(std.isfinite().all(), is_dead.double().mean(), torch.nan)


def lidar(views: Tensor, *, delta: float = 1e-4) -> Tensor:
    """Effective rank of W^-1/2 B W^-1/2, views: [n, q, D], q views of each of n clips (LiDAR, arXiv 2312.04000).

    B is the covariance of the clips' means, W that of views around their clip's mean, + delta * I. exp entropy of the
    eigenvalues over their sum (the paper adds an epsilon to keep the logarithm finite; here 0 ln 0 = 0). From 1 to
    min(D, n - 1); 0 where all clips have one mean. How many directions tell clips apart rather than views: directions
    that only vary within clips count little. `delta` is absolute, so features far below sqrt(delta) are not whitened,
    and a collapsed network reads as healthy (21 of 32 where a healthy one had 15): never read it alone.
    """
    if views.dim() != 3 or views.shape[0] < 2 or views.shape[1] < 2:
        raise ValueError(f"lidar needs views [n, q, D] of n >= 2 clips, q >= 2 views each, got {list(views.shape)}")
    if delta <= 0:
        raise ValueError(f"delta={delta} must be positive: W has no inverse where views agree")
    samples = views.detach().double()
    means = samples.mean(dim=1)  # [n, D]
    inner = (samples - means[:, None]).flatten(0, 1)  # [n * q, D]
    outer = means - means.mean(dim=0)
    is_finite = samples.isfinite().all()
    within = torch.where(is_finite, inner.T @ inner / len(inner), 0)
    within.diagonal().add_(delta)
    # With W = L L^T, L^-1 B L^-T has the eigenvalues of W^-1/2 B W^-1/2, and B = outer^T outer / n.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(within).L, outer.T, upper=False)  # [D, n]
    gram = whitened @ whitened.T if whitened.shape[0] <= whitened.shape[1] else whitened.T @ whitened
    spectrum = _eigenvalues(gram / len(means))
    return torch.where(outer.square().mean() <= _noise_floor(samples, views.dtype), 0, _exp_entropy(spectrum))


def prediction_nmse(predicted: Tensor, target: Tensor) -> Tensor:
    """mean |prediction - target|^2 / variance of the target, both [..., D]: 1 - R^2 over all samples and dimensions.

    0 for a perfect prediction, 1 for the targets' mean, more for worse. Healthy: well below 1; it rises as a network
    collapses, to 1 and more where what is left of the target is noise. 1 by definition where the target does not vary.
    A target that depends on position alone can be predicted: see `diagnostics.cross_sample_gap`.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {list(predicted.shape)}, {list(target.shape)}"
        )
    samples = _rows(target.flatten(0, -2))
    error = (_rows(predicted.flatten(0, -2)) - samples).square().mean()
    spread = samples.var(dim=0, correction=0).mean()
    return torch.where(spread <= _noise_floor(samples, target.dtype), 1.0, error / spread)


def position_decodability(tokens: Tensor, positions: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """R^2 of each token's place, told from its features by a ridge regression; mean over the axes of the grid.

    tokens: [B, N, D], positions: [N, A], those of `nn.rope.grid_positions`. Fitted on clips 0, 2, 4, ..., judged on the
    others, which are new clips: 1 - squared error / squared distance to the mean place. The penalty is `ridge` times
    the features' mean variance. Axes of length one are left out.

    At most 1; about 0, or below with few tokens, where features know nothing of place, as in complete collapse. Dense
    features know it in part. Close to 1 it is no fault, but with a cross-sample gap near 0 place is all they know:
    positional collapse (CAPI, arXiv 2502.08769, where it is described).
    """
    if tokens.dim() != 3 or len(tokens) < 2 or positions.shape[:1] != tokens.shape[1:2]:
        raise ValueError(
            f"tokens must be [B, N, D] of B >= 2 clips and positions [N, A], "
            f"got {list(tokens.shape)} and {list(positions.shape)}"
        )
    places = positions.double() - positions.double().mean(dim=0)  # [N, A]
    fit, held_out = (tokens[start::2].detach().double() for start in (0, 1))  # [B / 2, N, D]
    mean = fit.mean(dim=(0, 1))
    rows = (fit - mean).flatten(0, 1)
    weights = _ridge_weights(rows, places.repeat(len(fit), 1), ridge)  # [D, A]
    error = ((held_out - mean) @ weights - places).square().mean(dim=(0, 1))  # [A]
    spread = places.square().mean(dim=0)
    varies = spread > 0
    scores = torch.where(varies, 1 - error / spread.clamp_min(TINY), 0)
    return scores.sum() / varies.sum().clamp_min(1)


@torch.no_grad()
def parameter_distance(student: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """|student - target| / |student| over all parameters, Euclidean norms; 0 or more. Whole or sharded alike.

    How far the EMA target lags behind: about the sum of the last 1 / (1 - momentum) updates. 0 at the start and for a
    momentum of 0; small and steady in a healthy run. It grows where learning rate over (1 - momentum) is too large for
    the target to follow, and falls to 0 with the learning rate, or where the student has stopped to learn.
    """
    distance = _total_norm(mine.detach() - theirs.detach() for mine, theirs in zip(student, target, strict=True))
    return distance / _total_norm(mine.detach() for mine in student).clamp_min(TINY)


def _rows(z: Tensor) -> Tensor:
    if z.dim() != 2 or z.shape[0] < 2:
        raise ValueError(f"features must be [N, D] with N >= 2 samples, got {list(z.shape)}: flatten batch and tokens")
    return z.detach().double()


def _noise_floor(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """A variance that rounding to `dtype`, or fp64 sums over samples, may make out of a constant."""
    relative = max(torch.finfo(dtype).eps / 2, 16 * torch.finfo(torch.float64).eps)
    return relative**2 * samples.square().mean()


def _gram(samples: Tensor) -> Tensor:
    """What has the eigenvalues of samples^T samples / N, samples: [N, D], and is no larger than needed."""
    smaller = samples.T @ samples if samples.shape[1] <= samples.shape[0] else samples @ samples.T
    return smaller / samples.shape[0]


def _above_noise(eigenvalues: Tensor, samples: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of the covariance in rising order -> all D of them in falling order, noise as 0."""
    eigenvalues = eigenvalues.flip(0)  # [min(N, D)]
    eigenvalues = torch.where(eigenvalues > _noise_floor(samples, dtype), eigenvalues, 0 * eigenvalues)  # keeps nan
    return F.pad(eigenvalues, (0, samples.shape[1] - len(eigenvalues)))


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """[..., n, n] -> [..., n] in rising order, 0 where below the decomposition's rounding; nan where not finite."""
    is_finite = symmetric.isfinite().all(dim=-1).all(dim=-1)[..., None]
    eigenvalues = torch.linalg.eigvalsh(torch.where(is_finite[..., None], symmetric, 0))  # raises on what is not finite
    noise = eigenvalues[..., -1:] * torch.finfo(torch.float64).eps * eigenvalues.shape[-1]
    return torch.where(is_finite, torch.where(eigenvalues > noise, eigenvalues, 0), torch.nan)


def _exp_entropy(spectrum: Tensor) -> Tensor:
    return torch.special.entr(spectrum / spectrum.sum().clamp_min(TINY)).sum().exp()


def _where_it_varies(spectrum: Tensor, value: Tensor) -> Tensor:
    return torch.where(spectrum[0] == 0, 0, value)


def _ridge_weights(rows: Tensor, values: Tensor, ridge: float) -> Tensor:
    """argmin_w mean |rows w - values|^2 + ridge * mean variance * |w|^2: [D, A], for centred rows [M, D]."""
    covariance = rows.T @ rows / len(rows)
    covariance.diagonal().add_((ridge * covariance.diagonal().mean()).clamp_min(TINY))
    factor = torch.linalg.cholesky_ex(covariance).L
    return torch.cholesky_solve(rows.T @ values / len(rows), factor)


def _total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all entries, fp64; for shards, which are reduced in one call, that of the whole."""
    norms = torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in tensors])
    total = torch.linalg.vector_norm(norms)
    return (total.full_tensor() if isinstance(total, DTensor) else total).double()
