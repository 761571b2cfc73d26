# SPDX-License-Identifier: Apache-2.0
r"""A Pyro guide, known by running it: its sites, their log density, and whether it can be run for many draws at once.

A guide is a density over constrained sites ``x_s = T_s(z_s)``. In latent space

    ``log q(z) = log q(x) + Σ_s log |det dT_s/dz_s|``.

* A site is a *point* if it is a ``Delta``: it follows from other sites, or is a point estimate.
* A site is *free* if it is drawn: neither a point, nor observed.
* A site is *auxiliary* if the guide says so (``infer={"is_auxiliary": True}``): random, but no latent of the model.

One run under an outer plate of n draws counts only if it agrees with single runs: a guide that was not written to
broadcast may fail, or give numbers that mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_sm.base import Arguments
from pyro_sm.model.density import ModelDensity

_DRAWS_PLATE = "_pyro_sm_draws"
# Relative and absolute. Elementwise both ways give the same bits, through a network in float32 they differ by 1e-5 or
# so; a guide that does not broadcast is off by the size of a draw (4.5 for the one in tests/, measured).
_TOLERANCE = 1e-3

Found = TypeVar("Found")


def guide_name(guide: Any) -> str:
    """What to call a guide in a message."""
    return getattr(guide, "__name__", type(guide).__name__)


def is_point(fn: Any) -> bool:
    """Whether a distribution is a ``Delta``, under whatever wrappers."""
    while not isinstance(fn, dist.Delta):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def is_free(site: Any) -> bool:
    """Whether a sample statement (a site of a trace, or a message) is drawn."""
    return not (site["is_observed"] or isinstance(site["fn"], _Subsample) or is_point(site["fn"]))


def sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The sample statements of a trace by name, plates left out."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    }


def subsampled_plate(trace: poutine.Trace) -> Any | None:
    """The first plate of a trace (its frame) that was run on a part of its size, if there is one."""
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                return frame
    return None


@dataclass(frozen=True)
class GuideSites:
    """What one run of a guide shows, beside the latents of the model.

    Args:
        trace: of the run.
        latent: names of the model's latent sites.
    """

    trace: poutine.Trace
    latent: frozenset[str]

    @property
    def sites(self) -> dict[str, Any]:
        """The sample statements of the run by name, plates left out."""
        return sample_sites(self.trace)

    @property
    def free(self) -> dict[str, Any]:
        """The sites that are drawn, by name: no points, none observed."""
        return {name: site for name, site in self.sites.items() if is_free(site)}

    @property
    def missing(self) -> list[str]:
        """The model's latents that the guide has no statement for, sorted."""
        return sorted(self.latent - self.sites.keys())

    @property
    def points(self) -> list[str]:
        """The model's latents that are points, sorted."""
        return sorted(name for name, site in self.sites.items() if name in self.latent and is_point(site["fn"]))

    @property
    def foreign(self) -> list[str]:
        """Sites that are no latent of the model, and do not say that they are auxiliary."""
        return [name for name in self.sites if name not in self.latent and name not in self.auxiliary]

    @property
    def auxiliary(self) -> list[str]:
        """Sites that say that they are auxiliary."""
        return [name for name, site in self.sites.items() if site["infer"].get("is_auxiliary")]

    @property
    def depth(self) -> int:
        """Dimensions taken by the guide's own plates: that of the draws goes outside of them."""
        frames = (frame for site in self.sites.values() for frame in site["cond_indep_stack"] if frame.vectorized)
        return max((-frame.dim for frame in frames), default=0)


def _same_shape(mine: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two shapes are the same but for dimensions of size one on the left, as Pyro's losses compare them."""
    return all(a == b for a, b in zip_longest(reversed(mine), reversed(theirs), fillvalue=1))


def check_shape(guide: Any, site: str, found: Sequence[int], expected: Sequence[int], what: str = "values") -> None:
    """Refuse a guide whose site has another shape than the model's.

    Raises:
        ValueError: the shapes differ by more than dimensions of size one on the left.
    """
    if not _same_shape(found, expected):
        raise ValueError(
            f"the latent site {site!r} has {what} of shape {tuple(found)} in {guide_name(guide)}, of shape "
            f"{tuple(expected)} in the model: was the guide made for another model?"
        )


def read_guide(guide: Callable[..., Any], density: ModelDensity, arguments: Arguments) -> GuideSites:
    """Run the guide once, and look at it beside the latents of ``density``."""
    trace = arguments.call(poutine.trace(guide).get_trace)
    return GuideSites(trace, frozenset(site.name for site in density.sites))


def check_shapes(guide: Any, found: GuideSites, density: ModelDensity) -> None:
    """Refuse a guide that has a latent of the model in another shape.

    Raises:
        ValueError: it has.
    """
    for site in density.sites:
        if site.name in found.sites:
            check_shape(guide, site.name, found.sites[site.name]["value"].shape, site.shape)


def check_packed(guide: Any, shapes: Mapping[str, Sequence[int]], density: ModelDensity) -> None:
    """Refuse a guide whose packed latent, of sites with these unconstrained ``shapes``, is not that of the density.

    Raises:
        ValueError: sites, their order or their shapes differ.
    """
    own = [(name, math.prod(shape)) for name, shape in shapes.items()]
    wanted = [(site.name, site.stop - site.start) for site in density.sites]
    if own != wanted:
        raise ValueError(
            f"{guide_name(guide)} covers the latent sites {dict(own)} (name: size), the model has {dict(wanted)}: "
            "was the guide made for another model, or is a plate subsampled?"
        )
    for site in density.sites:
        check_shape(guide, site.name, shapes[site.name], site.unconstrained_shape, "unconstrained values")


def run_guide(guide: Callable[..., Any], arguments: Arguments) -> dict[str, Any]:
    """The sample statements of one run, for one draw."""
    return sample_sites(arguments.call(poutine.trace(guide).get_trace))


def run_guide_batched(guide: Callable[..., Any], arguments: Arguments, num_draws: int, depth: int) -> dict[str, Any]:
    """The sample statements of one run for ``num_draws`` draws, under a plate outside of ``depth`` dimensions."""
    with pyro.plate(_DRAWS_PLATE, num_draws, dim=-depth - 1):
        return run_guide(guide, arguments)


def sites_log_prob(sites: Mapping[str, Any], num_draws: int) -> Tensor:
    """``log q`` (n,) in nats, in constrained space, of sites whose log densities lead with the n draws.

    Raises:
        ValueError: a site does not have the batch dimension of the draws.
    """
    total = torch.zeros(())
    for site in sites.values():
        log_prob = site["fn"].log_prob(site["value"])
        if log_prob.numel() % num_draws:
            raise ValueError("a site of the guide does not have the batch dimension of the draws")
        total = total + log_prob.reshape(num_draws, -1).sum(1)
    return total


def log_jacobian(density: ModelDensity, z: Tensor) -> Tensor:
    """``Σ_s log |det dT_s/dz_s|`` (n,) of latents (n, D)."""
    total = z.new_zeros(len(z))
    for site in density.sites:
        latent = z[:, site.start : site.stop].reshape(len(z), *site.unconstrained_shape)
        jacobian = site.transform.log_abs_det_jacobian(latent, site.transform(latent))
        total = total + jacobian.reshape(len(z), -1).sum(1)
    return total


def close(a: Tensor, b: Tensor) -> bool:
    """Whether a batched run and a single one found the same."""
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)


def verified(together: Callable[[], Found], agrees: Callable[[Found], bool]) -> Found | None:
    """What a batched run gives; None if it fails, as a guide does that was not written for it, or does not agree."""
    try:
        found = together()
        return found if agrees(found) else None
    except (RuntimeError, ValueError, IndexError):  # what broadcasting a guide not written for it raises
        return None
