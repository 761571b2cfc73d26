# SPDX-License-Identifier: Apache-2.0
"""The prior as the covering component: bounded weights, and the right evidence from a guide that has lost a mode."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sm import ModelDensity, PriorCovering, WideCovering
from pyro_sm.diffusion.covering import default_covering, draw_with_covering
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.kernels import gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.examples.improper import factor_model
from pyro_sm.weights import evidence


def two_modes() -> None:
    """``x² ≈ 9`` under a Cauchy-tailed prior: modes at ±3 of unequal weight."""
    x = pyro.sample("x", dist.StudentT(3.0, 0.5, 2.0))
    pyro.sample("y", dist.Normal(x**2, 1.5), obs=torch.tensor(9.0))


def one_sided_guide() -> Diffusion:
    """A guide that knows the right-hand mode only."""
    ratios = NoiseRange().levels(16, dtype=torch.float32, device=torch.device("cpu"))
    silent = Denoiser(lambda x, c, context: torch.zeros(x.shape[0], 2 * x.shape[1]))
    return Diffusion(silent, gaussian_kernels(ratios, 1), torch.tensor([3.0]), torch.tensor([[0.3]]))


def exact_log_evidence() -> float:
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    log_p = dist.StudentT(3.0, 0.5, 2.0).log_prob(x) + dist.Normal(x**2, 1.5).log_prob(torch.tensor(9.0))
    return float(torch.logsumexp(log_p, 0) + torch.log(x[1] - x[0]))


def test_evidence_is_right_although_the_guide_has_lost_a_mode() -> None:
    density = ModelDensity(two_modes)
    draws, _ = draw_with_covering(one_sided_guide(), density, PriorCovering(0.1), 20_000)
    estimate = evidence(draws.log_weight)
    assert abs(estimate.log_evidence - exact_log_evidence()) < 5 * estimate.log_evidence_se
    assert estimate.log_evidence_se < 0.06


def test_without_it_the_evidence_lacks_the_lost_mode_and_the_weights_look_fine() -> None:
    density = ModelDensity(two_modes)
    draws, _ = draw_with_covering(one_sided_guide(), density, PriorCovering(0.0), 20_000)
    estimate = evidence(draws.log_weight)
    assert estimate.log_evidence < exact_log_evidence() - 5 * estimate.log_evidence_se


def test_weights_are_bounded_by_the_likelihood() -> None:
    density = ModelDensity(two_modes)
    draws, own = draw_with_covering(one_sided_guide(), density, PriorCovering(0.1), 5000)
    assert own == 4500
    log_likelihood = draws.log_p - density.log_prior(draws.z)
    assert bool((draws.log_weight <= log_likelihood + math.log(10) + 1e-3).all())


def test_the_default_is_the_prior_where_there_is_one() -> None:
    assert default_covering(ModelDensity(two_modes)) == PriorCovering()
    flat = ModelDensity(factor_model(lambda x: -x.square().sum(-1), 2))
    assert default_covering(flat) == WideCovering()
    with pytest.raises(TypeError, match="use WideCovering"):
        draw_with_covering(one_sided_guide(), ModelDensity(factor_model(lambda x: -x.square().sum(-1), 1)),
                         PriorCovering(), 50)  # fmt: skip


def test_share_is_checked() -> None:
    with pytest.raises(ValueError, match="share"):
        PriorCovering(1.0)
