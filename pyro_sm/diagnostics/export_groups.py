# SPDX-License-Identifier: Apache-2.0
r"""What an export holds: arrays by group and site, (chain, draw, \*shape), computed from the model and its draws.

NumPy only; which ArviZ there is, and what dimensions are called, is told elsewhere (``arviz_lines.py``,
``export_names.py``). The groups are those listed at the head of ``export.py``. Every distinct draw is pushed through
the model once, a thousand at a time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from pyro_sm.base import Draws, PyroSMWarning
from pyro_sm.model.density import ModelDensity

OWN_NAMES = ("lp", "log_q", "log_weight")
"""Of variables that are no sites, though a site may be called so."""

_CHUNK = 1000
"""Rows at a time: few enough that what the model makes of them fits into memory, many enough that calls are cheap."""

Groups = dict[str, dict[str, np.ndarray]]
"""Values (chain, draw, ...) by group and variable."""


def to_numpy(value: Tensor) -> np.ndarray:
    """The values of a tensor on any device, of its shape and precision."""
    return value.detach().cpu().numpy()


def _in_chunks(function: Callable[[Tensor], Mapping[str, Tensor]], z: Tensor) -> dict[str, np.ndarray]:
    """``function(z)`` by rows, a thousand at a time, so that only its results have to fit into memory."""
    results: dict[str, np.ndarray] = {}
    for start in range(0, z.shape[0], _CHUNK):
        part = z[start : start + _CHUNK]
        for name, value in function(part).items():
            rows = to_numpy(value)
            if name not in results:
                results[name] = np.empty((z.shape[0], *rows.shape[1:]), rows.dtype)
            results[name][start : start + _CHUNK] = rows
    return results


def into_chains(values: Mapping[str, np.ndarray], chains: int) -> dict[str, np.ndarray]:
    """Rows (N, ...) dealt to ``chains`` in their order: (chain, draw, ...); ``chains`` divides N."""
    return {name: value.reshape(chains, -1, *value.shape[1:]) for name, value in values.items()}


def predictive_draws(density: ModelDensity, z: Tensor) -> dict[str, np.ndarray]:
    """Data drawn at latents (N, D), (N, *shape) by observed site: deterministic sites belong to ``posterior``."""

    def draw(part: Tensor) -> dict[str, Tensor]:
        return {k: v for k, v in density.posterior_predictive(part).items() if k in density.observed}

    return _in_chunks(draw, z)


def posterior_groups(
    density: ModelDensity, draws: Draws, index: Tensor, chains: int, log_likelihood: bool, log_prior: bool
) -> Groups:
    """``posterior``, ``sample_stats``, ``log_likelihood``, ``log_prior``; each distinct draw is computed once."""
    distinct, inverse = torch.unique(index, return_inverse=True)
    z = draws.z[distinct]
    positions = to_numpy(inverse)

    def spread(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return into_chains({name: value[positions] for name, value in values.items()}, chains)

    groups = {"posterior": spread(_in_chunks(density.unpack, z))}
    if density.deterministic:
        groups["posterior"] |= spread(_in_chunks(density.deterministics, z))
    stats = {"lp": to_numpy(draws.log_p[index]), "log_q": to_numpy(draws.log_q[index])}
    groups["sample_stats"] = into_chains(stats, chains)
    if log_likelihood and density.observed:
        with contextlib.suppress(NotImplementedError):  # discrete sites summed out: data not independent
            groups["log_likelihood"] = spread(_in_chunks(density.log_likelihood, z))
    if log_prior and density.has_prior:
        groups["log_prior"] = spread(_in_chunks(density.log_prior_terms, z))
    return groups


@torch.no_grad()
def raw_group(density: ModelDensity, draws: Draws) -> dict[str, np.ndarray]:
    """``guide``: all raw draws in one chain, with ``lp`` and ``log_weight``, nats."""
    guide = _in_chunks(density.unpack, draws.z)
    guide = {f"{name}_site" if name in OWN_NAMES else name: values for name, values in guide.items()}
    guide |= {"lp": to_numpy(draws.log_p), "log_weight": to_numpy(draws.log_weight)}
    return into_chains(guide, 1)


def prior_groups(density: ModelDensity, num_draws: int, predictive: bool) -> Groups:
    """``prior``, with deterministic sites, and ``prior_predictive``, of the same draws, in one chain."""
    z = density.prior_draws(num_draws)
    prior = _in_chunks(density.unpack, z)
    if density.deterministic:
        prior |= _in_chunks(density.deterministics, z)
    groups = {"prior": into_chains(prior, 1)}
    if predictive and density.observed:
        try:
            groups["prior_predictive"] = into_chains(predictive_draws(density, z), 1)
        except (ValueError, RuntimeError) as error:  # a wide prior overflows where the posterior never goes
            warnings.warn(
                f"no data can be drawn from the prior, so there is no group prior_predictive: {error}",
                PyroSMWarning,
                stacklevel=3,
            )
    return groups
