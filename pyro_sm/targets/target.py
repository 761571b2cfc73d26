# SPDX-License-Identifier: Apache-2.0
r"""What a benchmark target is: an unnormalised density ``p̃`` on R^d with as much of the truth as is known.

``log p̃`` is in nats and takes any batch, ``(..., d) -> (...)``; it follows the dtype and the device of ``x`` and
works under ``torch.func.vmap``. ``log Z = log ∫ p̃`` is a number where it is known. Exact draws and modes are further
abilities that not every target has: ask with ``isinstance``.

As a Pyro model, every target is ``pyro_sm.examples.improper.factor_model(target.log_prob, target.dim)``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class CoveringGaussian(NamedTuple):
    """``N(loc, diag(scale)²)`` that covers a target: where a sampler that is told nothing else may begin.

    ``loc``: (d,); ``scale``: (d,).
    """

    loc: Tensor
    scale: Tensor


@runtime_checkable
class Target(Protocol):
    """A density to sample from.

    ``name``: in words. ``dim``: d. ``log_evidence``: ``log Z`` in nats, None where it is unknown. ``start``: a
    Gaussian that covers the target.
    """

    @property
    def name(self) -> str:
        """In words, with its sizes."""
        ...

    @property
    def dim(self) -> int:
        """Number of latents d."""
        ...

    @property
    def log_evidence(self) -> float | None:
        """``log Z`` in nats, or None where it is not known."""
        ...

    @property
    def start(self) -> CoveringGaussian:
        """A Gaussian that covers the target."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p̃(x)`` (...) for ``x`` (..., d), nats."""
        ...


@runtime_checkable
class HasDraws(Target, Protocol):
    """A target with exact draws."""

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, d), on the device of ``generator``."""
        ...


@runtime_checkable
class HasModes(Target, Protocol):
    """A target whose modes are cells with known probability; K is their number."""

    def mode_weights(self) -> Tensor:
        """Probability of each cell, (K,)."""
        ...

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) in each cell, (K,)."""
        ...


def drawing_device(generator: torch.Generator | None) -> torch.device:
    """Where draws are made: torch wants generator and result on one device."""
    return torch.device("cpu") if generator is None else generator.device


def cell_shares(cell: Tensor, num_cells: int, dtype: torch.dtype) -> Tensor:
    """Share of draws in each cell, (num_cells,), from the index of every draw's cell (N,), int64."""
    return torch.bincount(cell, minlength=num_cells).to(dtype) / cell.shape[0]
