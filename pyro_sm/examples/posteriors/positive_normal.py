# SPDX-License-Identifier: Apache-2.0
r"""The normal restricted to the positive axis, ``N⁺(μ, s)``: density ``N(x; μ, s) / Φ(μ/s)`` for x > 0."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Normal, constraints
from torch.distributions.utils import broadcast_all


class PositiveNormal(TorchDistribution):
    """``N⁺(loc, scale)``; reparametrised. Draws by inversion, accurate for ``loc > -5 scale`` or so in float64.

    Args:
        loc: mean of the unrestricted normal.
        scale: its standard deviation.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.positive
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> PositiveNormal:
        """The same distribution with another batch shape."""
        shape = Size(batch_shape)
        return PositiveNormal(self.loc.expand(shape), self.scale.expand(shape), validate_args=False)

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """``x = μ − s Φ⁻¹(v Φ(μ/s))``, v uniform in (0, 1)."""
        shape = self._extended_shape(Size(sample_shape))
        tiny = torch.finfo(self.loc.dtype).tiny
        v = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(min=tiny)
        standard = v * torch.special.ndtr(self.loc / self.scale)
        return (self.loc - self.scale * torch.special.ndtri(standard)).clamp(min=tiny)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats at ``value``, elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        log_mass = torch.special.log_ndtr(self.loc / self.scale)
        return Normal(self.loc, self.scale, validate_args=False).log_prob(value) - log_mass
