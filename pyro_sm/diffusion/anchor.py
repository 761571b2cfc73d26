# SPDX-License-Identifier: Apache-2.0
r"""What a denoiser knows before training, if the modes are known: a mixture of normal laws, denoised exactly.

For ``u ~ Σ_j π_j N(m_j, Q_j diag(λ_j) Q_jᵀ)`` and ``y = u + r ε``, with ``w = Q_jᵀ (y − m_j)``,

    responsibilities  ``γ_j ∝ π_j exp(−½ Σ_d [w²/(λ_j + r²) + log(λ_j + r²)])``,
    mean              ``E[u | y] = Σ_j γ_j μ_j``,   ``μ_j = m_j + Q_j (λ_j/(λ_j + r²) w)``,
    variance          ``Var[u_d | y] = Σ_j γ_j [(Q_j² λ_j r²/(λ_j + r²))_d + μ_{j,d}²] − E[u_d | y]²``.

A network that has to find narrow modes in many dimensions by itself needs long for it; around an anchor it learns
what is not normal about them.

Source: "Denoising Diffusion Samplers" https://arxiv.org/abs/2302.13834 (a sampler around a law that is known).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Products (J, rows, D) of so many numbers, a megabyte in float32, stay in the cache of a core.
_NUMBERS_IN_CACHE = 2**18
# A variance by differences may come out as zero or less: at least this share of that within groups, 1 % of its sd.
_LEAST_SHARE = 1e-4
_FEWEST = 10  # draws that make a group: a variance is then known to half of itself, √(2/10)


class Anchor(NamedTuple):
    """Whitened: ``log_weight`` (J,), ``loc`` (J, D), ``values`` (J, D) and ``vectors`` (J, D, D), in columns."""

    log_weight: Tensor
    loc: Tensor
    values: Tensor
    vectors: Tensor

    def moments(self, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, D) of the clean point for ``y`` (B, D) and ``r`` (B,) or (1,)."""
        rows = max(1, _NUMBERS_IN_CACHE // self.loc.numel())
        if y.device.type != "cpu" or y.shape[0] <= rows:
            return self._moments(y, r)
        levels = r.split(rows) if r.shape[0] > 1 else [r] * -(-y.shape[0] // rows)
        pieces = [self._moments(a, b) for a, b in zip(y.split(rows), levels, strict=True)]
        return torch.cat([mean for mean, _ in pieces]), torch.cat([variance for _, variance in pieces])

    def _moments(self, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        square = r.square()[:, None]
        total = self.values[:, None] + square  # (J, B, D) or (J, 1, D)
        along = torch.baddbmm(-(self.loc[:, None] @ self.vectors), y.expand(len(self.loc), -1, -1), self.vectors)
        share = self.log_weight[:, None] - 0.5 * (along.square() / total + total.log()).sum(-1)
        share = torch.softmax(share, 0)[..., None]
        shrink = self.values[:, None] / total
        means = torch.baddbmm(self.loc[:, None], shrink * along, self.vectors.mT)
        within = (shrink * square) @ self.vectors.mT.square()
        mean = (share * means).sum(0)
        spread = (share * (within + (means - mean).square())).sum(0)
        return mean, torch.maximum(spread, _LEAST_SHARE * (share * within).sum(0))


def fit_anchor(u: Tensor, label: Tensor) -> Anchor | None:
    """Normal laws at groups of draws; None if there are not two groups of a size to speak of.

    The covariance of a group of n draws is drawn towards that within all groups, of its own size, by ``10D`` draws'
    worth: without that, few draws in many dimensions would make it singular.

    Args:
        u: (N, D) equally weighted draws, whitened.
        label: (N,) group of each; negative for none.
    """
    dim = u.shape[1]
    wide = u.double()
    groups = [wide[label == j] for j in label.unique() if int(j) >= 0]
    groups = [group for group in groups if len(group) >= _FEWEST]
    if len(groups) < 2:
        return None
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64, device=u.device)
    scatter = torch.stack([torch.atleast_2d(torch.cov(group.T, correction=0)) for group in groups])
    pooled = (counts[:, None, None] * scatter).sum(0) / counts.sum()
    pooled = pooled + 1e-9 * pooled.diagonal().mean() * torch.eye(dim, dtype=pooled.dtype, device=u.device)
    size = scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / pooled.diagonal().sum()
    held = (10 * dim / (counts + 10 * dim))[:, None, None]
    covariance = (1 - held) * scatter + held * size.clamp(min=1e-9)[:, None, None] * pooled
    values, vectors = torch.linalg.eigh(covariance)
    loc = torch.stack([group.mean(0) for group in groups])
    log_weight = (counts / counts.sum()).log()
    return Anchor(*(x.to(u) for x in (log_weight, loc, values.clamp(min=1e-12), vectors)))
