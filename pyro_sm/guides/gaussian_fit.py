# SPDX-License-Identifier: Apache-2.0
r"""Pyro's Gaussian guides fitted by Batch-and-Match: no optimiser, no learning rate, no second derivatives.

The guide's ``N(μ, Σ)`` over the packed unconstrained latents is moved to minimise the base-space Fisher divergence
``E_q (s_p − s_q)ᵀ Σ (s_p − s_q)``, zero at a perfect fit, by the closed updates of ``batch_and_match.py``. What
comes out stands in the guide's own parameters, so that everything Pyro does with the guide goes on from there:

* ``AutoMultivariateNormal``: ``Σ = LLᵀ``, ``L = diag(scale) · scale_tril`` with a unit diagonal in ``scale_tril``;
* ``AutoLowRankMultivariateNormal``: ``Σ = diag(scale) (I + FFᵀ) diag(scale)``, ``F = cov_factor`` (D, rank).

Sources: "Batch and match: black-box variational inference with a score-based divergence"
https://arxiv.org/abs/2402.14758 ; "Batch, match, and patch: low-rank approximations for score-based variational
inference" https://arxiv.org/abs/2410.22292 .
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn.module import pyro_method
from torch import Tensor
from torch.distributions import transform_to

from pyro_sm.base import Evaluations
from pyro_sm.gaussians.batch_and_match import Gaussian, LowRankGaussian, batch_and_match, start_at_mode
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import no_validation


class GaussianFit(NamedTuple):
    """How a fit went; what it found is in the guide.

    ``fisher``: (num_batches,) base-space Fisher divergence of each batch before its update, nats²: it should have
    come to rest far below D. ``elbo``: (num_batches,) of the same draws, nats. Both are NaN for a batch with fewer
    than two finite draws. ``skipped``: batches without an update. ``evaluations``: of the model.
    """

    fisher: Tensor
    elbo: Tensor
    skipped: int
    evaluations: Evaluations


@dataclass(frozen=True)
class BatchAndMatch:
    """Fit ``AutoMultivariateNormal`` or ``AutoLowRankMultivariateNormal`` by matching scores.

        guide = AutoMultivariateNormal(model)
        result = BatchAndMatch().fit(guide, data)

    starts from the guide's present location and scale, or from the mode next to it, and costs ``num_batches ·
    batch_size`` scores, and some hundred for the mode. Like every
    single Gaussian it settles on one of several separated modes.

    Args:
        num_batches: updates.
        batch_size: scores per update.
        rank: of ``AutoMultivariateNormal`` only: look for a covariance that is a diagonal plus this rank, at a cost
            linear in the number of latents. It starts from the guide's variances. ``AutoLowRankMultivariateNormal``
            has its own rank.
        search_mode: for full covariances: begin at Laplace's approximation where that is better than the guide.

    Raises:
        ValueError: ``num_batches`` or ``rank`` < 1, ``batch_size`` < 2.
    """

    num_batches: int = 150
    batch_size: int = 32
    rank: int | None = None
    search_mode: bool = True

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"expected num_batches >= 1, found {self.num_batches}")
        if self.batch_size < 2:
            raise ValueError(f"expected batch_size >= 2, found {self.batch_size}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"expected rank >= 1, found {self.rank}")

    def fit(self, guide: Any, *args: Any, **kwargs: Any) -> GaussianFit:
        """Set the parameters of ``guide``, in the param store and in the guide itself.

        Args:
            guide: the guide; it is set up if it has never been called.
            *args: what its model is called with.
            **kwargs: the same, by name.

        Raises:
            TypeError: the guide is of another kind.
            ValueError: ``rank`` contradicts the guide's own; guide and model have different latents; the density is
                finite nowhere near the guide.
            ModelRefusedError: the model cannot be evaluated in batches.
        """
        if not isinstance(guide, AutoMultivariateNormal | AutoLowRankMultivariateNormal):
            raise TypeError(
                "expected AutoMultivariateNormal or AutoLowRankMultivariateNormal, found "
                f"{type(guide).__name__}: Batch-and-Match updates a covariance with its correlations (for a "
                "mean-field guide use FisherDivergence or an ELBO)"
            )
        if guide.prototype_trace is None:
            with torch.no_grad(), poutine.block():
                guide(*args, **kwargs)
        density = ModelDensity(_model(guide), args, kwargs)
        check_latents(type(guide).__name__, latent_sizes(guide), density)
        start = _start(guide, self.rank)
        if self.search_mode and isinstance(start, Gaussian):
            start = start_at_mode(density, start, batch_size=self.batch_size)
        fitted = batch_and_match(density, start, num_batches=self.num_batches, batch_size=self.batch_size)
        if isinstance(fitted.gaussian, LowRankGaussian) and isinstance(guide, AutoLowRankMultivariateNormal):
            _set_low_rank(guide, fitted.gaussian)
        else:
            _set_full(guide, fitted.gaussian)
        return GaussianFit(fitted.fisher, fitted.elbo, fitted.skipped, density.evaluations)


def _model(guide: Any) -> Any:
    """The user's model: ``AutoContinuous`` keeps it under a handler that gives latents their first values."""
    model = guide.model
    handler, inner = getattr(getattr(model, "func", None), "args", (None, model))
    return inner if isinstance(handler, InitMessenger) else model


@pyro_method
def latent_sizes(guide: Any) -> dict[str, int]:
    """Unconstrained size of each latent site of a guide that has been called, in the order in which it packs them."""
    if isinstance(guide, AutoNormal):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        return {name: guide._get_loc_and_scale(name)[0].numel() for name in names}
    return {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}


def check_latents(kind: str, own: dict[str, int], density: ModelDensity) -> None:
    """Compare the latent sites of a guide of this ``kind`` with those of a model.

    Raises:
        ValueError: they, their sizes or their order differ.
    """
    wanted = {site.name: site.stop - site.start for site in density.sites}
    if list(own.items()) != list(wanted.items()):
        raise ValueError(
            f"{kind} covers the latent sites {own} (name: size), the model has {wanted}: was the "
            "guide made for another model, or is a plate subsampled?"
        )


def guide_gaussian(guide: Any) -> Gaussian:
    """The ``N(μ, Σ)`` (float64) over the packed latents that a Gaussian guide of Pyro's stands for now.

    Raises:
        TypeError: the guide is not Gaussian over the packed latents.
        ValueError: it has never been called.
    """
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise ValueError(f"this {type(guide).__name__} has never been called: fit it first")
    with no_validation():  # a fit that has diverged is the caller's to report
        found = _law(guide) if isinstance(guide, AutoNormal | AutoContinuous) else None
    if found is None:
        raise TypeError(
            "expected a Gaussian guide over all latents (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, "
            "AutoLowRankMultivariateNormal, or what laplace_approximation() returns), found "
            f"{type(guide).__name__}"
        )
    return found


@pyro_method
@torch.no_grad()
def _law(guide: Any) -> Gaussian | None:
    """As :func:`guide_gaussian`; None for a law that is not normal."""
    if isinstance(guide, AutoNormal):
        pieces = [[x.reshape(-1).double() for x in guide._get_loc_and_scale(name)] for name in latent_sizes(guide)]
        loc, scale = (torch.cat(part) for part in zip(*pieces, strict=True))
        return Gaussian(loc.clone(), torch.diag(scale.square()))
    law = guide.get_posterior()
    if isinstance(law, dist.LowRankMultivariateNormal):
        low_rank = LowRankGaussian(*(x.double() for x in (law.loc, law.cov_diag, law.cov_factor)))
        return Gaussian(low_rank.loc.clone(), low_rank.covariance)
    if isinstance(law, dist.MultivariateNormal):
        tril = law.scale_tril.double()
        return Gaussian(law.loc.double().clone(), tril @ tril.T)
    if isinstance(law, dist.Independent) and isinstance(law.base_dist, dist.Normal):
        return Gaussian(law.mean.double().clone(), torch.diag(law.variance.double()))
    return None


# `pyro_method` reads the parameters from the param store where they live there, and they are changed in place:
# the store, the guide and an optimiser that holds them all go on with the same tensors.
@pyro_method
@torch.no_grad()
def _start(guide: Any, rank: int | None) -> Gaussian | LowRankGaussian:
    posterior = guide.get_posterior()
    loc = posterior.loc.detach()
    if isinstance(guide, AutoLowRankMultivariateNormal):
        own = posterior.cov_factor.shape[1]
        if rank not in (None, own):
            raise ValueError(f"expected rank={own}, that of the guide, or None, found {rank}")
        return LowRankGaussian(loc, posterior.cov_diag.detach(), posterior.cov_factor.detach())
    tril = posterior.scale_tril.detach()
    if rank is None:
        return Gaussian(loc.double(), tril.double() @ tril.double().T)
    return LowRankGaussian(loc, tril.square().sum(1), tril.new_zeros(len(loc), rank))


@pyro_method
@torch.no_grad()
def _set_full(guide: Any, gaussian: Gaussian | LowRankGaussian) -> None:
    tril = torch.linalg.cholesky(gaussian.covariance)
    scale = tril.diagonal()
    guide.loc.copy_(gaussian.loc)
    _assign(guide.scale, scale, guide.scale_constraint)
    _assign(guide.scale_tril, tril / scale[:, None], guide.scale_tril_constraint)


@pyro_method
@torch.no_grad()
def _set_low_rank(guide: Any, gaussian: LowRankGaussian) -> None:
    scale = gaussian.diagonal.sqrt()
    guide.loc.copy_(gaussian.loc)
    guide.cov_factor.copy_(gaussian.factor / scale[:, None])
    _assign(guide.scale, scale, guide.scale_constraint)


def _assign(param: Any, value: Tensor, constraint: Any) -> None:
    """Write a constrained value into the unconstrained tensor behind ``param``."""
    param.unconstrained().copy_(transform_to(constraint).inv(value))
