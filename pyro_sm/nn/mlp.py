# SPDX-License-Identifier: Apache-2.0
r"""A residual multilayer perceptron that knows the noise level and, if there is one, a context.

``(x, c, context)``: x (B, D) scaled to unit size, c (B,) a quarter of the log noise-to-signal ratio, context (B, C)
or None; returns (B, O). The last layer starts at zero, so the untrained network returns zero everywhere.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" https://arxiv.org/abs/2206.00364
(the noise embedding and scaling of the input).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """Cosines and sines of ``2π f_j c`` at fixed frequencies ``f_j`` spaced from 1/8 to 4; (B,) -> (B, 2J)."""

    frequencies: Tensor

    def __init__(self, num_frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-3, 2, num_frequencies, base=2.0) * 2 * math.pi)

    def forward(self, c: Tensor) -> Tensor:
        """Embed ``c`` (B,)."""
        angle = c[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1)


class ResidualMLP(nn.Module):
    """``depth`` residual blocks of ``width`` units; noise level and context scale and shift every block.

    Args:
        dim: D, size of the input.
        out_dim: O, size of the output.
        width: hidden units.
        depth: residual blocks.
        context_dim: C, or 0 for none.
        condition_width: size of what noise level and context are squeezed into; wider only costs time.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        width: int = 128,
        depth: int = 3,
        context_dim: int = 0,
        condition_width: int = 32,
    ) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.embedding = NoiseEmbedding()
        condition = 2 * self.embedding.frequencies.numel() + context_dim
        self.condition = nn.Sequential(nn.Linear(condition, condition_width), nn.SiLU())
        self.first = nn.Linear(dim, width)
        self.modulation = nn.ModuleList(nn.Linear(condition_width, 2 * width) for _ in range(depth))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, out_dim)
        self.skip = nn.Linear(condition_width, out_dim)
        for layer in (self.last, self.skip):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluate; see the head of the file for shapes."""
        features = self.embedding(c)
        if self.context_dim:
            if context is None:
                raise ValueError(f"expected a context of size {self.context_dim}, found none")
            features = torch.cat([features, context.expand(x.shape[0], -1)], -1)
        condition = self.condition(features)
        h = self.first(x)
        for modulation, hidden in zip(self.modulation, self.hidden, strict=True):
            scale, shift = modulation(condition).chunk(2, -1)
            h = h + hidden(torch.nn.functional.silu(h * (1 + scale) + shift))
        return self.last(torch.nn.functional.silu(h)) + self.skip(condition)


class Architecture(Protocol):
    """A choice of network, before the sizes are known."""

    def build(self, dim: int, out_dim: int, context_dim: int) -> nn.Module:
        """A module ``(x (B, dim), c (B,), context (B, context_dim) or None) -> (B, out_dim)``, zero at the start."""
        ...


@dataclass(frozen=True)
class MLP:
    """:class:`ResidualMLP` of this width and depth."""

    width: int = 128
    depth: int = 3

    def build(self, dim: int, out_dim: int, context_dim: int) -> nn.Module:
        """The network."""
        return ResidualMLP(dim, out_dim, width=self.width, depth=self.depth, context_dim=context_dim)
