# SPDX-License-Identifier: Apache-2.0
r"""Weighted draws from any guide, with the log density they have in the unconstrained latent space.

The log weight of a draw is ``log p̃(z) − log q(z)``, and ``log q`` that of ``guide_trace.py``. Three kinds of guide,
in this order:

1. one that offers :meth:`WeightedGuide.draw_weighted` knows its own weights (diffusions: path weights);
2. ``AutoContinuous`` has one distribution over the packed latent vector, in the order of the density;
3. any other guide is run under an outer plate if that is verified against single runs, else run draw by draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor
from torch.distributions import biject_to

from pyro_sm.base import Arguments, Density, DiffusionGuide, Draws, PathGuide
from pyro_sm.diffusion.covering import default_covering, process_log_weight
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import (
    GuideSites,
    check_packed,
    check_shapes,
    close,
    guide_name,
    is_point,
    log_jacobian,
    read_guide,
    run_guide,
    run_guide_batched,
    sites_log_prob,
    verified,
)

# Latents whose density is evaluated at once. For a model of five latents, one costs 2.4 µs in batches of 256, 0.23 µs
# in 4,096, 0.13 µs in 16,384, and 0.48 µs in 65,536, where memory begins to count (measured on one core).
_CHUNK = 4096
# Draws of a batched run that are compared with single runs: a branch that a share p of them takes goes unseen with
# probability (1 − p)^32, 3 % for a p of 0.1. They cost some 30 ms.
_CHECKS = 32


@runtime_checkable
class WeightedGuide(Protocol):
    """A guide that draws latents and knows their weights."""

    def draw_weighted(self, density: Density, num_draws: int, arguments: Arguments) -> Draws:
        """``num_draws`` independent draws with ``log p̃`` and log weight; ``arguments`` are those of the model."""
        ...


class _Sampled(NamedTuple):
    """Constrained values by site (n, \\*shape) and ``log q`` in constrained space (n,)."""

    values: dict[str, Tensor]
    log_q: Tensor


@torch.no_grad()
def draw_from_guide(
    guide: Callable[..., Any],
    density: ModelDensity,
    num_draws: int,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Draws:
    """``num_draws`` draws of ``guide`` with their ``log p̃`` and log weight under ``density``.

    Args:
        guide: one of the three kinds at the head of this file; it is called with ``args`` and ``kwargs``.
        density: the model with its data; each draw costs one evaluation of it.
        num_draws: how many, N.
        args: what the model (and so the guide) is called with.
        kwargs: the same, by name.

    Raises:
        TypeError: the guide has no log density (a point estimate, auxiliary latents, a missing latent).
        ValueError: a site of the guide has another shape than that of the model.
    """
    arguments = Arguments(tuple(args), dict(kwargs or {}))
    if isinstance(guide, AutoContinuous) and guide.prototype_trace is not None:
        check_packed(guide, guide._unconstrained_shapes, density)
    if isinstance(guide, WeightedGuide):
        return guide.draw_weighted(density, num_draws, arguments)
    if isinstance(guide, AutoLaplaceApproximation):
        raise TypeError(
            "AutoLaplaceApproximation is a point estimate until it is turned into a Gaussian: pass "
            "guide.laplace_approximation(*args) instead"
        )
    if isinstance(guide, AutoContinuous):
        z, log_q = _draw_continuous(guide, density, num_draws, arguments)
    elif callable(guide):
        z, log_q = _draw_traced(guide, density, num_draws, arguments)
    else:
        raise TypeError(
            f"cannot draw from {type(guide).__name__}: expected a Pyro guide (a callable with sample "
            "statements) or an object with the method draw_weighted(density, num_draws, arguments)"
        )
    log_p = torch.cat([density.log_prob(part) for part in z.split(_CHUNK)])
    return Draws(z, log_p, log_p - log_q)


def _draw_continuous(
    guide: AutoContinuous, density: ModelDensity, n: int, arguments: Arguments
) -> tuple[Tensor, Tensor]:
    """Latents (n, D) and ``log q`` (n,) from the packed posterior of the guide."""
    if guide.prototype_trace is None:
        arguments.call(guide)
    posterior = arguments.call(guide.get_posterior)
    z = posterior.sample((n,))
    if z.shape != (n, density.dim):
        raise TypeError(
            f"expected {type(guide).__name__} to draw latents of shape {(n, density.dim)}, found "
            f"{tuple(z.shape)}: was it built for another model, or is a plate of local latents subsampled?"
        )
    return z, posterior.log_prob(z)


def _draw_traced(
    guide: Callable[..., Any], density: ModelDensity, n: int, arguments: Arguments
) -> tuple[Tensor, Tensor]:
    """Latents (n, D) and ``log q`` (n,) from traces of the guide."""
    probe = read_guide(guide, density, arguments)
    _check_sites(guide_name(guide), probe)
    check_shapes(guide, probe, density)
    sampled = _sample_vectorised(guide, density, probe, n, arguments)
    if sampled is None:
        sampled = _sample_one_by_one(guide, density, n, arguments)
    z = density.pack(sampled.values)
    return z, sampled.log_q + log_jacobian(density, z)


def _check_sites(name: str, probe: GuideSites) -> None:
    """Refuse guides whose draws have no density, or one that is not known."""
    if probe.missing:
        raise TypeError(f"cannot draw from {name}: it has no sample statement for {', '.join(probe.missing)}")
    if probe.foreign:
        raise TypeError(
            f"cannot weigh draws of {name}: {', '.join(probe.foreign)} is not a continuous latent site of the model, "
            "so the density of the guide's draws is not known in closed form"
        )
    if probe.points and not probe.auxiliary:
        raise TypeError(
            f"cannot weigh draws of {name}: {', '.join(probe.points)} is a point estimate (Delta) without a "
            "density; train a guide with some width, for example AutoNormal"
        )


class _Batch(NamedTuple):
    """Sites by name of one run for n draws, and what was sampled there."""

    sites: dict[str, Any]
    sampled: _Sampled


def _sample_vectorised(
    guide: Callable[..., Any], density: ModelDensity, probe: GuideSites, n: int, arguments: Arguments
) -> _Sampled | None:
    """All draws in one run under an outer plate; ``None`` if that does not agree with single runs."""

    def together() -> _Batch:
        sites = run_guide_batched(guide, arguments, n, probe.depth)
        values = {site.name: sites[site.name]["value"].reshape(n, *site.shape) for site in density.sites}
        return _Batch(sites, _Sampled(values, sites_log_prob(sites, n)))

    def agrees(batch: _Batch) -> bool:
        return all(_agrees(guide, probe, batch, i, arguments) for i in range(0, n, -(-n // _CHECKS)))

    found = verified(together, agrees)
    return None if found is None else found.sampled


def _agrees(guide: Callable[..., Any], probe: GuideSites, batch: _Batch, i: int, arguments: Arguments) -> bool:
    """Whether draw ``i`` of a batched run has the values and the density of a single run."""
    shapes = {name: site["value"].shape for name, site in probe.sites.items()}
    log_q = batch.sampled.log_q
    single = {name: site["value"].reshape(len(log_q), *shapes[name])[i] for name, site in batch.sites.items()}
    sites = run_guide(poutine.condition(guide, data=_given(batch.sites, single)), arguments)
    if not all(close(site["value"], single[name]) for name, site in sites.items()):
        return False
    return close(sites_log_prob(sites, 1)[0], log_q[i])


def _sample_one_by_one(guide: Callable[..., Any], density: ModelDensity, n: int, arguments: Arguments) -> _Sampled:
    """One run of the guide per draw: about a millisecond each, right for every guide."""
    rows: dict[str, list[Tensor]] = {site.name: [] for site in density.sites}
    log_q = []
    for _ in range(n):
        sites = run_guide(guide, arguments)
        for name, row in rows.items():
            row.append(sites[name]["value"])
        log_q.append(sites_log_prob(sites, 1)[0])
    return _Sampled({name: torch.stack(row) for name, row in rows.items()}, torch.stack(log_q))


@torch.no_grad()
def guide_log_weight(
    guide: Callable[..., Any],
    density: ModelDensity,
    z: Tensor,
    log_p: Tensor,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor | None:
    """The log weights (n,), nats, that ``guide`` gives to any latents, as :func:`draw_from_guide` to its own draws.

    Args:
        guide: of any kind at the head of this file; a diffusion with its default covering component.
        density: the model with its data.
        z: the latents (n, D), inside the support.
        log_p: their log density (n,), nats.
        args: what the guide is called with.
        kwargs: the same, by name.

    Returns:
        None if the guide has no density there that can be evaluated (auxiliary latents, a flow without an inverse).
    """
    arguments = Arguments(tuple(args), dict(kwargs or {}))
    if isinstance(guide, DiffusionGuide):
        process = guide.diffusion(arguments)
        return process_log_weight(process, density, default_covering(density), z, log_p)
    if isinstance(guide, PathGuide):
        return log_p - guide.latent_log_prob(z, arguments)
    if isinstance(guide, WeightedGuide):
        return None
    if isinstance(guide, AutoContinuous):
        try:
            return log_p - arguments.call(guide.get_posterior).log_prob(z)
        except NotImplementedError:
            return None
    log_q = [_traced_log_q(guide, row, arguments) for row in _site_rows(density, z)]
    known = [value for value in log_q if value is not None]
    return None if len(known) < len(log_q) else log_p - torch.stack(known) - log_jacobian(density, z)


def _site_rows(density: ModelDensity, z: Tensor) -> Iterator[dict[str, Tensor]]:
    """Values by site of one latent after the other; also those of the auxiliary sites of ``AutoNormal``."""
    values = density.unpack(z)
    free = {f"{s.name}_unconstrained": biject_to(s.support).inv(values[s.name]) for s in density.sites}
    for i in range(len(z)):
        yield {name: value[i] for name, value in {**values, **free}.items()}


def _given(sites: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of the sites that a guide can be conditioned on.

    A Delta recomputes its value from what it depends on; conditioned on one a rounding error away it has density 0.
    """
    return {name: values[name] for name, site in sites.items() if name in values and not is_point(site["fn"])}


def _traced_log_q(guide: Callable[..., Any], row: dict[str, Tensor], arguments: Arguments) -> Tensor | None:
    """``log q`` () in constrained space of one draw's values, or None if something else in the guide is random."""
    sites = run_guide(guide, arguments)
    given = _given(sites, row)
    if any(name not in given and not is_point(site["fn"]) for name, site in sites.items()):
        return None
    return sites_log_prob(run_guide(poutine.condition(guide, data=given), arguments), 1)[0]
