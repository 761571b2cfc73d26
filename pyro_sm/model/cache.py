# SPDX-License-Identifier: Apache-2.0
r"""Keeping the batched density of a model while model and data stay the same.

A :class:`~pyro_sm.model.density.ModelDensity` is verified when it is made, which costs a few hundred runs of the
model. So one is made per model; new data rebind it (one run), and data seen lately are recognised by identity or by
value.
Whoever holds a cache holds a tuple of :class:`CachedDensity`, and replaces it by what :func:`bound_density` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Arguments
from pyro_sm.model.density import ModelDensity

_KEPT = 4  # more than one, so that a look at held-out data does not cost the training data theirs


class CachedDensity(NamedTuple):
    """A density and the exact model and arguments it was made for."""

    model: Callable[..., Any]
    arguments: Arguments
    versions: tuple[int, ...]
    density: ModelDensity


Cache = tuple[CachedDensity, ...]


def tensor_versions(arguments: Arguments) -> tuple[int, ...]:
    """How often each tensor was changed in place: a tensor compared with itself does not show it."""
    tensors = (a for a in arguments.values if isinstance(a, Tensor))
    return tuple(0 if a.is_inference() else a._version for a in tensors)


def _same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same data; what cannot be compared is taken to differ."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, RuntimeError, TypeError):  # containers of arrays compare to no single truth value
        return False


def same_arguments(these: Arguments, those: Arguments) -> bool:
    """Whether two calls of a model have the same arguments, by identity or by value."""
    return (
        len(these.args) == len(those.args)
        and these.kwargs.keys() == those.kwargs.keys()
        and all(_same_value(a, b) for a, b in zip(these.args, those.args, strict=True))
        and all(_same_value(value, those.kwargs[name]) for name, value in these.kwargs.items())
    )


def bound_density(cache: Cache, model: Callable[..., Any], arguments: Arguments) -> tuple[ModelDensity, Cache]:
    """The density of ``model`` on this data, and the cache to keep: ``cache`` itself if it was in there.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches, or the data change its latents.
    """
    held = [c for c in cache if c.model is model]
    for cached in held:
        unchanged = tensor_versions(cached.arguments) == cached.versions
        if unchanged and same_arguments(arguments, cached.arguments):
            return cached.density, cache
    args, kwargs = arguments.args, dict(arguments.kwargs)  # a copy: the caller may change a dictionary of his
    density = held[-1].density.with_data(args, kwargs) if held else ModelDensity(model, args, kwargs)
    new = CachedDensity(model, Arguments(args, kwargs), tensor_versions(arguments), density)
    return density, (*cache, new)[-_KEPT:]
