# SPDX-License-Identifier: Apache-2.0
r"""How much noise: the range of noise-to-signal ratios, in whitened space, between which the reverse kernels stand.

A clean point ``u`` becomes ``x_t = α(t) u + σ(t) ε`` with ``ε ~ N(0, I)``. Of a schedule ``(α, σ)`` only the
noise-to-signal ratio ``r = σ/α`` matters here: kernels, network and weights are written in the rescaled variable
``y = x/α = u + r ε``, in which variance exploding (α = 1) and variance preserving (α² + σ² = 1) are the same process.
So a range of ratios is all there is to choose; where in it the kernels stand is fitted (``diffusion/levels.py``).

Source: "Variational Diffusion Models" https://arxiv.org/abs/2107.00630 (section 5: invariance to the schedule);
"Elucidating the Design Space of Diffusion-Based Generative Models" https://arxiv.org/abs/2206.00364 .
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseRange:
    """Noise-to-signal ratios from ``min`` to ``max``, unitless: noise is measured in widths of the base.

    Args:
        min: of the first kernel; below the smallest detail of the posterior, in widths of the base. By default .002:
            "Elucidating the Design Space of Diffusion-Based Generative Models" https://arxiv.org/abs/2206.00364 .
        max: of the last kernel; there the posterior must be hidden, or the guide cannot leave its base. By default 8:
            of a point as far off as one width of the base, a share of 1/(1 + 8²) = 1.5 % of the variance is seen.

    Raises:
        ValueError: unless ``0 < min < max``.
    """

    min: float = 0.002
    max: float = 8.0

    def __post_init__(self) -> None:
        if not 0 < self.min < self.max:
            raise ValueError(f"expected 0 < min < max, found min={self.min} and max={self.max}")

    def levels(self, num_steps: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Ratios ``0 = r_0 < r_1 < … < r_K``, (K+1,), geometric from ``min`` on; ``r_0`` is the clean point.

        Raises:
            ValueError: fewer than two steps.
        """
        if num_steps < 2:
            raise ValueError(f"expected at least 2 steps, found {num_steps}")
        t = torch.linspace(0, 1, num_steps, dtype=dtype, device=device)
        ratios = self.min * (self.max / self.min) ** t
        return torch.cat([torch.zeros(1, dtype=dtype, device=device), ratios])
