# SPDX-License-Identifier: Apache-2.0
"""From a Pyro model to draws, evidence and an honest verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sm.base import Draws, Evaluations
from pyro_sm.diagnostics.verdict.probe import Probe
from pyro_sm.diagnostics.verdict.trust import Trust, TrustWarning
from pyro_sm.examples import eight_schools
from pyro_sm.gaussians.student_mixture import StudentMixture
from pyro_sm.ladder import AdaptiveImportanceSampling, ModeMixture, WeightedMixture, fit_mixture
from pyro_sm.search.completeness import Completeness
from pyro_sm.search.multistart import MultiStartSearch
from pyro_sm.search.starts import gaussian_start
from pyro_sm.smc import TemperedSMC

MODES = ModeMixture(MultiStartSearch(num_starts=256))
SMALL_PROBE = Probe(smc=TemperedSMC(num_particles=512, num_moves=3))


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


Y = torch.tensor([0.3, 1.1, 0.7, -0.2])


def exact():
    covariance = 0.25 * torch.eye(4) + 4.0
    return float(dist.MultivariateNormal(torch.ones(4), covariance).log_prob(Y))


@pytest.fixture(scope="module")
def fit():
    return fit_mixture(conjugate, Y, modes=MODES)


def test_evidence_weights_and_draws(fit):
    assert fit.log_evidence == pytest.approx(exact(), abs=5 * fit.log_evidence_se)
    assert fit.ess > 0.9
    assert fit.khat < 0.5
    samples = fit.get_samples(8000)["mu"]
    precision = 0.25 + 16
    mean = (0.25 + 4 * float(Y.sum())) / precision
    assert samples.shape == (8000,)
    assert float(samples.mean()) == pytest.approx(mean, abs=6 / math.sqrt(8000 * precision))
    assert float(samples.std()) == pytest.approx(precision**-0.5, rel=0.05)


def test_the_same_seed_gives_the_same_and_leaves_the_generator_alone(fit):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = fit_mixture(conjugate, Y, modes=MODES)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(again.result.draws.z, fit.result.draws.z)
    assert torch.equal(again.get_samples(6000)["mu"], fit.get_samples(6000)["mu"])
    other = fit_mixture(conjugate, Y, modes=MODES, seed=1)
    assert not torch.equal(other.result.draws.z, fit.result.draws.z)


def test_the_verdict_is_at_best_care_without_a_probe(fit):
    verdict = fit.check()
    assert verdict.level is Trust.CARE
    assert "nothing has looked elsewhere" in str(verdict)
    assert "ended at one place" in str(verdict)


def test_with_a_probe_it_can_be_trusted(fit):
    verdict = fit.check(probe=SMALL_PROBE, disable_progbar=True)
    assert verdict.level is Trust.TRUST
    assert verdict.findings.probe.evaluations.scores > 0
    assert verdict.findings.probe.unknown is not None


def test_a_lost_mode_is_found_by_the_probe():
    """A search from the wrong place, with one start: good weights on half of the answer."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu.square(), 0.5), obs=y)

    narrow = gaussian_start(torch.tensor([3.0]), torch.tensor([0.01]))
    one = ModeMixture(MultiStartSearch(num_starts=1, max_stages=1))
    fit = fit_mixture(model, torch.tensor(9.0), start=narrow, modes=one, adaptive=None)
    assert fit.khat < 0.5
    assert fit.ess > 0.8
    assert fit.search.num_places == 1
    verdict = fit.check(probe=SMALL_PROBE, disable_progbar=True)
    assert verdict.level is Trust.DISTRUST


def test_eight_schools():
    y, sigma = eight_schools.data()
    fit = fit_mixture(eight_schools.noncentered, y, sigma, modes=MODES)
    assert "adaptive importance sampling" in fit.result.method
    assert fit.log_evidence == pytest.approx(eight_schools.exact().log_evidence, abs=5 * fit.log_evidence_se)
    assert fit.log_evidence == pytest.approx(-31.311, abs=0.15)
    assert fit.khat < 0.7
    samples = fit.get_samples(4000)
    samples["theta"] = samples["mu"][:, None] + samples["tau"][:, None] * samples["theta_raw"]
    errors = eight_schools.errors(samples)
    assert errors.mean < 0.1
    assert errors.sd < 0.1


def test_a_funnel_is_refused():
    def funnel():
        scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(8), (scale / 2).exp()).to_event(1))

    adaptive = AdaptiveImportanceSampling(max_rounds=3)
    fit = fit_mixture(funnel, modes=MODES, adaptive=adaptive)
    assert fit.check().level is Trust.DISTRUST
    with pytest.warns(TrustWarning):
        fit.to_arviz(400, predictive=False, prior=False)


def test_nothing_anywhere_is_said():
    def impossible(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(mu > 40, 0.0, -1e30) - y)

    fit = fit_mixture(impossible, torch.tensor(1.0), modes=MODES, adaptive=None)
    assert fit.check().level is Trust.DISTRUST or fit.log_evidence < -1e20


def test_without_a_mode_there_is_no_trust():
    """Centred eight schools: the density grows without bound where the scale vanishes, whatever k̂ says."""
    y, sigma = eight_schools.data()
    fit = fit_mixture(eight_schools.centered, y.double(), sigma.double(), modes=MODES, dtype=torch.float64)
    assert fit.search.num_places == 0
    verdict = fit.check()
    assert verdict.level is Trust.DISTRUST
    assert "none of 256 ascents ended at a mode" in str(verdict)


def test_an_incomplete_search_asks_for_care(fit):
    few = replace(fit, search=Completeness(100, [90, *[1] * 10]))
    verdict = few.check(probe=SMALL_PROBE, disable_progbar=True)
    assert verdict.level is Trust.CARE
    assert "search with more starts" in str(verdict)


class Given:
    """In the place of a method: a pool of which a given share counts."""

    def __init__(self, ess):
        self.ess, self.called = ess, False

    def run(self, density, _):
        self.called = True
        z = torch.linspace(-2, 2, 1000)[:, None]
        counts = torch.arange(1000) < round(1000 * self.ess)
        log_weight = torch.where(counts, 0.0, -math.inf).double()
        law = StudentMixture(torch.zeros(1).double(), torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double())
        return WeightedMixture(law, Draws(z, log_weight, log_weight), Evaluations(7, 3), None, f"given {self.ess}")


@pytest.mark.parametrize(("found", "adapted", "follows", "kept"), [
    (0.45, 0.9, False, 0.45), (0.35, 0.9, True, 0.9), (0.35, 0.2, True, 0.35),
])  # fmt: skip
def test_adaptation_follows_below_two_fifths_and_the_better_is_kept(found, adapted, follows, kept):
    other = Given(adapted)
    fit = fit_mixture(conjugate, Y, modes=Given(found), adaptive=other)
    assert other.called == follows
    assert fit.result.method == f"given {kept}"
    assert fit.result.evaluations.values == (14 if follows else 7)


def test_report(fit):
    lines = fit.report().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["log evidence", "weights", "method", "search", "cost"]
    assert "Batch-and-Match" in lines[2]
    assert "ended at one place" in lines[3]
    assert str(fit.result.evaluations.values) in lines[4]


def test_arviz(fit):
    idata = fit.to_arviz(400, num_chains=2, prior=False)
    attributes = idata.posterior.attrs
    assert idata.posterior["mu"].shape == (2, 200)
    assert attributes["log_evidence"] == pytest.approx(fit.log_evidence)
    assert attributes["verdict"] == "use with care"
    assert "Batch-and-Match" in attributes["objective"]
    assert "log_likelihood" in (idata.groups() if callable(idata.groups) else [g.strip("/") for g in idata.groups])


def test_more_draws_than_the_pool_is_worth_come_from_a_larger_pool(fit):
    before = fit.density.evaluations.values
    assert fit.get_samples(100)["mu"].shape == (100,)
    assert fit.density.evaluations.values == before
    assert len(fit.get_samples(5000)["mu"].unique()) > 3500
    assert fit.density.evaluations.values > before
