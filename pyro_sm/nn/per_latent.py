# SPDX-License-Identifier: Apache-2.0
r"""Many small networks side by side, one for each latent, that know nothing of each other.

For latent d, with all products and ``silu`` by component,

    ``h = silu((1 + s) (a_d x_d + b_d) + t)``,   ``h ← h + W silu((1 + s') h + t')``,   ``F_d = O_d silu(h)``,

``s, t, s', t'`` from noise level and context, ``a_d, b_d`` (w,) and ``O_d`` (O/D, w) of its own, W shared. It says
all there is to say where latents are independent. A dense network of a fixed width has to hold so many functions
apart in one hidden layer, and leaks from each into all others: from some ten latents on that costs more than what the
latents have to do with each other. ``O`` starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_sm.nn.pieces import in_pieces

_NUMBERS_IN_CACHE = 2**16  # hidden numbers at a time, 256 kB in float32: several such tensors share the cache


class PerLatent(nn.Module):
    """See the head of the file.

    Args:
        dim: D, size of the input.
        out_dim: O, size of the output, a multiple of D: all latents' first numbers, then all their second ones, ….
        width: w, hidden units of each latent.
        condition_width: size of what is known of noise level and context.
    """

    def __init__(self, dim: int, out_dim: int, *, width: int, condition_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(condition_width, 2 * width)
        self.second = nn.Linear(condition_width, 2 * width)
        self.slope = nn.Parameter(torch.randn(dim, width))
        self.shift = nn.Parameter(torch.randn(dim, width))
        self.hidden = nn.Linear(width, width)
        self.last = nn.Parameter(torch.zeros(out_dim // dim, dim, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` (B, D) and ``condition`` (B, ·) or (1, ·) to (B, O)."""
        rows = max(1, _NUMBERS_IN_CACHE // self.slope.numel())
        return in_pieces(self._trunk, x, [self.first(condition), self.second(condition)], rows)

    def _trunk(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        silu = nn.functional.silu
        (scale, shift), (next_scale, next_shift) = (level[:, None].chunk(2, -1) for level in levels)
        h = silu(torch.addcmul(shift, torch.addcmul(self.shift, x[..., None], self.slope), 1 + scale))
        h = silu(h + self.hidden(silu(torch.addcmul(next_shift, h, 1 + next_scale))))
        return torch.cat([(h * last).sum(-1) for last in self.last], -1)
