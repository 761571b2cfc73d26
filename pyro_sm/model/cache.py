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

from pyro_sm.model.density import ModelDensity

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_KEPT = 4  # more than one, so that a look at held-out data does not cost the training data theirs


class CachedDensity(NamedTuple):
    """A density and the exact model and arguments it was made for."""

    model: Callable[..., Any]
    args: Args
    kwargs: Kwargs
    versions: tuple[int, ...]
    density: ModelDensity


Cache = tuple[CachedDensity, ...]


def tensor_versions(args: Args, kwargs: Kwargs) -> tuple[int, ...]:
    """How often each tensor was changed in place: a tensor compared with itself does not show it."""
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
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


def same_arguments(args: Args, kwargs: Kwargs, other_args: Args, other_kwargs: Kwargs) -> bool:
    """Whether two calls of a model have the same arguments, by identity or by value."""
    return (
        len(args) == len(other_args)
        and kwargs.keys() == other_kwargs.keys()
        and all(_same_value(a, b) for a, b in zip(args, other_args, strict=True))
        and all(_same_value(kwargs[k], other_kwargs[k]) for k in kwargs)
    )


def bound_density(cache: Cache, model: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[ModelDensity, Cache]:
    """The density of ``model`` on this data, and the cache to keep: ``cache`` itself if it was in there.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches, or the data change its latents.
    """
    held = [c for c in cache if c.model is model]
    for cached in held:
        unchanged = tensor_versions(cached.args, cached.kwargs) == cached.versions
        if unchanged and same_arguments(args, kwargs, cached.args, cached.kwargs):
            return cached.density, cache
    density = held[-1].density.with_data(args, kwargs) if held else ModelDensity(model, args, kwargs)
    new = CachedDensity(model, args, dict(kwargs), tensor_versions(args, kwargs), density)
    return density, (*cache, new)[-_KEPT:]
