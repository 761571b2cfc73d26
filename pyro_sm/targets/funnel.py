# SPDX-License-Identifier: Apache-2.0
r"""Neal's funnel: a scale and the normals that have it, normalised.

    ``v ~ N(0, 3²)``,   ``x_i | v ~ N(0, e^v)``,   ``i = 1 … d−1``;   latents ``(v, x_1, …, x_{d−1})``.

The neck (small v) is where samplers fail, so the figure to report is the standard deviation of v, 3 if all is well.
``E x_i² = e^{9/2}``, carried by rare large v: do not judge by moments of ``x_i``.

Source: "Slice sampling" https://doi.org/10.1214/aos/1056562461 .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sm.targets.target import CoveringGaussian, drawing_device


class Funnel:
    """The funnel in d dimensions; ``log Z = 0``.

    Args:
        dim: d ≥ 2.
        dtype: of draws and of the start; torch's default if None.

    Raises:
        ValueError: ``dim < 2``.
    """

    log_evidence = 0.0
    v_sd = 3.0

    def __init__(self, dim: int = 10, *, dtype: torch.dtype | None = None) -> None:
        if dim < 2:
            raise ValueError(f"expected dim >= 2, found {dim}")
        self.dim = dim
        self.name = f"funnel, d={dim}"
        self.dtype = dtype or torch.get_default_dtype()

    @property
    def start(self) -> CoveringGaussian:
        """The marginal standard deviations: 3 for v, ``e^{9/4}`` for the others."""
        scale = torch.full((self.dim,), math.exp(self.v_sd**2 / 4), dtype=self.dtype)
        scale[0] = self.v_sd
        return CoveringGaussian(torch.zeros_like(scale), scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` (...) in nats for ``x`` (..., d), v first."""
        v, rest = x[..., 0], x[..., 1:]
        norm = math.log(self.v_sd) + 0.5 * self.dim * math.log(2 * math.pi)
        narrow = -0.5 * rest.square().sum(-1) * torch.exp(-v) - 0.5 * (self.dim - 1) * v
        return narrow - 0.5 * (v / self.v_sd).square() - norm

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, d)."""
        noise = torch.randn(
            num_draws, self.dim, generator=generator, dtype=self.dtype, device=drawing_device(generator)
        )
        v = self.v_sd * noise[:, :1]
        return torch.cat([v, torch.exp(0.5 * v) * noise[:, 1:]], 1)

    def found_v_sd(self, x: Tensor) -> float:
        """Standard deviation of v in draws ``x`` (N, d); the truth is ``v_sd``."""
        return float(x[:, 0].std())
