# SPDX-License-Identifier: Apache-2.0
r"""Mixtures to anneal from: ``b'(z) = ρ b(z) + (1−ρ) Σ_k w_k N(z; m_k, Σ_k)``, with exact draws, density and score.

Two that are made of little: :func:`widened`, a Gaussian that nobody has checked, at three widths; and
:func:`around_draws`, what a guide knows, whatever it is. There ``m_1 … m_K`` are draws of the guide, chosen with
``w^γ``, ``γ`` such that a tenth of the draws is left (a few weights do not decide where to look), all with
``Σ_k = h² Σ``, ``Σ`` the covariance of the draws under the same weights (:func:`damped_covariance`), and Silverman's

    ``h = (4 / ((D + 2) K))^{1/(D+4)}``,

and ``b`` is the widened Gaussian of the draws as they came. So the start needs no density of the guide, covers what
the guide covers, weighs it as well as the weights know, and reaches ten times as far.

Source: "Density Estimation for Statistics and Data Analysis" https://doi.org/10.1201/9781315140919 .
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.smc.path import Start
from pyro_sm.weights import damping, normalised, resample, systematic

_WIDENINGS = (3.0, 10.0)
"""Widths, beside 1, of a base that nobody has checked: other modes are many widths off. Each √10 of the last."""
_LEFT = 0.1  # of the draws, by the damped weights that choose among them: of 16,000, enough for 100 laws to differ


class NormalLaws(NamedTuple):
    """``loc`` (K, D), lower Cholesky factors ``scale_tril`` (K, D, D) and ``log_weight`` (K,) of normal laws."""

    loc: Tensor
    scale_tril: Tensor
    log_weight: Tensor

    def nearest(self, z: Tensor) -> Tensor:
        """Which law (N,) each latent (N, D) most likely comes from."""
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        found = []
        for k in range(len(self.loc)):
            white = torch.linalg.solve_triangular(self.scale_tril[k], (z - self.loc[k]).T, upper=False)
            found.append(self.log_weight[k] - log_det[k] - 0.5 * white.square().sum(0))
        return torch.stack(found).argmax(0)


class MixtureStart:
    """``ρ b + (1−ρ) Σ_k w_k N(m_k, Σ_k)``, a start with exact draws.

    Args:
        start: ``b``.
        laws: the normal laws; their weights sum to 1.
        share: ρ, in (0, 1).
    """

    def __init__(self, start: Start, laws: NormalLaws, share: float) -> None:
        self.start, self.laws, self.share = start, laws, share
        dim = laws.loc.shape[1]
        eye = torch.eye(dim, dtype=laws.loc.dtype, device=laws.loc.device)
        self._whiten = torch.linalg.solve_triangular(laws.scale_tril, eye.expand_as(laws.scale_tril), upper=False)
        log_det = laws.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self._constant = laws.log_weight - log_det - 0.5 * dim * math.log(2 * math.pi) + math.log1p(-share)

    def sample(self, num_draws: int) -> Tensor:
        """Draws (num_draws, D), those of ``b`` first; every part has its share of them, up to one draw."""
        loc, tril, log_weight = self.laws
        uniform = torch.rand(2, dtype=torch.float64, device=loc.device)
        num_start = int(self.share * num_draws + float(uniform[0]))
        which = systematic(torch.softmax(log_weight.double(), 0), uniform[1], num_draws - num_start)
        near = torch.randn(len(which), loc.shape[1], dtype=loc.dtype, device=loc.device)
        for k in which.unique():
            near[which == k] = loc[k] + near[which == k] @ tril[k].T
        return torch.cat([self.start.sample(num_start).to(near), near]) if num_start else near

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log b'`` (N,) in nats, and its score (N, D)."""
        log_b, score_b = self.start.log_prob_and_score(z)
        # One part at a time: (K, N, D) would be memory for nothing.
        parts = [c - 0.5 * self._white(z, k).square().sum(-1) for k, c in enumerate(self._constant)]
        log_parts = torch.stack(
            [torch.nan_to_num(log_b, nan=-math.inf, neginf=-math.inf) + math.log(self.share), *parts]
        )
        responsibility = torch.softmax(log_parts, 0)
        held = responsibility[0].unsqueeze(-1)
        score = torch.where(held > 0, held * score_b, 0.0)
        for k, whiten in enumerate(self._whiten):
            score = score - responsibility[k + 1].unsqueeze(-1) * (self._white(z, k) @ whiten)
        return torch.logsumexp(log_parts, 0), score

    def _white(self, z: Tensor, k: int) -> Tensor:
        return (z - self.laws.loc[k]) @ self._whiten[k].T


def widened(loc: Tensor, scale_tril: Tensor) -> MixtureStart:
    """A third each of ``N(loc, L Lᵀ)`` and of the same, 3 and 10 times as wide; ``loc`` (D,), ``L`` (D, D)."""
    wide = torch.stack([width * scale_tril for width in _WIDENINGS])
    count = len(_WIDENINGS)
    equal = torch.full((count,), -math.log(count), dtype=loc.dtype, device=loc.device)
    laws = NormalLaws(loc.expand(count, -1), wide, equal)
    return MixtureStart(GaussianDensity(loc, scale_tril), laws, 1 / (count + 1))


def _varies(variance: Tensor, loc: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a variance (D,) around ``loc`` (D,) is more than what rounding in ``dtype`` leaves of a constant."""
    return variance.sqrt() > 10 * torch.finfo(dtype).eps * loc.abs()


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and diagonal scale (D, D) of draws (N, D), as a base; a latent that does not vary has scale 1."""
    loc, scale = z.mean(0), z.std(0)
    return loc, torch.where(_varies(scale.square(), loc, z.dtype), scale, 1.0).diag()


def damped_covariance(draws: Draws, share: float) -> tuple[Tensor, Tensor]:
    """``γ log w`` (N,), ``γ`` such that a ``share`` of the draws is left, and the covariance (D, D) under ``w^γ``.

    Both float64. The covariance can be factorised in the dtype of the draws, whatever they are: a latent that does
    not vary has variance 1, and the diagonal is raised by a millionth, or, with more latents, by what rounding needs.

    Raises:
        ValueError: a log weight is NaN or ``+inf``, or none is finite.
    """
    log_weight = damping(draws.log_weight, share) * draws.log_weight.double()
    weight, z = normalised(log_weight), draws.z.double()
    loc = weight @ z
    apart = (z - loc) * weight.sqrt().unsqueeze(-1)
    covariance = apart.T @ apart
    spread = covariance.diagonal()
    relative = max(1e-6, 10 * len(loc) * torch.finfo(draws.z.dtype).eps)
    jitter = torch.where(_varies(spread, loc, draws.z.dtype), relative * spread, 1.0)
    return log_weight, covariance + jitter.diag()


def around_draws(draws: Draws, num_laws: int = 100, share: float = 0.25) -> MixtureStart:
    """The mixture around draws of a guide, as at the head of this file.

    Args:
        draws: of the guide, finite (N, D); their log weights need not be good for anything else.
        num_laws: K, at most N.
        share: ρ, of the widened Gaussian, in (0, 1).

    Raises:
        ValueError: fewer than two draws, or a share or count out of its range; a log weight is NaN or ``+inf``, or
            none is finite.
    """
    count = len(draws.z)
    if count < 2 or not 1 <= num_laws <= count or not 0 < share < 1:
        raise ValueError(f"expected 1 <= num_laws <= draws and 0 < share < 1, found {num_laws}, {count} and {share}")
    dim = draws.z.shape[1]
    log_weight, covariance = damped_covariance(draws, _LEFT)
    bandwidth = (4 / ((dim + 2) * num_laws)) ** (1 / (dim + 4))
    tril = bandwidth * torch.linalg.cholesky(covariance)
    loc = draws.z[resample(log_weight, num_laws)]
    equal = torch.full((num_laws,), -math.log(num_laws), dtype=loc.dtype, device=loc.device)
    laws = NormalLaws(loc, tril.to(loc).expand(num_laws, -1, -1), equal)
    return MixtureStart(widened(*moments(draws.z)), laws, share)
