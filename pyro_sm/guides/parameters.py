# SPDX-License-Identifier: Apache-2.0
"""A guide's parameters in Pyro's param store: made, shared with a warning, released, and in step with a loaded store.

All of a guide's parameters stand in the store under the guide's name, ``name.parameter``, so that
``param_store.save`` and ``load`` carry them. Pyro hands a second guide of the same name the first one's tensors
silently, and follows a store that was loaded parameter by parameter, keeping what was not in the file: both are
noticed here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.utils.weak import WeakIdKeyDictionary

from pyro_sm.base import PyroSMWarning

# Whose a tensor of the store is. By identity of the tensor and weakly: it must neither keep a guide alive, nor go
# with a tensor that is copied or pickled, as an attribute of it would.
_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _full_name(guide: PyroModule, name: str) -> str:
    return f"{guide._pyro_name}.{name}"


def has(guide: PyroModule, name: str) -> bool:
    """Whether the guide has this parameter."""
    return name in guide._pyro_params


def create(guide: PyroModule, name: str, value: Tensor) -> None:
    """A Pyro parameter of the guide, whatever the store holds."""
    setattr(guide, name, PyroParam(value, constraints.real))


def register(guide: PyroModule, values: Mapping[str, Tensor]) -> None:
    """Create Pyro parameters, adopting (after a check) what the store holds under their names.

    Raises:
        ValueError: the store holds a parameter of another shape under one of the names.

    Warns:
        PyroSMWarning: the store holds a parameter of another guide that is still in use.
    """
    store = pyro.get_param_store()
    for name, value in values.items():
        full_name = _full_name(guide, name)
        if full_name in store:
            held = store[full_name]
            if held.shape != value.shape:
                raise ValueError(
                    f"the param store already holds '{full_name}' with shape {tuple(held.shape)}, this guide "
                    f"needs {tuple(value.shape)}: call pyro.clear_param_store(), or give this guide a name of "
                    "its own: AutoDiffusion(model, name=...)"
                )
            owner = _OWNERS.get(store._params[full_name])
            if owner is not None and owner() not in (None, guide):
                warnings.warn(
                    f"the param store already holds '{full_name}' of another guide: this guide shares its "
                    "parameters. Call pyro.clear_param_store() first, or give this guide a name of its own",
                    PyroSMWarning,
                    stacklevel=2,
                )
        create(guide, name, value)
        _OWNERS[getattr(guide, name).unconstrained()] = weakref.ref(guide)


def release(guide: PyroModule, names: Iterable[str]) -> None:
    """Take the guide's own parameters out of the store, so that another guide may have the names."""
    store = pyro.get_param_store()
    for name in names:
        full_name = _full_name(guide, name)
        mine = guide._parameters.get(f"{name}_unconstrained")
        if mine is not None and full_name in store and store._params[full_name] is mine:
            del store[full_name]


def drop(guide: PyroModule, names: Iterable[str]) -> None:
    """Take parameters away from the guide, and out of the store."""
    store = pyro.get_param_store()
    for name in names:
        if has(guide, name):
            if _full_name(guide, name) in store:
                del store[_full_name(guide, name)]
            delattr(guide, name)


def replaced(guide: PyroModule, name: str) -> bool:
    """Whether the store holds another tensor under this name than the guide does: the store was loaded since."""
    held = pyro.get_param_store()._params.get(_full_name(guide, name))
    return held is not None and held is not guide._parameters.get(f"{name}_unconstrained")


def optional(guide: PyroModule, names: tuple[str, ...]) -> tuple[Tensor, ...] | None:
    """Parameters that are not always there, detached; adopted from a store that was loaded; None without."""
    if not has(guide, names[0]):
        store = pyro.get_param_store()
        held = {name: _full_name(guide, name) for name in names}
        if not all(full_name in store for full_name in held.values()):
            return None
        register(guide, {name: store[full_name] for name, full_name in held.items()})
    return tuple(getattr(guide, name).detach() for name in names)


def write(guide: PyroModule, names: tuple[str, ...], values: Any, now: tuple[Tensor, ...] | None) -> None:
    """Give optional parameters these ``values``, a tuple as long as ``names``, or drop them for None.

    Where they are there already (``now``) and keep their shapes, they are changed in place.
    """
    if values is None:
        drop(guide, names)
    elif now is not None and all(new.shape == old.shape for new, old in zip(values, now, strict=True)):
        for name, value in zip(names, values, strict=True):
            getattr(guide, name).copy_(value)
    else:
        drop(guide, names)
        register(guide, dict(zip(names, values, strict=True)))
