# SPDX-License-Identifier: Apache-2.0
r"""Densities on R^D that need no Pyro: a function and its score, counted, in batches of independent rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sm.base import Evaluations


def value_and_score(log_prob: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B,) and gradients (B, D) of a batched function of independent rows, in one backward pass."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        value = log_prob(leaf)
        (score,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), score.detach()


def without_nan(value: Tensor) -> Tensor:
    """A density that is not a number is not a place to sample from."""
    return torch.nan_to_num(value, nan=-math.inf, posinf=math.inf, neginf=-math.inf)


class FunctionDensity:
    """``log p̃`` given as a function ``(B, D) -> (B,)`` that torch can differentiate.

    NaN values are read as ``-inf``: a density that is not a number is not a place to sample from.

    Raises:
        ValueError: a batch or a result has the wrong shape.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.function = function
        self.dim = dim
        self.dtype = dtype or torch.get_default_dtype()
        self.device = torch.device(device)
        self.evaluations = Evaluations()

    def _value(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"expected latents of shape (B, {self.dim}), found {tuple(z.shape)}")
        value = self.function(z)
        if value.shape != z.shape[:1]:
            raise ValueError(f"expected log densities of shape ({z.shape[0]},), found {tuple(value.shape)}")
        return value

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p̃`` (B,) for ``z`` (B, D), nats; differentiable while grad is enabled."""
        self.evaluations.values += z.shape[0]
        value = self._value(z)
        self.evaluations.not_a_number += int(torch.isnan(value).sum())
        return without_nan(value)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p̃`` (B,) and its gradient (B, D), detached; the latter may be NaN where ``log p̃ = -inf``."""
        self.evaluations.values += z.shape[0]
        self.evaluations.scores += z.shape[0]
        value, score = value_and_score(self._value, z)
        self.evaluations.not_a_number += int(torch.isnan(value).sum())
        return without_nan(value), score
