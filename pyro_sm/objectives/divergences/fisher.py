# SPDX-License-Identifier: Apache-2.0
r"""The Fisher divergence between a guide and a model, as a Pyro objective.

``Δ(z) = s_q(z) − s_p(z) = −∇ r(z)`` with the log ratio ``r = log p̃ − log q``; the normaliser of ``p̃`` drops out.

    ``FD_m(q‖p) = E_q ‖m(z)ᵀ Δ(z)‖²``

With a reparametrised guide ``z = F(u)``, ``u ~ N(0, I)``, and ``m = J_F`` it is measured in the guide's own whitened
space, where it needs no score of q at all:

    ``E_u ‖∇_u r(F(u))‖² = E_u ‖∇_u [log p̃(F(u)) + log|det J_F(u)|] + u‖²``.

Both are zero, draw by draw, at ``q = p``. Draws carry the path gradient, so a step costs Hessian-vector products of
``log p̃``. The divergence cannot see the relative weight of separated modes. The Sobolev term can, and is free of the
normaliser as well:

    ``FD + γ Var_q(r)``.

Sources: "Batch and match: black-box variational inference with a score-based divergence"
https://arxiv.org/abs/2402.14758 ; "Interpreting diffusion score matching using normalizing flow"
https://arxiv.org/abs/2107.10072 ; "Towards Healing the Blindness of Score Matching"
https://arxiv.org/abs/2209.07396 .
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import PathDraws
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import guide_name
from pyro_sm.objectives.divergences.guide_paths import Path
from pyro_sm.objectives.divergences.path_objective import PathObjective
from pyro_sm.objectives.gradients import gradient
from pyro_sm.objectives.metrics import BaseSpace, Metric, jacobian

# ---------------------------------------------------------------------------------------------- the estimators


def squared_norm(x: Tensor) -> Tensor:
    """``‖x_n‖²`` (N,) of rows (N, K)."""
    return x.square().sum(-1)


def base_space_values(log_ratio: Tensor, noise: Tensor, *, create_graph: bool = True) -> Tensor:
    """``‖∇_u r(F(u))‖²`` (N,), nats²: one value per draw.

    ``log_ratio``: (N,) ``r`` as a function of ``noise`` (N, K), which requires grad.
    """
    return squared_norm(gradient(log_ratio, noise, create_graph=create_graph))


def difference_through_noise(log_ratio: Tensor, z: Tensor, noise: Tensor, *, create_graph: bool = True) -> Tensor:
    """``Δ`` (N, D) from the noise alone, by ``J_Fᵀ Δ = −∇_u r``; for guides whose density is dear elsewhere.

    ``log_ratio``: (N,) and ``z``: (N, D), both functions of ``noise`` (N, D), which requires grad. Takes D
    backward passes through F.
    """
    pulled_back = gradient(log_ratio, noise, create_graph=create_graph)
    return -torch.linalg.solve(jacobian(z, noise).mT, pulled_back[..., None])[..., 0]


def variance_values(log_ratio: Tensor, weight: Tensor) -> Tensor:
    """Values (N,) whose mean under ``weight`` (N,) is the variance of ``log_ratio`` (N,), nats².

    Unbiased for equal weights: ``(r_n − r̄)² / (1 − Σ w²)`` with ``r̄ = Σ w r``.
    """
    centred = log_ratio - (weight * log_ratio).sum()
    spread = 1 - weight.square().sum()
    return centred.square() / spread.clamp(min=torch.finfo(spread.dtype).eps)


class FisherTerms(NamedTuple):
    """``values``: (N,) ``‖mᵀΔ‖² + γ (r − r̄)²``, one per draw. ``weight``: (N,), summing to one."""

    values: Tensor
    weight: Tensor


def fisher_terms(
    path: Path,
    log_p: Callable[[Tensor], Tensor],
    noise: Tensor,
    metric: BaseSpace | Metric,
    sobolev: float = 0.0,
    *,
    create_graph: bool = True,
) -> FisherTerms:
    """The divergence of one batch of ``noise`` (N, K), draw by draw, nats².

    Args:
        path: the guide as a map from noise.
        log_p: ``log p̃`` (N,) of latents (N, D), twice differentiable.
        noise: standard normal, or the nodes of a quadrature rule.
        metric: where the difference of the scores is measured.
        sobolev: γ.
        create_graph: False if only the values are wanted.

    A draw with ``log p̃ = −inf`` has an infinite value and no gradient.
    """
    with torch.enable_grad():
        noise = noise.detach().requires_grad_(True)
        draws = path.draw(noise)
        log_p_z = log_p(draws.z)
        possible = torch.isfinite(log_p_z)
        log_ratio = torch.where(possible, log_p_z - draws.log_q, 0.0)
        if isinstance(metric, BaseSpace):
            values = base_space_values(log_ratio, noise, create_graph=create_graph)
        else:
            difference = _difference(path, draws, log_p_z, log_ratio, noise, create_graph=create_graph)
            values = squared_norm(metric(draws.z, difference))
        if sobolev:
            weight = draws.weight * possible
            weight = weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
            values = values + sobolev * variance_values(log_ratio, weight)
        return FisherTerms(torch.where(possible, values, torch.inf), draws.weight)


def _difference(
    path: Path, draws: PathDraws, log_p_z: Tensor, log_ratio: Tensor, noise: Tensor, *, create_graph: bool
) -> Tensor:
    """``Δ`` (N, D) by whichever way is cheaper for this guide: its own density, or the noise."""
    square = path.whitened and path.noise_dim == draws.z.shape[1]
    if path.log_q is None or (square and not path.closed_form):
        return difference_through_noise(log_ratio, draws.z, noise, create_graph=create_graph)
    score_p = gradient(log_p_z, draws.z, create_graph=create_graph)
    score_q = gradient(path.log_q(draws.z), draws.z, create_graph=create_graph)
    return torch.where(torch.isfinite(log_p_z)[:, None], score_q - score_p, 0.0)


# ------------------------------------------------------------------------------------------- speaking to Pyro


class FisherDivergence(PathObjective):
    r"""``E_q ‖m(z)ᵀ (s_q − s_p)‖² + γ Var_q(log p̃ − log q)``, nats², with path gradients.

    Used like ``Trace_ELBO``: ``SVI(model, guide, optim, loss=FisherDivergence())``, with any guide that has a
    reparametrised draw and a log density: Pyro's ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoMultivariateNormal``,
    ``AutoLowRankMultivariateNormal``, ``AutoIAFNormal`` and ``AutoNormalizingFlow``; ``AutoDiffusion`` (by its
    probability flow) and ``AutoGaussianMixture``; hand-written guides. All draws are evaluated in one batch.

    It is zero if and only if guide and posterior agree, and no bound on the evidence. Without the Sobolev term it
    cannot see the relative weight of separated modes.

    In base space a guide much narrower than the posterior scores D, the number of latents, with hardly a gradient;
    locations move slowly along weakly identified directions. It can take
    many more steps than ``Trace_ELBO`` to the same accuracy, from a wide start too: for a Gaussian use
    Batch-and-Match, which minimises the same divergence without gradients of it.

    Args:
        num_draws: N, draws per loss; 32 by default.
        metric: :class:`~pyro_sm.objectives.metrics.BaseSpace` (default; affine invariant, and without a false
            infimum at infinite scale on heavy tails), ``Identity()``, ``MatrixMetric(m)``, ``FlowMetric(transform)``.
        sobolev: γ, weight of the variance of the log ratio.
        num_particles: Pyro's word for ``num_draws``.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Raises:
        TypeError: at the first call, if a site of the guide is not reparametrised, the guide has no log density, or
            no base space (use ``Identity()``).
        ValueError: ``sobolev`` is negative, or positive with a single draw; at the first call, if a plate is
            subsampled, guide and model have different latents, or the model cannot be differentiated twice.
        ModelRefusedError: the model cannot be evaluated in batches (at the first call).

    Sources: "Batch and match: black-box variational inference with a score-based divergence"
    https://arxiv.org/abs/2402.14758 ; "Interpreting diffusion score matching using normalizing flow"
    https://arxiv.org/abs/2107.10072 .
    """

    def __init__(
        self,
        num_draws: int | None = None,
        *,
        metric: BaseSpace | Metric | None = None,
        sobolev: float = 0.0,
        num_particles: int | None = None,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(num_draws, num_particles, default=32, max_plate_nesting=max_plate_nesting)
        if sobolev < 0:
            raise ValueError(f"expected sobolev >= 0, found {sobolev}")
        if sobolev > 0 and self.num_draws < 2:
            raise ValueError(f"expected num_draws >= 2 for the variance of the Sobolev term, found {self.num_draws}")
        self.metric = metric or BaseSpace()
        self.sobolev = sobolev

    def _needs(self, path: Path, guide: Any) -> None:
        if isinstance(self.metric, BaseSpace) and not path.whitened:
            raise TypeError(
                f"{guide_name(guide)} has a site whose draws are no known function of Gaussian noise, so it has no "
                "base space: use FisherDivergence(metric=Identity())"
            )
        if not path.whitened and path.log_q is None:
            raise TypeError(f"{guide_name(guide)} has no log density at a given latent")

    def _divergence(self, path: Path, density: ModelDensity, guide: Any, *, commit: bool) -> Tensor:
        noise = torch.randn(self.num_draws, path.noise_dim, dtype=density.dtype, device=density.device)
        terms = fisher_terms(path, density.log_prob, noise, self.metric, self.sobolev, create_graph=commit)
        return (terms.weight * terms.values).sum()
