# SPDX-License-Identifier: Apache-2.0
r"""A diffusion as a Pyro distribution, and its probability flow as a transform.

A draw made by :meth:`DiffusionPosterior.rsample` remembers its path: ``log_prob`` of *that very tensor* is
``−R``, the path log density, whose importance weight is unbiased for Z. For any other tensor ``log_prob`` is the
marginal log density by the probability flow. The two differ for one draw, and agree in what they estimate.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Transform, constraints

from pyro_sm.diffusion.diffusion import Diffusion


class DiffusionPosterior(TorchDistribution):
    """Distribution of a packed latent (D,); ``event_dim`` 1, any sample and batch shape, reparametrised.

    Args:
        diffusion: the sampler.
        batch_shape: independent copies (set by :meth:`expand`).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    has_rsample = True

    def __init__(self, diffusion: Diffusion, batch_shape: Size = torch.Size()) -> None:  # noqa: B008
        self.diffusion = diffusion
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(Size(batch_shape), Size((diffusion.dim,)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiffusionPosterior:
        """Independent copies over ``batch_shape``."""
        return DiffusionPosterior(self.diffusion, Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape ``sample_shape + batch_shape + (D,)``, differentiable in all parameters."""
        shape = Size(sample_shape) + self.batch_shape
        z, log_ratio = self.diffusion.draw(shape.numel())
        z, log_ratio = z.reshape(*shape, self.diffusion.dim), log_ratio.reshape(shape)
        self._last = (z, -log_ratio)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Path log density of the last draw, or the flow's log density of any other value; nats."""
        if self._last is not None and value is self._last[0]:
            return self._last[1]
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        return self.diffusion.log_prob(value.reshape(-1, self.diffusion.dim)).reshape(value.shape[:-1])


class FlowTransform(Transform):
    """The probability flow as a bijection from its Gaussian start to latent space."""

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__(cache_size=1)
        self.diffusion = diffusion
        self._log_det: tuple[Tensor, Tensor] | None = None

    def _call(self, x: Tensor) -> Tensor:
        u, log_det = self.diffusion.flow().from_noise(x.reshape(-1, self.diffusion.dim))
        z = self.diffusion.to_latent(u).reshape(x.shape)
        self._log_det = (z, (log_det + self.diffusion.log_det(u)).reshape(x.shape[:-1]))
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        u = self.diffusion.to_white(y.reshape(-1, self.diffusion.dim))
        x, log_det = self.diffusion.flow().to_noise(u)
        self._log_det = (y, (self.diffusion.log_det(u) - log_det).reshape(y.shape[:-1]))
        return x.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det ∂z/∂x|`` for ``x`` (..., D) and its image ``y``; returns (...)."""
        if self._log_det is None or self._log_det[0] is not y:
            y = self._call(x)
        held = self._log_det
        return held[1] if held is not None else torch.zeros(x.shape[:-1])

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """This transform; it always caches its last value."""
        return self
