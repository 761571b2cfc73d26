# SPDX-License-Identifier: Apache-2.0
r"""Unequal modes: a product of two-component Gaussian mixtures and standard normals, normalised.

    ``p(x) = Π_{i≤d/2} [.8 N(x_i; 3, .5²) + .2 N(x_i; −3, .5²)]  Π_{i>d/2} N(x_i; 0, 1)``.

``2^{d/2}`` modes; the one with k coordinates at −3 weighs ``.8^{d/2−k} .2^k``: with d = 8, from .4096 down to .0016.
The components are 12 standard deviations apart, so the sign of a coordinate is its component.

Source: this project's own, for want of a published target whose modes differ in weight by a factor of 256.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sm.targets.target import CoveringGaussian, cell_shares, drawing_device


class UnequalModes:
    """The product above.

    Args:
        dim: d, even; the first half are mixtures.
        dtype: of draws, weights and the start; torch's default if None.

    Raises:
        ValueError: ``dim`` is odd, not positive, or has more modes than can be listed (d > 32).
    """

    log_evidence = 0.0
    right_weight, place, width = 0.8, 3.0, 0.5

    def __init__(self, dim: int = 8, *, dtype: torch.dtype | None = None) -> None:
        if not 2 <= dim <= 32 or dim % 2:
            raise ValueError(f"expected an even dim from 2 to 32, found {dim}")
        self.dim = dim
        self.name = f"unequal modes, d={dim}"
        self.dtype = dtype or torch.get_default_dtype()
        self._half = dim // 2

    @property
    def start(self) -> CoveringGaussian:
        """Scale 3 for the mixtures and 1 for the normals."""
        scale = torch.tensor([3.0, 1.0], dtype=self.dtype).repeat_interleave(self._half)
        return CoveringGaussian(torch.zeros_like(scale), scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` (...) in nats for ``x`` (..., d)."""
        mixed, normal = x[..., : self._half], x[..., self._half :]
        right = math.log(self.right_weight) - 0.5 * ((mixed - self.place) / self.width).square()
        left = math.log(1 - self.right_weight) - 0.5 * ((mixed + self.place) / self.width).square()
        each = torch.logsumexp(torch.stack([right, left]), 0) - math.log(self.width)
        return (each - 0.5 * normal.square() - math.log(2 * math.pi)).sum(-1)

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, d)."""
        device = drawing_device(generator)
        noise = torch.randn(num_draws, self.dim, generator=generator, dtype=self.dtype, device=device)
        u = torch.rand(num_draws, self._half, generator=generator, dtype=self.dtype, device=device)
        place = torch.where(u < self.right_weight, self.place, -self.place).to(noise)
        return torch.cat([place + self.width * noise[:, : self._half], noise[:, self._half :]], 1)

    def mode_weights(self) -> Tensor:
        """Weight of each mode, (2^{d/2},); the bits of the index, first coordinate lowest, say which are at +3."""
        index = torch.arange(2**self._half)
        right = (index[:, None] >> torch.arange(self._half)) & 1
        weight = torch.where(right.bool(), self.right_weight, 1 - self.right_weight)
        return weight.to(self.dtype).prod(1)

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) in each mode, by the signs of the first half, (2^{d/2},)."""
        power = 2 ** torch.arange(self._half, device=x.device)
        return cell_shares(((x[:, : self._half] > 0) * power).sum(1), 2**self._half, x.dtype)
