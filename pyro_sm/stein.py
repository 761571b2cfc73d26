# SPDX-License-Identifier: Apache-2.0
r"""Kernel Stein discrepancy: how far draws are from a density of which only the score is known.

For draws ``x_i`` (N, D), scores ``s_i = ∇log p(x_i)`` and a kernel ``κ``, the *Stein kernel*

    h(x, x') = s·s' κ + s·∇_{x'}κ + s'·∇_x κ + tr ∇_x∇_{x'}κ

has mean zero in either argument under ``p``. ``KSD² = E h(x, x')``, ``x, x'`` independent draws of the other density;

    U = 1/(N(N−1)) Σ_{i≠j} h_ij   (unbiased, may be negative)        V = 1/N² Σ_ij h_ij   (non-negative, biased)

Kernels here are radial, ``κ = φ(r²)`` with ``r² = ‖x − x'‖²``, so that
``h = s·s' φ − 2φ' (s − s')·(x − x') − 2Dφ' − 4r²φ''``. The inverse multiquadric (IMQ) controls weak convergence, the
Gaussian (RBF) does not. Like the Fisher divergence, KSD hardly sees the relative weight of separated modes.
Units: squared scores (nats per unit of x, squared).

With a diffusion matrix ``m(x)`` (D, D) the operator is ``S f = p⁻¹ ∇·(p m f) = b·f + Σ_ij m_ij ∂_i f_j`` with the
*drift* ``b_j = (mᵀs)_j + Σ_i ∂_i m_ij``, and the Stein kernel of ``κ I``

    h_m(x, x') = b·b' κ + b·m'ᵀ∇_{x'}κ + b'·mᵀ∇_xκ + Σ_ik (m m'ᵀ)_ik ∂_i ∂'_k κ
               = b·b' φ + 2φ' r·(m b' − m' b) − 2φ' tr(m m'ᵀ) − 4φ'' (mᵀr)·(m'ᵀr),   r = x − x'.

Sources: "A Kernelized Stein Discrepancy for Goodness-of-fit Tests" https://arxiv.org/abs/1602.03253 ;
"A Kernel Test of Goodness of Fit" https://arxiv.org/abs/1602.02964 ;
"Measuring Sample Quality with Kernels" https://arxiv.org/abs/1703.01717 ;
"Minimum Stein Discrepancy Estimators" https://arxiv.org/abs/1906.08283 ;
"Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 .
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sm.divergence import jacobian

_MEDIAN_ROWS = 1000  # whose half a million distances are more than a length scale needs


class Profile(NamedTuple):
    """``φ(r²)`` and its first two derivatives with respect to ``r²``, of any one shape."""

    value: Tensor
    first: Tensor
    second: Tensor


class RadialKernel(Protocol):
    """A kernel ``κ(x, x') = φ(‖x − x'‖²)``."""

    def fitted(self, z: Tensor) -> RadialKernel:
        """The kernel with its length scale settled, by the draws ``z`` (N, D) if it was left open."""
        ...

    def profile(self, squared: Tensor) -> Profile:
        """``φ, φ', φ''`` at squared distances."""
        ...


def median_distance(z: Tensor) -> float:
    """Median distance between two different draws, of the first 1000 of ``z`` (N, D); 1 if that is zero."""
    rows = z.detach()[:_MEDIAN_ROWS]
    if len(rows) < 2:
        return 1.0
    return float(torch.pdist(rows).median()) or 1.0


def _check_length_scale(length_scale: float | None) -> None:
    if length_scale is not None and not length_scale > 0:
        raise ValueError(f"expected length_scale > 0, found {length_scale}")


@dataclass(frozen=True)
class IMQ:
    """``(1 + r²/ℓ²)^β``.

    Args:
        length_scale: ℓ, in units of z; by default the median distance of the draws.
        beta: β in (−1, 0).

    Raises:
        ValueError: ℓ is not positive, or β outside (−1, 0), where KSD no longer controls weak convergence.
    """

    length_scale: float | None = None
    beta: float = -0.5

    def __post_init__(self) -> None:
        _check_length_scale(self.length_scale)
        if not -1 < self.beta < 0:
            raise ValueError(f"expected beta in (-1, 0), found {self.beta}")

    def fitted(self, z: Tensor) -> IMQ:
        """The kernel with its length scale settled: by the median distance of ``z`` (N, D) if it was left open."""
        return self if self.length_scale is not None else replace(self, length_scale=median_distance(z))

    def profile(self, squared: Tensor) -> Profile:
        """``φ`` and its two derivatives at squared distances, each of their shape."""
        inverse = 1 / (1.0 if self.length_scale is None else self.length_scale) ** 2
        base = 1 + squared * inverse
        value = base**self.beta
        first = self.beta * inverse * value / base
        return Profile(value, first, (self.beta - 1) * inverse * first / base)


@dataclass(frozen=True)
class RBF:
    """``exp(−r²/(2ℓ²))``. Blind to draws that wander off when D > 2; prefer :class:`IMQ`.

    Args:
        length_scale: ℓ, in units of z; by default the median distance of the draws.

    Raises:
        ValueError: ℓ is not positive.
    """

    length_scale: float | None = None

    def __post_init__(self) -> None:
        _check_length_scale(self.length_scale)

    def fitted(self, z: Tensor) -> RBF:
        """The kernel with its length scale settled: by the median distance of ``z`` (N, D) if it was left open."""
        return self if self.length_scale is not None else replace(self, length_scale=median_distance(z))

    def profile(self, squared: Tensor) -> Profile:
        """``φ`` and its two derivatives at squared distances, each of their shape."""
        rate = 0.5 / (1.0 if self.length_scale is None else self.length_scale) ** 2
        value = torch.exp(-rate * squared)
        return Profile(value, -rate * value, rate**2 * value)


def stein_kernel(x: Tensor, score: Tensor, other: Tensor, other_score: Tensor, kernel: RadialKernel) -> Tensor:
    """``h(x_i, x'_j)`` (N, M); ``x``, ``score``: (N, D), ``other``, ``other_score``: (M, D). Differentiable."""
    centre = other.detach().mean(0)  # distances survive the cancellation that a large mean would cause
    x, other = x - centre, other - centre
    squared = (x.square().sum(1)[:, None] + other.square().sum(1) - 2 * x @ other.T).clamp(min=0)
    own, others = (score * x).sum(1)[:, None], (other_score * other).sum(1)
    crossed = own + others - score @ other.T - x @ other_score.T
    k = kernel.profile(squared)
    return (score @ other_score.T) * k.value - 2 * k.first * (crossed + x.shape[1]) - 4 * squared * k.second


def diffusion_stein_kernel(
    x: Tensor,
    drift: Tensor,
    matrix: Tensor,
    other: Tensor,
    other_drift: Tensor,
    other_matrix: Tensor,
    kernel: RadialKernel,
) -> Tensor:
    """``h_m(x_i, x'_j)`` (N, M); points and drifts (N, D), (M, D), matrices (N, D, D), (M, D, D). Differentiable."""
    gap = x[:, None] - other
    k = kernel.profile(gap.square().sum(-1))
    own = torch.einsum("nmi,nij->nmj", gap, matrix)  # mᵀr
    others = torch.einsum("nmi,mij->nmj", gap, other_matrix)  # m'ᵀr
    crossed = (own * other_drift).sum(-1) - (others * drift[:, None]).sum(-1)
    trace = matrix.flatten(1) @ other_matrix.flatten(1).T
    return (drift @ other_drift.T) * k.value + 2 * k.first * (crossed - trace) - 4 * k.second * (own * others).sum(-1)


def _checked(z: Tensor, score: Tensor) -> None:
    if z.ndim != 2 or z.shape != score.shape:
        raise ValueError(
            f"expected draws and scores of one shape (N, D), found {tuple(z.shape)}, {tuple(score.shape)}"
        )
    if len(z) < 2:
        raise ValueError(f"expected at least two draws, found {len(z)}")


def _rows(
    z: Tensor, score: Tensor, kernel: RadialKernel, chunk_size: int, matrix: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(z), chunk_size):
        part = slice(start, min(start + chunk_size, len(z)))
        if matrix is None:
            yield part, stein_kernel(z[part], score[part], z, score, kernel)
        else:
            yield part, diffusion_stein_kernel(z[part], score[part], matrix[part], z, score, matrix, kernel)


class SteinStatistics(NamedTuple):
    """Two estimates of ``KSD²``, scalars: ``u`` is unbiased, ``v`` non-negative."""

    u: Tensor
    v: Tensor


def _diagonal(score: Tensor, kernel: RadialKernel, matrix: Tensor | None = None) -> Tensor:
    """``h(x_i, x_i) = ‖s_i‖² φ(0) − 2 tr(m mᵀ) φ'(0)`` (N,), in closed form; ``tr(m mᵀ) = D`` without a matrix."""
    zero = kernel.profile(score.new_zeros(()))
    size = score.shape[1] if matrix is None else matrix.square().sum((1, 2))
    return zero.value * score.square().sum(-1) - 2 * size * zero.first


def stein_statistics(
    z: Tensor,
    score: Tensor,
    kernel: RadialKernel | None = None,
    *,
    weight: Tensor | None = None,
    matrix: Tensor | None = None,
    chunk_size: int = 1024,
) -> SteinStatistics:
    """U- and V-statistic of ``KSD²`` between draws and the density with these scores; differentiable in both.

    Args:
        z: draws, (N, D).
        score: ``∇log p`` at the draws, (N, D); of the unnormalised density.
        kernel: by default ``IMQ()`` with the median distance.
        weight: (N,) of the draws, summing to one; by default ``1/N``. With weights
            ``V = Σ w_i w_j h_ij`` and ``U = Σ_{i≠j} w_i w_j h_ij / (1 − Σ w_i²)``, unbiased if they are constants
            and the draws identically distributed.
        matrix: diffusion matrices ``m(z)`` (N, D, D); ``score`` is then the drift b, both of :func:`through_matrix`.
        chunk_size: rows of the N×N matrix held at once (all of them, where gradients are wanted).

    Raises:
        ValueError: shapes differ, or fewer than two draws.
    """
    _checked(z, score)
    kernel = (kernel or IMQ()).fitted(z)
    if weight is None:
        weight = torch.full_like(z[:, 0].detach(), 1 / len(z))
    elif weight.shape != z.shape[:1]:
        raise ValueError(f"expected weights of shape ({len(z)},), found {tuple(weight.shape)}")
    total = z.new_zeros(())
    for part, block in _rows(z, score, kernel, chunk_size, matrix):
        total = total + weight[part] @ block @ weight
    trace = (weight.square() * _diagonal(score, kernel, matrix)).sum()
    return SteinStatistics((total - trace) / (1 - weight.square().sum()), total)


def wild_signs(num_draws: int, num_bootstrap: int, flip: float, like: Tensor) -> Tensor:
    """Sign processes (N, B): each starts fair and flips from one draw to the next with probability ``flip``."""
    start = torch.rand(1, num_bootstrap, dtype=like.dtype, device=like.device) < 0.5
    flips = torch.rand(num_draws - 1, num_bootstrap, dtype=like.dtype, device=like.device) < flip
    count = torch.cat([start, flips]).to(torch.int64).cumsum(0)
    return (1 - 2 * (count % 2)).to(like.dtype)


class SteinTest(NamedTuple):
    """Goodness of fit of draws to a density.

    ``p_value``: share of bootstrap statistics at least as large as the observed one; small means a bad fit.
    ``u``, ``v``: estimates of ``KSD²``. ``kernel``: with its length scale. ``bootstrap``: (B,) null sample of ``v``.
    """

    p_value: float
    u: float
    v: float
    kernel: RadialKernel
    bootstrap: Tensor


def stein_test_from_signs(
    z: Tensor, score: Tensor, kernel: RadialKernel, signs: Tensor, *, chunk_size: int = 1024
) -> SteinTest:
    """:func:`stein_test` with its random part given: ``signs`` (N, B)."""
    _checked(z, score)
    n = len(z)
    kernel = kernel.fitted(z)
    with torch.no_grad():
        null, total = z.new_zeros(signs.shape[1]), z.new_zeros(())
        for part, block in _rows(z, score, kernel, chunk_size):
            null += (signs[part] * (block @ signs)).sum(0)
            total += block.sum()
        trace = _diagonal(score, kernel).sum()
    v = total / n**2
    null = null / n**2
    p_value = (1 + int((null >= v).sum())) / (1 + len(null))
    return SteinTest(p_value, float((total - trace) / (n * (n - 1))), float(v), kernel, null)


def stein_test(
    z: Tensor,
    score: Tensor,
    kernel: RadialKernel | None = None,
    *,
    num_bootstrap: int = 500,
    flip: float = 0.5,
    chunk_size: int = 1024,
) -> SteinTest:
    """Test whether draws come from the density with these scores, by a wild bootstrap of the V-statistic.

    Args:
        z: draws, (N, D); in order, if they come from a Markov chain.
        score: ``∇log p`` at the draws, (N, D).
        kernel: by default ``IMQ()`` with the median distance.
        num_bootstrap: B.
        flip: probability that the sign changes between neighbouring draws: ½ for independent draws, smaller for
            a Markov chain (0.1, say, after thinning), or the test rejects too often.
        chunk_size: rows of the N×N matrix held at once.

    Raises:
        ValueError: shapes differ, fewer than two draws, ``num_bootstrap`` < 1 or ``flip`` outside (0, ½].

    Source: "A Kernel Test of Goodness of Fit" https://arxiv.org/abs/1602.02964 .
    """
    if num_bootstrap < 1:
        raise ValueError(f"expected num_bootstrap >= 1, found {num_bootstrap}")
    if not 0 < flip <= 0.5:
        raise ValueError(f"expected flip in (0, 0.5], found {flip}")
    _checked(z, score)
    signs = wild_signs(len(z), num_bootstrap, flip, z)
    return stein_test_from_signs(z, score, kernel or IMQ(), signs, chunk_size=chunk_size)


class Pushed(NamedTuple):
    """Draws and scores (N, D) in the space that a flow leads to."""

    z: Tensor
    score: Tensor


def through_flow(flow: Callable[[Tensor], Tensor], z: Tensor, score: Tensor, *, create_graph: bool = False) -> Pushed:
    """Draws and scores in ``y = T(z)``: ``s_y = J⁻ᵀ (s − ∇log|det J|)``, ``J = ∂T/∂z``.

    KSD of the result is the *diffusion* kernel Stein discrepancy of ``z`` with ``m = J⁻¹`` and the kernel
    ``κ(T(z), T(z'))``.

    Args:
        flow: acts on each row (D,) by itself; twice differentiable.
        z: draws, (N, D).
        score: (N, D).
        create_graph: keep the result differentiable in ``z``, which must then require grad, and in ``score``.
    """
    _checked(z, score)
    with torch.enable_grad():
        leaf = z if create_graph else z.detach().requires_grad_(True)
        y = flow(leaf)
        j = jacobian(y, leaf)
        log_det = torch.linalg.slogdet(j).logabsdet
        volume = None
        if log_det.requires_grad:
            (volume,) = torch.autograd.grad(log_det.sum(), leaf, create_graph=create_graph, allow_unused=True)
        own = score if volume is None else score - volume
        pushed = torch.linalg.solve(j.mT, own[..., None]).squeeze(-1)
    return Pushed(y, pushed) if create_graph else Pushed(y.detach(), pushed.detach())


class Diffused(NamedTuple):
    """Drifts ``b = mᵀs + ∇·m`` (N, D) and diffusion matrices ``m`` (N, D, D) at the draws."""

    drift: Tensor
    matrix: Tensor


def through_matrix(
    matrix: Callable[[Tensor], Tensor], z: Tensor, score: Tensor, *, create_graph: bool = False
) -> Diffused:
    """What the Stein operator ``S f = p⁻¹ ∇·(p m f)`` needs of a diffusion matrix; ``(∇·m)_j = Σ_i ∂_i m_ij``.

    Args:
        matrix: maps (N, D) to ``m``, (N, D, D), each row on its own; differentiable, twice for ``create_graph``.
        z: draws, (N, D).
        score: (N, D).
        create_graph: keep the result differentiable in ``z``, which must then require grad, and in ``score``.

    Raises:
        ValueError: shapes differ, or the matrix has another shape.
    """
    _checked(z, score)
    with torch.enable_grad():
        leaf = z if create_graph else z.detach().requires_grad_(True)
        m = matrix(leaf)
        if m.shape != (*z.shape, z.shape[1]):
            raise ValueError(f"expected a diffusion matrix of shape {(*z.shape, z.shape[1])}, found {tuple(m.shape)}")
        # Row i of m is a field in j; of its Jacobian (N, j, k) the part k = i enters.
        rows = [jacobian(m[:, i], leaf, create_graph=create_graph)[:, :, i] for i in range(z.shape[1])]
        drift = (m.mT @ score[..., None]).squeeze(-1) + torch.stack(rows).sum(0)
    return Diffused(drift, m) if create_graph else Diffused(drift.detach(), m.detach())
