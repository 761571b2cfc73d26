# SPDX-License-Identifier: Apache-2.0
r"""Gaussian bases ``N(m, L Lᵀ)``: where a diffusion guide starts, and what whitens its latent space.

The untrained guide is its base exactly. A base that covers every mode (the prior) lets weighting find them; a base
that fits one bump (Laplace, Batch-and-Match) makes unimodal posteriors quick.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_sm.base import Density, PyroSMWarning
from pyro_sm.gaussians.batch_and_match import Gaussian, LowRankGaussian, batch_and_match, match_to_rest, start_at_mode
from pyro_sm.gaussians.gaussian import LocScale, given_gaussian
from pyro_sm.gaussians.laplace import laplace
from pyro_sm.guides.gaussian_fit import check_latents, guide_gaussian, latent_sizes
from pyro_sm.model.density import ModelDensity

# Latents up to which Batch-and-Match keeps a full covariance from the start: an update costs several D³ (a
# factorisation of 200 takes four milliseconds), and 150 · 32 scores of D numbers are 48 for each of its D²/2 at 200.
_FULL = 200
_MATCHED = 128  # draws, at least, that it is matched to in the end: the ELBO of a batch is known to .09 of the spread


class Base(Protocol):
    """A way to choose the Gaussian base for a density."""

    def fit(self, density: ModelDensity) -> LocScale:
        """The base for ``density``; may evaluate it (evaluations are counted on it)."""
        ...


@dataclass(frozen=True)
class PriorBase:
    """Robust moments of prior draws: per latent, the median and 1.4826 × the median absolute deviation.

    Sites with an improper prior have no draws; they get mean 0 and ``improper_scale`` in unconstrained units, with
    a warning, because whether that covers the posterior is for the user to know.

    Args:
        num_draws: prior draws; no density evaluations. Of 4000 the median is known to .02 widths.
        inflate: factor on the scale.
        improper_scale: scale of latents whose prior is improper: ten times that of one of unit size, and a guess.
    """

    num_draws: int = 4000
    inflate: float = 1.0
    improper_scale: float = 10.0

    def fit(self, density: ModelDensity) -> LocScale:
        """Median and scaled median absolute deviation of the prior, as a diagonal base."""
        draws = density.prior_draws(self.num_draws)
        loc = draws.median(0).values
        scale = 1.4826 * (draws - loc).abs().median(0).values * self.inflate
        for site in density.sites:
            if site.name in density.improper:
                warnings.warn(
                    f"site '{site.name}' has an improper prior, so PriorBase cannot know where the posterior lies: "
                    f"using N(0, {self.improper_scale}^2) in unconstrained space. If that does not cover every mode, "
                    "give a base: AutoDiffusion(model, base=GivenBase(loc, scale))",
                    PyroSMWarning,
                    stacklevel=2,
                )
                loc[site.start : site.stop] = 0.0
                scale[site.start : site.stop] = self.improper_scale
        return LocScale(loc, torch.diag(scale.clamp(min=1e-6)))


@dataclass(frozen=True)
class GivenBase:
    """A base chosen by the user, in unconstrained space.

    Args:
        loc: (D,) or a number for all latents.
        scale: a number, (D,) standard deviations, or (D, D) lower-triangular.

    Raises:
        ValueError: on :meth:`fit`, if the shapes do not match the model, a number is not finite, a scale is not
            positive or a matrix not lower-triangular.
    """

    loc: Tensor | float
    scale: Tensor | float

    def fit(self, density: ModelDensity) -> LocScale:
        """Check the shapes against the model and return the base."""
        return LocScale(*given_gaussian(self.loc, self.scale, density))


def _finite_start(density: Density, draws: Tensor) -> Tensor:
    """The draw with the highest density, (D,)."""
    log_p = density.log_prob(draws)
    if not bool(torch.isfinite(log_p).any()):
        raise ValueError(f"the density is not finite at any of {draws.shape[0]} prior draws: give a GivenBase")
    return draws[log_p.argmax()]


@dataclass(frozen=True)
class LaplaceBase:
    """Mode and curvature: ``N(z*, (−∇² log p̃(z*))⁻¹)``.

    The mode is sought by L-BFGS from the best of ``num_starts`` prior draws. Directions in which the curvature is
    not negative get the standard deviation ``max_scale``, with a warning.

    Args:
        num_starts: prior draws tried as a start.
        max_iterations: of L-BFGS.
        max_scale: largest standard deviation along an eigenvector of the Hessian.
        inflate: factor on the scale.
    """

    num_starts: int = 256
    max_iterations: int = 200
    max_scale: float = 10.0
    inflate: float = 1.0

    def fit(self, density: ModelDensity) -> LocScale:
        """Find the mode and its curvature.

        Raises:
            ValueError: there is no mode, or none with a curvature that the numbers can hold.
        """
        start = _finite_start(density, density.prior_draws(self.num_starts))
        found = laplace(density, start, max_iterations=self.max_iterations, max_scale=self.max_scale)
        flat = found.num_flat
        if flat:
            warnings.warn(
                f"the density is flat or convex in {flat} of {density.dim} directions at its mode: LaplaceBase uses "
                f"the scale {self.max_scale} there",
                PyroSMWarning,
                stacklevel=2,
            )
        tril, failed = torch.linalg.cholesky_ex(found.covariance)
        if int(failed):
            raise ValueError(
                "the widths at the mode differ by more than the numbers can hold: the density seems to rise without "
                "end, as in the neck of a funnel. Use PriorBase() or a GivenBase, or reparametrise the model"
            )
        return LocScale(found.loc, (tril * self.inflate).to(density.dtype))


@dataclass(frozen=True)
class BatchAndMatchBase:
    """The Gaussian that Batch-and-Match finds, from the prior's robust moments or the mode next to them.

    With a ``rank``, its covariance is a diagonal plus a matrix of that rank (batch, match and patch), found at a cost
    linear in the number of latents. Without, small batches are a start only (of low rank beyond 200 latents): what
    they find is then matched to ``4D`` scores at a time, again and again, until its evidence lower bound is at rest.
    What is left between it and a posterior with hundreds of latents can be as little as a nat.

    Args:
        num_batches: updates.
        batch_size: scores per update.
        inflate: factor on the scale; a base a little too wide is safer than one too narrow. By default
            ``1 + 0.2 min(1, 10/D)``: what is safe costs nats in every dimension, log 1.2 = .18 each in up to ten, and
            no more than two in all beyond. (That ten lies in the gap of the benchmark that it was chosen on: to be
            replaced by what the fit leaves.)
        rank: K of the low-rank form; by default a full covariance.

    Raises:
        ValueError: ``rank`` < 1; on :meth:`fit`, if the density is not finite near the prior's moments.

    Sources: "Batch and match: black-box variational inference with a score-based divergence"
    https://arxiv.org/abs/2402.14758 ; "Batch, match, and patch: low-rank approximations for score-based variational
    inference" https://arxiv.org/abs/2410.22292 .
    """

    num_batches: int = 150
    batch_size: int = 32
    inflate: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"expected rank >= 1, found {self.rank}")

    def fit(self, density: ModelDensity) -> LocScale:
        """Run the updates on the density."""
        prior = PriorBase().fit(density)
        variance = prior.scale_tril.diagonal().square()
        rank = self.rank or (round(math.sqrt(density.dim)) if density.dim > _FULL else None)
        start: Gaussian | LowRankGaussian
        if rank is None:
            start = start_at_mode(density, Gaussian(prior.loc, torch.diag(variance)), batch_size=self.batch_size)
        else:
            start = LowRankGaussian(prior.loc, variance, variance.new_zeros(density.dim, rank))
        fitted = batch_and_match(density, start, num_batches=self.num_batches, batch_size=self.batch_size)
        found = Gaussian(fitted.gaussian.loc, fitted.gaussian.covariance)
        if self.rank is None:
            found = match_to_rest(density, found, batch_size=max(4 * density.dim, _MATCHED))
        tril = torch.linalg.cholesky(found.covariance)
        if not math.isfinite(float(tril.sum())):
            raise ValueError("Batch-and-Match diverged: use PriorBase() or a GivenBase")
        inflate = 1 + 0.2 * min(1.0, 10 / density.dim) if self.inflate is None else self.inflate
        return LocScale(found.loc.to(density.dtype), (tril * inflate).to(density.dtype))


class GuideBase:
    """The Gaussian that a fitted guide of Pyro's is: ``N(μ, inflate² Σ)`` over the packed unconstrained latents.

    The way to a hundred latents and more, where a Gaussian with correlations is needed and hard to reach from the
    prior or a mode: an ELBO brings a low-rank guide near, matching scores sharpens it, the diffusion goes on::

        guide = AutoLowRankMultivariateNormal(model, rank=10)
        svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(2000):
            svi.step(data)
        BatchAndMatch().fit(guide, data)  # again, until the `fisher` that it returns is at rest far below D
        sampler = DiffusionSampler(model, base=GuideBase(guide))

    With ``AutoLowRankMultivariateNormal``, ``Σ = diag(s) (I + FFᵀ) diag(s)``, ``F`` (D, rank). The guide is read when
    the base is made; what happens to it, or to the param store, later does not matter. Like every single Gaussian it
    covers one of several separated modes.

    Args:
        guide: AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, or what
            ``laplace_approximation()`` of an AutoLaplaceApproximation returns; it must have been called.
        inflate: factor on the scale; above 1 for a guide fitted by an ELBO alone, which comes out too narrow.

    Raises:
        TypeError: the guide is not Gaussian over the packed latents.
        ValueError: it has never been called, its numbers are not finite, or ``inflate`` is not positive; on
            :meth:`fit`, if guide and model have different latents.

    Sources: "Gaussian variational approximation with a factor covariance structure"
    https://arxiv.org/abs/1701.03208 ; "Batch, match, and patch: low-rank approximations for score-based variational
    inference" https://arxiv.org/abs/2410.22292 .
    """

    def __init__(self, guide: Any, *, inflate: float = 1.0) -> None:
        if not 0 < inflate < math.inf:
            raise ValueError(f"expected inflate > 0 and finite, found {inflate}")
        gaussian = guide_gaussian(guide)
        tril, failed = torch.linalg.cholesky_ex(gaussian.covariance)
        if int(failed) or not bool(torch.isfinite(gaussian.loc).all() and torch.isfinite(tril).all()):
            raise ValueError(
                f"the location or covariance of this {type(guide).__name__} is not finite or not positive definite: "
                "its fit has diverged"
            )
        self.kind = type(guide).__name__
        self.sizes: dict[str, int] = latent_sizes(guide)
        self.inflate = inflate
        self.gaussian = LocScale(gaussian.loc, tril)

    def __repr__(self) -> str:
        return f"GuideBase({self.kind} of {len(self.gaussian.loc)} latents, inflate={self.inflate})"

    def fit(self, density: ModelDensity) -> LocScale:
        """Check the latents against the model and return the base; no evaluations."""
        check_latents(self.kind, self.sizes, density)
        loc, scale_tril = (x.to(density.device, density.dtype) for x in self.gaussian)
        return LocScale(loc, scale_tril * self.inflate)
