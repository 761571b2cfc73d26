# SPDX-License-Identifier: Apache-2.0
r"""A Pyro guide as a differentiable map from noise: ``u ↦ z``, ``log q(z)``; and ``log q`` at any latent.

Five kinds of guide, in this order:

1. one that offers :class:`~pyro_sm.base.PathGuide` says it itself;
2. diffusions, by their probability flow, whose start is Gaussian;
3. ``AutoContinuous``: its posterior over the packed latent is a function of Gaussian noise (``pushforward.py``);
4. ``AutoNormal``: by its locations and scales, site by site;
5. any other guide is traced (``traced_paths.py``).

``K``, the number of noise variables per draw, may differ from D (a low-rank Gaussian has D + rank).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoLaplaceApproximation, AutoNormal
from pyro.nn.module import pyro_method
from torch import Tensor

from pyro_sm.base import Arguments, Bound, DiffusionGuide, PathDraws, PathGuide
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import check_packed, check_shape, guide_name
from pyro_sm.model.pushforward import NoGaussianNoiseError, noise_shape, push


@dataclass(frozen=True)
class Path:
    """A guide with its current parameters, in plain torch.

    Args:
        noise_dim: K, standard normal variables behind each draw.
        draw: noise (N, K) to :class:`~pyro_sm.base.PathDraws`; rows do not mix.
        log_q: log density (N,) of any latents (N, D), nats; ``None`` if it is not known.
        closed_form: whether ``log_q`` is cheap and exact, so that its gradient is the way to the score.
        whitened: whether the noise is all there is to a draw, so that a base space exists.
    """

    noise_dim: int
    draw: Callable[[Tensor], PathDraws]
    log_q: Callable[[Tensor], Tensor] | None
    closed_form: bool
    whitened: bool = True


def uniform(like: Tensor) -> Tensor:
    """Equal weights: ``1/N`` for every draw (N,), without gradient."""
    return torch.full_like(like.detach(), 1 / like.shape[0])


def set_up(guide: Any, model: Callable[..., Any], arguments: Arguments) -> Bound | None:
    """Let an automatic guide create its parameters, and refuse guides that have no density.

    Returns:
        A diffusion guide bound to the model, None for others.

    Raises:
        TypeError: the guide is a point estimate.
    """
    if isinstance(guide, AutoDelta | AutoLaplaceApproximation):
        raise TypeError(
            f"{guide_name(guide)} is a point estimate and has no log density: use a guide with some width, such as "
            "AutoNormal (of a fitted Laplace approximation: guide.laplace_approximation(*args))"
        )
    if isinstance(guide, DiffusionGuide):
        return guide.bind(model, *arguments.args, **arguments.kwargs)
    if getattr(guide, "prototype_trace", ...) is None:
        with torch.no_grad(), poutine.block():
            arguments.call(guide)
    return None


def automatic_path(
    guide: Any, density: ModelDensity, arguments: Arguments, bound: Bound | None = None
) -> Path | None:
    """The path of a guide of the first four kinds, ``None`` for others; ``bound`` is what :func:`set_up` returned.

    Raises:
        TypeError: the guide's posterior is no known function of Gaussian noise.
        ValueError: the guide's latents are not those of the model.
    """
    if isinstance(guide, AutoContinuous):
        check_packed(guide, guide._unconstrained_shapes, density)
    if isinstance(guide, PathGuide):
        return Path(
            density.dim,
            lambda u: guide.path_draws(u, arguments),
            lambda z: guide.latent_log_prob(z, arguments),
            closed_form=True,
        )
    if bound is not None:
        return _diffusion_path(guide, bound, arguments)
    if isinstance(guide, AutoContinuous):
        return _continuous_path(guide, _posterior(guide, arguments))
    if type(guide) is AutoNormal:
        return _normal_path(guide, density)
    return None


@pyro_method
def _posterior(guide: Any, arguments: Arguments) -> Any:
    """The distribution over the packed latent (D,), its parameters read in Pyro's context."""
    return arguments.call(guide.get_posterior)


def _distribution_path(posterior: Any, log_q: Callable[[Tensor], Tensor], *, closed_form: bool) -> Path:
    """The path of a distribution over the packed latent, with equally weighted draws."""

    def draw(noise: Tensor) -> PathDraws:
        z, value = push(posterior, noise)
        return PathDraws(z, value, uniform(value))

    return Path(noise_shape(posterior).numel(), draw, log_q, closed_form)


def _continuous_path(guide: Any, posterior: Any) -> Path:
    """The path of an ``AutoContinuous``, by its ``posterior`` over the packed latent."""

    def log_q(z: Tensor) -> Tensor:
        try:
            # A transform remembers its last value: given that very tensor, it would hand out noise cut off from it.
            return posterior.log_prob(z.clone())
        except (KeyError, NotImplementedError) as error:  # what Pyro's flows without an inverse raise
            raise TypeError(
                f"the flow of {guide_name(guide)} has no inverse, so its log density at a given latent is not known; "
                "use FisherDivergence"
            ) from error

    closed_form = not isinstance(posterior, torch.distributions.TransformedDistribution)
    try:
        return _distribution_path(posterior, log_q, closed_form=closed_form)
    except NoGaussianNoiseError as error:
        raise TypeError(
            f"the posterior of {guide_name(guide)} ({error}) is no known function of Gaussian noise, so it has no "
            "path gradient; give the guide the methods of pyro_sm.base.PathGuide"
        ) from None


def _diffusion_path(guide: Any, bound: Bound, arguments: Arguments) -> Path:
    """The path of a diffusion: its probability flow, from a Gaussian."""
    process: Any = bound.diffusion()
    transform = _flow_transform(guide, arguments)
    base = dist.Normal(*process.flow().base()).to_event(1)
    posterior = dist.TransformedDistribution(base, [transform])
    return _distribution_path(posterior, process.log_prob, closed_form=False)


@pyro_method
def _flow_transform(guide: Any, arguments: Arguments) -> Any:
    """The map from the Gaussian (D,) to latents, its parameters read in Pyro's context."""
    return arguments.call(guide.get_transform)


@pyro_method
def _sites_of(guide: AutoNormal, density: ModelDensity) -> tuple[Tensor, Tensor]:
    """Locations and scales (D,) of an AutoNormal, packed as the density packs its latents."""
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    if sorted(names) != sorted(site.name for site in density.sites):
        raise ValueError(f"AutoNormal covers the sites {names}, the model has {[s.name for s in density.sites]}")
    parts = []
    for site in density.sites:
        loc = operator.attrgetter(site.name)(guide.locs)
        scale = operator.attrgetter(site.name)(guide.scales)
        if loc.numel() != site.stop - site.start:
            raise ValueError(
                f"site {site.name!r}: AutoNormal holds {loc.numel()} locations, the model has "
                f"{site.stop - site.start} latents: was the guide made for another model, or is a plate subsampled?"
            )
        check_shape(guide, site.name, loc.shape, site.unconstrained_shape, "unconstrained values")
        parts.append((loc.reshape(-1), scale.reshape(-1)))
    locs, scales = zip(*parts, strict=True)
    return torch.cat(locs), torch.cat(scales)


def _normal_path(guide: AutoNormal, density: ModelDensity) -> Path:
    """The path of an ``AutoNormal``: independent normal latents."""
    loc, scale = _sites_of(guide, density)
    posterior = dist.Normal(loc, scale).to_event(1)
    return _distribution_path(posterior, posterior.log_prob, closed_form=True)
