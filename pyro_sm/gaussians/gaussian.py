# SPDX-License-Identifier: Apache-2.0
r"""The normal law ``N(m, L Lᵀ)``: its log density, a user's own one checked, as a density with draws, from moments.

``log N(z; m, L Lᵀ) = −½ |L⁻¹(z − m)|² − log|det L| − D/2 log 2π``, nats; ``L`` lower triangular.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.base import Density
from pyro_sm.density import FunctionDensity


class LocScale(NamedTuple):
    """``loc`` (D,) and lower-triangular ``scale_tril`` (D, D) of a Gaussian base."""

    loc: Tensor
    scale_tril: Tensor


def moments_of(z: Tensor, *, isotropic: bool = False) -> LocScale:
    """Mean and covariance of draws ``z`` (N, D), the latter drawn towards its diagonal by ``D/(D + N)``.

    ``isotropic``: one variance for all latents, and the centre of nothing but the origin: what a symmetric network
    needs of its base.
    """
    num_draws, dim = z.shape
    if isotropic:
        scale = z.double().square().mean().sqrt().to(z)
        return LocScale(torch.zeros_like(z[0]), scale * torch.eye(dim, dtype=z.dtype, device=z.device))
    wide = z.double()
    covariance = torch.atleast_2d(torch.cov(wide.T, correction=0))
    diagonal = torch.diag(covariance.diagonal().clamp(min=1e-12))
    share = dim / (dim + num_draws)
    tril = torch.linalg.cholesky((1 - share) * covariance + share * diagonal)
    return LocScale(wide.mean(0).to(z), tril.to(z))


def fits(u: Tensor) -> bool:
    """Whether a standard normal base is good enough for whitened draws ``u`` (N, D).

    It is where they are centred within 1.5 of its scales, and their own scales are between a third and twice its own
    in every direction. To move it for less would only turn the latents by the noise of the draws, and hide from the
    network which of them go together.
    """
    covariance = torch.atleast_2d(torch.cov(u.double().T, correction=0))
    variances = torch.linalg.eigvalsh(covariance)
    centred = float(u.mean(0).abs().max()) <= 1.5
    return centred and float(variances[0]) >= 1 / 9 and float(variances[-1]) <= 4


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
