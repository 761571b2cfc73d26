# SPDX-License-Identifier: Apache-2.0
r"""Distinct modes from the ends of many ascents, and how many ascents ended at each.

The best ends climb on by Newton (:mod:`~pyro_sm.search.newton`), a few at once and no two of them close together. A
peak at which nothing more is to be gained is a mode, unless it lies within

    ``(z − m)ᵀ Σ⁻¹ (z − m) < 4``

of a higher one, ``Σ`` Laplace's covariance there: two equal normal laws have two modes from two widths on. Ends
within the same distance of a mode ended there. It goes on with the ends that are left until none is, or until two
batches of them bring nothing new.

With hundreds of latents no Hessian is formed: ends are modes as they are, with the widths of the start, and one
where they are within a quarter of these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.search.newton import Peaks, climbed

_APART = 4.0
_STILL_CLIMBING = 0.1  # nats to be gained yet, .4 widths: where an ascent was cut off farther away is no mode
_AT_ONCE = 16  # ends that climb together: a call of the density costs little more for many rows
_PATIENCE = 2  # batches that bring nothing new: 32 of the best ends that are left
_SAME = 0.25  # widths of the start, root mean square, within which ends do not climb together
_HEIGHT, _MASS = 30.0, 20.0  # nats below the best, in density and in Laplace's mass: e⁻²⁰ of the mass is none
MAX_DIM = 150  # of a Hessian: one is 2D scores, of D numbers each, and D³ operations


class Modes(NamedTuple):
    """K modes, float64 but for ``loc``.

    ``loc`` (K, D); ``log_p`` (K,), nats; ``scale_tril`` (K, D, D), Laplace's; ``hits`` (K,), its ascents.
    """

    loc: Tensor
    log_p: Tensor
    scale_tril: Tensor
    hits: Tensor

    @property
    def log_mass(self) -> Tensor:
        """Laplace's ``log p̃(m) + log|det L| + D/2 log 2π`` (K,), nats."""
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_p + log_det + self.loc.shape[1] / 2 * math.log(2 * math.pi)

    def distances(self, z: Tensor) -> Tensor:
        """``(z − m)ᵀ Σ⁻¹ (z − m)`` (K, N) at ``z`` (N, D)."""
        parts = [
            torch.linalg.solve_triangular(tril, (z - m).T.double(), upper=False).square().sum(0)
            for m, tril in zip(self.loc, self.scale_tril, strict=True)
        ]
        return (
            torch.stack(parts) if parts else torch.full((0, len(z)), math.inf, dtype=torch.float64, device=z.device)
        )

    def select(self, rows: Tensor) -> Modes:
        """Some of them; ``rows``: indices or a mask."""
        return Modes(self.loc[rows], self.log_p[rows], self.scale_tril[rows], self.hits[rows])

    def that_matter(self) -> Modes:
        """Those within 30 nats of the highest or within 20 of the one with the most mass, highest first."""
        if len(self.loc) == 0:
            return self
        near = (self.log_p >= self.log_p.max() - _HEIGHT) | (self.log_mass >= self.log_mass.max() - _MASS)
        found = self.select(near)
        return found.select(found.log_p.argsort(descending=True))


def no_modes(z: Tensor) -> Modes:
    """An empty list for latents like ``z`` (N, D)."""
    dim = z.shape[1]
    return Modes(
        z[:0],
        torch.empty(0, dtype=torch.float64, device=z.device),
        torch.empty(0, dim, dim, dtype=torch.float64, device=z.device),
        torch.empty(0, dtype=torch.long, device=z.device),
    )


def _apart(dim: int) -> float:
    return _APART if dim <= MAX_DIM else _SAME**2 * dim


def _with_peak(modes: Modes, peaks: Peaks, k: int) -> tuple[Modes, bool]:
    """With peak ``k``, one ascent that ended there; whether it is a new mode."""
    peak = Modes(
        peaks.loc[k : k + 1],
        peaks.log_p[k : k + 1],
        peaks.scale_tril[k : k + 1],
        torch.ones(1, dtype=torch.long, device=peaks.loc.device),
    )
    apart = _apart(peaks.loc.shape[1])
    higher = modes.log_p >= peak.log_p
    distance = modes.distances(peak.loc)[:, 0]
    under = higher & (distance < apart)
    if bool(under.any()):
        nearest = int(torch.where(under, distance, math.inf).argmin())
        hits = modes.hits.clone()
        hits[nearest] += 1
        return modes._replace(hits=hits), False
    over = ~higher & (peak.distances(modes.loc)[0] < apart)
    peak = peak._replace(hits=peak.hits + modes.hits[over].sum())
    kept = modes.select(~over)
    merged = Modes(*(torch.cat([a, b]) for a, b in zip(kept, peak, strict=True)))
    return merged, not bool(over.any())


def _chosen(z: Tensor, log_p: Tensor, left: Tensor, scale: Tensor) -> Tensor:
    """Up to sixteen of the best ends that are ``left`` (N,), no two of them close; indices."""
    order = log_p.argsort(descending=True)
    order = order[left[order]][: 16 * _AT_ONCE]
    points = z[order] / scale
    near = (points[:, None] - points[None]).square().mean(-1) < _SAME**2
    chosen: list[int] = []
    free = torch.ones(len(order), dtype=torch.bool, device=z.device)
    while len(chosen) < _AT_ONCE and bool(free.any()):
        first = int(free.nonzero()[0])
        chosen.append(first)
        free = free & ~near[first]
    return order[chosen]


def _peaks(density: Density, z: Tensor, log_p: Tensor, scale: Tensor) -> Peaks:
    if z.shape[1] <= MAX_DIM:
        return climbed(density, z, scale)
    tril = torch.diag(scale.double()).expand(len(z), -1, -1)
    return Peaks(z, log_p.double(), tril, torch.zeros_like(log_p, dtype=torch.float64))


def distinct_modes(
    density: Density, z: Tensor, log_p: Tensor, scale: Tensor, known: Modes | None = None, max_modes: int = 64
) -> Modes:
    """The modes that ascents ended at, with those ``known`` before.

    Args:
        density: that was climbed.
        z: ends (N, D).
        log_p: theirs (N,), nats; ``-inf`` for ascents that never began.
        scale: (D,), widths of the start.
        known: modes of earlier stages, with their hits.
        max_modes: no more are looked for; those known are kept.
    """
    modes = no_modes(z) if known is None else known
    left = torch.isfinite(log_p)
    misses = 0
    while True:
        distance = modes.distances(z)
        if len(modes.loc):
            nearest, which = distance.min(0)
            ended = left & (nearest < _apart(z.shape[1]))
            modes = modes._replace(hits=modes.hits + torch.bincount(which[ended], minlength=len(modes.loc)))
            left = left & ~ended
        if not bool(left.any()) or len(modes.loc) >= max_modes or misses == _PATIENCE:
            return modes
        rows = _chosen(z, log_p, left, scale)
        left[rows] = False
        peaks = _peaks(density, z[rows], log_p[rows], scale)
        news = False
        for k in peaks.log_p.argsort(descending=True).tolist():
            if bool(peaks.gain[k] <= _STILL_CLIMBING) and bool(torch.isfinite(peaks.log_p[k])):
                modes, new = _with_peak(modes, peaks, k)
                news = news or new
        misses = 0 if news else misses + 1
