# SPDX-License-Identifier: Apache-2.0
r"""Kernel Stein discrepancy as a Pyro objective, for guides with reparametrised draws.

``KSD²(q‖p) = E h(z, z')`` over independent draws of the guide (``stein.py`` has the Stein kernel ``h``), estimated by
the U-statistic (unbiased) or the V-statistic of N draws. The guide needs no density at all, only path gradients:
they run through the draws and, by second derivatives of ``log p̃``, through their scores. ``log Z`` drops out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyro_sm.model import ModelDensity
from pyro_sm.model_cache import Cache, bound_density
from pyro_sm.stein import IMQ, RadialKernel, stein_statistics

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def stein_discrepancy(
    log_prob: Callable[[Tensor], Tensor], z: Tensor, kernel: RadialKernel, *, unbiased: bool = True
) -> Tensor:
    """``KSD²`` of draws ``z`` (N, D) that carry a path gradient, a scalar; ``log_prob``: (N, D) -> (N,), nats.

    Differentiable in whatever made ``z``. The length scale, if left open, is that of the draws, without gradient.
    """
    with torch.enable_grad():
        leaf = z if z.requires_grad else z.detach().requires_grad_(True)
        (score,) = torch.autograd.grad(log_prob(leaf).sum(), leaf, create_graph=True)
    found = stein_statistics(leaf, score, kernel, chunk_size=len(leaf))
    return found.u if unbiased else found.v


class SteinDiscrepancy(ELBO):
    r"""``KSD²(guide ‖ model)``: needs draws of the guide, not its density.

    Used like ``Trace_ELBO`` with an ``AutoContinuous`` guide (or any guide with one auxiliary unconstrained vector,
    packed as Pyro's autoguides do). The value is non-negative on average and zero at a perfect fit; it does not
    bound the evidence.

    Args:
        kernel: ``IMQ()`` (default) or ``RBF()``; in unconstrained space.
        num_particles: N ≥ 2, draws per step; the cost is N scores and N² kernel values.
        unbiased: the U-statistic (default) or the V-statistic.

    Raises:
        TypeError: the guide has no auxiliary vector, or one without reparametrised draws.
        ValueError: fewer than two particles; guide and model differ in their latents.
        ModelRefusedError: the model cannot be evaluated in batches.

    Source: "A Kernelized Stein Discrepancy for Goodness-of-fit Tests" https://arxiv.org/abs/1602.03253 ;
    "Minimum Stein Discrepancy Estimators" https://arxiv.org/abs/1906.08283 .
    """

    def __init__(self, kernel: RadialKernel | None = None, num_particles: int = 64, *, unbiased: bool = True) -> None:
        if num_particles < 2:
            raise ValueError(f"expected num_particles >= 2, found {num_particles}")
        super().__init__(num_particles=num_particles)
        self.kernel = kernel or IMQ()
        self.unbiased = unbiased
        self._cache: Cache = ()

    def density(self, model: Callable[..., Any], args: Args, kwargs: Kwargs) -> ModelDensity:
        """The model's batched density, kept while model and data stay the same."""
        with poutine.block():
            density, self._cache = bound_density(self._cache, model, args, kwargs)
        return density

    def _draws(self, guide: Callable[..., Any], density: ModelDensity, args: Args, kwargs: Kwargs) -> Tensor:
        with torch.enable_grad(), poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
            nodes: Any = poutine.trace(guide).get_trace(*args, **kwargs).nodes
        auxiliary = [site for site in nodes.values() if (site.get("infer") or {}).get("is_auxiliary")]
        if len(auxiliary) != 1:
            raise TypeError(
                f"SteinDiscrepancy cannot train {type(guide).__name__}: it needs one auxiliary site with all "
                f"latents in an unconstrained vector, as AutoContinuous guides have, found {len(auxiliary)}"
            )
        posterior = auxiliary[0]["fn"]
        if not posterior.has_rsample:
            raise TypeError(
                f"SteinDiscrepancy cannot train {type(guide).__name__}: {type(posterior).__name__} has no "
                "reparametrised draws, and so no path gradient"
            )
        value = auxiliary[0]["value"].detach()
        if tuple(value.shape) != (density.dim,):
            raise ValueError(f"expected a guide with {density.dim} latents, found {tuple(value.shape)}")
        packed = density.pack({site.name: nodes[site.name]["value"].detach()[None] for site in density.sites})[0]
        if not torch.allclose(packed, value.to(packed), rtol=1e-3, atol=1e-3):
            raise ValueError("expected the guide to pack the latents in the order of the model's trace; it does not")
        with torch.enable_grad():
            return posterior.rsample((self.num_particles,))

    def _get_trace(self, model: Any, guide: Any, args: Args, kwargs: Kwargs) -> Any:
        """A guide trace and the model replayed against it, as ELBO subclasses offer."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _loss(self, model: Callable[..., Any], guide: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor:
        density = self.density(model, args, kwargs)
        z = self._draws(guide, density, args, kwargs)
        return stein_discrepancy(density.log_prob, z, self.kernel, unbiased=self.unbiased)

    # -- the ELBO interface ------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """``KSD²`` of one set of draws, a float."""
        with torch.no_grad():
            return float(self._loss(model, guide, args, kwargs))

    def differentiable_loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """``KSD²`` of one set of draws, a scalar tensor."""
        return self._loss(model, guide, args, kwargs)

    def loss_and_grads(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """``KSD²`` of one set of draws, its gradients added to the guide's parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())
