# SPDX-License-Identifier: Apache-2.0
r"""What all divergences with path gradients share: the density of the model, the guide as a path, and the checks.

Such a divergence is an average over draws ``z = F(u)`` of a guide, differentiated through F, of something with the
scores ``∇ log p̃`` in it. So the model must be differentiable twice, with second derivatives that autograd sees, and
its score must be exact: that of a minibatch would do for ``E s``, but not for ``E ‖s‖²``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.base import Arguments, Bound, Evaluations, PyroSMWarning
from pyro_sm.model.cache import Cache, bound_density
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import guide_name, subsampled_plate
from pyro_sm.model.trace import isolated_rng, no_validation
from pyro_sm.objectives.divergences.guide_paths import Path, automatic_path, set_up
from pyro_sm.objectives.divergences.traced_paths import TracedGuide
from pyro_sm.objectives.elbo import ScoreObjective
from pyro_sm.objectives.gradients import backward, gradient

# Draws at which the second derivatives are looked at. One would show a density that is linear by pieces; the others
# are against a false alarm: a density that is curved where only a quarter of the draws fall (Huber's, say) raises one
# in a hundred times, .75^16.
_CHECKS = 16


def check_not_subsampled(model: Callable[..., Any], density: ModelDensity, z: Tensor, arguments: Arguments) -> None:
    """Refuse minibatches: with a noisy score, ``E‖Δ̂‖² = ‖Δ‖² + tr Var``, and the guide would chase the second term.

    ``z``: a latent (1, D) or more, at the first of which the model is run.

    Raises:
        ValueError: a plate of the model is subsampled.
    """
    values = {name: value[0] for name, value in density.unpack(z[:1].detach()).items()}
    with torch.no_grad(), poutine.block(), no_validation(), isolated_rng(0):
        trace = arguments.call(poutine.trace(poutine.condition(model, data=values)).get_trace)
    part = subsampled_plate(trace)
    if part is not None:
        raise ValueError(
            f"the plate '{part.name}' of the model is subsampled to {part.size} of {part.full_size}: the "
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


class PathObjective(ScoreObjective):
    """An average over draws with path gradients; a subclass defines :meth:`_divergence`, from path and density.

    Args: as :class:`~pyro_sm.objectives.elbo.ScoreObjective`.
    """

    _densities: Cache = ()
    _last: ModelDensity | None = None
    _traced: TracedGuide | None = None
    _checked: tuple[object, object] | None = None

    @property
    def evaluations(self) -> Evaluations:
        """Evaluations so far, of the model last trained on; a gradient here is a score with its derivative."""
        return self._last.evaluations if self._last is not None else Evaluations()

    @abstractmethod
    def _divergence(self, path: Path, density: ModelDensity, guide: Any, *, commit: bool) -> Tensor:
        """The divergence of one batch of draws, a scalar; differentiable, if it is a training step (``commit``)."""

    def _needs(self, path: Path, guide: Any) -> None:
        """Raise a TypeError if the guide lacks what this objective needs of it."""

    def _density(self, model: Callable[..., Any], arguments: Arguments) -> ModelDensity:
        """The density of a model that no guide keeps."""
        density, self._densities = bound_density(self._densities, model, arguments)
        return density

    def _path(self, guide: Any, density: ModelDensity, arguments: Arguments, bound: Bound | None = None) -> Path:
        """The guide as a map from noise, with its current parameters; a guide that is traced is looked at once."""
        path = automatic_path(guide, density, arguments, bound)
        if path is not None:
            return path
        if not callable(guide):
            raise TypeError(f"expected a Pyro guide, a callable with sample statements, found {guide_name(guide)}")
        if self._traced is None or self._traced.guide is not guide or self._traced.density is not density:
            self._traced = TracedGuide(guide, density, arguments)
        return self._traced.path(arguments)

    def _check(
        self, model: Callable[..., Any], guide: Any, path: Path, density: ModelDensity, arguments: Arguments
    ) -> None:
        """Once for every guide and density, without touching the random state."""
        if self._checked is not None and self._checked[0] is guide and self._checked[1] is density:
            return
        self._needs(path, guide)
        with torch.no_grad(), isolated_rng(0), poutine.block():
            num_draws = max(self.num_draws, _CHECKS)  # a stratified guide needs one for each component
            noise = torch.randn(num_draws, path.noise_dim, dtype=density.dtype, device=density.device)
            z = path.draw(noise).z[:_CHECKS]
        if z.shape[1] != density.dim:
            raise ValueError(f"{guide_name(guide)} draws {z.shape[1]} latents, the model has {density.dim}")
        check_not_subsampled(model, density, z, arguments)
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

    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        bound = set_up(guide, model, arguments)
        density: Any = self._density(model, arguments) if bound is None else bound.density
        with torch.enable_grad():
            path = self._path(guide, density, arguments, bound)
            self._check(model, guide, path, density, arguments)
            loss = self._divergence(path, density, guide, commit=commit)
        density.evaluations.scores += self.num_draws
        self._last = density
        return loss

    def _backward(self, loss: Tensor, model: Callable[..., Any], guide: Any) -> None:
        if loss.requires_grad:
            backward(loss, guide)
