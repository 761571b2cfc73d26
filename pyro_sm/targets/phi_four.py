# SPDX-License-Identifier: Apache-2.0
r"""The φ⁴ model on a chain: two phases that only a whole chain can leave.

    ``log p̃(φ) = −β [ (aN/2) Σ_{i=0}^{N} (φ_{i+1} − φ_i)² + Σ_{i=1}^{N} ( (1 − φ_i²)² / (4aN) − hφ_i / N ) ]``,

``φ_0 = φ_{N+1} = 0`` (Dirichlet), N sites, in nats. With h = 0 the two phases, φ near +1 and near −1, weigh the same;
a field h tips them.

A chain is a product of factors of neighbours, so with the field on a grid of G values ``Z`` is a product of transfer
matrices (G × G), the law of one site the product of a forward and a backward message, and a draw one pass of
conditional draws: all three are computed here. The grid is fine enough while its spacing is far below the width
``(βaN)^{−1/2}`` of a step between neighbours.

Source: "Adaptive Monte Carlo augmented with normalizing flows" https://arxiv.org/abs/2105.12603 .
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.targets.target import CoveringGaussian, cell_shares, drawing_device

_HIGHEST = 3.0
_NUM_CELLS = 800


class SiteLaw(NamedTuple):
    """What is known of one site: its ``mean``, ``sd``, ``abs_mean`` ``E|φ|`` and ``positive``, ``P(φ > 0)``."""

    mean: float
    sd: float
    abs_mean: float
    positive: float


class PhiFour:
    """The chain.

    Args:
        num_sites: N.
        h: field.
        a: coupling; small a, deep wells.
        beta: inverse temperature β.
        dtype: of draws, weights and the start; torch's default if None.

    Raises:
        ValueError: N < 2, a or β not positive, or a step between neighbours too narrow for the grid (``βaN > 5000``).
    """

    def __init__(
        self,
        num_sites: int = 32,
        h: float = 0.0,
        *,
        a: float = 0.1,
        beta: float = 20.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_sites < 2:
            raise ValueError(f"expected num_sites >= 2, found {num_sites}")
        if not (a > 0 and beta > 0):
            raise ValueError(f"expected positive a and beta, found {a} and {beta}")
        if beta * a * num_sites > 5000:
            raise ValueError(f"expected beta * a * num_sites <= 5000, found {beta * a * num_sites:.4g}")
        self.dim = num_sites
        self.h, self.a, self.beta = h, a, beta
        self.name = f"phi-four, N={num_sites}, h={h:g}"
        self.dtype = dtype or torch.get_default_dtype()
        width = 2 * _HIGHEST / _NUM_CELLS
        self._grid = -_HIGHEST + width * (torch.arange(_NUM_CELLS, dtype=torch.float64) + 0.5)
        self._width = width

    @property
    def start(self) -> CoveringGaussian:
        """Standard normal: the wells are at ±1."""
        return CoveringGaussian(torch.zeros(self.dim, dtype=self.dtype), torch.ones(self.dim, dtype=self.dtype))

    @property
    def mid_site(self) -> int:
        """Index N // 2 of the middle site, whose sign says the phase."""
        return self.dim // 2

    def _log_site(self, phi: Tensor) -> Tensor:
        well = (1 - phi.square()).square() / (4 * self.a * self.dim)
        return -self.beta * (well - self.h * phi / self.dim)

    def _log_bond(self, difference: Tensor) -> Tensor:
        return -0.5 * self.beta * self.a * self.dim * difference.square()

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p̃(φ)`` (...) in nats for ``x`` = φ (..., N)."""
        inner = self._log_bond(x[..., 1:] - x[..., :-1]).sum(-1)
        ends = self._log_bond(x[..., 0]) + self._log_bond(x[..., -1])
        return self._log_site(x).sum(-1) + inner + ends

    @cached_property
    def _messages(self) -> tuple[Tensor, float]:
        """Backward messages (N, G), each scaled to a largest value of 0, in logs, and ``log Z``.

        ``b_N(φ) = exp(bond to 0)``; ``b_i(φ) = δ Σ_φ' exp(bond(φ' − φ) + site(φ')) b_{i+1}(φ')``. By the symmetry of
        the chain the forward messages are the backward ones in reverse order.
        """
        site = self._log_site(self._grid)
        transfer = torch.exp(self._log_bond(self._grid[:, None] - self._grid)) * self._width
        message, log_scale = torch.exp(self._log_bond(self._grid)), 0.0
        found = [message.log()]
        for _ in range(self.dim - 1):
            message = transfer @ (site.exp() * message)
            top = message.max()
            message, log_scale = message / top, log_scale + float(top.log())
            found.append(message.log())
        first = torch.logsumexp(self._log_bond(self._grid) + site + found[-1], 0)
        return torch.stack(found[::-1]), float(first) + math.log(self._width) + log_scale

    @property
    def log_evidence(self) -> float:
        """``log Z`` by transfer matrices, nats."""
        return self._messages[1]

    def site_law(self, site: int) -> SiteLaw:
        """The law of site 0 … N−1.

        Raises:
            ValueError: no such site.
        """
        if not 0 <= site < self.dim:
            raise ValueError(f"expected a site from 0 to {self.dim - 1}, found {site}")
        backward = self._messages[0]
        mass = torch.softmax(backward[site] + backward[self.dim - 1 - site] + self._log_site(self._grid), 0)
        mean = float(mass @ self._grid)
        sd = math.sqrt(float(mass @ (self._grid - mean).square()))
        return SiteLaw(mean, sd, float(mass @ self._grid.abs()), float(mass[self._grid > 0].sum()))

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_draws, N), site by site given the one before; exact but for the grid, ``O(δ²)``, δ = .0075."""
        device = drawing_device(generator)
        grid, backward = self._grid.to(device), self._messages[0].to(device)
        onward = backward + self._log_site(grid)
        parts = []
        # In blocks: every draw carries a row of G conditional probabilities.
        for size in torch.arange(num_draws).split(4096):
            phi = torch.zeros(len(size), dtype=torch.float64, device=device)
            sites = []
            for site in range(self.dim):
                cdf = torch.softmax(self._log_bond(phi[:, None] - grid) + onward[site], 1).cumsum(1)
                u, place = torch.rand(2, len(size), generator=generator, dtype=torch.float64, device=device)
                cell = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=len(grid) - 1)
                phi = grid[cell] + self._width * (place - 0.5)
                sites.append(phi)
            parts.append(torch.stack(sites, 1))
        return torch.cat(parts).to(self.dtype)

    def mode_weights(self) -> Tensor:
        """Probability that the middle site is negative and that it is positive, (2,)."""
        positive = self.site_law(self.mid_site).positive
        return torch.tensor([1 - positive, positive], dtype=self.dtype)

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) whose middle site is negative and positive, (2,)."""
        return cell_shares((x[:, self.mid_site] > 0).long(), 2, x.dtype)
