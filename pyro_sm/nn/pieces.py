# SPDX-License-Identifier: Apache-2.0
"""A network on so many rows at a time that its activations stay in the cache of a core.

An accelerator wants all rows at once, and gets them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class InPieces(Protocol):
    """A network that knows how many rows at a time stay in the cache."""

    @property
    def rows_in_cache(self) -> int:
        """How many rows of input leave activations that stay in the cache of one core."""
        ...


def in_pieces(
    network: Callable[[Tensor, Sequence[Tensor]], Tensor], x: Tensor, levels: Sequence[Tensor], rows: int
) -> Tensor:
    """``network(x, levels)`` (B, ·) for ``x`` (B, ·), ``rows`` of them at a time; ``levels``: (B, ·) or (1, ·)."""
    if x.device.type != "cpu" or x.shape[0] <= rows:
        return network(x, levels)
    pieces = [level.split(rows) if level.shape[0] > 1 else itertools.repeat(level) for level in levels]
    return torch.cat([network(part, at) for part, *at in zip(x.split(rows), *pieces, strict=False)])
