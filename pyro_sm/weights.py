# SPDX-License-Identifier: Apache-2.0
r"""Importance weights: what one batch of log weights says, and what may be done with it.

``log w_i`` (N,), nats, with ``E[w] = Z``.

* evidence ``log Ẑ = log (1/N) Σ w_i``; its delta-method standard error ``sd(w) / (√N mean(w))``, which holds where
  weights have a variance; and one that adds the share of Z that a heavy tail has above the largest weight seen;
* effective sample size ``ESS = (Σ w)² / Σ w²``;
* damping: the largest ``γ ≤ 1`` with ``ESS(w^γ) ≥ τ N`` (a trust region on the weights);
* Pareto smoothing: the tail of the weights is replaced by the quantiles of a generalised Pareto law fitted to
  it; its shape k̂ tells whether the mean of the weights can be trusted (k̂ < 0.7).

Sources: "Pareto Smoothed Importance Sampling" https://arxiv.org/abs/1507.02646 ;
"A New and Efficient Estimation Method for the Generalized Pareto Distribution"
https://doi.org/10.1198/tech.2009.08017 ;
"Trust-region constrained annealing" https://arxiv.org/abs/2508.12511 .
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def log_mean_exp(log_w: Tensor) -> Tensor:
    """``log (1/N) Σ exp(log_w)``; ``log_w``: (N,), returns a scalar."""
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


def normalised(log_w: Tensor) -> Tensor:
    """Weights that sum to one, (N,).

    Raises:
        ValueError: no weight is finite, or one is NaN or ``+inf``, so nothing can be normalised.
    """
    broken = int((torch.isnan(log_w) | (log_w == math.inf)).sum())
    if broken:
        raise ValueError(
            f"expected log weights that are finite or -inf, found {broken} NaN or +inf among {log_w.shape[0]}"
        )
    if not torch.isfinite(log_w).any():
        raise ValueError(f"expected at least one finite log weight, found none among {log_w.shape[0]}")
    return torch.softmax(log_w, 0)


def effective_sample_size(log_w: Tensor) -> float:
    """``(Σ w)² / Σ w²`` in [1, N]; 0 if no weight is finite, NaN if one is NaN."""
    if not torch.isfinite(log_w).any():
        return 0.0
    # Float32 log-sum-exps of large log weights lose the digits that their difference needs.
    w = torch.exp((log_w - log_w.max()).double())
    return float(w.sum() ** 2 / w.square().sum())


class Evidence(NamedTuple):
    """``log Z`` and its standard error, both in nats."""

    log_evidence: float
    log_evidence_se: float


def evidence(log_w: Tensor) -> Evidence:
    """Evidence from independent weights (N,); the error is ``sd(w)/(√N mean(w)) = √((1/ESS − 1/N) N/(N−1))``.

    This is the delta method. It holds where the weights have a variance; where they have none it is too small most of
    the time, and :func:`evidence_with_tail` is what to report. The error is ``inf`` for a single weight, and if no
    weight is finite.
    """
    n = log_w.shape[0]
    ess = effective_sample_size(log_w)
    if ess == 0.0:
        return Evidence(-math.inf, math.inf)
    variance = max(1 / ess - 1 / n, 0.0) * n / (n - 1) if n > 1 else math.inf
    return Evidence(float(log_mean_exp(log_w.double())), math.sqrt(variance))


def damping(log_w: Tensor, share: float, iterations: int = 50) -> float:
    """Largest ``γ`` in (0, 1] with ``ESS(w^γ) ≥ share · N``, by bisection to an absolute ``2^-iterations``.

    Weights of ``-inf`` stay at zero for every γ > 0, so ``share`` is of the *finite* weights (and γ is 1 if
    there are none).

    Raises:
        ValueError: ``share`` is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"expected the effective share in (0, 1), found {share}")
    log_w = log_w[torch.isfinite(log_w)].double()
    target = share * log_w.shape[0]
    if log_w.shape[0] == 0 or effective_sample_size(log_w) >= target:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(iterations):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_sample_size(middle * log_w) >= target else (low, middle)
    return max(low, 0.5**iterations)


def generalised_pareto_fit(exceedances: Tensor) -> tuple[float, float]:
    """Shape ``k`` and scale of a generalised Pareto law: the empirical Bayes estimate of Zhang and Stephens.

    ``exceedances``: (M,) positive and sorted ascending. The shape is shrunk towards 0.5 with the weight of
    ten observations, as in the source of Pareto smoothing.
    """
    x = exceedances.double()
    n = x.shape[0]
    m = 30 + int(math.sqrt(n))
    grid = 1 - torch.sqrt(m / (torch.arange(1, m + 1, dtype=torch.float64, device=x.device) - 0.5))
    grid = grid / (3 * x[int(n / 4 + 0.5) - 1]) + 1 / x[-1]
    k_grid = torch.log1p(-grid[:, None] * x).mean(1)
    log_posterior = n * (torch.log(-grid / k_grid) - k_grid - 1)
    b = (torch.softmax(log_posterior, 0) * grid).sum()
    k = float(torch.log1p(-b * x).mean())
    scale = -k / float(b)
    return (n * k + 10 * 0.5) / (n + 10), scale


class Smoothed(NamedTuple):
    """Pareto-smoothed log weights (N,), in the same unit as the input, and the shape k̂ of their tail."""

    log_w: Tensor
    khat: float


class Tail(NamedTuple):
    """The largest weights, relative to the largest of all.

    ``position``: (M,) where they stand, by weight ascending. ``exceedance``: (M,) ``w − cut``, positive.
    ``cut``: the largest weight below the tail. All relative to ``exp(log_scale)``, the largest weight.
    """

    position: Tensor
    exceedance: Tensor
    cut: float
    log_scale: float


def upper_tail(log_w: Tensor) -> Tail:
    """The weights strictly above the one of rank ``⌈min(N/5, 3√N)⌉ + 1`` from the top.

    ``log_w``: (N,), none NaN or ``+inf`` and at least one finite.
    """
    n = log_w.shape[0]
    size = min(math.ceil(min(0.2 * n, 3 * math.sqrt(n))), n - 1)
    shift = log_w.max()
    w = torch.exp((log_w - shift).double())
    order = torch.argsort(w)
    cut = w[order[-size - 1]].clamp(min=torch.finfo(torch.float64).tiny)
    index = order[-size:] if size else order[:0]
    index = index[w[index] > cut]
    return Tail(index, w[index] - cut, float(cut), float(shift))


class TailLaw(NamedTuple):
    """The generalised Pareto law fitted to a tail: ``shape`` k̂ and ``scale`` σ, relative to the largest weight.

    Where none can be fitted, ``tail`` is None and ``shape`` is ``inf``, or ``-inf`` if there is no tail.
    """

    tail: Tail | None
    shape: float
    scale: float


def fitted_tail(log_w: Tensor) -> TailLaw:
    """The law of the upper tail of log weights (N,).

    The shape is ``inf`` if it cannot be estimated: fewer than five weights in the tail, none below it, or a weight
    that is NaN or ``+inf``. It is ``-inf`` if the largest weights are all equal up to rounding, so that there is no
    tail.
    """
    n = log_w.shape[0]
    finite = int(torch.isfinite(log_w).sum())
    if finite == 0 or not math.isfinite(float(log_w.max())):
        return TailLaw(None, math.inf, math.nan)
    tail = upper_tail(log_w)
    rounding = math.sqrt(torch.finfo(log_w.dtype).eps)
    if n > 20 and 1 - tail.cut <= rounding:
        return TailLaw(None, -math.inf, math.nan)
    m = tail.position.shape[0]
    if m < 5 or finite <= m:
        return TailLaw(None, math.inf, math.nan)
    k, scale = generalised_pareto_fit(tail.exceedance)
    if not (math.isfinite(k) and math.isfinite(scale) and scale > 0):
        return TailLaw(None, math.inf, math.nan)
    return TailLaw(tail, k, scale)


def pareto_smooth(log_w: Tensor) -> Smoothed:
    """Replace the largest ``min(N/5, 3√N)`` weights by fitted Pareto quantiles, truncated at the raw maximum.

    ``log_w``: (N,). Nothing is smoothed where :func:`fitted_tail` finds no law.
    """
    tail, k, scale = fitted_tail(log_w)
    if tail is None:
        return Smoothed(log_w, k)
    m = tail.position.shape[0]
    p = (torch.arange(m, dtype=torch.float64, device=log_w.device) + 0.5) / m
    quantile = -scale * torch.log1p(-p) if abs(k) < 1e-12 else scale * torch.expm1(-k * torch.log1p(-p)) / k
    smooth = log_w.clone()
    smooth[tail.position] = (torch.log(quantile + tail.cut).clamp(max=0.0) + tail.log_scale).to(log_w.dtype)
    return Smoothed(smooth, k)


def _unseen(exceedance: Tensor, cut: float, num_errors: float) -> tuple[float, float]:
    """A cautious shape of a tail, and ``Σ w`` expected above its largest weight, relative to that weight.

    ``exceedance``: (M,) above the ``cut`` c, sorted ascending, the last ``u = 1 − c``. The shape k is taken
    ``num_errors`` standard errors ``(1 + k̂)/√M`` larger than it is found. The mass is

        ``M E[(c + X); X > u] = M S(u) (c + u + (σ + k u)/(1 − k))``,   ``S(u) = (1 + k u/σ)^(−1/k)``,

    ``inf`` for k ≥ 1, where weights have no mean, and 0 for k ≤ 1/2, where they have a variance that tells the error.
    """
    m = len(exceedance)
    found, scale = generalised_pareto_fit(exceedance)
    k = found + num_errors * (1 + found) / math.sqrt(m)
    if k <= 0.5:
        return k, 0.0
    if not (k < 1 and scale > 0):
        return k, math.inf
    u = float(exceedance[-1])
    return k, m * (1 + k * u / scale) ** (-1 / k) * (cut + u + (scale + k * u) / (1 - k))


def unseen_mass(log_w: Tensor) -> float:
    """The share of ``Σ w`` that log weights (N,) let expect above the largest; ``inf`` if there is no saying.

    By the tail's law with a shape one standard error above k̂: an underrated tail hides most. If the upper quarter of
    the tail has a smaller shape even with two of its own errors added, that one counts: the weights of a mixture, of
    which one component is rare, look like a heavy tail, but end.
    """
    law = fitted_tail(log_w)
    if law.tail is None:
        # Nothing to be said of the tail. Fewer than two effective draws have no spread to tell an error either.
        return math.inf if law.shape == math.inf and effective_sample_size(log_w) < 2 else 0.0
    x, cut = law.tail.exceedance, law.tail.cut
    shape, mass = _unseen(x, cut, 1.0)
    m = len(x) // 4
    if shape > 0.5 and m >= 5 and x[-m] > x[-m - 1]:
        upper = x[-m - 1 :]
        shorter, less = _unseen((upper - upper[0])[1:], cut + float(upper[0]), 2.0)
        mass = less if shorter < shape else mass
    return mass / float(torch.exp((log_w - law.tail.log_scale).double()).sum())


def evidence_with_tail(log_w: Tensor) -> Evidence:
    """Evidence from independent weights (N,), with the error to report: ``√(se_Δ² + unseen_mass²)``, nats.

    ``se_Δ`` is that of :func:`evidence`. Weights without a variance (k ≥ 1/2) have errors of the order ``N^(k−1)``:
    mostly too little, by what the sample does not hold, and at times too much, by one weight, which ``se_Δ`` sees.
    Where k̂ is below 1/2 by more than its own error, this is the delta method's. The error is ``inf`` where k̂ is 1 or
    nearly, and where one draw carries everything.
    """
    found = evidence(log_w)
    if not math.isfinite(found.log_evidence_se):
        return found
    return found._replace(log_evidence_se=math.hypot(found.log_evidence_se, unseen_mass(log_w)))


def systematic(weights: Tensor, start: Tensor, num_draws: int) -> Tensor:
    """The arithmetic of :func:`resample`: ascending indices (num_draws,), no randomness.

    ``weights``: (N,) summing to one; ``start``: a scalar in [0, 1), uniform for an unbiased result. Index i
    is taken once for every point ``(j + start) / num_draws`` in its slice of the unit interval; slices are
    half-open, so an index of weight zero is never taken.
    """
    position = (torch.arange(num_draws, dtype=weights.dtype, device=weights.device) + start) / num_draws
    upper = torch.cumsum(weights, 0)
    last = int(weights.nonzero()[-1])  # the sum of the weights may round to less than a position
    return torch.searchsorted(upper, position, right=True).clamp(max=last)


def resample(log_w: Tensor, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
    """Systematic resampling: indices (num_draws,), index i appearing ``num_draws · w_i`` times up to one.

    The indices are in random order, so that any slice of them is itself a fair sample.

    Raises:
        ValueError: no weight is finite, or one is NaN or ``+inf``.
    """
    w = normalised(log_w.double())
    start = torch.rand((), dtype=torch.float64, generator=generator, device=w.device)
    index = systematic(w, start, num_draws)
    return index[torch.randperm(num_draws, generator=generator, device=w.device)]
