# SPDX-License-Identifier: Apache-2.0
r"""The two weightings of importance-weighted score matching: pure estimators, one value per row, noise as argument.

Both train a denoiser on noised points ``y = u + r ε`` in whitened space; both aim at ``∇ log p_r`` of the *target*,
although no draw of the target exists.

* :class:`PathWeights` — the clean points are draws ``u_i`` of the sampler, picked in proportion to their damped path
  weight; the target is the clean point itself (denoising), moved by a control variate made of the density's score
  there (``target_score.py``). One density and gradient per draw, none per step.
* :class:`MarginalWeights` — the paper's form. With inner draws ``u_k = y + r ε_k``, k = 1..K,

      ``log p̂ = logsumexp_k log p̃(u_k) − log K``,   ``Ŝ = Σ_k softmax_k(log p̃(u_k)) ∇ log p̃(u_k)``,

  from the *same* draws, and ``p̂^B`` the noised buffer with its covering component: the row's weight is
  ``w = p̂/p̂^B``, self-normalised over the batch, and the loss ``Σ w̄ λ ‖s − Ŝ‖²``. Because numerator and score
  share their draws, ``E[w Ŝ | y]/E[w | y] = ∇p_r/p_r`` exactly: the weight removes the ratio bias of Ŝ.

Source: "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
https://arxiv.org/abs/2505.19431 ; with ``w = 1`` the second form is "Iterated Denoising Energy Matching"
https://arxiv.org/abs/2402.06121 .
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sm.base import Density, DiffusionProcess
from pyro_sm.diffusion.covering import Covering, WideCovering, default_covering
from pyro_sm.objectives.importance_weighted.buffer import Buffer
from pyro_sm.objectives.importance_weighted.target_score import fisher_information, score_shift

# The variance head learns from the same residuals; half weight keeps the mean, which matters more, in front.
_VARIANCE_WEIGHT = 0.5


class StepNoise(NamedTuple):
    """All randomness of one optimiser step, drawn before anything else happens.

    ``pick``: (B,) uniforms that choose clean points. ``level``: (B,) log-uniform noise ratios.
    ``noise``: (B, D) standard normal. ``inner``: (K, B, D) standard normal, K = 0 unless the weighting wants it.
    """

    pick: Tensor
    level: Tensor
    noise: Tensor
    inner: Tensor


class Weighting(Protocol):
    """How one optimiser step makes a loss of the buffer."""

    @property
    def num_inner(self) -> int:
        """K, inner density evaluations per row and step."""
        ...

    @property
    def needs_score(self) -> bool:
        """Whether a round's draws need the density's score as well."""
        ...

    def default_covering(self, density: Density) -> Covering:
        """The covering component to use if none is given."""
        ...

    def loss(
        self,
        process: DiffusionProcess,
        density: Density,
        covering: Covering,
        buffer: Buffer,
        step: StepNoise,
    ) -> Tensor:
        """Loss per row (B,); the objective takes the mean."""
        ...


def draw_step_noise(ratios: Tensor, batch_size: int, dim: int, num_inner: int) -> StepNoise:
    """Stratified picks and levels (each of B equal strata once, in independent order), and Gaussian noise."""

    def stratified() -> Tensor:
        order = torch.randperm(batch_size, device=ratios.device)
        return (order + torch.rand_like(order, dtype=ratios.dtype)) / batch_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=ratios.dtype, device=ratios.device)

    low, high = ratios[1].log(), ratios[-1].log()
    return StepNoise(
        stratified(),
        torch.exp(low + (high - low) * stratified()),
        normal(batch_size, dim),
        normal(num_inner, batch_size, dim),
    )


class TargetScore(NamedTuple):
    """What is known of the law of the clean points: its whitened ``score`` (B, D) at each of them, and its Fisher
    ``information`` (D,)."""

    score: Tensor
    information: Tensor


def denoising_loss(
    process: DiffusionProcess, u: Tensor, r: Tensor, noise: Tensor, known: TargetScore | None = None
) -> Tensor:
    """Regression loss per row (B,), less that of an untrained network on the very same row.

    ``mean_d [e² − F*² + ½ · ½(h + ê² exp(−h) − F̂²)]`` against clean points ``u`` (B, D), which the score, if it is
    known, makes into a better estimate of the mean; ``ê`` and ``F̂``, in the term of the variance, are ``e`` and
    ``F*`` of the clean points themselves, and fixed. What is subtracted does not depend on the network: gradients are
    those of the plain loss, but the number is 0 for an untrained guide, negative once it has learned something, and
    free of most of the noise.
    """
    error, log_variance, target = process.regression(u, u + r[:, None] * noise, r)
    residual = error.detach().square()
    variance_term = 0.5 * (log_variance + residual * torch.exp(-log_variance) - target.square())
    if known is not None:
        shift = score_shift(known.score, r, noise, known.information, log_variance.detach())
        moved = shift * torch.sqrt(1 + r[:, None].square()) / r[:, None]
        error, target = error - moved, target + moved
    return (error.square() - target.square() + _VARIANCE_WEIGHT * variance_term).mean(-1)


class TrainingPoints(NamedTuple):
    """What denoising needs of a buffer: training ``weight`` (M,) and whitened latents ``u`` (M, D).

    ``score``: (M, D), whitened; ``information``: (D,), of the law of ``u``; both None where they are not wanted, or
    no score is known.
    """

    weight: Tensor
    u: Tensor
    score: Tensor | None
    information: Tensor | None


def training_points(process: DiffusionProcess, buffer: Buffer, *, with_score: bool) -> TrainingPoints:
    """All that does not change from step to step; made at every call, at a cost of ``O(M D²)``."""
    weight, u = buffer.weights(), process.to_white(buffer.latents())
    score = process.white_score(u, buffer.scores()) if with_score else None
    information = None if score is None else fisher_information(score, weight)
    return TrainingPoints(weight, u, None if information is None else score, information)


@dataclass(frozen=True)
class PathWeights:
    """Denoising score matching on draws picked by their damped path weights ``w^γ`` (the default).

    The density's score takes the noise out of the regression target (``target_score.py``). While
    weights are damped, the draws' law is not yet the density's, and its score points ahead of them: to where the next
    rounds will be.

    Args:
        target_score: whether to use it; without, a round costs densities and no gradients.
    """

    target_score: bool = True

    @property
    def num_inner(self) -> int:
        """None: the density is evaluated once per draw, not per step."""
        return 0

    @property
    def needs_score(self) -> bool:
        """As was asked for."""
        return self.target_score

    def default_covering(self, density: Density) -> Covering:
        """The prior where the model has one, else the widened base."""
        return default_covering(density)

    def loss(
        self,
        process: DiffusionProcess,
        density: Density,
        covering: Covering,
        buffer: Buffer,
        step: StepNoise,
    ) -> Tensor:
        """Denoising loss of rows picked by weight."""
        # Without grad: a base wider than the draws would lower the loss and teach the network nothing.
        with torch.no_grad():
            # A base is known by where it puts two latents; another objective may have moved it.
            base = process.to_white(buffer.rounds[-1].draws.z[:2]).flatten().tolist()
            made = buffer.once(
                (self.target_score, *base), lambda: training_points(process, buffer, with_score=self.target_score)
            )
            index = buffer.pick(made.weight, step.pick)
            u, known = made.u[index], None
            if made.score is not None and made.information is not None:
                known = TargetScore(made.score[index], made.information)
        return denoising_loss(process, u, step.level, step.noise, known)


class MarginalEstimate(NamedTuple):
    """``log_p``: (B,) ``log p̂_r(y)``. ``score``: (B, D) ``Ŝ``, from the same inner draws."""

    log_p: Tensor
    score: Tensor


def marginal_estimate(
    process: DiffusionProcess, density: Density, y: Tensor, r: Tensor, inner: Tensor
) -> MarginalEstimate:
    """Noised density and score at ``y`` (B, D) by K inner draws; ``inner``: (K, B, D), ``r``: (B,); whitened.

    ``K · B`` density and gradient evaluations. An inner draw whose density or score is no finite number counts as
    impossible; a row that has only such gets ``log_p = −inf`` and a zero score, and with it no weight.
    """
    num_inner, batch, dim = inner.shape
    points = (y + r[:, None] * inner).reshape(-1, dim)
    log_p, score = density.log_prob_and_score(process.to_latent(points))
    log_p = (log_p + process.log_det(points)).reshape(num_inner, batch)
    score = process.white_score(points, score).reshape(num_inner, batch, dim)
    possible = torch.isfinite(log_p) & torch.isfinite(score).all(-1)
    log_p, score = torch.where(possible, log_p, -math.inf), torch.where(possible[..., None], score, 0.0)
    share = torch.nan_to_num(torch.softmax(log_p, 0))
    return MarginalEstimate(torch.logsumexp(log_p, 0) - math.log(num_inner), (share[..., None] * score).sum(0))


def noised_buffer_log_prob(y: Tensor, r: Tensor, u: Tensor, covering: WideCovering) -> Tensor:
    """``log p̂^B_r(y)`` (B,): kernels on the guide's own draws ``u`` (M, D), plus the covering component noised.

    No model evaluations. ``(1−ρ) (1/M) Σ_j N(y; u_j, r²) + ρ N(y; 0, scale² + r²)``, whitened.
    """
    dim = y.shape[-1]
    # By matrix products, float32 distances below 1e-3 of the norms would be lost, and r is as small as that.
    distance = torch.cdist(y, u, compute_mode="donot_use_mm_for_euclid_dist").square()
    kernel = -0.5 * (distance / r[:, None].square() + dim * torch.log(2 * math.pi * r[:, None].square()))
    own = torch.logsumexp(kernel, 1) - math.log(u.shape[0])
    if covering.share == 0:
        return own
    noised = covering.log_prob_white(y, r.square())
    return torch.logaddexp(math.log1p(-covering.share) + own, math.log(covering.share) + noised)


@dataclass(frozen=True)
class MarginalWeights:
    """The paper's form: self-normalised marginal weights and a score target from the same inner draws.

    Neither ``w`` nor ``Ŝ`` is clipped: clipping would bring the bias back that the shared draws remove.

    Args:
        num_inner: K, inner draws per row; each costs one density and one gradient evaluation per step.
        max_kernels: the noised buffer is represented by at most this many of its draws.

    Raises:
        ValueError: a count that is not positive.
    """

    num_inner: int = 16
    max_kernels: int = 4096

    def __post_init__(self) -> None:
        if self.num_inner < 1 or self.max_kernels < 1:
            raise ValueError(f"expected positive counts, found {self.num_inner} and {self.max_kernels}")

    @property
    def needs_score(self) -> bool:
        """No: the inner draws have theirs."""
        return False

    def default_covering(self, density: Density) -> Covering:
        """The widened base: its noised density is known, the prior's is not."""
        return WideCovering()

    def loss(
        self,
        process: DiffusionProcess,
        density: Density,
        covering: Covering,
        buffer: Buffer,
        step: StepNoise,
    ) -> Tensor:
        """``B w̄ λ (‖s − Ŝ‖² − ‖s_0 − Ŝ‖²)/D`` per row, ``λ = r²``, ``s_0`` the untrained score; ``w̄`` sums to 1.

        The clean points are the buffer's draws alike, whatever their path weight. The variance head has no target
        in this form and is held near zero; the fitted variance factors do its work.
        """
        if not isinstance(covering, WideCovering):
            raise TypeError(f"expected a WideCovering, whose noised density is known, found {covering!r}")
        own = torch.cat([r.draws.z[: r.num_guide] for r in buffer.rounds])
        with torch.no_grad():
            latents = buffer.latents()
            u = process.to_white(latents[buffer.pick(torch.ones_like(latents[:, 0]), step.pick)])
            y = u + step.level[:, None] * step.noise
            estimate = marginal_estimate(process, density, y, step.level, step.inner)
            stride = -(-own.shape[0] // self.max_kernels)
            log_buffer = noised_buffer_log_prob(y, step.level, process.to_white(own[::stride]), covering)
            log_weight = estimate.log_p - log_buffer
            if not bool(torch.isfinite(log_weight).any()):
                raise ValueError("no inner draw has a finite density: the base lies outside the model's support")
            weight = torch.softmax(log_weight, 0) * log_weight.shape[0]
            square_ratio = step.level.square()[:, None]
            target = y + square_ratio * estimate.score
            # In the neck of a funnel a score of 10²⁰ is nothing unusual, and its row's weight next to nothing.
            seen = torch.isfinite(target).all(-1) & (weight > 0)
            target, weight = torch.where(seen[:, None], target, y), torch.where(seen, weight, 0.0)
            root = weight.sqrt()[:, None]
        error, log_variance, start = process.regression(target, y, step.level)
        # The denoiser's error is F − F* = r √(1+r²) (s − Ŝ); its square may overflow where w times it does not.
        square = ((root * error).square() - (root * start).square()) / (1 + square_ratio)
        return square.mean(-1) + 1e-2 * log_variance.square().mean(-1)
