# SPDX-License-Identifier: Apache-2.0
r"""Any guide as a differentiable map from noise, by running it with the noise given.

Each free site of the guide (``guide_trace.py``) gets its value from a slice of the noise (``pushforward.py``), so
that values, auxiliary sites and Delta sites alike become functions of the noise. All draws run under one outer plate
if that agrees with single runs, else one by one.

``log q`` at any latent is known if the free sites are the latent sites themselves: run the guide conditioned on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sm.base import Arguments, PathDraws
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import (
    check_shapes,
    close,
    guide_name,
    is_free,
    log_jacobian,
    read_guide,
    run_guide,
    run_guide_batched,
    sites_log_prob,
    subsampled_plate,
    verified,
)
from pyro_sm.model.pushforward import NoGaussianNoiseError, noise_shape, push
from pyro_sm.objectives.divergences.guide_paths import Path, uniform

# Draws of a batched run that are compared with single runs, and as many again at noise shifted a little: a branch
# that a share p of the draws takes goes unseen with probability (1 − p)^4 to (1 − p)^8, 24 to 6 % for a p of 0.3.
# Fewer than in guide_draws.py: this is done for every data set, before the first step, at some milliseconds a run.
_CHECKS = 4


class _FromNoise(Messenger):
    """Give every free site its value from the next slice of the noise; ``noise``: (n, K), or (K,) for one draw."""

    def __init__(self, noise: Tensor, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.noise = noise
        self.sizes = sizes

    def __enter__(self) -> _FromNoise:
        self.position = 0
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or not is_free(msg) or self.sizes[msg["name"]] == 0:
            return
        size = self.sizes[msg["name"]]
        piece = self.noise[..., self.position : self.position + size]
        self.position += size
        msg["value"], _ = push(msg["fn"], piece.reshape(noise_shape(msg["fn"])))
        msg["done"] = True


class _Probe(NamedTuple):
    """What one run of a guide shows.

    ``sizes``: noise variables of each free site, 0 where its draws are no known function of Gaussian noise.
    ``depth``: dimensions taken by the guide's own plates. ``direct``: whether the free sites are the latent sites.
    """

    sizes: dict[str, int]
    depth: int
    direct: bool

    @property
    def whitened(self) -> bool:
        """Whether the noise is all there is to a draw."""
        return all(self.sizes.values())


def _noise_size(fn: Any) -> int:
    """Noise variables of a draw of ``fn``; 0 if its draws are no known function of Gaussian noise."""
    try:
        return noise_shape(fn).numel()
    except NoGaussianNoiseError:
        return 0


def _probe_guide(guide: Callable[..., Any], density: ModelDensity, arguments: Arguments) -> _Probe:
    """Run the guide once and refuse what has no path gradient.

    Raises:
        TypeError: a site is not reparametrised, is missing, is not a latent of the model, or is a point estimate.
        ValueError: a plate of the guide is subsampled, or a site has another shape than the model's.
    """
    with torch.no_grad(), poutine.block():
        found = read_guide(guide, density, arguments)
    name = guide_name(guide)
    part = subsampled_plate(found.trace)
    if part is not None:
        raise ValueError(
            f"the plate '{part.name}' of {name} is subsampled to {part.size} of {part.full_size}: a score "
            "divergence needs the whole latent vector; use the full plate"
        )
    if found.missing:
        raise TypeError(f"{name} has no sample statement for the latent site {', '.join(found.missing)}")
    check_shapes(guide, found, density)
    free = {site: node["fn"] for site, node in found.free.items()}
    rigid = [f"'{site}' ({type(fn).__name__})" for site, fn in free.items() if not fn.has_rsample]
    if rigid:
        raise TypeError(
            f"{name} samples {', '.join(rigid)} without reparametrisation, so its draws carry no path gradient"
        )
    if not free:
        raise TypeError(f"{name} is a point estimate: all its sites are Delta, so it has no log density")
    extra = [site for site in found.foreign if site in free]
    if extra:
        raise TypeError(f"{', '.join(extra)} of {name} is no latent site of the model, so log q is not known")
    sizes = {site: _noise_size(fn) for site, fn in free.items()}
    return _Probe(sizes, found.depth, free.keys() == found.latent)


class TracedGuide:
    """A guide that is run to be known.

    Args:
        guide: a Pyro guide, called with the ``arguments`` of the model.
        density: the model with its data.
        arguments: see above.

    Raises:
        TypeError: a site of the guide is not reparametrised, is missing, is not a latent of the model, or all are
            point estimates.
        ValueError: a plate of the guide is subsampled.
    """

    def __init__(self, guide: Callable[..., Any], density: ModelDensity, arguments: Arguments) -> None:
        self.guide = guide
        self.density = density
        self.probe = _probe_guide(guide, density, arguments)
        self.noise_dim = sum(self.probe.sizes.values())
        self._batched: bool | None = None if self.probe.whitened else False

    def path(self, arguments: Arguments) -> Path:
        """The guide as a :class:`~pyro_sm.objectives.divergences.guide_paths.Path`, with its current parameters."""
        call = _Call(self, arguments)
        log_q = call.log_q if self.probe.direct else None
        return Path(self.noise_dim, call.draw, log_q, closed_form=self.probe.direct, whitened=self.probe.whitened)

    def batched(self, call: _Call, noise: Tensor) -> bool:
        """Whether one run for all draws agrees with single runs; found out at the first draws."""
        if self._batched is None:
            with torch.no_grad(), poutine.block():
                self._batched = self._agrees(call, noise[:: max(1, noise.shape[0] // _CHECKS)])
        return self._batched

    def _agrees(self, call: _Call, noise: Tensor) -> bool:
        """Whether one run for all rows of ``noise`` (n, K) gives what n runs give."""
        noise = torch.cat([noise, noise.flip(0) + 0.1])  # at least two rows: one would broadcast

        def agrees(together: tuple[Tensor, Tensor]) -> bool:
            return all(close(a, b) for a, b in zip(together, call.one_by_one(noise), strict=True))

        return verified(lambda: call.together(noise), agrees) is not None


class _Call(NamedTuple):
    """A traced guide with its arguments."""

    traced: TracedGuide
    arguments: Arguments

    def _run(self, handler: Messenger, n: int | None) -> dict[str, Any]:
        """Sample sites of one run for one draw (``n`` None), or of one for n draws."""
        with BlockMessenger(expose_types=["param"]), handler:
            if n is None:
                return run_guide(self.traced.guide, self.arguments)
            return run_guide_batched(self.traced.guide, self.arguments, n, self.traced.probe.depth)

    def _read(self, sites: Mapping[str, Any], n: int) -> tuple[Tensor, Tensor]:
        """Latents (n, D) and log q (n,) in latent space."""
        density = self.traced.density
        z = density.pack({s.name: sites[s.name]["value"].reshape(n, *s.shape) for s in density.sites})
        return z, sites_log_prob(sites, n) + log_jacobian(density, z)

    def together(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (n, D) and log q (n,) at noise (n, K), from one run."""
        return self._read(self._run(_FromNoise(noise, self.traced.probe.sizes), noise.shape[0]), noise.shape[0])

    def one_by_one(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (n, D) and log q (n,) at noise (n, K), from n runs."""
        rows = [self._read(self._run(_FromNoise(u, self.traced.probe.sizes), None), 1) for u in noise]
        return torch.cat([z for z, _ in rows]), torch.cat([log_q for _, log_q in rows])

    def draw(self, noise: Tensor) -> PathDraws:
        """Equally weighted draws at noise (n, K)."""
        z, log_q = self.together(noise) if self.traced.batched(self, noise) else self.one_by_one(noise)
        return PathDraws(z, log_q, uniform(log_q))

    def log_q(self, z: Tensor) -> Tensor:
        """``log q`` (n,) of any latents (n, D), nats; for guides whose free sites are the latent sites."""
        density, n = self.traced.density, z.shape[0]
        values = density.unpack(z)
        if not self.traced.batched(self, z.new_zeros(2, self.traced.noise_dim)):
            rows = [sites_log_prob(self._run_at(values, i), 1) for i in range(n)]
            return torch.cat(rows) + log_jacobian(density, z)
        depth, aligned = self.traced.probe.depth, {}
        for site in density.sites:
            own = len(site.shape) - site.support.event_dim
            aligned[site.name] = values[site.name].reshape(n, *(1,) * (depth - own), *site.shape)
        return sites_log_prob(self._run(ConditionMessenger(aligned), n), n) + log_jacobian(density, z)

    def _run_at(self, values: Mapping[str, Tensor], i: int) -> dict[str, Any]:
        """Sample sites of one run, conditioned on row ``i`` of the values (n, \\*shape) by site."""
        row = {name: value[i] for name, value in values.items()}
        return self._run(ConditionMessenger(row), None)
