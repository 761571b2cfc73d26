# SPDX-License-Identifier: Apache-2.0
r"""Weighted draws from any guide, with the log density they have in the unconstrained latent space.

A Pyro guide is a density over constrained sites ``x_s = T_s(z_s)``. In latent space

    log q(z) = log q(x) + Σ_s log |det dT_s/dz_s|,

and the log weight of a draw is ``log p̃(z) − log q(z)``. Three kinds of guide, in this order:

1. one that offers :meth:`WeightedGuide.draw_weighted` knows its own weights (diffusions: path weights);
2. ``AutoContinuous`` has one distribution over the packed latent vector, in the order of the density;
3. any other guide is run under an outer plate if that is verified against single runs, else run draw by draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor
from torch.distributions import biject_to

from pyro_sm.base import Arguments, Density, DiffusionGuide, Draws, PathGuide
from pyro_sm.diffusion.covering import default_covering, process_log_weight
from pyro_sm.model.density import ModelDensity

_CHUNK = 4096
_CHECKS = 32
"""Draws of a batched run that are compared with single runs: a wrong branch hides in few of them."""


@runtime_checkable
class WeightedGuide(Protocol):
    """A guide that draws latents and knows their weights."""

    def draw_weighted(
        self, density: Density, num_draws: int, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Draws:
        """``num_draws`` independent draws with ``log p̃`` and log weight."""
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
    """
    kwargs = dict(kwargs or {})
    if isinstance(guide, WeightedGuide):
        return guide.draw_weighted(density, num_draws, tuple(args), dict(kwargs or {}))
    if isinstance(guide, AutoLaplaceApproximation):
        raise TypeError(
            "AutoLaplaceApproximation is a point estimate until it is turned into a Gaussian: pass "
            "guide.laplace_approximation(*args) instead"
        )
    if isinstance(guide, AutoContinuous):
        z, log_q = _draw_continuous(guide, density, num_draws, args, kwargs)
    elif callable(guide):
        z, log_q = _draw_traced(guide, density, num_draws, args, kwargs)
    else:
        raise TypeError(
            f"cannot draw from {type(guide).__name__}: expected a Pyro guide (a callable with sample "
            "statements) or an object with the method draw_weighted(density, num_draws, args, kwargs)"
        )
    log_p = torch.cat([density.log_prob(part) for part in z.split(_CHUNK)])
    return Draws(z, log_p, log_p - log_q)


def _draw_continuous(
    guide: AutoContinuous, density: ModelDensity, n: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Latents (n, D) and ``log q`` (n,) from the packed posterior of the guide."""
    if guide.prototype_trace is None:
        guide(*args, **kwargs)
    posterior = guide.get_posterior(*args, **kwargs)
    z = posterior.sample((n,))
    if z.shape != (n, density.dim):
        raise TypeError(
            f"expected {type(guide).__name__} to draw latents of shape {(n, density.dim)}, found "
            f"{tuple(z.shape)}: was it built for another model, or is a plate of local latents subsampled?"
        )
    return z, posterior.log_prob(z)


def _draw_traced(
    guide: Callable[..., Any],
    density: ModelDensity,
    n: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Latents (n, D) and ``log q`` (n,) from traces of the guide."""
    probe = poutine.trace(guide).get_trace(*args, **kwargs)
    _check_sites(guide, density, probe)
    sampled = _sample_vectorised(guide, density, probe, n, args, kwargs)
    if sampled is None:
        sampled = _sample_one_by_one(guide, density, n, args, kwargs)
    z = density.pack(sampled.values)
    return z, sampled.log_q + _log_jacobian(density, z)


def _log_jacobian(density: ModelDensity, z: Tensor) -> Tensor:
    """``Σ_s log |det dT_s/dz_s|`` (n,) of latents (n, D)."""
    total = torch.zeros_like(z[:, 0])
    for site in density.sites:
        latent = z[:, site.start : site.stop].reshape(len(z), *site.unconstrained_shape)
        jacobian = site.transform.log_abs_det_jacobian(latent, site.transform(latent))
        total = total + jacobian.reshape(len(z), -1).sum(1)
    return total


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
    kwargs = dict(kwargs or {})
    if isinstance(guide, DiffusionGuide):
        process = guide.diffusion(Arguments(tuple(args), kwargs))
        return process_log_weight(process, density, default_covering(density), z, log_p)
    if isinstance(guide, PathGuide):
        return log_p - guide.latent_log_prob(z, tuple(args), kwargs)
    if isinstance(guide, WeightedGuide):
        return None
    if isinstance(guide, AutoContinuous):
        try:
            return log_p - guide.get_posterior(*args, **kwargs).log_prob(z)
        except NotImplementedError:
            return None
    log_q = [_traced_log_q(guide, row, args, kwargs) for row in _site_rows(density, z)]
    known = [value for value in log_q if value is not None]
    return None if len(known) < len(log_q) else log_p - torch.stack(known) - _log_jacobian(density, z)


def _site_rows(density: ModelDensity, z: Tensor) -> Iterator[dict[str, Tensor]]:
    """Values by site of one latent after the other; also those of the auxiliary sites of ``AutoNormal``."""
    values = density.unpack(z)
    free = {f"{s.name}_unconstrained": biject_to(s.support).inv(values[s.name]) for s in density.sites}
    for i in range(len(z)):
        yield {name: value[i] for name, value in {**values, **free}.items()}


def _traced_log_q(
    guide: Callable[..., Any], row: dict[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """``log q`` () in constrained space of one draw's values, or None if something else in the guide is random."""
    sites = _sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    # A Delta recomputes its value from what it depends on; conditioned on one a rounding error away it has density 0.
    given = {name: row[name] for name, site in sites.items() if name in row and not _is_point(site["fn"])}
    if any(name not in given and not _is_point(site["fn"]) for name, site in sites.items()):
        return None
    return _log_q(_sample_sites(poutine.trace(poutine.condition(guide, data=given)).get_trace(*args, **kwargs)), 1)[0]


def _sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The sample statements of a guide's trace by name, plates left out."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def _is_point(fn: Any) -> bool:
    while not isinstance(fn, dist.Delta):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def _check_sites(guide: Callable[..., Any], density: ModelDensity, probe: poutine.Trace) -> None:
    name = getattr(guide, "__name__", type(guide).__name__)
    sites = _sample_sites(probe)
    wanted = {site.name for site in density.sites}
    missing = sorted(wanted - sites.keys())
    if missing:
        raise TypeError(f"cannot draw from {name}: it has no sample statement for {', '.join(missing)}")
    extra = [s for s in sites if s not in wanted and not sites[s]["infer"].get("is_auxiliary")]
    if extra:
        raise TypeError(
            f"cannot weigh draws of {name}: {', '.join(extra)} is not a continuous latent site of the model, "
            "so the density of the guide's draws is not known in closed form"
        )
    free = [s for s in wanted if _is_point(sites[s]["fn"])]
    if free and not any(sites[s]["infer"].get("is_auxiliary") for s in sites):
        raise TypeError(
            f"cannot weigh draws of {name}: {', '.join(sorted(free))} is a point estimate (Delta) without a "
            "density; train a guide with some width, for example AutoNormal"
        )


def _log_q(sites: Mapping[str, Any], n: int) -> Tensor:
    """``log q`` (n,) of traced sites whose log densities lead with the n draws."""
    total = torch.zeros(())
    for site in sites.values():
        value = site["fn"].log_prob(site["value"])
        total = total.to(value) + value.reshape(n, -1).sum(1)
    return total


def _sample_vectorised(
    guide: Callable[..., Any],
    density: ModelDensity,
    probe: poutine.Trace,
    n: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> _Sampled | None:
    """All draws in one run under an outer plate; ``None`` if that does not agree with single runs."""
    frames = [f for site in _sample_sites(probe).values() for f in site["cond_indep_stack"] if f.vectorized]
    depth = max((-frame.dim for frame in frames), default=0)
    try:
        with pyro.plate("_pyro_sm_draws", n, dim=-depth - 1):
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        sites = _sample_sites(trace)
        values = {site.name: sites[site.name]["value"].reshape(n, *site.shape) for site in density.sites}
        log_q = _log_q(sites, n)
        agrees = all(_agrees(guide, probe, sites, log_q, i, args, kwargs) for i in range(0, n, -(-n // _CHECKS)))
    except (RuntimeError, ValueError, IndexError):  # what broadcasting a guide not written for it raises
        return None
    return _Sampled(values, log_q) if agrees else None


def _agrees(
    guide: Callable[..., Any],
    probe: poutine.Trace,
    sites: Mapping[str, Any],
    log_q: Tensor,
    i: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether draw ``i`` of a batched run has the values and the density of a single run."""
    shapes = {name: site["value"].shape for name, site in _sample_sites(probe).items()}
    single = {name: site["value"].reshape(log_q.shape[0], *shapes[name])[i] for name, site in sites.items()}
    # Delta sites recompute their value: conditioned on one a rounding error away, they would have density 0.
    free = {name: value for name, value in single.items() if not _is_point(sites[name]["fn"])}
    trace = _sample_sites(poutine.trace(poutine.condition(guide, data=free)).get_trace(*args, **kwargs))
    if not all(_close(site["value"], single[name]) for name, site in trace.items()):
        return False
    return _close(_log_q(trace, 1)[0], log_q[i])


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def _sample_one_by_one(
    guide: Callable[..., Any],
    density: ModelDensity,
    n: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> _Sampled:
    """One run of the guide per draw: about a millisecond each, right for every guide."""
    rows: dict[str, list[Tensor]] = {site.name: [] for site in density.sites}
    log_q = []
    for _ in range(n):
        sites = _sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        for name, row in rows.items():
            row.append(sites[name]["value"])
        log_q.append(_log_q(sites, 1)[0])
    return _Sampled({name: torch.stack(row) for name, row in rows.items()}, torch.stack(log_q))
