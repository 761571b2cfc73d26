# SPDX-License-Identifier: Apache-2.0
r"""Denoising score matching of a diffusion guide on draws that already exist: of MCMC, or of another sampler.

With draws ``z_i`` and weights ``w_i`` (whitened: ``u_i``), levels ``r`` and noise ``ε``, the network learns

    ``min_D  E_{i~w, r, ε} ‖D(u_i + r ε, r) − u_i‖²``,

the denoising form of ``E_r E_{p_r}‖s_θ − ∇log p_r‖²``. The model is not evaluated in training; it weights the guide's
own draws afterwards, which corrects what the given draws got wrong as long as they cover the posterior, and gives
the evidence, which MCMC does not.

Sources: "A Connection Between Score Matching and Denoising Autoencoders" https://doi.org/10.1162/NECO_a_00142 ;
"Score-Based Generative Modeling through Stochastic Differential Equations" https://arxiv.org/abs/2011.13456 .
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.base import Arguments, Bound, DiffusionGuide, require
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives.elbo import ScoreObjective
from pyro_sm.objectives.importance_weighted.weightings import denoising_loss, draw_step_noise
from pyro_sm.weights import resample

_REFIT_DRAWS = 2048


class _Part(NamedTuple):
    """Latents (n, D) and their log weights (n,)."""

    z: Tensor
    log_weight: Tensor


class _Split(NamedTuple):
    """The guide they were packed for, and the two parts of the draws."""

    guide: Any
    training: _Part
    held_out: _Part


class DrawsScoreMatching(ScoreObjective):
    r"""Fits a diffusion guide to posterior draws: ``svi = SVI(model, guide, optim, DrawsScoreMatching(draws))``.

    ``draws`` is what ``MCMC.get_samples()`` returns. ``svi.step(*args)`` takes the model's own arguments, as ever;
    afterwards ``to_arviz(model, guide, *args)`` weights the guide's draws by the model. The returned number is the
    denoising loss less that of the untrained guide: it starts at 0 and falls. ``svi.evaluate_loss(*args)`` is the
    same on draws that training never saw: a network trained for too long on few draws remembers them instead of
    their density, and this number turns upwards when it does.

    Args:
        draws: values by site, ``{name: (N, *shape)}``, as the model has them (constrained), with every continuous
            latent site of the model; deterministic sites are ignored. Or unconstrained latents (N, D).
        weight: (N,) non-negative weights of the draws; equal by default.
        held_out: share of the draws, picked at random, that is kept for ``evaluate_loss``; at least one each.
        batch_size: noised points per step.
        refit_every: steps between two moment fits of the kernel variances.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Raises:
        TypeError: the guide is not a diffusion guide (at the first call).
        ValueError: fewer than two draws, a count that is not positive, a share outside (0, 1), weights that do not
            fit; at the first call, a missing site, a wrong shape, or draws that are not finite or lie outside the
            model's support.
    """

    def __init__(
        self,
        draws: Mapping[str, Tensor] | Tensor,
        *,
        weight: Tensor | None = None,
        held_out: float = 0.1,
        batch_size: int = 1024,
        refit_every: int = 100,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if batch_size < 1 or refit_every < 1:
            raise ValueError(f"expected positive counts, found {batch_size} and {refit_every}")
        super().__init__(batch_size, None, default=batch_size, max_plate_nesting=max_plate_nesting)
        if not 0 < held_out < 1:
            raise ValueError(f"expected held_out in (0, 1), found {held_out}")
        if isinstance(draws, Mapping) and not draws:
            raise ValueError("expected draws by site, found none")
        lengths = {len(draws)} if isinstance(draws, Tensor) else {len(value) for value in draws.values()}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"expected the same number of draws, at least two, for every site, found {lengths}")
        given = lengths.pop()
        if weight is not None:
            if weight.shape != (given,):
                raise ValueError(f"expected weights of shape ({given},), found {tuple(weight.shape)}")
            if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()) or not float(weight.sum()) > 0:
                raise ValueError("expected finite, non-negative weights, not all of them zero")
        self.draws = draws
        self.weight = weight
        self.held_out = held_out
        self.batch_size = batch_size
        self.refit_every = refit_every
        self._data: _Split | None = None
        self._steps = 0

    def _packed(self, density: ModelDensity) -> Tensor:
        """The draws as latents (N, D)."""
        if isinstance(self.draws, Tensor):
            z = self.draws
            if z.ndim != 2 or z.shape[1] != density.dim:
                raise ValueError(f"expected latents of shape (N, {density.dim}), found {tuple(z.shape)}")
        else:
            z = density.pack(dict(self.draws))
        z = z.detach().to(density.device, density.dtype)
        bad = ~torch.isfinite(z).all(-1)
        if bool(bad.any()):
            raise ValueError(
                f"{int(bad.sum())} of {len(z)} draws are not finite in unconstrained space: they lie outside the "
                "model's support or on its boundary"
            )
        return z

    def _split(self, guide: Any, density: ModelDensity) -> _Split:
        latents = self._packed(density)
        log_weight = torch.zeros_like(latents[:, 0]) if self.weight is None else self.weight.to(latents).log()
        order = torch.randperm(len(latents), device=latents.device)
        kept = min(max(1, round(self.held_out * len(latents))), len(latents) - 1)
        parts = [_Part(latents[index], log_weight[index]) for index in (order[kept:], order[:kept])]
        for part in parts:
            if not bool(torch.isfinite(part.log_weight).any()):
                raise ValueError("too few draws have a positive weight to be split into two parts")
        return _Split(guide, *parts)

    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        diffusion_guide: DiffusionGuide = require(self, guide, DiffusionGuide)
        bound = diffusion_guide.bind(model, *arguments.args, **arguments.kwargs)
        if self._data is None or self._data.guide is not guide:
            assert isinstance(bound.density, ModelDensity)
            self._data, self._steps = self._split(guide, bound.density), 0
        if commit and self._steps % self.refit_every == 0:
            self.refit(bound)
        part = self._data.training if commit else self._data.held_out
        process = bound.diffusion()
        noise = draw_step_noise(process.ratios, self.batch_size, process.dim, 0)
        share = torch.softmax(part.log_weight, 0).cumsum(0)
        index = torch.searchsorted(share, noise.pick).clamp(max=len(part.z) - 1)
        u = process.to_white(part.z[index]).detach()
        self._steps += int(commit)
        return denoising_loss(process, u, noise.level, noise.noise).mean()

    def refit(self, bound: Bound) -> None:
        """Fit the guide's kernel variances to all draws; also worth a call after the last step."""
        if self._data is not None:
            z = torch.cat([self._data.training.z, self._data.held_out.z])
            log_weight = torch.cat([self._data.training.log_weight, self._data.held_out.log_weight])
            with torch.no_grad(), poutine.block():
                chosen = z[resample(log_weight, min(_REFIT_DRAWS, len(z)))]
                bound.adapt(bound.diffusion().refitted(chosen))
