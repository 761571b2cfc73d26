# SPDX-License-Identifier: Apache-2.0
r"""A posterior as a mixture of t laws at its modes: search, Laplace, a few updates by Batch-and-Match, weights.

Around every mode stands Laplace's law ``N(m, L Lᵀ)``. Where the posterior is skew it is not the best normal law
there, and B draws ``z_b`` of it with their scores ``g_b`` mend it: the normal law whose scores match has

    ``Σ Γ Σ = C``,   ``m = z̄ + Σ ḡ``,   so   ``Σ = C^{½} (C^{½} Γ C^{½})^{−½} C^{½}``,

``C``, ``Γ`` the covariances and ``z̄``, ``ḡ`` the means of draws and scores: exact for a normal posterior from D + 1
draws, and Batch-and-Match with an infinite learning rate. The law with the largest effective share of weights is
kept. The mixture has a t law with ν = 7 in the place of each, with shares by the evidence of each law's own weights.

Measured on fifteen posteriors of a public database, three seeds, this gave effective shares of .4 to .9 in twelve, at
some 12,000 evaluations after 64 ascents and 93,000 after 1,024; what it cannot answer (funnels, curved valleys)
has a k̂ or an effective share that says so.

Sources: "Batch and match: black-box variational inference with a score-based divergence"
https://arxiv.org/abs/2402.14758 ; "Pathfinder: parallel quasi-Newton variational inference"
https://arxiv.org/abs/2108.03782 .
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.gaussians.student_mixture import StudentMixture
from pyro_sm.ladder.weighted_mixture import WeightedMixture, weighted_draws
from pyro_sm.search.modes import Modes
from pyro_sm.search.multistart import MultiStartSearch
from pyro_sm.search.starts import SearchStart
from pyro_sm.weights import effective_sample_size, log_mean_exp

_BATCH, _BATCH_PER_LATENT = 96, 4  # scores of an update: four times what determines D + D²/2 numbers
_NARROWER = 0.7  # Laplace's law may be too wide by far: the first draws are nearer to the mode
_TAIL = 25.0  # nats below the highest draw, and one for each latent: farther out the scores are another law's
_GOOD = 0.85  # effective share: what a t law can have of a normal target in five dimensions
_EQUAL = 0.1  # of the shares, in equal parts: an evidence that is off by much must not lose a mode


class _Law(NamedTuple):
    """``loc`` (D,), ``scale_tril`` (D, D), ``log_mass`` by its own weights, nats, their effective share ``ess``."""

    loc: Tensor
    scale_tril: Tensor
    log_mass: float
    ess: float

    def student(self) -> StudentMixture:
        return StudentMixture(self.loc.new_zeros(1), self.loc[None], self.scale_tril[None])


def matched(z: Tensor, score: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean (D,) and Cholesky factor (D, D) of the normal law whose scores match ``score`` at ``z``, both (N, D).

    None where there is none: fewer than D + 2 points, or scores or points that do not span the space.
    """
    n, dim = z.shape
    if n < dim + 2:
        return None
    # In units of the points' own widths, or D latents of different size would be badly conditioned.
    scale = z.std(0)
    if not bool((scale > 0).all()):
        return None
    u, g = z / scale, score * scale
    points = torch.atleast_2d(torch.cov(u.T, correction=0))
    slopes = torch.atleast_2d(torch.cov(g.T, correction=0))
    value, vector = torch.linalg.eigh(points)
    root = (vector * value.clamp(min=0).sqrt()) @ vector.T
    value, vector = torch.linalg.eigh(root @ slopes @ root)
    if not float(value[0]) > 1e-14 * float(value[-1]):
        return None
    covariance = root @ ((vector / value.sqrt()) @ vector.T) @ root
    tril, failed = torch.linalg.cholesky_ex((covariance + covariance.T) / 2)
    loc = u.mean(0) + covariance @ g.mean(0)
    if bool(failed) or not bool(torch.isfinite(loc).all()):
        return None
    return scale * loc, scale[:, None] * tril


def _first(modes: Modes) -> list[_Law]:
    masses = modes.log_mass.tolist()
    return [
        _Law(loc.double(), tril, mass, 0.0)
        for loc, tril, mass in zip(modes.loc, modes.scale_tril, masses, strict=True)
    ]


@dataclass(frozen=True)
class ModeMixture:
    """Settings of the method at the head of this file; :meth:`run` it on a density and a start.

    Args:
        search: for modes.
        num_updates: of each mode's law, each ``max(96, 4 D)`` values and scores; the last ones are skipped where .85
            of the draws count. Five are enough where any number is.
        num_draws: of the pool. Four thousand make means right to .02 standard deviations at an effective share of
            .6, and bear a k̂ of .7.

    Raises:
        ValueError: a number of updates below zero, or of draws below two.
    """

    search: MultiStartSearch = field(default_factory=MultiStartSearch)
    num_updates: int = 5
    num_draws: int = 4000

    def __post_init__(self) -> None:
        if self.num_updates < 0:
            raise ValueError(f"expected num_updates >= 0, found {self.num_updates}")
        if self.num_draws < 2:
            raise ValueError(f"expected num_draws >= 2, found {self.num_draws}")

    @torch.no_grad()
    def run(self, density: Density, start: SearchStart) -> WeightedMixture:
        """The mixture with its pool; random numbers come from torch's global generator.

        Where no mode is found it is one t law, as wide as the start.
        """
        before = replace(density.evaluations)
        modes, completeness = self.search.run(density, start)
        laws = self._updated(density, _first(modes))
        if not laws:
            laws = [_Law(start.loc.double(), torch.diag(start.scale.double()), 0.0, 0.0)]
        mixture = _mixed(laws)
        pool = weighted_draws(density, mixture, self.num_draws)
        spent = density.evaluations - before
        method = "mode search, Laplace and Batch-and-Match"
        return WeightedMixture(mixture, pool, spent, completeness, method)

    def _updated(self, density: Density, laws: list[_Law]) -> list[_Law]:
        """The best of what Batch-and-Match makes of each law."""
        best, now, active = list(laws), list(laws), list(range(len(laws)))
        for update in range(self.num_updates + 1):
            last = update == self.num_updates
            active = self._update(density, best, now, active, first=update == 0, last=last)
            if not active:
                break
        return best

    def _update(
        self, density: Density, best: list[_Law], now: list[_Law], active: list[int], *, first: bool, last: bool
    ) -> list[int]:
        """Weigh the active laws of ``now`` by fresh draws, keep the better ones in ``best``, and match their scores.

        Both lists are changed; returns the laws that go on. One call of the density serves all of them.
        """
        dim = density.dim
        size = max(_BATCH, _BATCH_PER_LATENT * dim)
        drawn = [_draws(now[k], size, narrow=first) for k in active]
        if not drawn:
            return []
        z = torch.cat(drawn).to(density.dtype)
        if last:  # weighed only
            log_p, score = density.log_prob(z).double(), torch.zeros_like(z)
        else:
            log_p, score = density.log_prob_and_score(z)
        log_p = torch.where(torch.isfinite(score).all(-1), log_p.double(), -math.inf)
        log_p = torch.where(torch.isfinite(log_p), log_p, -math.inf)
        going = []
        parts = zip(active, z.double().split(size), log_p.split(size), score.double().split(size), strict=True)
        for k, points, value, slope in parts:
            if not first:
                now[k] = _weighed(now[k], points, value)
                best[k] = now[k] if now[k].ess > best[k].ess else best[k]
            if now[k].ess > _GOOD or not bool(torch.isfinite(value).any()):
                continue
            near = value > value.max() - _TAIL - dim
            law = matched(points[near], slope[near]) if not last else None
            if law is not None:
                now[k] = _Law(*law, -math.inf, 0.0)
            if law is not None or first:  # Laplace's own law is weighed, too, where it cannot be mended
                going.append(k)
        return going


def _draws(law: _Law, num_draws: int, *, narrow: bool) -> Tensor:
    if not narrow:
        return law.student().sample(num_draws)
    noise = torch.randn(num_draws, len(law.loc), dtype=law.loc.dtype, device=law.loc.device)
    return law.loc + _NARROWER * noise @ law.scale_tril.T


def _weighed(law: _Law, z: Tensor, log_p: Tensor) -> _Law:
    log_w = log_p - law.student().log_prob(z)
    return law._replace(log_mass=float(log_mean_exp(log_w)), ess=effective_sample_size(log_w) / len(z))


def _mixed(laws: list[_Law]) -> StudentMixture:
    mass = torch.tensor([law.log_mass for law in laws], dtype=torch.float64, device=laws[0].loc.device)
    mass = torch.nan_to_num(mass, nan=-1e300, posinf=-1e300, neginf=-1e300)
    share = (1 - _EQUAL) * torch.softmax(mass, 0) + _EQUAL / len(laws)
    return StudentMixture(
        share.log(), torch.stack([law.loc for law in laws]), torch.stack([law.scale_tril for law in laws])
    )
