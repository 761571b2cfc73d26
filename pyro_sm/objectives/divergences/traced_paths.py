# SPDX-License-Identifier: Apache-2.0
r"""Any guide as a differentiable map from noise, by running it with the noise given.

The *free* sites of a guide are its sample statements that are not ``Delta``. Each gets its value from a slice of the
noise (``pushforward.py``), so that values, auxiliary sites and Delta sites alike become functions of the noise. All
draws run under one outer plate if that agrees with single runs, else one by one.

``log q`` at any latent is known if the free sites are the latent sites themselves: run the guide conditioned on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_sm.base import PathDraws
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.pushforward import NoGaussianNoiseError, noise_shape, push
from pyro_sm.objectives.divergences.guide_paths import Args, Kwargs, Path, guide_name, uniform

_CHECKS = 4  # draws of a batched run that are compared with single runs
_PLATE = "_pyro_sm_draws"


def _is_point(fn: Any) -> bool:
    while not isinstance(fn, dist.Delta):
        if not hasattr(fn, "base_dist"):
            return False
        fn = fn.base_dist
    return True


def _is_free(site: Any) -> bool:
    return not (site["is_observed"] or isinstance(site["fn"], _Subsample) or _is_point(site["fn"]))


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
        if msg["done"] or not _is_free(msg) or self.sizes[msg["name"]] == 0:
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
        return all(self.sizes.values())


def _samples(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    }


def probe_guide(guide: Callable[..., Any], density: ModelDensity, args: Args, kwargs: Kwargs) -> _Probe:
    """Run the guide once and refuse what has no path gradient.

    Raises:
        TypeError: a site is not reparametrised, is missing, is not a latent of the model, or is a point estimate.
        ValueError: a plate of the guide is subsampled.
    """
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    name, sites = guide_name(guide), _samples(trace)
    for site in trace.nodes.values():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"the plate '{frame.name}' of {name} is subsampled to {frame.size} of {frame.full_size}: a score "
                    "divergence needs the whole latent vector; use the full plate"
                )
    missing = sorted({s.name for s in density.sites} - sites.keys())
    if missing:
        raise TypeError(f"{name} has no sample statement for the latent site {', '.join(missing)}")
    free = {n: site["fn"] for n, site in sites.items() if _is_free(site)}
    rigid = [f"'{n}' ({type(fn).__name__})" for n, fn in free.items() if not fn.has_rsample]
    if rigid:
        raise TypeError(
            f"{name} samples {', '.join(rigid)} without reparametrisation, so its draws carry no path gradient"
        )
    if not free:
        raise TypeError(f"{name} is a point estimate: all its sites are Delta, so it has no log density")
    latent = {s.name for s in density.sites}
    extra = [n for n in free if n not in latent and not sites[n]["infer"].get("is_auxiliary")]
    if extra:
        raise TypeError(f"{', '.join(extra)} of {name} is no latent site of the model, so log q is not known")
    frames = [f for s in sites.values() for f in s["cond_indep_stack"] if f.vectorized]
    sizes = {}
    for n, fn in free.items():
        try:
            sizes[n] = noise_shape(fn).numel()
        except NoGaussianNoiseError:
            sizes[n] = 0
    return _Probe(sizes, max((-f.dim for f in frames), default=0), free.keys() == latent)


class TracedGuide:
    """A guide that is run to be known.

    Args:
        guide: a Pyro guide, called with ``args`` and ``kwargs`` of the model.
        density: the model with its data.
        args: see above.
        kwargs: see above.

    Raises:
        TypeError: see :func:`probe_guide`.
        ValueError: see :func:`probe_guide`.
    """

    def __init__(self, guide: Callable[..., Any], density: ModelDensity, args: Args, kwargs: Kwargs) -> None:
        self.guide = guide
        self.density = density
        self.probe = probe_guide(guide, density, args, kwargs)
        self.noise_dim = sum(self.probe.sizes.values())
        self._batched: bool | None = None if self.probe.whitened else False

    def path(self, args: Args, kwargs: Kwargs) -> Path:
        """The guide as a :class:`~pyro_sm.objectives.divergences.guide_paths.Path`, with its current parameters."""
        call = _Call(self, args, kwargs)
        log_q = call.log_q if self.probe.direct else None
        return Path(self.noise_dim, call.draw, log_q, closed_form=self.probe.direct, whitened=self.probe.whitened)

    def batched(self, call: _Call, noise: Tensor) -> bool:
        """Whether one run for all draws agrees with single runs; found out at the first draws."""
        if self._batched is None:
            with torch.no_grad(), poutine.block():
                self._batched = self._agrees(call, noise[:: max(1, noise.shape[0] // _CHECKS)])
        return self._batched

    def _agrees(self, call: _Call, noise: Tensor) -> bool:
        noise = torch.cat([noise, noise.flip(0) + 0.1])  # at least two rows: one would broadcast
        try:
            together = call.together(noise)
        except (RuntimeError, ValueError, IndexError):  # what broadcasting a guide not written for it raises
            return False
        alone = call.one_by_one(noise)
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(together, alone, strict=True))


class _Call(NamedTuple):
    """A traced guide with its arguments."""

    traced: TracedGuide
    args: Args
    kwargs: Kwargs

    def _run(self, handler: Messenger, n: int | None) -> dict[str, Any]:
        """Sample sites of one run for one draw (``n`` None), or of one for n draws."""
        with BlockMessenger(expose_types=["param"]), handler, ExitStack() as stack:
            if n is not None:
                stack.enter_context(pyro.plate(_PLATE, n, dim=-self.traced.probe.depth - 1))
            return _samples(poutine.trace(self.traced.guide).get_trace(*self.args, **self.kwargs))

    def _read(self, sites: Mapping[str, Any], n: int) -> tuple[Tensor, Tensor]:
        """Latents (n, D) and log q (n,) in latent space."""
        density = self.traced.density
        z = density.pack({s.name: sites[s.name]["value"].reshape(n, *s.shape) for s in density.sites})
        return z, self._log_q(sites, n) + self._log_det(z)

    def _log_q(self, sites: Mapping[str, Any], n: int) -> Tensor:
        total = torch.zeros((), dtype=self.traced.density.dtype, device=self.traced.density.device)
        for site in sites.values():
            log_prob = site["fn"].log_prob(site["value"])
            if log_prob.numel() % n:
                raise ValueError("a site of the guide does not have the batch dimension of the draws")
            total = total + log_prob.reshape(n, -1).sum(1)
        return total

    def _log_det(self, z: Tensor) -> Tensor:
        """``log |det dT/dz|`` (n,) of the bijections onto the supports."""
        n, total = z.shape[0], z.new_zeros(z.shape[0])
        for site in self.traced.density.sites:
            u = z[:, site.start : site.stop].reshape(n, *site.unconstrained_shape)
            total = total + site.transform.log_abs_det_jacobian(u, site.transform(u)).reshape(n, -1).sum(1)
        return total

    def together(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(self._run(_FromNoise(noise, self.traced.probe.sizes), noise.shape[0]), noise.shape[0])

    def one_by_one(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self._read(self._run(_FromNoise(u, self.traced.probe.sizes), None), 1) for u in noise]
        return torch.cat([z for z, _ in rows]), torch.cat([log_q for _, log_q in rows])

    def draw(self, noise: Tensor) -> PathDraws:
        z, log_q = self.together(noise) if self.traced.batched(self, noise) else self.one_by_one(noise)
        return PathDraws(z, log_q, uniform(log_q))

    def log_q(self, z: Tensor) -> Tensor:
        values, n = self.traced.density.unpack(z), z.shape[0]
        if not self.traced.batched(self, z.new_zeros(2, self.traced.noise_dim)):
            rows = [self._log_q(self._run_at(values, i), 1) for i in range(n)]
            return torch.cat(rows) + self._log_det(z)
        depth, aligned = self.traced.probe.depth, {}
        for site in self.traced.density.sites:
            own = len(site.shape) - site.support.event_dim
            aligned[site.name] = values[site.name].reshape(n, *(1,) * (depth - own), *site.shape)
        return self._log_q(self._run(ConditionMessenger(aligned), n), n) + self._log_det(z)

    def _run_at(self, values: Mapping[str, Tensor], i: int) -> dict[str, Any]:
        row = {name: value[i] for name, value in values.items()}
        return self._run(ConditionMessenger(row), None)
