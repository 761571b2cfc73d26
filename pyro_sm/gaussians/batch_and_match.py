# SPDX-License-Identifier: Apache-2.0
r"""Batch-and-Match: a Gaussian fitted by matching scores, without an optimiser or a Hessian; full or low-rank.

From ``q_t = N(μ_t, Σ_t)`` take B draws with mean ``z̄`` and covariance ``C`` (1/B), and target scores with mean
``ḡ`` and covariance ``Γ``. With learning rate λ,

    ``U = λΓ + λ/(1+λ) ḡḡᵀ``,   ``V = Σ_t + λC + λ/(1+λ)(μ_t−z̄)(μ_t−z̄)ᵀ``,
    ``Σ_{t+1} = 2V(I + (I + 4UV)^{1/2})⁻¹``,   ``μ_{t+1} = μ_t/(1+λ) + λ/(1+λ)(Σ_{t+1}ḡ + z̄)``.

With ``V = LLᵀ`` and ``M = LᵀUL`` this is ``Σ_{t+1} = 2 L (I + (I + 4M)^{1/2})⁻¹ Lᵀ``: symmetric and positive
definite by construction. A Gaussian target is a fixed point, whatever the batch.

*Low rank* (batch, match and patch): ``Σ_t = Ψ + WWᵀ`` with a diagonal Ψ and W of K columns. Measured in units of
``Ψ^{1/2}``, U and V differ from 0 and I only in the span of at most ``K + 2(B+1)`` vectors. The update is the one
above within that span, ``Σ_{t+1} = Ψ + Ψ^{1/2}N (S − I) NᵀΨ^{1/2}`` with an orthonormal N, and nothing outside it.
The *patch* projects it back: ``min KL(N(μ, Σ_{t+1}) ‖ N(μ, Ψ' + W'W'ᵀ))``, which is factor analysis of ``Σ_{t+1}``,
by the steps of its EM algorithm,

    ``β = Wᵀ(Ψ + WWᵀ)⁻¹``,   ``W ← Σβᵀ (I − βW + βΣβᵀ)⁻¹``,   ``Ψ ← diag(Σ − WβΣ)``,

each of which lowers that divergence. No D×D matrix is formed: an iteration costs ``O(D (K + B)²)``.

The *base-space Fisher divergence* ``E_q (s_p − s_q)ᵀ Σ (s_p − s_q)``, nats², and the ELBO are known from every batch
before its update, at no further cost.

Sources: "Batch and match: black-box variational inference with a score-based divergence"
https://arxiv.org/abs/2402.14758 ; "Batch, match, and patch: low-rank approximations for score-based variational
inference" https://arxiv.org/abs/2410.22292 .
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.gaussians.laplace import laplace

_PATCH_STEPS = 20  # of EM, each of which lowers the divergence; they begin at the best W for the Ψ there is
_REST, _MISSES = 0.05, 3  # nats of ELBO that are none (5 % of Z), and how often in a row
_LOWEST_RATE = 1e-4  # at which an update is a ten-thousandth of what the batch asks for: smaller ones mend nothing
_UNSETTLED = 10.0  # times D, ten times what a Gaussian too narrow has; see batch_and_match


class Gaussian(NamedTuple):
    """Mean ``loc`` (D,) and covariance ``covariance`` (D, D)."""

    loc: Tensor
    covariance: Tensor

    def draws(self, num_draws: int) -> Tensor:
        """Exact draws (N, D), N = ``num_draws``."""
        noise = torch.randn(num_draws, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise @ torch.linalg.cholesky(self.covariance).T

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log q`` (N,), nats, and ``−Σ⁻¹(z − μ)`` (N, D) at ``z`` (N, D)."""
        tril = torch.linalg.cholesky(self.covariance)
        score = -torch.cholesky_solve((z - self.loc).T, tril).T
        return _log_prob(score, z - self.loc, 2 * tril.diagonal().log().sum()), score

    def spread(self, score: Tensor) -> Tensor:
        """``Σ s`` for rows ``s`` (N, D)."""
        return score @ self.covariance


class LowRankGaussian(NamedTuple):
    """``N(μ, Ψ + WWᵀ)``: mean ``loc`` (D,), ``diagonal`` of Ψ (D,), positive, and ``factor`` W (D, K)."""

    loc: Tensor
    diagonal: Tensor
    factor: Tensor

    @property
    def covariance(self) -> Tensor:
        """``Ψ + WWᵀ`` (D, D), formed."""
        return torch.diag(self.diagonal) + self.factor @ self.factor.T

    def draws(self, num_draws: int) -> Tensor:
        """Exact draws (N, D), N = ``num_draws``."""
        dim, rank = self.factor.shape
        noise = torch.randn(num_draws, dim + rank, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise[:, :dim] * self.diagonal.sqrt() + noise[:, dim:] @ self.factor.T

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log q`` (N,), nats, and ``−Σ⁻¹(z − μ)`` (N, D) at ``z`` (N, D)."""
        tril, scaled = _capacitance(self)
        precise = (z - self.loc) / self.diagonal
        score = -precise + torch.cholesky_solve((precise @ self.factor).T, tril).T @ scaled
        log_det = self.diagonal.log().sum() + 2 * tril.diagonal().log().sum()
        return _log_prob(score, z - self.loc, log_det), score

    def spread(self, score: Tensor) -> Tensor:
        """``Σ s`` for rows ``s`` (N, D)."""
        return score * self.diagonal + (score @ self.factor) @ self.factor.T


def _log_prob(score: Tensor, offset: Tensor, log_det: Tensor) -> Tensor:
    return 0.5 * ((score * offset).sum(-1) - log_det - offset.shape[-1] * math.log(2 * math.pi))


def _capacitance(gaussian: LowRankGaussian) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of ``I + WᵀΨ⁻¹W`` (K, K), and ``WᵀΨ⁻¹`` (K, D)."""
    scaled = gaussian.factor.T / gaussian.diagonal
    eye = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    return torch.linalg.cholesky(eye + scaled @ gaussian.factor), scaled


# ------------------------------------------------------------------------------------------------ one update


def _matched(u: Tensor, v: Tensor) -> Tensor:
    """``2V(I + (I + 4UV)^{1/2})⁻¹``, symmetric and positive definite; U and V: (D, D)."""
    tril = torch.linalg.cholesky((v + v.T) / 2)
    m = tril.T @ u @ tril
    eigenvalue, eigenvector = torch.linalg.eigh((m + m.T) / 2)
    shrunk = eigenvector * (2 / (1 + torch.sqrt(1 + 4 * eigenvalue.clamp(min=0))))
    covariance = tril @ (shrunk @ eigenvector.T) @ tril.T
    return (covariance + covariance.T) / 2


class _Batch(NamedTuple):
    """``ḡ``, ``z̄`` (D,), and factors (D, B+1) with ``U = uuᵀ`` and ``V = Σ_t + vvᵀ``."""

    score_mean: Tensor
    z_mean: Tensor
    u: Tensor
    v: Tensor


def _batch(loc: Tensor, z: Tensor, score: Tensor, learning_rate: float) -> _Batch:
    z_mean, g_mean = z.mean(0), score.mean(0)
    share, blend = (learning_rate / len(z)) ** 0.5, (learning_rate / (1 + learning_rate)) ** 0.5
    u = torch.cat([share * (score - g_mean), blend * g_mean[None]]).T
    v = torch.cat([share * (z - z_mean), blend * (loc - z_mean)[None]]).T
    return _Batch(g_mean, z_mean, u, v)


def _moved(loc: Tensor, batch: _Batch, spread_score: Tensor, learning_rate: float) -> Tensor:
    return (loc + learning_rate * (spread_score + batch.z_mean)) / (1 + learning_rate)


def batch_and_match_update(gaussian: Gaussian, z: Tensor, score: Tensor, learning_rate: float) -> Gaussian:
    """One update from draws ``z`` (B, D) of ``gaussian`` and the target's scores there (B, D)."""
    batch = _batch(gaussian.loc, z, score, learning_rate)
    covariance = _matched(batch.u @ batch.u.T, gaussian.covariance + batch.v @ batch.v.T)
    return Gaussian(_moved(gaussian.loc, batch, covariance @ batch.score_mean, learning_rate), covariance)


class FactoredGaussian(NamedTuple):
    """``N(μ, Ψ + A T Aᵀ)``: ``loc`` (D,), ``diagonal`` of Ψ (D,), ``basis`` A (D, m), symmetric ``core`` T (m, m).

    ``Ψ^{-1/2}A`` is orthonormal and ``I + T`` positive definite, so that the whole is.
    """

    loc: Tensor
    diagonal: Tensor
    basis: Tensor
    core: Tensor

    @property
    def covariance(self) -> Tensor:
        """``Ψ + A T Aᵀ`` (D, D), formed."""
        return torch.diag(self.diagonal) + self.basis @ self.core @ self.basis.T


def low_rank_update(gaussian: LowRankGaussian, z: Tensor, score: Tensor, learning_rate: float) -> FactoredGaussian:
    """:func:`batch_and_match_update` in factors: one update, not yet patched; ``z``, ``score``: (B, D)."""
    batch = _batch(gaussian.loc, z, score, learning_rate)
    root = gaussian.diagonal.sqrt()[:, None]
    wide, narrow = torch.cat([gaussian.factor, batch.v], 1) / root, batch.u * root
    # Orthonormal to rounding even where the vectors are dependent, as they are for K + 2(B+1) > D.
    orthonormal, _ = torch.linalg.qr(torch.cat([wide, narrow], 1))
    wide, narrow = orthonormal.T @ wide, orthonormal.T @ narrow
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    core = _matched(narrow @ narrow.T, eye + wide @ wide.T) - eye
    basis = root * orthonormal
    spread = gaussian.diagonal * batch.score_mean + basis @ (core @ (basis.T @ batch.score_mean))
    return FactoredGaussian(_moved(gaussian.loc, batch, spread, learning_rate), gaussian.diagonal, basis, core)


def _closest_factor(target: FactoredGaussian, rank: int) -> Tensor:
    """The best W (D, K) for the target's own Ψ: its leading eigenvectors in units of ``Ψ^{1/2}``."""
    eigenvalue, eigenvector = torch.linalg.eigh(target.core)
    eigenvalue, eigenvector = eigenvalue[-rank:], eigenvector[:, -rank:]
    factor = target.basis @ (eigenvector * eigenvalue.clamp(min=0).sqrt())
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))


def patch(target: FactoredGaussian, rank: int, *, num_steps: int = _PATCH_STEPS) -> LowRankGaussian:
    """Project on a diagonal plus rank K by ``num_steps`` of EM on ``KL(target ‖ result)``; ``O(D m K)`` each.

    Starts at the best W for the target's own Ψ, which no step of EM has to look for.
    """
    diagonal_of_target = target.diagonal + ((target.basis @ target.core) * target.basis).sum(1)
    # EM divides by Ψ: a latent that the factors explain to rounding keeps a share of its variance.
    floor = 1e-9 * diagonal_of_target
    found = LowRankGaussian(target.loc, target.diagonal, _closest_factor(target, rank))
    eye = torch.eye(rank, dtype=target.loc.dtype, device=target.loc.device)
    for _ in range(num_steps):
        tril, scaled = _capacitance(found)
        beta = torch.cholesky_solve(scaled, tril)
        spread = target.diagonal[:, None] * beta.T + target.basis @ (target.core @ (target.basis.T @ beta.T))
        second = eye - beta @ found.factor + beta @ spread
        factor = torch.linalg.solve((second + second.T) / 2, spread.T).T
        diagonal = torch.maximum(diagonal_of_target - (factor * spread).sum(1), floor)
        found = LowRankGaussian(target.loc, diagonal, factor)
    return found


# --------------------------------------------------------------------------------------------------- the fit


def _update(
    gaussian: Gaussian | LowRankGaussian, z: Tensor, score: Tensor, learning_rate: float
) -> Gaussian | LowRankGaussian:
    """One update within the family; raises LinAlgError if it is not finite and positive definite."""
    new: Gaussian | LowRankGaussian
    if isinstance(gaussian, LowRankGaussian):
        new = patch(low_rank_update(gaussian, z, score, learning_rate), gaussian.factor.shape[1])
        _capacitance(new)
    else:
        new = batch_and_match_update(gaussian, z, score, learning_rate)
        torch.linalg.cholesky(new.covariance)
    if not all(bool(torch.isfinite(value).all()) for value in new):
        raise torch.linalg.LinAlgError("the update is not finite")
    return new


class BatchAndMatchFit(NamedTuple):
    """A fitted Gaussian, and how the fit went.

    ``fisher``: (num_batches,) mean base-space Fisher divergence of each batch before its update, nats²; about D for a
    Gaussian much too narrow, zero for a perfect fit. ``elbo``: (num_batches,) ``mean log p̃ − log q`` of the same
    draws, nats. NaN in both where a batch had fewer than two finite draws. ``skipped``: batches without an update.
    """

    gaussian: Gaussian | LowRankGaussian
    fisher: Tensor
    elbo: Tensor
    skipped: int


class _Scored(NamedTuple):
    """The finite draws (N, D) of a batch, their scores, base-space divergences (N,) and log ratios (N,)."""

    z: Tensor
    score: Tensor
    fisher: Tensor
    log_ratio: Tensor


def _scored(density: Density, gaussian: Gaussian | LowRankGaussian, batch_size: int) -> _Scored:
    z = gaussian.draws(batch_size)
    log_p, score = density.log_prob_and_score(z.to(density.dtype))
    log_q, own = gaussian.log_prob_and_score(z)
    gap = score.double() - own
    fisher = (gap * gaussian.spread(gap)).sum(1)
    good = torch.isfinite(log_p) & torch.isfinite(score).all(-1) & torch.isfinite(fisher)
    return _Scored(z[good], score[good].double(), fisher[good], log_p[good].double() - log_q[good])


def _better_half(batch: _Scored) -> _Scored:
    keep = batch.log_ratio >= batch.log_ratio.median()
    return _Scored(*(value[keep] for value in batch)) if int(keep.sum()) >= 2 else batch


def start_at_mode(density: Density, start: Gaussian, *, batch_size: int = 32) -> Gaussian:
    """Laplace's approximation from the mean of ``start``, if it is the better of the two; else ``start``.

    Better: all of ``batch_size`` draws have a finite density, and the ELBO they estimate is higher. From starts far
    off, where single updates overshoot, this is the difference between arriving and not; where the density has no
    mode (a hierarchical model with centred effects) it costs a few hundred scores and changes nothing.
    """
    try:
        found = laplace(density, start.loc)
        torch.linalg.cholesky(found.covariance)
    except (ValueError, torch.linalg.LinAlgError):
        return start
    candidate = Gaussian(found.loc.double(), found.covariance)
    scored = _scored(density, candidate, batch_size)
    own = _scored(density, Gaussian(start.loc.double(), start.covariance.double()), batch_size)
    if len(scored.z) < batch_size or (len(own.z) and float(scored.log_ratio.mean()) < float(own.log_ratio.mean())):
        return start
    return candidate


def batch_and_match(
    density: Density, start: Gaussian | LowRankGaussian, *, num_batches: int = 100, batch_size: int = 32
) -> BatchAndMatchFit:
    """Fit a Gaussian to ``density`` from ``start``, in the family of ``start``.

    A batch is *settled* if the median of its base-space divergences is below D, that of a Gaussian too narrow. The
    learning rate is ``λ = batch_size · D / max(n, 1)²`` at the n-th settled batch: it decays, so that the last
    batches are averaged, but not before the fit has arrived. (With ``1/(t + 1)``, as in the source, the last
    batches alone decide: the noise of a batch of a posterior that is no Gaussian remains.)
    Above ten times D, as from starts where a few draws have enormous scores, only the half of the draws with the
    higher ``log p̃ − log q`` enters: a Gaussian target is a fixed point of any selection.

    Draws where the density or its score is not finite are left out; an update from fewer than two draws, or one
    that is not positive definite, is skipped. Arithmetic runs in float64 whatever the density's dtype.

    Raises:
        ValueError: every update had to be skipped: the density is not finite near ``start``.
    """
    gaussian = type(start)(*(value.double() for value in start))
    dim = len(gaussian.loc)
    fisher, elbo = gaussian.loc.new_full((2, num_batches), math.nan)
    settled = skipped = 0
    for t in range(num_batches):
        batch = _scored(density, gaussian, batch_size)
        if len(batch.z) < 2:
            skipped += 1
            continue
        fisher[t], elbo[t] = batch.fisher.mean(), batch.log_ratio.mean()
        divergence = float(batch.fisher.median()) / dim
        if divergence > _UNSETTLED:
            batch = _better_half(batch)
        settled += divergence < 1
        try:
            gaussian = _update(gaussian, batch.z, batch.score, batch_size * dim / max(settled, 1) ** 2)
        except torch.linalg.LinAlgError:
            skipped += 1
    if skipped == num_batches:
        raise ValueError(
            f"Batch-and-Match took none of {num_batches} updates: the density or its score is not finite near the "
            "start; give another start, or use PriorBase()"
        )
    return BatchAndMatchFit(gaussian, fisher, elbo, skipped)


def match_to_rest(density: Density, start: Gaussian, *, batch_size: int, max_batches: int = 100) -> Gaussian:
    """The Gaussian, from ``start``, whose ELBO large batches do not raise any more; for hundreds of latents.

    With more draws than latents a batch knows all of the covariance, and the learning rate may be so large that the
    new Gaussian is the one that matches the batch, in some ten batches at the fixed point, whose ``log p̃ − log q``
    hardly varies. From far off that overshoots: an update that lowers the ELBO is taken back, and tried again from
    the same batch at a tenth of the rate.

    Args:
        density: evaluated at ``batch_size`` draws, and their scores, per batch.
        start: float64.
        batch_size: draws per batch; several times D.
        max_batches: evaluated at most.
    """
    highest_rate = rate = float(batch_size * len(start.loc))
    gaussian, batch = start, _scored(density, start, batch_size)
    if len(batch.z) < 2:  # nothing to match
        return start
    elbo, misses = float(batch.log_ratio.mean()), 0
    for _ in range(max_batches):
        try:
            tried = batch_and_match_update(gaussian, batch.z, batch.score, rate)
            scored = _scored(density, tried, batch_size)
        except torch.linalg.LinAlgError:
            rate /= 10
            continue
        # Draws without a density would flatter the mean of those that have one.
        gain = float(scored.log_ratio.mean()) - elbo if len(scored.z) >= len(batch.z) else -math.inf
        if gain > -_REST:
            gaussian, batch, elbo, rate = tried, scored, elbo + gain, min(10 * rate, highest_rate)
        else:
            rate /= 10
        misses = misses + 1 if abs(gain) < _REST else 0
        if misses == _MISSES or rate < _LOWEST_RATE:
            break
    return gaussian
