# SPDX-License-Identifier: Apache-2.0
r"""GMM-40 and its larger kin: K equally weighted Gaussians at random places in a square.

Means ``(rand(K, 2) − ½)·80`` after ``torch.manual_seed(0)``, isotropic standard deviation ``softplus(1) = 1.3133``,
``log Z = 0``. Not K separated modes: some means are closer than one standard deviation, so modes are counted by
responsibility (nearest mean), and the figure that shows coverage is the total variation of those counts.

Source: "Flow Annealed Importance Sampling Bootstrap" https://arxiv.org/abs/2208.01893 .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class GaussianMixture:
    """K isotropic Gaussians with equal weights in two dimensions; ``log Z = 0``.

    Args:
        num_modes: K (40, 80 or 120 in the literature).
        dtype: of the means; torch's default if None. Whatever it is, the means are the same.
    """

    dim = 2
    log_evidence = 0.0

    def __init__(self, num_modes: int = 40, dtype: torch.dtype | None = None) -> None:
        self.num_modes = num_modes
        generator = torch.Generator().manual_seed(0)
        # The published numbers are float32 draws; drawn in another dtype they would be other means.
        means = (torch.rand(num_modes, 2, generator=generator, dtype=torch.float32) - 0.5) * 80
        self.means = means.to(dtype or torch.get_default_dtype())
        self.scale = math.log1p(math.e)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` (...) in nats for ``x`` (..., 2)."""
        square = ((x.unsqueeze(-2) - self.means) / self.scale).square().sum(-1)
        norm = math.log(self.num_modes) + 2 * math.log(self.scale) + math.log(2 * math.pi)
        return torch.logsumexp(-0.5 * square, -1) - norm

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, 2)."""
        index = torch.randint(self.num_modes, (num_draws,), generator=generator)
        noise = torch.randn(num_draws, 2, generator=generator, dtype=self.means.dtype)
        return self.means[index] + self.scale * noise

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, 2) nearest to each mean, (K,)."""
        nearest = torch.cdist(x.to(self.means), self.means).argmin(1)
        return torch.bincount(nearest, minlength=self.num_modes) / x.shape[0]

    def mode_total_variation(self, x: Tensor, num_exact: int = 1_000_000) -> float:
        """``½ Σ_k |ŵ_k − w_k|`` against exact draws' shares: nearest-mean cells are not exactly 1/K each."""
        exact = self.mode_shares(self.sample(num_exact, torch.Generator().manual_seed(1)))
        return 0.5 * float((self.mode_shares(x) - exact).abs().sum())
