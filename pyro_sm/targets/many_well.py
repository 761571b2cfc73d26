# SPDX-License-Identifier: Apache-2.0
r"""Many-Well: d/2 independent double wells in the plane, 2^{d/2} modes of unequal weight.

For each pair ``(x₁, x₂)``, in nats,

    ``log p̃ = −(a x₁ + b x₁² + c x₁⁴) − ½ x₂²``,   ``(a, b, c) = (−½, −6, 1)``,

so ``log Z = (d/2)(log Z₁ + ½ log 2π)`` with ``Z₁ = ∫ exp(−a x − b x² − c x⁴) dx`` by one-dimensional quadrature. The
well right of zero holds the larger share of every pair. A sampler that keeps only the heavier wells shows in the mean
share of ``x₁ < 0``, over pairs: the minority share. Pairs are neighbouring coordinates: (x₁, x₂), (x₃, x₄), ….

Source: "Flow Annealed Importance Sampling Bootstrap" https://arxiv.org/abs/2208.01893 .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sm.targets.grid_law import GridLaw
from pyro_sm.targets.target import CoveringGaussian, cell_shares, drawing_device

_MOST_LISTED_PAIRS = 16


class ManyWell:
    """The product of ``dim / 2`` double wells.

    Args:
        dim: d, even; 2 to 200 in the literature.
        dtype: of draws and of the start; torch's default if None.

    Raises:
        ValueError: ``dim`` is odd or not positive.
    """

    a, b, c = -0.5, -6.0, 1.0

    def __init__(self, dim: int = 32, *, dtype: torch.dtype | None = None) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"expected an even dim >= 2, found {dim}")
        self.dim = dim
        self.name = f"Many-Well, d={dim}"
        self.dtype = dtype or torch.get_default_dtype()
        # The density of x₁ at ±6 is exp(−1080) of its largest value.
        self.x1_law = GridLaw(self._log_well, -6.0, 6.0)
        self.log_evidence = dim / 2 * (self.x1_law.log_norm + 0.5 * math.log(2 * math.pi))
        self.right_weight = float(self.x1_law.mass[self.x1_law.points > 0].sum())

    @property
    def start(self) -> CoveringGaussian:
        """Scale 2 for ``x₁``, whose wells are near ±1.7, and 1 for ``x₂``."""
        scale = torch.tensor([2.0, 1.0], dtype=self.dtype).repeat(self.dim // 2)
        return CoveringGaussian(torch.zeros_like(scale), scale)

    def _log_well(self, x1: Tensor) -> Tensor:
        square = x1.square()
        return -(self.a * x1 + self.b * square + self.c * square.square())

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p̃(x)`` (...) in nats for ``x`` (..., d)."""
        return (self._log_well(x[..., 0::2]) - 0.5 * x[..., 1::2].square()).sum(-1)

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, d): ``x₁`` by inverse CDF on a grid, ``x₂`` normal."""
        x1 = self.x1_law.sample((num_draws, self.dim // 2), self.dtype, generator)
        x2 = torch.randn(x1.shape, generator=generator, dtype=self.dtype, device=drawing_device(generator))
        return torch.stack([x1, x2], -1).flatten(1)

    def right_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) right of zero, for each pair, (d/2,); the truth is ``right_weight``."""
        return (x[:, 0::2] > 0).to(x.dtype).mean(0)

    def minority_share(self, x: Tensor) -> float:
        """Mean over pairs of the share of ``x`` (N, d) in the lighter well; the truth is ``1 − right_weight``."""
        return 1 - float(self.right_shares(x).mean())

    def mode_weights(self) -> Tensor:
        """Probability of each of the 2^{d/2} modes; the bits of the index, first pair lowest, say which are right.

        Raises:
            ValueError: more than 16 pairs: too many modes to list.
        """
        right = (torch.arange(self._num_modes())[:, None] >> torch.arange(self.dim // 2)) & 1
        return torch.where(right.bool(), self.right_weight, 1 - self.right_weight).to(self.dtype).prod(1)

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) in each of the 2^{d/2} modes.

        Raises:
            ValueError: more than 16 pairs: too many modes to list; see :meth:`right_shares`.
        """
        power = 2 ** torch.arange(self.dim // 2, device=x.device)
        return cell_shares(((x[:, 0::2] > 0) * power).sum(1), self._num_modes(), x.dtype)

    def _num_modes(self) -> int:
        if self.dim // 2 > _MOST_LISTED_PAIRS:
            raise ValueError(f"expected dim <= {2 * _MOST_LISTED_PAIRS} to list the modes, found {self.dim}")
        return 2 ** (self.dim // 2)
