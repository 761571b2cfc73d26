# SPDX-License-Identifier: Apache-2.0
r"""A law on an interval of the line, through its density on the midpoints ``m_j`` of equal cells of width ``δ``.

``Z ≈ δ Σ_j f(m_j)``: for a smooth ``f`` that vanishes at both ends the midpoint rule converges faster than any power
of ``δ``. A draw takes a cell by inverse CDF and a uniform place in it, so its density is right to ``O(δ²)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sm.targets.target import drawing_device


class GridLaw:
    """The law with density ``∝ exp(log_density)`` between ``low`` and ``high``.

    Args:
        log_density: ``(J,) -> (J,)`` in nats, unnormalised; called with float64.
        low: lower end; ``high``: upper end.
        num_cells: J.

    Raises:
        ValueError: an empty interval, or no cells.
    """

    def __init__(
        self, log_density: Callable[[Tensor], Tensor], low: float, high: float, num_cells: int = 20_000
    ) -> None:
        if not low < high:
            raise ValueError(f"expected low < high, found {low} and {high}")
        if num_cells < 1:
            raise ValueError(f"expected num_cells >= 1, found {num_cells}")
        self.low = low
        self.width = (high - low) / num_cells
        self.points = low + self.width * (torch.arange(num_cells, dtype=torch.float64) + 0.5)
        log_f = log_density(self.points)
        self.log_norm = float(torch.logsumexp(log_f, 0)) + math.log(self.width)
        self.mass = torch.softmax(log_f, 0)
        """Probability of each cell, (J,)."""
        self._cdf = self.mass.cumsum(0)

    def expectation(self, function: Callable[[Tensor], Tensor]) -> float:
        """``E f(X)`` of an elementwise function."""
        return float((self.mass * function(self.points)).sum())

    def sample(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the given shape, on the device of ``generator``."""
        device = drawing_device(generator)
        cdf = self._cdf.to(device)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) * cdf[-1]
        cell = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[0] - 1)
        place = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        return (self.low + self.width * (cell + place)).to(dtype)
