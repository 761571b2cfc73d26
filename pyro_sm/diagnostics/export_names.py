# SPDX-License-Identifier: Apache-2.0
r"""What the dimensions of exported variables are called: plates give theirs, the rest keep ArviZ's default.

A dimension of a site that is a plate has the plate's name and the labels ``0, …, size − 1``; another is called
``<variable>_dim_<i>``. No dimension may have the name of a variable, nor two sizes: then a suffix is added. Pyro's
scopes write ``/`` into names, which NetCDF reads as a path: it becomes a point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pyro_sm.diagnostics.export_groups import OWN_NAMES, Groups
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng, prior_trace


class Names(NamedTuple):
    """Names of dimensions: of each variable, and the labels along each dimension."""

    dims: dict[str, list[str]]
    coords: dict[str, np.ndarray]

    def of_sites(self, group: str, values: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        """Of a group's variables as far as they go: of a density those of the events are summed.

        Without those of sites that have one of :data:`OWN_NAMES`, whose variables have no dimensions of their own.
        """
        if group == "log_prior":
            return {name: self.dims[name][: value.ndim - 2] for name, value in values.items() if name in self.dims}
        return {name: dims for name, dims in self.dims.items() if name not in OWN_NAMES}


def dimension_names(density: ModelDensity, groups: Groups) -> Names:
    """Plates give dimensions their names; the rest keep ArviZ's default, ``<variable>_dim_<i>``."""
    variables = {name for group in groups.values() for name in group}
    dims: dict[str, list[str]] = {}
    coords: dict[str, np.ndarray] = {}
    for name, shape, event_dim, plates in _site_layouts(density):
        names = [f"{name}_dim_{i}" for i in range(len(shape))]
        for plate, dim, size in plates:
            position = len(shape) - event_dim + dim
            if not (0 <= position < len(shape) and shape[position] == size):
                continue
            label = _free_name(plate, size, variables, coords)
            coords[label] = np.arange(size)
            names[position] = label
        dims[_safe(name)] = [_safe(label) for label in names]
    return Names(dims, {_safe(label): values for label, values in coords.items()})


class _Layout(NamedTuple):
    """The shape of a site's value, and which of its batch dimensions (from the right) are plates."""

    name: str
    shape: tuple[int, ...]
    event_dim: int
    plates: tuple[tuple[str, int, int], ...]


def _site_layouts(density: ModelDensity) -> list[_Layout]:
    """Layouts of every latent, deterministic and observed site, from one run of the model."""
    with isolated_rng(0):
        trace, _ = prior_trace(density._traced)
    layouts = []
    for name, site in trace.nodes.items():
        shape = tuple(site["value"].shape) if isinstance(site["value"], Tensor) else ()
        # ``pyro.deterministic`` calls every dimension an event unless told otherwise.
        fn: Any = site["fn"]
        event_dim = fn.event_dim
        if name in density.deterministic and event_dim == len(shape):
            event_dim = 0
        frames = [(f.name, int(f.dim), int(f.size)) for f in site["cond_indep_stack"] if f.dim is not None]
        layouts.append(_Layout(name, shape, event_dim, tuple(frames)))
    return layouts


def _free_name(plate: str, size: int, variables: set[str], coords: Mapping[str, np.ndarray]) -> str:
    """A name no variable has, and no dimension of another size."""
    taken = variables | {"chain", "draw"}
    for label in (plate, f"{plate}_dim", f"{plate}_{size}", f"{plate}_dim_{size}"):
        if label not in taken and (label not in coords or len(coords[label]) == size):
            return label
    return f"{plate}_plate_{size}"


def _safe(name: str) -> str:
    """NetCDF reads ``/`` as a path; Pyro's scopes write it into names."""
    return name.replace("/", ".")


def netcdf_safe(groups: Groups) -> Groups:
    """The same values under names that NetCDF can store."""
    return {group: {_safe(name): value for name, value in data.items()} for group, data in groups.items()}
