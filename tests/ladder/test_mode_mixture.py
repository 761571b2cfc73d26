# SPDX-License-Identifier: Apache-2.0
"""A mixture at the modes: exact for normal laws, right evidence and shares where these are known, honest else."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.gaussians.student_mixture import StudentMixture
from pyro_sm.ladder import ModeMixture
from pyro_sm.ladder.mode_mixture import matched
from pyro_sm.ladder.weighted_mixture import weighted_draws
from pyro_sm.search.multistart import MultiStartSearch
from pyro_sm.search.starts import gaussian_start
from pyro_sm.targets import Funnel
from pyro_sm.weights import evidence

pytestmark = pytest.mark.usefixtures("float64")
MODES = ModeMixture(MultiStartSearch(num_starts=256))


def unit(dim):
    return gaussian_start(torch.zeros(dim), torch.ones(dim))


def correlated(dim):
    """A lower-triangular scale with widths from .3 to 3, and a loc."""
    tril = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)).tril(-1) * 0.3 + torch.eye(dim)
    return torch.linspace(-2, 3, dim), torch.logspace(-0.5, 0.5, dim)[:, None] * tril


# ------------------------------------------------------------------------------------------- matching scores


def test_a_normal_law_is_matched_exactly():
    loc, tril = correlated(4)
    law = GaussianDensity(loc, tril)
    z = 3 * torch.randn(6, 4)  # of another law, and as few as there may be
    found = matched(z, law.log_prob_and_score(z)[1])
    torch.testing.assert_close(found[0], loc, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[1], tril, rtol=1e-8, atol=1e-8)


def test_matching_wants_points_that_span_the_space():
    z = torch.randn(8, 4)
    assert matched(z[:5], -z[:5]) is None
    assert matched(z, torch.zeros(8, 4)) is None
    assert matched(z.index_fill(1, torch.tensor([2]), 1.0), -z) is None


# ---------------------------------------------------------------------------------------------- known answers


def test_a_normal_law_in_five_dimensions():
    loc, tril = correlated(5)
    law = GaussianDensity(loc, tril)
    density = FunctionDensity(lambda z: law.log_prob(z) + 7.0, 5)
    found = MODES.run(density, unit(5))
    assert found.log_evidence == pytest.approx(7, abs=5 * found.log_evidence_se)
    assert found.log_evidence_se < 0.01
    assert found.ess > 0.85
    assert found.khat < 0.5
    assert found.search.num_places == 1
    assert found.evaluations == density.evaluations
    mean = torch.softmax(found.draws.log_weight, 0) @ found.draws.z
    assert bool(((mean - loc).abs() < 5 * tril.norm(dim=1) / math.sqrt(found.ess * 4000)).all())


def two_modes():
    """Shares .7 and .3, ``log Z = −2``."""
    loc = torch.tensor([[-4.0, 2.0, 0.0], [5.0, 0.0, 3.0]])
    scale = torch.tensor([[0.3, 1.0, 2.0], [1.0, 0.5, 0.4]])

    def log_prob(z):
        parts = [torch.distributions.Normal(m, s).log_prob(z).sum(-1) for m, s in zip(loc, scale, strict=True)]
        return torch.logsumexp(torch.stack([parts[0] + math.log(0.7), parts[1] + math.log(0.3)]), 0) - 2.0

    return FunctionDensity(log_prob, 3)


def test_two_modes_in_their_shares():
    found = MODES.run(two_modes(), unit(3))
    assert found.log_evidence == pytest.approx(-2, abs=5 * found.log_evidence_se)
    assert found.log_evidence_se < 0.02
    share = float(torch.softmax(found.draws.log_weight, 0)[found.draws.z[:, 0] < 0].sum())
    assert share == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / (found.ess * 4000)))
    assert found.ess > 0.8


def test_a_forgotten_normaliser_is_seen():
    """Weights by a mixture whose components lack their determinants: log Z is off by many errors."""
    density = two_modes()
    mixture = MODES.run(density, unit(3)).mixture
    draws = weighted_draws(density, mixture, 4000)
    log_det = mixture.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_q = torch.logsumexp(mixture.joint_log_prob(draws.z) + log_det[:, None], 0)
    wrong = evidence(draws.log_p - log_q)
    assert abs(wrong.log_evidence + 2) > 10 * wrong.log_evidence_se
    # ... and so it is by one component instead of the mixture.
    own = StudentMixture(torch.zeros(1), mixture.loc[:1], mixture.scale_tril[:1])
    alone = evidence(draws.log_p - own.log_prob(draws.z))
    assert abs(alone.log_evidence + 2) > 1


def test_a_student_mixture_is_its_own_answer():
    law = StudentMixture(
        torch.tensor([0.4, 0.6]).log(), torch.tensor([[-3.0, 0.0], [3.0, 1.0]]), torch.stack([torch.eye(2)] * 2)
    )
    density = FunctionDensity(lambda z: law.log_prob(z) + 1.5, 2)
    found = MODES.run(density, unit(2))
    assert found.log_evidence == pytest.approx(1.5, abs=5 * found.log_evidence_se)
    assert found.log_evidence_se < 0.02
    assert found.ess > 0.9


def test_a_regression_in_raw_units():
    """Widths of thousands beside a start of width one; the evidence by the normal integral."""
    generator = torch.Generator().manual_seed(3)
    x = torch.stack([torch.ones(40), 1e-3 * torch.randn(40, generator=generator), torch.arange(40.0)], 1)
    y = x @ torch.tensor([4.0, 8000.0, -0.2]) + 3 * torch.randn(40, generator=generator)
    prior = torch.tensor([1e3, 1e5, 1e2])

    def log_prob(b):
        return torch.distributions.Normal(0.0, prior).log_prob(b).sum(-1) + torch.distributions.Normal(
            y, 3.0
        ).log_prob(b @ x.T).sum(-1)

    covariance = 9 * torch.eye(40) + x * prior.square() @ x.T
    exact = float(torch.distributions.MultivariateNormal(torch.zeros(40), covariance).log_prob(y))
    found = MODES.run(FunctionDensity(log_prob, 3), unit(3))
    assert found.search.num_places == 1
    assert found.log_evidence == pytest.approx(exact, abs=5 * found.log_evidence_se)
    assert found.log_evidence_se < 0.02
    assert found.ess > 0.85


def test_twenty_five_modes_on_a_grid():
    axis = 4.0 * torch.arange(-2.0, 3.0)
    centres = torch.cartesian_prod(axis, axis)

    def log_prob(z):
        return torch.logsumexp(-2 * torch.cdist(z, centres).square(), 1) - math.log(25 * math.pi / 2)

    found = ModeMixture(MultiStartSearch(num_starts=1024)).run(FunctionDensity(log_prob, 2), unit(2))
    assert found.mixture.num_components == 25
    assert found.log_evidence == pytest.approx(0, abs=5 * found.log_evidence_se)
    few = ModeMixture(MultiStartSearch(num_starts=8, max_stages=1)).run(FunctionDensity(log_prob, 2), unit(2))
    assert few.log_evidence < -0.5
    assert not few.search.is_complete


def test_good_weights_on_one_mode_of_two_and_a_search_that_cannot_know():
    """From the middle of one of two modes, with few steps to go: what the rule of three leaves, and no more."""
    near = gaussian_start(torch.tensor([-4.0, 2.0, 0.0]), torch.full((3,), 1e-3))
    found = ModeMixture(MultiStartSearch(num_starts=16, max_stages=1)).run(two_modes(), near)
    assert found.ess > 0.8
    assert found.khat < 0.5
    assert found.log_evidence == pytest.approx(-2 + math.log(0.7), abs=5 * found.log_evidence_se)
    assert found.search.unseen == pytest.approx(3 / 16)


# --------------------------------------------------------------------------------------------- honest failures


def test_a_funnel_is_refused():
    target = Funnel()
    found = MODES.run(FunctionDensity(target.log_prob, target.dim), unit(target.dim))
    assert found.khat > 0.7 or found.ess < 0.02


def test_without_a_mode_there_is_a_law_as_wide_as_the_start():
    slope = FunctionDensity(lambda z: torch.where(z[:, 0] < 50, z[:, 0], -math.inf), 2)
    found = MODES.run(slope, gaussian_start(torch.zeros(2), torch.tensor([2.0, 3.0])))
    assert found.search.num_places == 0
    torch.testing.assert_close(found.mixture.scale_tril[0], torch.diag(torch.tensor([2.0, 3.0])))


def test_no_weight_anywhere():
    nothing = FunctionDensity(lambda z: z.sum(1) * 0 - math.inf, 2)
    found = MODES.run(nothing, unit(2))
    assert found.log_evidence == -math.inf
    assert found.log_evidence_se == math.inf
    assert found.khat == math.inf
    assert found.ess == 0


def test_many_latents_without_a_hessian():
    dim = 160
    law = GaussianDensity(torch.ones(dim), torch.diag(torch.linspace(0.5, 2, dim)))
    found = ModeMixture(MultiStartSearch(num_starts=32), num_draws=1000).run(law, unit(dim))
    # Nine in ten of a hundred and sixty dimensions' normal draws are lost to a t law's tails, and no more.
    assert found.ess > 0.1
    assert found.log_evidence == pytest.approx(0, abs=5 * found.log_evidence_se)


def test_float32_draws_are_weighted_as_they_are():
    law = GaussianDensity(torch.zeros(3, dtype=torch.float32), torch.eye(3, dtype=torch.float32))
    start = gaussian_start(torch.zeros(3, dtype=torch.float32), torch.ones(3, dtype=torch.float32))
    found = MODES.run(law, start)
    assert found.draws.z.dtype == torch.float32
    assert found.draws.log_weight.dtype == torch.float64
    assert found.log_evidence == pytest.approx(0, abs=5 * found.log_evidence_se)


def test_errors():
    with pytest.raises(ValueError, match="num_updates >= 0, found -1"):
        ModeMixture(num_updates=-1)
    with pytest.raises(ValueError, match="num_draws >= 2, found 1"):
        ModeMixture(num_draws=1)
