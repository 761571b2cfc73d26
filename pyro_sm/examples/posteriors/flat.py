# SPDX-License-Identifier: Apache-2.0
"""Improper flat priors as sample statements: density one on their support."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Size, Tensor
from torch.distributions import constraints


def flat_vector(name: str, dim: int, support: constraints.Constraint = constraints.real_vector) -> Tensor:
    """A latent site of event shape (dim,), flat on ``support``, a set of vectors."""
    return pyro.sample(name, dist.ImproperUniform(support, Size(), Size((dim,))))


def flat_scalar(name: str, support: constraints.Constraint = constraints.real) -> Tensor:
    """A scalar latent site, flat on ``support``."""
    return pyro.sample(name, dist.ImproperUniform(support, Size(), Size()))
