# SPDX-License-Identifier: Apache-2.0
r"""Keeping the batched density of a model while model and data stay the same.

A :class:`~pyro_sm.model.density.ModelDensity` is verified when it is made, which costs a few hundred runs of the
model. So one is made per model; new data rebind it (one run), and data seen lately are recognised by value
(``fingerprint.py``), wherever the model finds them. Trainable parameters are no data: a density has their values of
the moment.
Whoever holds a cache holds a tuple of :class:`CachedDensity`, and replaces it by what :func:`bound_density` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pyro_sm.base import Arguments
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.fingerprint import Fingerprint, Path, changed_by_running, fingerprint

_KEPT = 4  # more than one, so that a look at held-out data does not cost the training data theirs


class CachedDensity(NamedTuple):
    """A density, the exact model and arguments it was made for, and what they were then."""

    model: Callable[..., Any]
    arguments: Arguments
    data: Fingerprint
    changing: frozenset[Path]
    """What the model changes itself, which is not compared."""
    density: ModelDensity

    def is_of(self, arguments: Arguments, now: Fingerprint) -> bool:
        """Whether the density is that of these arguments, which are ``now`` so."""
        if not now.same_but(self.data, self.changing):
            return False
        mine = self.arguments
        if mine.kwargs.keys() == arguments.kwargs.keys() and all(
            a is b for a, b in zip(mine.values, arguments.values, strict=True)
        ):
            return True
        # The density has its own arguments, which somebody may have changed since.
        return fingerprint(self.model, mine, self.data).same_but(self.data, self.changing)


Cache = tuple[CachedDensity, ...]


def bound_density(cache: Cache, model: Callable[..., Any], arguments: Arguments) -> tuple[ModelDensity, Cache]:
    """The density of ``model`` on this data, and the cache to keep: ``cache`` itself if it was in there.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches, or the data change its latents.
    """
    held = [c for c in cache if c.model is model]
    now = fingerprint(model, arguments, held[-1].data if held else None)
    for cached in held:
        if cached.is_of(arguments, now):
            return cached.density, cache
    args, kwargs = arguments.args, dict(arguments.kwargs)  # a copy: the caller may change a dictionary of his
    density = held[-1].density.with_data(args, kwargs) if held else ModelDensity(model, args, kwargs)
    changing = changed_by_running(now, fingerprint(model, arguments, now))
    if held:
        changing |= held[-1].changing
    new = CachedDensity(model, Arguments(args, kwargs), now, changing, density)
    return density, (*cache, new)[-_KEPT:]
