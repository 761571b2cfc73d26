# SPDX-License-Identifier: Apache-2.0
"""Any log density as an ordinary Pyro model: an improper flat prior and a factor, as users write it."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Size, Tensor
from torch.distributions import constraints


def factor_model(log_prob: Callable[[Tensor], Tensor], dim: int) -> Callable[[], None]:
    """A Pyro model with one latent site ``x`` (dim,), flat, and ``log_prob(x)`` as its density.

    Args:
        log_prob: ``(..., dim) -> (...)``, nats.
        dim: number of latents.
    """

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, Size(), Size((dim,))))
        pyro.factor("log_prob", log_prob(x))

    return model
