# SPDX-License-Identifier: Apache-2.0
r"""Estimators of a score from data: explicit, implicit, denoising and diffusion score matching.

Rows ``x`` (B, D) of data with density ``p``; a model's score ``s`` (B, D), nats per unit of x; ``y = x + σ ε`` with
``ε ~ N(0, I)``, of density ``p_σ``. Every function here takes its noise as an argument and returns one value per
row, (B,), all with the factor ½:

    J_ESM = ½ E‖s − ∇log p‖²                       explicit
    J_ISM = E[½ ‖s‖² + tr ∇s]                      implicit              J_ESM = J_ISM + ½ I(p)
    J_DSM = ½ E‖s(y) + ε/σ‖²                       denoising             J_DSM = J_ISM^σ + D/(2σ²)
    J_m   = E[½ ‖mᵀ s‖² + ∇·(m mᵀ s)]              diffusion matrix m(x) J_m = ½ E‖mᵀ(s − ∇log p)‖² + const

with ``I(p) = E‖∇log p‖²`` and ``J^σ`` the loss on the noised data ``y``. (The diffusion form is half of that in
the source, so that ``m = I`` gives the implicit one.) *One scale*: what is comparable between all of them is
``J_ESM = J_ISM + ½ I`` (``EnergyObjective.explicit_loss``); it is zero at the truth.

A flow ``y = T(x)`` with Jacobian ``J`` is the diffusion matrix ``m = J⁻¹``: ``J_m`` in x is ``J_ESM`` in y
(``diffusion_matrices.py``).

Sources: "Estimation of Non-Normalized Statistical Models by Score Matching"
https://jmlr.org/papers/v6/hyvarinen05a.html ; "A Connection Between Score Matching and Denoising Autoencoders"
https://doi.org/10.1162/NECO_a_00142 ; "Sliced Score Matching: A Scalable Approach to Density and Score Estimation"
https://arxiv.org/abs/1905.07088 ; "Interpreting diffusion score matching using normalizing flow"
https://arxiv.org/abs/2107.10072 ; "Minimum Stein Discrepancy Estimators" https://arxiv.org/abs/1906.08283 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.divergence import quadratic_forms
from pyro_sm.objectives.diffusion_matrices import Matrix

LogProb = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------------ derivatives


def live_score(log_prob: LogProb, x: Tensor) -> Tensor:
    """``∇_x log p̃`` (B, D) with its graph, in ``x`` and in the parameters; ``log_prob``: (B, D) -> (B,).

    ``x`` must require grad. Works under ``torch.no_grad()``.
    """
    with torch.enable_grad():
        value = log_prob(x)
        if not value.requires_grad:
            return torch.zeros_like(x)
        (score,) = torch.autograd.grad(value.sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if score is None else score


def score_and_forms(
    log_prob: LogProb, x: Tensor, probes: Tensor, *, create_graph: bool = True
) -> tuple[Tensor, Tensor]:
    """``s`` (B, D) and ``vᵀ ∇s v`` (P, B) for ``probes`` (P, B, D), differentiable in the parameters."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        score = live_score(log_prob, leaf)
        return score, quadratic_forms(score, leaf, probes, create_graph=create_graph)


class Weighted(NamedTuple):
    """``mᵀ s`` (B, D), and the quadratic forms (P, B) of the Jacobian of ``m mᵀ s``."""

    score: Tensor
    forms: Tensor


def weighted_score_and_forms(
    log_prob: LogProb, matrix: Matrix, x: Tensor, probes: Tensor, *, create_graph: bool = True
) -> Weighted:
    """What :func:`diffusion_implicit` needs, for ``probes`` (P, B, D)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        score = live_score(log_prob, leaf)
        m = matrix(leaf)
        weighted = (m.mT @ score[..., None]).squeeze(-1)
        field = (m @ weighted[..., None]).squeeze(-1)
        return Weighted(weighted, quadratic_forms(field, leaf, probes, create_graph=create_graph))


def score_jumps(log_prob: LogProb, x: Tensor, *, halvings: int = 16) -> bool:
    """Whether the score is discontinuous somewhere between neighbouring rows of ``x`` (B, D).

    ReLU-like activations hide the curvature of an energy in kinks that autograd does not see: losses with ``tr ∇s``
    then lack the term that holds ``‖s‖²`` in balance. Every segment between neighbouring rows is halved towards
    the part whose score changes by more than ``H(a)(b − a)`` explains; at a kink the change remains.
    """
    if len(x) < 2:
        return False

    def score_and_product(at: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = at.detach().requires_grad_(True)
            score = live_score(log_prob, leaf)
            product = None
            if score.requires_grad:
                (product,) = torch.autograd.grad((score * v).sum(), leaf, allow_unused=True)
        return score.detach(), torch.zeros_like(at) if product is None else product

    low, high = x[:-1].detach(), x[1:].detach()
    step = high - low
    length = step.norm(dim=1)
    # Between outliers of heavy-tailed data a segment is long, and a smooth score still bends after 16 halvings.
    halvings += math.ceil(math.log2(max(1.0, float(length.max() / length.median().clamp(min=1e-30)))))
    score_low, slope_low = score_and_product(low, step)
    score_high, _ = score_and_product(high, step)
    scale = torch.maximum(score_low.abs(), score_high.abs()).max()
    for halving in range(halvings):
        middle = (low + high) / 2
        score_middle, slope_middle = score_and_product(middle, step)
        share = 0.5 ** (halving + 1)
        left = (score_middle - score_low - share * slope_low).square().sum(1)
        right = (score_high - score_middle - share * slope_middle).square().sum(1)
        take = (right > left)[:, None]
        low, score_low = torch.where(take, middle, low), torch.where(take, score_middle, score_low)
        slope_low = torch.where(take, slope_middle, slope_low)
        high, score_high = torch.where(take, high, middle), torch.where(take, score_high, score_middle)
    rest = score_high - score_low - 0.5**halvings * slope_low
    return bool((rest.abs() > 1e-3 * scale).any())


# ------------------------------------------------------------------------------------------------- estimators


def explicit(score: Tensor, target: Tensor) -> Tensor:
    """``½ ‖s − ∇log p‖²``; both (B, D)."""
    return 0.5 * (score - target).square().sum(-1)


def implicit(score: Tensor, trace: Tensor) -> Tensor:
    """``½ ‖s‖² + tr ∇s``; ``score``: (B, D), ``trace``: (B,), exact or estimated. Mean: ``J_ISM``."""
    return 0.5 * score.square().sum(-1) + trace


def denoising(score: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """``½ ‖s(y) + ε/σ‖²``; ``score`` at ``y = x + σε``, ``noise`` ε, both (B, D). Mean: ``J_DSM``."""
    return 0.5 * (score + noise / sigma).square().sum(-1)


def denoising_centred(score: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """:func:`denoising` less ``‖ε‖²/(2σ²)``, which no model can change. Mean: ``J_DSM − D/(2σ²) = J_ISM^σ``."""
    return 0.5 * score.square().sum(-1) + (score * noise).sum(-1) / sigma


def denoising_controlled(score: Tensor, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """:func:`denoising_centred` less the control variate ``s(x)·ε/σ``, whose mean is zero.

    ``score``: s(y), ``clean``: s(x), both (B, D). Mean: ``J_ISM^σ``. The spread stays finite as σ → 0.
    """
    return 0.5 * score.square().sum(-1) + ((score - clean) * noise).sum(-1) / sigma


def diffusion_implicit(weighted: Tensor, trace: Tensor) -> Tensor:
    """``½ ‖mᵀs‖² + ∇·(m mᵀ s)``; ``weighted``: mᵀs (B, D), ``trace``: (B,). With ``m = I`` :func:`implicit`."""
    return 0.5 * weighted.square().sum(-1) + trace


# -------------------------------------------------------------------------------------------------- one scale


def denoising_constant(dim: int, sigma: float) -> float:
    """``D/(2σ²) = J_DSM − J_ISM^σ``."""
    return dim / (2 * sigma**2)


def gaussian_information(covariance: Tensor, sigma: float = 0.0) -> Tensor:
    """``I(p_σ) = tr (Σ + σ²I)⁻¹`` for Gaussian data, exact; ``covariance``: (D, D)."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.inv(covariance + sigma**2 * eye).diagonal().sum()


def noised_data_score(data: Tensor, y: Tensor, sigma: float, *, leave_out: Tensor | None = None) -> Tensor:
    """Score (B, D) at ``y`` (B, D) of the data's own mixture ``p̂_σ = (1/N) Σ N(x_i, σ²I)``; ``data``: (N, D).

    ``leave_out``: (B,) the index of the one row that each ``y`` must not use.
    """
    logits = -0.5 * (torch.cdist(y, data, compute_mode="donot_use_mm_for_euclid_dist") / sigma).square()
    if leave_out is not None:
        logits = logits.scatter(1, leave_out[:, None], -math.inf)
    return (torch.softmax(logits, 1) @ data - y) / sigma**2


def estimated_information(
    data: Tensor, sigma: float, index: Tensor, noise: Tensor, *, held_out: bool = True
) -> Tensor:
    """``I(p_σ)``, estimated from data at ``y = data[index] + σ noise``, a scalar.

    ``held_out=False``: ``mean ‖∇log p̂_σ(y)‖²``: unbiased for the *empirical* density ``p̂_σ`` (the floor of a
    denoising loss on these very data; tends to ``D/σ²``, not to ``I(p)``, as σ → 0). ``held_out=True``: in
    ``I(p_σ) = max_s −2 J_ISM^σ(s)`` the score of ``p̂_σ`` less the row that ``y`` came from: a lower bound on
    average, close where the bumps of neighbouring rows overlap.

    Args:
        data: (N, D).
        sigma: σ.
        index: (B,) rows of the data to noise.
        noise: ε (B, D).
        held_out: see above.

    Raises:
        ValueError: σ is not positive, or fewer than two rows.
    """
    if sigma <= 0:
        raise ValueError(f"expected sigma > 0, found {sigma}")
    if len(data) < 2:
        raise ValueError(f"expected at least two rows of data, found {len(data)}")
    y = data[index] + sigma * noise
    if not held_out:
        return noised_data_score(data, y, sigma).square().sum(-1).mean()
    score = noised_data_score(data, y, sigma, leave_out=index)
    return -2 * denoising_centred(score, noise, sigma).mean()
