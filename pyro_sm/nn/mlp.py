# SPDX-License-Identifier: Apache-2.0
r"""A residual multilayer perceptron that knows the noise level and, if there is one, a context.

``(x, c, context)``: x (B, D) scaled to unit size; c (B,) a quarter of the log noise-to-signal ratio, or (1,) where
all rows share one; context (B, C), or (C,) where all rows share one, or None; returns (B, O). The last layer starts
at zero, so the untrained network returns zero everywhere.

Beside it, for many latents, each has a small network of its own (``per_latent.py``); what comes out is the sum.

Only ``h ↦ h + W silu(h (1 + scale) + shift)`` knows the point. Where all rows share level and context, as they do in
every step of a sampler, scale and shift are one row: half of the work is saved.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" https://arxiv.org/abs/2206.00364
(the noise embedding and scaling of the input).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pyro_sm.nn.per_latent import PerLatent
from pyro_sm.nn.pieces import in_pieces

# So many rows at a time: their activations stay in the cache of a core, and calls are still few enough not to count.
_ROWS_IN_CACHE = 2048
# Each latent has a network of its own, of this width, where there are more latents than a few, which the joint
# network can tell apart. (Ten lies in a gap of the benchmark that it was chosen on: to be replaced by what a
# validation loss says.)
_FEW_LATENTS, _LATENT_WIDTH = 10, 16


class NoiseEmbedding(nn.Module):
    """Cosines and sines of ``2π f_j c`` at fixed frequencies ``f_j`` spaced from 1/8 to 4; (B,) -> (B, 2J)."""

    frequencies: Tensor

    def __init__(self, num_frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-3, 2, num_frequencies, base=2.0) * 2 * math.pi)

    def forward(self, c: Tensor) -> Tensor:
        """The embedding (B, 2J) of levels ``c`` (B,), or (1, 2J) of one for all rows."""
        angle = c[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1)


def level_features(embedding: NoiseEmbedding, c: Tensor, context: Tensor | None, context_dim: int) -> Tensor:
    """The embedded level, and the context beside it if there is to be one: (B, ·), or one row where all share both.

    Raises:
        ValueError: there is no context where one is expected.
    """
    features = embedding(c)
    if not context_dim:
        return features
    if context is None:
        raise ValueError(f"expected a context of size {context_dim}, found none")
    rows = torch.broadcast_shapes(features.shape[:1], context.shape[:-1])
    return torch.cat([features.expand(*rows, -1), context.expand(*rows, -1)], -1)


class ResidualMLP(nn.Module):
    """``depth`` residual blocks of ``width`` units; noise level and context scale and shift every block.

    Args:
        dim: D, size of the input.
        out_dim: O, size of the output.
        width: hidden units.
        depth: residual blocks.
        context_dim: C, or 0 for none.
        latent_width: hidden units of each latent's own network, or 0 to go without; then O is a multiple of D.
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
        latent_width: int = 0,
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
        self.own: PerLatent | None = None
        if latent_width:
            self.own = PerLatent(dim, out_dim, width=latent_width, condition_width=condition_width)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluate; see the head of the file for shapes."""
        features = level_features(self.embedding, c, context, self.context_dim)
        condition = self.condition(features)
        levels = [self.skip(condition), *(modulation(condition) for modulation in self.modulation)]
        joint = in_pieces(self._trunk, x, levels, _ROWS_IN_CACHE)
        return joint if self.own is None else joint + self.own(x, condition)

    def _trunk(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """What knows the point: ``x`` (B, D) to (B, O).

        ``levels``: what is added to the result (B, O), then scale and shift of each block (B, 2 width); or one row.
        """
        h = self.first(x)
        for level, hidden in zip(levels[1:], self.hidden, strict=True):
            scale, shift = level.chunk(2, -1)
            h = h + hidden(torch.nn.functional.silu(torch.addcmul(shift, h, 1 + scale)))
        return self.last(torch.nn.functional.silu(h)) + levels[0]


class Architecture(Protocol):
    """A choice of network, before the sizes are known."""

    @property
    def isotropic(self) -> bool:
        """Whether it counts on a base that is the same in all directions."""
        ...

    def build(self, dim: int, out_dim: int, context_dim: int) -> nn.Module:
        """A module ``(x (B, dim), c (B,) or (1,), context or None) -> (B, out_dim)``, zero at the start.

        ``c`` (1,) is one noise level for all rows; the context is (B, context_dim), or (context_dim,) for all rows.
        """
        ...


@dataclass(frozen=True)
class MLP:
    """:class:`ResidualMLP` of this width and depth.

    Args:
        width: hidden units.
        depth: residual blocks.
        latent_width: hidden units of each latent's own network, or 0 to go without; by default 16, and none for up to
            ten latents, which the joint network can tell apart, nor in a guide whose base mixes the latents.

    Raises:
        ValueError: ``latent_width`` is negative.
    """

    width: int = 128
    depth: int = 3
    latent_width: int | None = None

    def __post_init__(self) -> None:
        if self.latent_width is not None and self.latent_width < 0:
            raise ValueError(f"expected latent_width >= 0, found {self.latent_width}")

    @property
    def isotropic(self) -> bool:
        """No: the network treats every latent in its own way, whatever the base."""
        return False

    def build(self, dim: int, out_dim: int, context_dim: int) -> nn.Module:
        """The network for ``dim`` latents and these sizes of output and context; zero at the start."""
        own = self.latent_width
        if own is None:
            own = _LATENT_WIDTH if dim > _FEW_LATENTS else 0
        return ResidualMLP(
            dim, out_dim, width=self.width, depth=self.depth, context_dim=context_dim, latent_width=own
        )
