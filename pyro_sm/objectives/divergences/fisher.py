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

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyro_sm.base import DiffusionGuide, Evaluations, PathDraws, PyroSMWarning
from pyro_sm.model.cache import Cache, bound_density
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng, no_validation
from pyro_sm.objectives.divergences.guide_paths import Path, automatic_path, guide_name, set_up
from pyro_sm.objectives.divergences.traced_paths import TracedGuide
from pyro_sm.objectives.gradients import backward
from pyro_sm.objectives.metrics import BaseSpace, Metric, jacobian

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_CHECKS = 16  # draws at which the second derivatives are looked at

# ---------------------------------------------------------------------------------------------- the estimators


def gradient(value: Tensor, at: Tensor, *, create_graph: bool) -> Tensor:
    """``∇ value_n`` with respect to row n of ``at`` (N, D), for values (N,) of independent rows; zero if constant."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(
        value.sum(), at, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found


def squared_norm(x: Tensor) -> Tensor:
    """``‖x_n‖²`` (N,) of rows (N, K)."""
    return x.square().sum(-1)


def base_space_values(log_ratio: Tensor, noise: Tensor, *, create_graph: bool = True) -> Tensor:
    """``‖∇_u r(F(u))‖²`` (N,), nats²: one value per draw.

    ``log_ratio``: (N,) ``r`` as a function of ``noise`` (N, K), which requires grad.
    """
    return squared_norm(gradient(log_ratio, noise, create_graph=create_graph))


def latent_difference(
    log_q: Callable[[Tensor], Tensor], log_p: Callable[[Tensor], Tensor], z: Tensor, *, create_graph: bool = True
) -> Tensor:
    """``Δ = ∇ log q − ∇ log p̃`` (N, D) at latents ``z`` (N, D), which may carry a path gradient.

    For draws that are to carry none, detach them: the fixed point of a Gaussian guide is then that of the ELBO.
    """
    z = z if z.requires_grad else z.detach().requires_grad_(True)
    return gradient(log_q(z) - log_p(z), z, create_graph=create_graph)


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
    square = path.whitened and path.noise_dim == draws.z.shape[1]
    if path.log_q is None or (square and not path.closed_form):
        return difference_through_noise(log_ratio, draws.z, noise, create_graph=create_graph)
    score_p = gradient(log_p_z, draws.z, create_graph=create_graph)
    score_q = gradient(path.log_q(draws.z), draws.z, create_graph=create_graph)
    return torch.where(torch.isfinite(log_p_z)[:, None], score_q - score_p, 0.0)


# --------------------------------------------------------------------------------------------------- the checks


def check_not_subsampled(
    model: Callable[..., Any], density: ModelDensity, z: Tensor, args: Args, kwargs: Kwargs
) -> None:
    """Refuse minibatches: with a noisy score, ``E‖Δ̂‖² = ‖Δ‖² + tr Var``, and the guide would chase the second term.

    Raises:
        ValueError: a plate of the model is subsampled.
    """
    values = {name: value[0] for name, value in density.unpack(z[:1].detach()).items()}
    with torch.no_grad(), poutine.block(), no_validation(), isolated_rng(0):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"the plate '{frame.name}' of the model is subsampled to {frame.size} of {frame.full_size}: the "
                    "squared norm of a minibatch's score is biased by its variance; use the full data, or an ELBO"
                )


def vanishing_curvature(density: ModelDensity, z: Tensor) -> tuple[str, ...]:
    """Sites whose rows of the Hessian of ``log p̃`` are exactly zero at all ``z`` (N, D), though their score is not.

    Raises:
        ValueError: the model cannot be differentiated twice.
    """
    with torch.enable_grad(), isolated_rng(0):
        z = z.detach().clone().requires_grad_(True)
        log_p = density.log_prob(z)
        score = gradient(log_p, z, create_graph=True)
        direction = torch.randn_like(z)
        try:
            product = gradient((score * direction).sum(1), z, create_graph=False)
        except RuntimeError as error:
            raise ValueError(
                "the model's log density cannot be differentiated twice, which a score divergence with path "
                f"gradients needs: {error}"
            ) from error
    flat = ((product == 0) & torch.isfinite(log_p)[:, None]).all(0) & (score != 0).any(0)
    return tuple(site.name for site in density.sites if bool(flat[site.start : site.stop].any()))


# ------------------------------------------------------------------------------------------- speaking to Pyro


class PathObjective(ELBO):
    """What all divergences with path gradients share: the density, the guide as a path, and ELBO's four methods.

    A subclass defines :meth:`_loss`, from a :class:`~pyro_sm.objectives.divergences.guide_paths.Path` and a density.
    """

    def __init__(self, num_particles: int, max_plate_nesting: float) -> None:
        if num_particles < 1:
            raise ValueError(f"expected num_particles >= 1, found {num_particles}")
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self._densities: Cache = ()
        self._last: ModelDensity | None = None
        self._traced: TracedGuide | None = None
        self._checked: tuple[object, object] | None = None

    @property
    def evaluations(self) -> Evaluations:
        """Evaluations so far, of the model last trained on; a gradient here is a score with its derivative."""
        return self._last.evaluations if self._last is not None else Evaluations()

    def _loss(self, path: Path, density: ModelDensity, guide: Any, *, commit: bool, create_graph: bool) -> Tensor:
        raise NotImplementedError

    def _needs(self, path: Path, guide: Any) -> None:
        """Raise a TypeError if the guide lacks what this objective needs of it."""

    def _get_trace(self, model: Any, guide: Any, args: Args, kwargs: Kwargs) -> Any:
        """A guide trace and the model replayed against it, as ELBO subclasses offer."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _density(self, model: Callable[..., Any], args: Args, kwargs: Kwargs) -> ModelDensity:
        density, self._densities = bound_density(self._densities, model, args, kwargs)
        return density

    def _path(self, guide: Any, density: ModelDensity, args: Args, kwargs: Kwargs) -> Path:
        path = automatic_path(guide, density, args, kwargs)
        if path is not None:
            return path
        if not callable(guide):
            raise TypeError(f"expected a Pyro guide, a callable with sample statements, found {guide_name(guide)}")
        if self._traced is None or self._traced.guide is not guide or self._traced.density is not density:
            self._traced = TracedGuide(guide, density, args, kwargs)
        return self._traced.path(args, kwargs)

    def _check(
        self, model: Callable[..., Any], guide: Any, path: Path, density: ModelDensity, args: Args, kwargs: Kwargs
    ) -> None:
        """Once for every guide and density, without touching the random state."""
        if self._checked is not None and self._checked[0] is guide and self._checked[1] is density:
            return
        self._needs(path, guide)
        with torch.no_grad(), isolated_rng(0), poutine.block():
            num_draws = max(self.num_particles, _CHECKS)  # a stratified guide needs one for each component
            noise = torch.randn(num_draws, path.noise_dim, dtype=density.dtype, device=density.device)
            z = path.draw(noise).z[:_CHECKS]
        if z.shape[1] != density.dim:
            raise ValueError(f"{guide_name(guide)} draws {z.shape[1]} latents, the model has {density.dim}")
        check_not_subsampled(model, density, z, args, kwargs)
        flat = vanishing_curvature(density, z)
        if flat:
            warnings.warn(
                f"the second derivatives of the log density vanish at the latent site {', '.join(flat)} although the "
                "first ones do not (ReLU, abs, Laplace?): the path gradient of a score divergence is then wrong "
                "without notice; smooth the model (softplus, Huber, Student-t), or use an ELBO",
                PyroSMWarning,
                stacklevel=5,
            )
        self._checked = (guide, density)

    def _evaluate(
        self, model: Callable[..., Any], guide: Any, args: Args, kwargs: Kwargs, *, commit: bool, create_graph: bool
    ) -> Tensor:
        set_up(guide, model, args, kwargs)
        if isinstance(guide, DiffusionGuide):
            density: Any = guide.bind(model, *args, **kwargs).density
        else:
            density = self._density(model, args, kwargs)
        with torch.enable_grad():
            path = self._path(guide, density, args, kwargs)
            self._check(model, guide, path, density, args, kwargs)
            loss = self._loss(path, density, guide, commit=commit, create_graph=create_graph)
        density.evaluations.scores += self.num_particles
        self._last = density
        return loss if create_graph else loss.detach()

    def loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The divergence of one batch of draws; leaves guide and objective as they are."""
        return float(self._evaluate(model, guide, args, kwargs, commit=False, create_graph=False))

    def differentiable_loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The divergence of one batch of draws as a scalar tensor, differentiable in the guide's parameters."""
        grad = torch.is_grad_enabled()
        return self._evaluate(model, guide, args, kwargs, commit=grad, create_graph=grad)

    def loss_and_grads(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The divergence of one batch of draws, its gradients added to the guide's parameters.

        Raises:
            ValueError: the loss or a gradient is NaN.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            backward(loss, guide)
        return float(loss.detach())


class FisherDivergence(PathObjective):
    r"""``E_q ‖m(z)ᵀ (s_q − s_p)‖² + γ Var_q(log p̃ − log q)``, nats², with path gradients.

    Used like ``Trace_ELBO``: ``SVI(model, guide, optim, loss=FisherDivergence())``, with any guide that has a
    reparametrised draw and a log density: Pyro's ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoMultivariateNormal``,
    ``AutoLowRankMultivariateNormal``, ``AutoIAFNormal`` and ``AutoNormalizingFlow``; ``AutoDiffusion`` (by its
    probability flow) and ``AutoGaussianMixture``; hand-written guides. All particles are evaluated in one batch.

    It is zero if and only if guide and posterior agree, and no bound on the evidence. Without the Sobolev term it
    cannot see the relative weight of separated modes.

    In base space a guide much narrower than the posterior scores D, the number of latents, with hardly a gradient;
    locations move slowly along weakly identified directions. It can take
    many more steps than ``Trace_ELBO`` to the same accuracy, from a wide start too: for a Gaussian use
    Batch-and-Match, which minimises the same divergence without gradients of it.

    Args:
        num_particles: N, draws per loss.
        metric: :class:`~pyro_sm.objectives.metrics.BaseSpace` (default; affine invariant, and without a false
            infimum at infinite scale on heavy tails), ``Identity()``, ``MatrixMetric(m)``, ``FlowMetric(transform)``.
        sobolev: γ, weight of the variance of the log ratio.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Raises:
        TypeError: at the first call, if a site of the guide is not reparametrised, the guide has no log density, or
            no base space (use ``Identity()``).
        ValueError: ``sobolev`` is negative, or positive with a single particle; at the first call, if a plate is
            subsampled, guide and model have different latents, or the model cannot be differentiated twice.
        ModelRefusedError: the model cannot be evaluated in batches (at the first call).

    Sources: "Batch and match: black-box variational inference with a score-based divergence"
    https://arxiv.org/abs/2402.14758 ; "Interpreting diffusion score matching using normalizing flow"
    https://arxiv.org/abs/2107.10072 .
    """

    def __init__(
        self,
        num_particles: int = 32,
        *,
        metric: BaseSpace | Metric | None = None,
        sobolev: float = 0.0,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(num_particles, max_plate_nesting)
        if sobolev < 0:
            raise ValueError(f"expected sobolev >= 0, found {sobolev}")
        if sobolev > 0 and num_particles < 2:
            raise ValueError(
                f"expected num_particles >= 2 for the variance of the Sobolev term, found {num_particles}"
            )
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

    def _loss(self, path: Path, density: ModelDensity, guide: Any, *, commit: bool, create_graph: bool) -> Tensor:
        noise = torch.randn(self.num_particles, path.noise_dim, dtype=density.dtype, device=density.device)
        terms = fisher_terms(path, density.log_prob, noise, self.metric, self.sobolev, create_graph=create_graph)
        return (terms.weight * terms.values).sum()
