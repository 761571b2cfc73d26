# SPDX-License-Identifier: Apache-2.0
r"""Densities on R^D that need no Pyro: from a function, Gaussian, and tempered.

``log p̃_β = (1−β) log b + β log p̃`` is the geometric path from a base ``b`` (β=0) to the target (β=1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sm.base import Density, Evaluations


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
        self.evaluations.density += z.shape[0]
        value = self._value(z)
        self.evaluations.not_a_number += int(torch.isnan(value).sum())
        return without_nan(value)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p̃`` (B,) and its gradient (B, D), detached; the latter may be NaN where ``log p̃ = -inf``."""
        self.evaluations.density += z.shape[0]
        self.evaluations.gradient += z.shape[0]
        value, score = value_and_score(self._value, z)
        self.evaluations.not_a_number += int(torch.isnan(value).sum())
        return without_nan(value), score


def gaussian_log_prob(z: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """``log N(z; loc, L Lᵀ)``; ``z``: (..., D), ``loc``: (D,), ``scale_tril``: (D, D); returns (...)."""
    flat = (z - loc).reshape(-1, z.shape[-1])
    white = torch.linalg.solve_triangular(scale_tril, flat.T, upper=False).T.reshape(z.shape)
    log_det = scale_tril.diagonal().abs().log().sum()
    return -0.5 * white.square().sum(-1) - log_det - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def given_gaussian(loc: Tensor | float, scale: Tensor | float, density: Density) -> tuple[Tensor, Tensor]:
    """A user's Gaussian for the latents of ``density``, checked: ``loc`` (D,) and lower-triangular scale (D, D).

    Args:
        loc: (D,), or a number for all latents.
        scale: a number, (D,) standard deviations, or (D, D) lower-triangular.
        density: for D, dtype and device.

    Raises:
        ValueError: a shape does not match, a number is not finite, or the scale is no Cholesky factor.
    """
    dim = density.dim
    loc = torch.as_tensor(loc, dtype=density.dtype, device=density.device)
    scale = torch.as_tensor(scale, dtype=density.dtype, device=density.device)
    if loc.shape not in ((), (dim,)):
        raise ValueError(f"expected loc of shape () or ({dim},), found {tuple(loc.shape)}")
    if scale.shape not in ((), (dim,), (dim, dim)):
        raise ValueError(f"expected scale of shape (), ({dim},) or ({dim}, {dim}), found {tuple(scale.shape)}")
    if not bool(torch.isfinite(loc).all()):
        raise ValueError(f"expected a finite loc, found {loc.tolist()}")
    tril = scale if scale.ndim == 2 else torch.diag(scale.expand(dim))
    if not bool((tril.diagonal() > 0).all()) or not bool(torch.isfinite(tril).all()):
        raise ValueError("expected a finite scale with a positive diagonal")
    if bool((tril.triu(1) != 0).any()):
        raise ValueError(
            "expected a lower-triangular scale, found entries above the diagonal: of a covariance, pass "
            "torch.linalg.cholesky(covariance)"
        )
    return loc.expand(dim).clone(), tril.clone()


class GaussianDensity(FunctionDensity):
    """``N(loc, L Lᵀ)``, normalised. ``loc``: (D,); ``scale_tril``: (D, D)."""

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(
            lambda z: gaussian_log_prob(z, loc, scale_tril), loc.shape[0], dtype=loc.dtype, device=loc.device
        )
        self.loc = loc
        self.scale_tril = scale_tril

    def sample(self, num_draws: int) -> Tensor:
        """Exact draws, (num_draws, D)."""
        noise = torch.randn(num_draws, self.dim, dtype=self.dtype, device=self.device)
        return self.loc + noise @ self.scale_tril.T


class TemperedDensity(FunctionDensity):
    """``(1−β) log b(z) + β log p̃(z)``; evaluations are counted on the two densities themselves too."""

    def __init__(self, base: Density, target: Density, beta: float) -> None:
        if base.dim != target.dim:
            raise ValueError(f"expected a base of dimension {target.dim}, found {base.dim}")
        super().__init__(self._mix, target.dim, dtype=target.dtype, device=target.device)
        self.base = base
        self.target = target
        self.beta = beta

    def _mix(self, z: Tensor) -> Tensor:
        return (1 - self.beta) * self.base.log_prob(z) + self.beta * self.target.log_prob(z)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p̃_β`` (B,) and its gradient (B, D), detached; from the two densities' own scores."""
        self.evaluations.density += z.shape[0]
        self.evaluations.gradient += z.shape[0]
        base, base_score = self.base.log_prob_and_score(z)
        target, target_score = self.target.log_prob_and_score(z)
        value = (1 - self.beta) * base + self.beta * target
        score = (1 - self.beta) * base_score + self.beta * target_score
        return without_nan(value), score
