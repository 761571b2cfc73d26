# SPDX-License-Identifier: Apache-2.0
r"""The search for modes: many starts, ascents, distinct modes, and on in stages while little is known to be complete.

How many starts? Of a hundred random mixtures (1 to 8 latents, 1 to 8 modes up to thirty widths away) the answers
with good weights were wrong in 36 of 76 after 32 starts, in 15 of 74 after 64 and stages, and in 4 of 70 after 1,024:
k̂ and effective share speak of the modes that were found, and of no other. A thousand starts are a third of a second
where values are cheap. Where they are dear, 64 are a beginning: if all end at one place another start leads elsewhere
with at most 3/64 (the rule of three); as soon as there are two places it goes on.

Each later stage begins around what was found; there is one where there are two places, and another while Good and
Turing's share of starts that lead elsewhere is above 2 %, or the last has found a new place. Where more than half of
the ascents end at places of their own there is no list to complete: ridges, shells, funnels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.search.ascent import ascended
from pyro_sm.search.completeness import ENOUGH, Completeness
from pyro_sm.search.modes import Modes, distinct_modes
from pyro_sm.search.starts import SearchStart, starts, starts_around

_MANY, _FEW = 1024, 64
_CHEAP = 20e-6  # seconds a value and score: 1,024 ascents of some 40 steps are then a second
_SAMPLE = 256  # rows that are timed: fewer would time the call, and not the row
_NO_LIST = 0.5  # of ascents end at places of their own


class SearchResult(NamedTuple):
    """``modes`` that matter, highest first, and how complete the list is."""

    modes: Modes
    completeness: Completeness


def seconds_per_row(density: Density, start: SearchStart) -> float:
    """What one value with its score costs here, in a batch; 64 + 256 evaluations, or 64 where these are dear.

    At starts of every kind: a singular matrix far out can cost more than all that is near.
    """
    spent = 0.0
    for rows in (_FEW, _SAMPLE):
        z = starts(rows, start).to(density.dtype)
        begin = time.perf_counter()
        float(density.log_prob_and_score(z)[0].sum())  # waits for the device
        spent = (time.perf_counter() - begin) / rows
        if spent > 10 * _CHEAP:  # so much that a first call, which may set things up, is no excuse
            break
    return spent


def _worth_another(found: Completeness, places_before: int) -> bool:
    """Whether another stage is called for after this one."""
    if found.num_places <= 1:
        return False
    no_list = found.num_alone > _NO_LIST * found.num_arrived and found.num_starts > _FEW
    return not no_list and (found.num_alone > ENOUGH * found.num_arrived or found.num_places > places_before)


@dataclass(frozen=True)
class MultiStartSearch:
    """Settings of the search; :meth:`run` it on a density and a start.

    Args:
        num_starts: of the first stage; if None 1,024 where a value with its score costs no more than 20 µs here and
            now, else 64. A number makes the search the same on every machine.
        max_stages: stages at most, the first included.
        max_steps: of an ascent, each one value and score. Eighty are enough for nine in ten ends to arrive, and
            Newton does the rest.
        max_modes: with more than these there is no use in a list.

    Raises:
        ValueError: a count below one.
    """

    num_starts: int | None = None
    max_stages: int = 8
    max_steps: int = 80
    max_modes: int = 64

    def __post_init__(self) -> None:
        for name in ("num_starts", "max_stages", "max_steps", "max_modes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, found {value}")

    @torch.no_grad()
    def run(self, density: Density, start: SearchStart) -> SearchResult:
        """The modes; random numbers come from torch's global generator."""
        first = self.num_starts
        if first is None:
            first = _MANY if seconds_per_row(density, start) <= _CHEAP else _FEW
        # A stage of a quarter refines an estimate that a thousand gave; a few starts are worth their like again.
        later = max(first // 4, min(first, _FEW))
        modes, total, before = self._stage(density, start, starts(first, start), None), first, 0
        for stage in range(1, self.max_stages + 1):
            found = modes.that_matter()
            full = len(modes.loc) >= self.max_modes
            completeness = Completeness(total, found.hits.tolist(), stage, full)
            if full or stage == self.max_stages or not _worth_another(completeness, before):
                break
            before = completeness.num_places
            modes = self._stage(density, start, starts_around(later, start, found.loc), modes)
            total += later
        return SearchResult(found, completeness)

    def _stage(self, density: Density, start: SearchStart, z: Tensor, known: Modes | None) -> Modes:
        ends, log_p = ascended(density, z.to(density.dtype), start.scale, self.max_steps)
        return distinct_modes(density, ends, log_p, start.scale, known, self.max_modes)
