# SPDX-License-Identifier: Apache-2.0
r"""Mixtures of multivariate t laws: density, draws, and a fit to weighted draws.

``q(z) = Σ_k α_k t_ν(z; m_k, C_k)``, ``C_k = L_k L_kᵀ`` (covariances are ``ν/(ν−2) C_k``); with ``d² = |L⁻¹(z − m)|²``

    ``log t_ν(z; m, C) = log Γ((ν+D)/2) − log Γ(ν/2) − D/2 log(νπ) − log|det L| − (ν+D)/2 log(1 + d²/ν)``, nats.

A t law is a normal law of random precision: ``z = m + L ε / √(c/ν)``, ``c ~ χ²_ν``; given ``z``, that precision is
``u = (ν + D)/(ν + d²)`` on average. So EM has a closed form. With weights ``w_i`` that sum to one, ``r_ki`` the share
of component k at ``z_i``, ``R_k = Σ_i w_i r_ki`` and ``A_k = Σ_i w_i r_ki u_ki (z_i − m_k)(z_i − m_k)ᵀ``,

    ``m_k ← Σ w r u z / Σ w r u``,   ``C_k ← (A_k + λ T)/(R_k + λ)``,   ``α_k ← (R_k + a)/(1 + K a)``:

each step raises

    ``Σ_i w_i log q(z_i) − ½ λ Σ_k [tr(C_k⁻¹ T) + log|C_k|] + a Σ_k log α_k``,

the likelihood with a prior that draws every ``C_k`` towards a diagonal ``T``, so that a component with few draws has
a density, and one with none stays where it may yet be of use. ``T`` is what variance is left within the draws nearest
to each of the components' first means, which are chosen far from each other: it is small where modes are.

Sources: "Robust mixture modelling using the t distribution" https://doi.org/10.1023/A:1008981510081 ; "Adaptive
importance sampling in general mixture classes" https://arxiv.org/abs/0710.4242 .
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.weights import normalised, systematic

NU = 7.0
"""Degrees of freedom: tails that a posterior rarely outdoes. Of draws for a normal law of the same scale .95 count in
two dimensions, .79 in ten, .47 in fifty (by quadrature)."""

_SHRINKAGE = 0.02  # λ K: a component with its fair share of the weight is drawn to T by 2 %
_PRIOR_SHARE = 1e-3  # a K: no component falls below a thousandth of its fair share
_STEPS = 15  # of EM: the fit is one of several rounds, each on more draws than the last
_ROUNDING = 1e-10  # of T, added to what is factorised


class StudentMixture(NamedTuple):
    """``log_weight`` (K,), nats, summing to one; ``loc`` (K, D); lower-triangular ``scale_tril`` (K, D, D); ν."""

    log_weight: Tensor
    loc: Tensor
    scale_tril: Tensor
    nu: float = NU

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.log_weight)

    def distances(self, z: Tensor) -> Tensor:
        """``d²`` (K, N) of every component at ``z`` (N, D)."""
        # One component at a time: (K, N, D) would be memory for nothing.
        white = (
            torch.linalg.solve_triangular(tril, (z - m).T, upper=False)
            for m, tril in zip(self.loc, self.scale_tril, strict=True)
        )
        return torch.stack([w.square().sum(0) for w in white])

    def joint_log_prob(self, z: Tensor) -> Tensor:
        """``log α_k + log t_k`` (K, N) at ``z`` (N, D), nats."""
        return self._joint(self.distances(z))

    def _joint(self, distance: Tensor) -> Tensor:
        dim, nu = self.loc.shape[1], self.nu
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (self.log_weight - log_det + constant)[:, None] - (nu + dim) / 2 * torch.log1p(distance / nu)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q`` (N,) at ``z`` (N, D), nats; differentiable."""
        return torch.logsumexp(self.joint_log_prob(z), 0)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log q`` (N,) and its gradient (N, D): ``−Σ_k r_k u_k C_k⁻¹ (z − m_k)``."""
        distance = self.distances(z)
        joint = self._joint(distance)
        share = torch.softmax(joint, 0) * (self.nu + z.shape[1]) / (self.nu + distance)
        score = torch.zeros_like(z)
        for k, (m, tril) in enumerate(zip(self.loc, self.scale_tril, strict=True)):
            score = score - share[k, :, None] * torch.cholesky_solve((z - m).T, tril).T
        return torch.logsumexp(joint, 0), score

    def sample(self, num_draws: int) -> Tensor:
        """Draws (num_draws, D), component by component, each with its share of them up to one draw."""
        uniform = torch.rand((), dtype=torch.float64, device=self.loc.device)
        which = systematic(torch.softmax(self.log_weight.double(), 0), uniform, num_draws)
        noise = torch.randn(num_draws, self.loc.shape[1], dtype=self.loc.dtype, device=self.loc.device)
        shape = torch.full((num_draws, 1), self.nu / 2, dtype=self.loc.dtype, device=self.loc.device)
        noise = noise / (torch._standard_gamma(shape) / (self.nu / 2)).sqrt()
        parts = [self.loc[k] + noise[which == k] @ self.scale_tril[k].T for k in which.unique().tolist()]
        return torch.cat(parts) if parts else noise

    def mean(self) -> Tensor:
        """``Σ α m`` (D,)."""
        return torch.softmax(self.log_weight, 0) @ self.loc

    def covariance(self) -> Tensor:
        """Of the mixture (D, D): that of the components, and that of their means."""
        share, apart = torch.softmax(self.log_weight, 0), self.loc - self.mean()
        within = self.nu / (self.nu - 2) * self.scale_tril @ self.scale_tril.mT
        return torch.einsum("k,kij->ij", share, within) + (share[:, None] * apart).T @ apart


class Prior(NamedTuple):
    """Of a fit: ``target`` T (D,), a diagonal; ``strength`` λ; ``share`` a. See the head of this file."""

    target: Tensor
    strength: float
    share: float


def first_guess(z: Tensor, weight: Tensor, num_components: int) -> tuple[StudentMixture, Prior]:
    """Where EM begins, and the prior: components at draws chosen far from each other, as wide as what lies nearest.

    A draw is chosen with a chance in proportion to its weight times its squared distance from those chosen before
    ("k-means++: the advantages of careful seeding" https://dl.acm.org/doi/10.5555/1283383.1283494 ).

    Args:
        z: draws (N, D), float64.
        weight: theirs (N,), summing to one.
        num_components: K; fewer where fewer draws have a weight.

    Raises:
        ValueError: fewer than one component.
    """
    if num_components < 1:
        raise ValueError(f"expected num_components >= 1, found {num_components}")
    spread = (weight @ (z - weight @ z).square()).clamp(min=1e-30)
    scaled = z / spread.sqrt()
    chosen = [int(torch.multinomial(weight, 1))]
    distance = (scaled - scaled[chosen[0]]).square().sum(1)
    while len(chosen) < min(num_components, len(z)) and bool((weight * distance > 0).any()):
        chosen.append(int(torch.multinomial(weight * distance, 1)))
        distance = torch.minimum(distance, (scaled - scaled[chosen[-1]]).square().sum(1))
    loc, count = z[chosen], len(chosen)
    nearest = torch.cdist(scaled, scaled[chosen]).argmin(1)
    apart = (z - loc[nearest]) * weight.sqrt()[:, None]
    # Draws all at the components' means would leave no variance at all.
    within = apart.T @ apart + torch.diag(1e-6 * spread)
    tril = torch.linalg.cholesky(within).expand(count, -1, -1)
    log_weight = torch.full((count,), -math.log(count), dtype=z.dtype, device=z.device)
    prior = Prior(within.diagonal(), _SHRINKAGE / count, _PRIOR_SHARE / count)
    return StudentMixture(log_weight, loc, tril), prior


def moment_law(z: Tensor, log_weight: Tensor) -> StudentMixture:
    """One t law with mean and covariance of draws (N, D) with log weights (N,), the latter raised by a millionth.

    Raises:
        ValueError: no weight is finite, or one is NaN or ``+inf``.
    """
    weight = normalised(log_weight.double())
    z, weight = z[weight > 0], weight[weight > 0]  # one without a weight may be infinite
    loc = weight @ z
    apart = (z - loc) * weight.sqrt()[:, None]
    covariance = apart.T @ apart
    covariance = covariance + torch.diag(1e-6 * covariance.diagonal() + 1e-30)
    tril = math.sqrt((NU - 2) / NU) * torch.linalg.cholesky(covariance)
    return StudentMixture(torch.zeros_like(loc[:1]), loc[None], tril[None])


def em_step(mixture: StudentMixture, z: Tensor, weight: Tensor, prior: Prior) -> StudentMixture:
    """One step of EM on draws ``z`` (N, D) with weights (N,) that sum to one."""
    dim, count = z.shape[1], mixture.num_components
    distance = mixture.distances(z)
    share = torch.softmax(mixture._joint(distance), 0) * weight
    held = share.sum(1)
    drawn = share * (mixture.nu + dim) / (mixture.nu + distance)
    total = drawn.sum(1, keepdim=True)
    loc = torch.where(total > 0, drawn @ z / total.clamp(min=1e-300), mixture.loc)
    target = torch.diag(prior.target)
    tril = []
    for k in range(count):
        apart = z - loc[k]
        scatter = (drawn[k, :, None] * apart).T @ apart + (prior.strength + _ROUNDING) * target
        tril.append(torch.linalg.cholesky(scatter / (held[k] + prior.strength)))
    log_weight = torch.log((held + prior.share) / (1 + count * prior.share))
    return mixture._replace(log_weight=log_weight, loc=loc, scale_tril=torch.stack(tril))


def penalised_log_likelihood(mixture: StudentMixture, z: Tensor, weight: Tensor, prior: Prior) -> float:
    """What EM climbs, see the head of this file, nats."""
    precision = torch.cholesky_inverse(mixture.scale_tril)
    trace = (precision.diagonal(dim1=-2, dim2=-1) * prior.target).sum()
    log_det = 2 * mixture.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum()
    likelihood = (weight * mixture.log_prob(z)).sum()
    return float(likelihood - 0.5 * prior.strength * (trace + log_det) + prior.share * mixture.log_weight.sum())


def fitted(z: Tensor, log_weight: Tensor, num_components: int, num_steps: int = _STEPS) -> StudentMixture:
    """The mixture that EM finds from weighted draws; its first means come from torch's global generator.

    Args:
        z: draws (N, D), float64.
        log_weight: theirs (N,), nats, damped as seems wise.
        num_components: K.
        num_steps: of EM.

    Raises:
        ValueError: no weight is finite, or one is NaN or ``+inf``; fewer than one component.
    """
    weight = normalised(log_weight.double())
    z, weight = z[weight > 0], weight[weight > 0]
    mixture, prior = first_guess(z, weight, num_components)
    for _ in range(num_steps):
        mixture = em_step(mixture, z, weight, prior)
    return mixture
