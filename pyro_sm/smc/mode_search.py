# SPDX-License-Identifier: Apache-2.0
r"""A start for annealing that knows the modes: ``b'(z) = ρ b(z) + (1−ρ) Σ_k w_k N(z; m_k, Σ_k)``.

A bridge ``b^{1−β} p̃^β`` weighs a narrow mode at ``m`` by about ``b(m)^{1−β}``: in many dimensions the modes in the
tails of ``b`` all but vanish half-way, and no particle comes back to them. From a mixture of ``b`` with normal laws
at the modes there is no such half-way point.

1. *Ascent* of ``log p̃`` (:func:`~pyro_sm.search.ascent.ascended`) from draws of ``b``, widened, in units of their
   spread.
2. *Merging*: the end points with ``(z−m)ᵀ Σ⁻¹ (z−m) < 4`` around a higher one are one mode with it, as two equal
   normal laws no farther apart are. ``Σ`` is Laplace's, minus the inverse Hessian, its widths no larger than the
   spread of ``b``.
3. ``w``: half in proportion to Laplace's ``p̃(m_k) |2π Σ_k|^{½}``, half in equal parts, for Laplace may be far off.

Where modes are too many to list, or not normal (shells, funnels), ``b'`` is no better than ``b``: the effective share
of its weights ``p̃/b'`` tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.search.ascent import ascended
from pyro_sm.smc.mixture_start import MixtureStart, NormalLaws
from pyro_sm.smc.path import Start
from pyro_sm.weights import effective_sample_size

_STILL_CLIMBING = 0.1  # nats to be gained yet, .4 widths: where an ascent was cut off farther away is no mode
_APART = 4.0  # squared distance of two modes, in widths: two equal normal laws have two modes from two widths on
_NORMAL_IQR = 1.349  # interquartile range of N(0, 1)


class Search(NamedTuple):
    """What was found: the ``start`` to anneal from, and the ``modes``, None where they cannot be listed."""

    start: Start
    modes: NormalLaws | None


class Curvature(NamedTuple):
    """``precision`` (D, D): minus the Hessian, eigenvalues raised to 1. ``gain``: ``½ gᵀ precision⁻¹ g``, nats, what
    the next Newton step is predicted to gain; nothing at a mode."""

    precision: Tensor
    gain: float


def curvature_at(density: Density, z: Tensor, scale: Tensor) -> Curvature | None:
    """The curvature at ``z`` (D,) in units of ``scale`` (D,), float64.

    By central differences of 4D scores: the first 2D find the widths that the steps of the others are small beside.
    None if a value or a score is not finite.
    """
    dim, relative = len(z), 1e-4 if z.dtype == torch.float64 else 1e-2
    step = torch.full_like(z, relative)
    curvature = torch.zeros(dim, dim, dtype=torch.float64, device=z.device)
    gradient = curvature[0]
    for _ in range(2):
        offset = torch.diag(step * scale)
        value, score = density.log_prob_and_score(torch.cat([z + offset, z - offset]))
        if not bool(torch.isfinite(value).all()):
            return None
        curvature = -((score[:dim] - score[dim:]) * scale).double() / (2 * step.double().unsqueeze(-1))
        gradient = (score * scale).double().mean(0)
        if not bool(torch.isfinite(curvature).all()):
            return None
        step = relative * curvature.diagonal().clamp(min=1.0).rsqrt().to(z)
    value, vector = torch.linalg.eigh((curvature + curvature.T) / 2)
    value = value.clamp(min=1.0)
    return Curvature((vector * value) @ vector.T, 0.5 * float(((gradient @ vector).square() / value).sum()))


@dataclass(frozen=True)
class ModeSearch:
    """Settings of the search; :meth:`run` it on a density and a start.

    Args:
        num_ascents: how many climb; a mode is found if one begins in its basin: with 512, one that holds 1 % of the
            start is missed with a chance of .99^512 = .6 %.
        max_steps: of every ascent, each one density and one gradient evaluation per row.
        max_modes: with more than these there is no use in a list: 512 ascents miss each of a hundred equal
            basins with a chance of e^−5.
        max_dim: with more latents than these the modes are not looked for: each costs 4D gradients for its curvature.
        start_share: ρ, in (0, 1): with a half, neither the start nor the modes cost more than log 2 = .7 nats.
        widening: ascents begin at the start's draws, this much farther from their median: else the basins in the
            tails of the start have few.
        min_effective_share: what the weights of the mixture must leave of draws for it to be used, in [0, 1].

    Raises:
        ValueError: a count or the widening that is not positive, or a share out of its range.
    """

    num_ascents: int = 512
    max_steps: int = 60
    max_modes: int = 100
    max_dim: int = 200
    start_share: float = 0.5
    widening: float = 1.5
    min_effective_share: float = 0.15

    def __post_init__(self) -> None:
        for name in ("num_ascents", "max_steps", "max_modes", "max_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, found {getattr(self, name)}")
        if not self.widening > 0:
            raise ValueError(f"expected a positive widening, found {self.widening}")
        if not 0 < self.start_share < 1:
            raise ValueError(f"expected start_share in (0, 1), found {self.start_share}")
        if not 0 <= self.min_effective_share <= 1:
            raise ValueError(f"expected min_effective_share in [0, 1], found {self.min_effective_share}")

    def run(self, density: Density, start: Start, *, progress: Callable[[], None] | None = None) -> Start:
        """The start that :meth:`find` finds; ``progress`` is called after every step of the ascents, and every
        mode's.
        """

        def go_on() -> bool:
            if progress is not None:
                progress()
            return True

        found = self.find(density, start, go_on=go_on)
        return start if found is None else found.start

    @torch.no_grad()
    def find(self, density: Density, start: Start, *, go_on: Callable[[], bool] | None = None) -> Search | None:
        """``b'`` and the modes; with ``start`` as it is if there are too many modes, none, or ``b'`` does not fit.

        ``go_on`` is called after every step of the ascents and every mode; where it returns False the search ends
        there, and None is returned.
        """
        stopped = False

        def goes_on() -> bool:
            nonlocal stopped
            stopped = stopped or (go_on is not None and not go_on())
            return not stopped

        if density.dim > self.max_dim:
            return Search(start, None)
        z = start.sample(self.num_ascents)
        quarter, loc, three = torch.quantile(z.double(), z.new_tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
        spread = ((three - quarter) / _NORMAL_IQR).to(z)
        scale = torch.where(torch.isfinite(spread) & (spread > 0), spread, 1.0)
        begin = loc.to(z) + self.widening * (z - loc.to(z))
        ends = ascended(density, begin, scale, self.max_steps, goes_on)
        modes = None if stopped else self._merged(density, *ends, scale, goes_on)
        if stopped:
            return None
        if modes is None:
            return Search(start, None)
        mixture = MixtureStart(start, modes, self.start_share)
        z = mixture.sample(self.num_ascents)
        log_w = density.log_prob(z) - mixture.log_prob_and_score(z)[0]
        log_w = torch.nan_to_num(log_w, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        fits = effective_sample_size(log_w) >= self.min_effective_share * len(z)
        return Search(mixture if fits else start, modes)

    def _merged(
        self, density: Density, z: Tensor, log_p: Tensor, scale: Tensor, goes_on: Callable[[], bool]
    ) -> NormalLaws | None:
        """The modes among end points ``z`` (N, D) with ``log_p`` (N,); None if there are too many, or none."""
        left = torch.isfinite(log_p)
        found: list[tuple[int, Tensor]] = []
        while bool(left.any()):
            if len(found) == self.max_modes:
                return None
            best = int(torch.where(left, log_p, -math.inf).argmax())
            left[best] = False
            curvature = curvature_at(density, z[best], scale)
            if not goes_on():
                return None
            if curvature is None or curvature.gain > _STILL_CLIMBING:
                continue
            precision = curvature.precision
            offset = ((z - z[best]) / scale).double()
            left = left & (((offset @ precision) * offset).sum(-1) >= _APART)
            found.append((best, precision))
        if not found:
            return None
        index = torch.tensor([i for i, _ in found], device=z.device)
        tril = torch.linalg.cholesky(torch.linalg.inv(torch.stack([p for _, p in found])))
        log_volume = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        weight = 0.5 * torch.softmax(log_p[index].double() + log_volume, 0) + 0.5 / len(found)
        return NormalLaws(z[index], (scale.double().unsqueeze(-1) * tril).to(z), weight.log().to(z))
