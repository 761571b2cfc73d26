# SPDX-License-Identifier: Apache-2.0
"""The verdict on guides, samplers and files: good ones are trusted, lost modes are not, whatever k̂ says."""

import importlib.util
import math
import warnings
from dataclasses import replace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from samplers import DATA, bimodal, hierarchy, make, trained

from pyro_sm import (
    AutoDiffusion,
    GivenBase,
    ModelDensity,
    Probe,
    StoppingRule,
    Trust,
    TrustWarning,
    WideCovering,
    check,
    check_guide,
    to_arviz,
)
from pyro_sm.base import Evaluations, RoundInfo
from pyro_sm.corrections import IndependentMetropolis
from pyro_sm.diagnostics import (
    ChainFindings,
    ProbeResult,
    Thresholds,
    TrainingFindings,
    draw_from_guide,
    guide_log_weight,
)
from pyro_sm.diagnostics.verdict.chains import markov_ess, measure_chains
from pyro_sm.diagnostics.verdict.check import look_elsewhere
from pyro_sm.diagnostics.verdict.training import measure_training
from pyro_sm.diagnostics.verdict.weights import measure_weights
from pyro_sm.examples.improper import factor_model
from pyro_sm.nn.mlp import MLP
from pyro_sm.smc import PriorStart, TemperedSMC
from pyro_sm.targets import UnequalModes
from pyro_sm.weights import evidence, pareto_smooth

HAS_LINE_1 = importlib.util.find_spec("arviz_base") is not None
LINES = [
    pytest.param(True, id="arviz 0"),
    pytest.param(False, id="arviz 1", marks=pytest.mark.skipif(not HAS_LINE_1, reason="needs arviz-base")),
]
BROKEN = Probe(TemperedSMC(64, max_temperatures=1), modes=None)
Y = torch.tensor(1.2)


def positive(y):
    """One latent that needs a transform: Gamma(3, 2) times a Gaussian likelihood of its logarithm."""
    s = pyro.sample("s", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(s.log(), 2.0), obs=y)


def gamma_guide(shape, rate):
    def guide(y):
        pyro.sample("s", dist.Gamma(shape, rate))

    return guide


def two_modes_guide(*weights):
    loc = torch.tensor([[3.0, 3.0], [-3.0, 3.0]])[: len(weights)]

    def guide():
        parts = dist.Independent(dist.Normal(loc, 0.55), 1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), parts))

    return guide


def judged(model, guide, *args, **options):
    return check_guide(model, guide, *args, **{"disable_progbar": True, "num_draws": 4000, **options})


# --------------------------------------------------------------------------------------------------------- guides


def test_a_good_guide_is_trusted_and_a_lost_mode_is_not():
    good = judged(bimodal, two_modes_guide(0.5, 0.5), stein_draws=200)
    assert good.level is Trust.TRUST, str(good)
    assert good.findings.stein is not None
    lost = judged(bimodal, two_modes_guide(1.0), stein_draws=200)
    assert lost.level is Trust.DISTRUST
    assert lost.findings.weights.khat < 0.7 < lost.findings.weights.ess / 4000
    assert lost.findings.probe.unknown.share == pytest.approx(0.3, abs=0.1)
    assert lost.findings.probe.gap.gap == pytest.approx(-math.log(0.7), abs=0.15)
    blind = judged(bimodal, two_modes_guide(1.0), probe=None)
    assert all(r.level is Trust.TRUST for r in blind.reasons if "nothing has looked elsewhere" not in r.finding)
    assert blind.level is Trust.CARE


@pytest.mark.parametrize("seed", range(3))
def test_wrong_shares_that_the_weights_repair_are_trusted(seed):
    found = judged(bimodal, two_modes_guide(0.1, 0.9), seed=seed, num_draws=16_000)
    assert found.level is Trust.TRUST, str(found)


def test_too_few_draws_and_heavy_weights():
    few = judged(bimodal, two_modes_guide(0.5, 0.5), num_draws=300)
    assert few.level is Trust.CARE
    heavy = judged(positive, gamma_guide(30.0, 20.0), Y)
    assert heavy.level is Trust.DISTRUST
    assert any("k̂" in reason.finding and reason.level is Trust.DISTRUST for reason in heavy.reasons)


def test_a_broken_probe_leaves_at_most_care():
    found = judged(bimodal, two_modes_guide(0.5, 0.5), probe=BROKEN)
    assert found.level is Trust.CARE
    assert "failed" in found.reasons[0].finding


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_pyros_gaussians_on_sixteen_modes_are_not_trusted(auto):
    """Their k̂ and effective share are excellent, and fifteen modes are missing."""
    target = UnequalModes(8)
    model = factor_model(target.log_prob, 8)
    guide = auto(model, init_loc_fn=lambda site: torch.tensor([3.0, -3.0, 3.0, 3.0, 0, 0, 0, 0]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    found = judged(model, guide)
    assert found.level is Trust.DISTRUST
    assert found.findings.weights.khat < 0.7
    assert found.findings.probe.unknown.share == pytest.approx(1 - 0.8**3 * 0.2, abs=0.05)


def test_the_probe_can_be_used_again():
    density = ModelDensity(bimodal, (), {})
    probed = Probe().run(density, PriorStart(density))
    good = judged(bimodal, two_modes_guide(0.5, 0.5), probe=probed)
    lost = judged(bimodal, two_modes_guide(1.0), probe=probed)
    assert (good.level, lost.level) == (Trust.TRUST, Trust.DISTRUST)
    assert good.findings.probe.evaluations.values == density.evaluations.values


def test_checking_leaves_the_generators_alone():
    before = torch.get_rng_state()
    options = {"num_draws": 500, "probe": Probe(TemperedSMC(128), modes=None)}
    one, other = (judged(bimodal, two_modes_guide(0.5, 0.5), **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one == other
    assert judged(bimodal, two_modes_guide(0.5, 0.5), **options, seed=1) != one


# ------------------------------------------------------------------------------------------- weights at given latents


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
@pytest.mark.parametrize("model", [positive, lambda y: hierarchy(DATA)], ids=["positive", "hierarchy"])
def test_weights_at_a_guides_own_draws_are_its_weights(auto, model):
    if auto is AutoIAFNormal and model is positive:
        pytest.skip("needs two latents")
    guide = auto(model)
    guide(Y)
    density = ModelDensity(model, (Y,), {})
    draws = draw_from_guide(guide, density, 40, (Y,))
    found = guide_log_weight(guide, density, draws.z, draws.log_p, (Y,))
    torch.testing.assert_close(found, draws.log_weight, rtol=1e-3, atol=1e-3)


def test_weights_at_draws_of_a_guide_written_by_hand():
    density, guide = ModelDensity(positive, (Y,), {}), gamma_guide(2.0, 1.5)
    draws = draw_from_guide(guide, density, 40, (Y,))
    found = guide_log_weight(guide, density, draws.z, draws.log_p, (Y,))
    torch.testing.assert_close(found, draws.log_weight, rtol=1e-4, atol=1e-4)
    forgotten = draws.log_p - dist.Gamma(2.0, 1.5).log_prob(density.unpack(draws.z)["s"])
    assert not torch.allclose(found, forgotten, atol=0.1)  # the jacobian


def test_weights_of_an_untrained_diffusion_are_those_of_its_base():
    guide = AutoDiffusion(hierarchy, num_steps=64, architecture=MLP(width=8, depth=1), name="untrained")
    density = ModelDensity(hierarchy, (DATA,), {})
    guide.bind(hierarchy, DATA)
    z = density.prior_draws(500)
    log_p = density.log_prob(z)
    found = guide_log_weight(guide, density, z, log_p, (DATA,))
    base = dist.MultivariateNormal(guide.base_loc, scale_tril=guide.base_scale_tril)
    exact = log_p - torch.logaddexp(base.log_prob(z) + math.log(0.9), density.log_prior(z) + math.log(0.1))
    assert float((found - exact).detach().abs().median()) < 0.2


def test_weights_of_a_guide_with_more_randomness_are_not_known():
    def guide(y):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("s", dist.Delta(noise.exp(), log_density=-noise + dist.Normal(0.0, 1.0).log_prob(noise) * 0))

    density = ModelDensity(positive, (Y,), {})
    assert guide_log_weight(guide, density, torch.zeros(3, 1), torch.zeros(3), (Y,)) is None
    found = judged(positive, guide, Y)
    assert found.findings.probe.unknown is None
    assert any("density there is not known" in text for text in found.unchecked)


# ------------------------------------------------------------------------------------------------------- measuring


def test_halves_agree_for_good_weights_and_not_for_heavy_ones():
    good = measure_weights(torch.randn(10_000)).halves
    assert abs(good.gap) < 4 * good.se
    one = torch.randn(10_000)
    one[17] = 30.0
    assert abs(measure_weights(one).halves.gap) > 10


def test_a_drift_since_the_last_rounds():
    pool = 0.1 * torch.randn(1000)
    rounds = [RoundInfo(i, 1.0, 0.5, 0.3, value, 0.02, 0.1, i, 0, 0.0) for i, value in enumerate((-9.0, 0, 0, 0))]
    steady = measure_training(pool, rounds).drift
    assert abs(steady.gap) < 0.05
    assert steady.se == pytest.approx(0.02 / 3**0.5, rel=0.1)
    drifted = measure_training(pool, [info._replace(log_evidence=-1.0) for info in rounds])
    assert drifted.drift.gap == pytest.approx(1.0, abs=0.05)
    assert measure_training(pool, ()) is None


def test_the_untrained_guides_round_is_no_sign_of_drift():
    """Two rounds, the first without any mass: half of the mean would be missing."""
    pool = 0.1 * torch.randn(1000)
    first, second = (
        RoundInfo(i, gamma, 0.5, 0.3, log_z, 0.02, 0.1, i, 0, 0.0)
        for i, gamma, log_z in ((1, 0.1, -90.0), (2, 1.0, 0.0))
    )
    found = measure_training(pool, [first, second])
    assert abs(found.drift.gap) < 0.05
    assert found.gamma == 1.0
    assert measure_training(pool, [first]) == TrainingFindings(0.1)


def test_chains():
    mixed = torch.randn(4, 500, 3)
    assert measure_chains([mixed]).rhat < 1.01
    both = [mixed, mixed + torch.arange(4.0)[:, None, None]]
    found = measure_chains(both, 0.4)
    assert found.rhat > 1.1
    assert markov_ess(both) < 100
    assert found.acceptance == 0.4
    assert found.num_chains == 4
    stuck = torch.arange(4.0)[:, None].expand(4, 500)
    assert measure_chains([stuck]).rhat == math.inf
    assert measure_chains([torch.zeros(4, 500)]) == ChainFindings(4)
    assert markov_ess([torch.zeros(4, 500)]) is None
    assert measure_chains([mixed[:1]]) == ChainFindings(1)
    assert measure_chains([torch.zeros(4, 3)]) is None
    assert measure_chains([], 0.4) == ChainFindings(acceptance=0.4)


# --------------------------------------------------------------------------------------------------- a second look


class Scripted(Probe):
    """A probe that finds what it is told to, and remembers with which settings it was asked."""

    script: tuple = ()
    asked: tuple = ()

    def run(self, density, start, *, progress=None):
        Scripted.asked += (self,)
        return Scripted.script[len(Scripted.asked) - 1]


def looked(*script, pool=None, num_repeats=1, thresholds=None):
    """What ``look_elsewhere`` makes of these results, one after the other, and the probes it sent."""
    Scripted.script, Scripted.asked = script, ()
    probe = Scripted(TemperedSMC(100, 3), modes=None, num_repeats=num_repeats)
    pool = torch.zeros(4000) if pool is None else pool
    return look_elsewhere(probe, None, None, pool, thresholds), Scripted.asked


def result(log_evidence=0.0, se=0.05, failure="", spent=(10, 4, 3), n=2000):
    z = torch.zeros(0 if failure else n, 1)
    return ProbeResult(z, z[:, 0], log_evidence, se, failure, Evaluations(*spent))


@pytest.mark.parametrize(
    ("log_evidence", "se", "again"),
    [
        (0.0, 0.05, False),
        (0.0, 0.15, False),  # worth 43 independent particles; 40 are enough
        (0.0, 0.17, True),  # worth 34
        (0.0, math.inf, True),
        (-0.2, 0.05, False),  # 0.05 nats and four errors
        (-0.3, 0.05, True),
        (+9.0, 0.05, False),  # more than the guide has is no fault of the probe
        (math.nan, 0.05, False),
    ],
)
def test_it_looks_again_where_the_first_look_is_too_little_to_judge_by(log_evidence, se, again):
    first, second = result(log_evidence, se), result(0.01, 0.04, spent=(100, 30, 4))
    found, asked = looked(first, second)
    assert len(asked) == 1 + again
    if not again:
        assert found is first
        return
    assert found == second._replace(evaluations=Evaluations(110, 34, 7))
    assert (asked[1].smc.num_particles, asked[1].smc.num_moves, asked[1].num_repeats) == (200, 6, 0)


def test_errors_of_both_sides_and_the_users_limits_count():
    pool = torch.zeros(4000)
    pool[:40] = 6.0  # an evidence with an error of its own
    gap = evidence(pool).log_evidence - 0.3
    assert len(looked(result(gap), result(), pool=pool)[1]) == 1
    assert len(looked(result(-0.3), result(), thresholds=Thresholds(drift=1.0))[1]) == 1
    assert len(looked(result(se=0.15), result(), thresholds=Thresholds(min_particles=50.0))[1]) == 2


def test_a_failed_look_is_not_repeated_and_does_not_replace_a_first_one():
    failed = result(failure="not reached", spent=(7, 7))
    found, asked = looked(failed)
    assert (found, len(asked)) == (failed, 1)
    first = result(se=1.0)
    found, asked = looked(first, failed)
    assert (len(asked), found.z is first.z, found.failure) == (2, True, "")
    assert found.evaluations == Evaluations(17, 11, 3)


@pytest.mark.parametrize(("num_repeats", "times"), [(0, 1), (1, 2), (3, 4)])
def test_it_looks_no_oftener_than_asked(num_repeats, times):
    poor = [result(se=1.0 - 0.1 * i) for i in range(5)]
    found, asked = looked(*poor, num_repeats=num_repeats)
    assert len(asked) == times
    assert found.log_evidence_se == poor[times - 1].log_evidence_se
    assert found.evaluations == Evaluations(10 * times, 4 * times, 3 * times)
    assert [probe.smc.num_particles for probe in asked] == [100 * 2**i for i in range(times)]


def test_no_second_look_where_the_weights_are_no_good():
    pool = 6 * torch.randn(4000, generator=torch.Generator().manual_seed(2))
    assert pareto_smooth(pool).khat > 0.7
    _, asked = looked(result(se=1.0), result(), pool=pool)
    assert len(asked) == 1


def test_a_second_look_is_recorded():
    """A probe of a few particles on a real model: the verdict has the cost of both looks."""
    probe = Probe(TemperedSMC(32, 1), modes=None)
    once = judged(bimodal, two_modes_guide(0.5, 0.5), probe=replace(probe, num_repeats=0))
    twice = judged(bimodal, two_modes_guide(0.5, 0.5), probe=probe)
    assert once.findings.probe.particles < 40
    assert twice.findings.probe.evaluations.values > 2.5 * once.findings.probe.evaluations.values


# ------------------------------------------------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def sampler():
    """Some hundred steps on a hierarchy that is close to its base: a good fit."""
    return trained(guide={"base": GivenBase(0.8, 1.0)}, budget=3200, objective={"num_particles": 320})


def test_a_good_fit_is_trusted_and_recorded(sampler, tmp_path):
    before = sampler.replicas[0].density.evaluations.values
    samples = sampler.get_samples(100)
    found = sampler.check(stein_draws=100, correction=IndependentMetropolis())
    assert found.level is Trust.TRUST, str(found)
    assert found.findings.chains.acceptance > 0.05
    assert found.findings.probe.evaluations.values > 0
    assert sampler.replicas[0].density.evaluations.values == before  # counted apart
    assert torch.equal(sampler.get_samples(100)["t"], samples["t"])
    probed = sampler.probe_result
    assert sampler.check(stein_draws=100, correction=IndependentMetropolis()) == found
    assert sampler.probe_result is probed
    assert str(found) in sampler.report()


@pytest.mark.parametrize("legacy", LINES)
def test_the_file_alone_gives_the_same_verdict(sampler, legacy, tmp_path):
    found = sampler.check()
    idata = sampler.to_arviz(400, legacy=legacy)
    assert check(idata) == found
    idata.to_netcdf(tmp_path / "posterior.nc")
    path = tmp_path / "posterior.nc"
    read = az.from_netcdf(path) if legacy else xarray.open_datatree(path)
    assert check(read) == found
    assert read.posterior.attrs["verdict"] == found.level.words
    read.close()


def test_a_sampler_that_lost_a_mode_is_not_trusted_and_warns():
    base = GivenBase(torch.tensor([3.0, 3.0]), 0.6)
    sampler = make(
        bimodal,
        guide={"base": base},
        budget=640 * 4,
        objective={"num_particles": 256, "covering": WideCovering(0.1, 1.0)},
    )
    sampler.run()
    found = sampler.check()
    assert found.findings.weights.khat < 0.7
    assert found.level is Trust.DISTRUST, str(found)
    with pytest.warns(TrustWarning, match="unknown to the guide"):
        sampler.to_arviz(400)


def test_interrupting_the_check_changes_nothing(sampler):
    sampler._probe_run = None

    class Interrupted(Probe):
        def run(self, *args, **kwargs):
            raise KeyboardInterrupt

    before = torch.get_rng_state()
    verdict = sampler._verdict
    with pytest.raises(KeyboardInterrupt):
        sampler.check(probe=Interrupted())
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler._verdict is verdict
    assert sampler.check().level is Trust.TRUST


def test_a_verdict_does_not_outlive_its_training():
    sampler = trained()
    sampler.check()
    assert sampler._verdict is not None
    sampler.stopping = StoppingRule(max_evaluations=1280)
    sampler.run(DATA)
    assert sampler._verdict is None
    assert sampler.probe_result is not None
    sampler.run(DATA + 1)
    assert sampler.probe_result is None


def test_nothing_run_nothing_checked():
    with pytest.raises(ValueError, match="call run"):
        make().check()


# ------------------------------------------------------------------------------------------------------------ files


def test_an_export_without_a_check_says_what_is_missing(sampler):
    idata = trained().to_arviz(400)
    found = check(idata)
    assert found.level is Trust.CARE
    assert found.findings.weights.khat is not None
    assert "lost modes (no probe was run)" in found.unchecked


def test_a_verdict_on_any_guide_can_be_recorded():
    guide = two_modes_guide(1.0)
    verdict = judged(bimodal, guide)
    with pytest.warns(TrustWarning):
        idata = to_arviz(bimodal, guide, num_samples=400, verdict=verdict)
    assert check(idata) == verdict
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(to_arviz(bimodal, guide, num_samples=400)).level is Trust.CARE


def test_files_of_others():
    rng = np.random.default_rng(1)
    good = az.from_dict(posterior={"x": rng.normal(size=(4, 1000, 2)), "name": np.full((4, 1000), "a")})
    found = check(good)
    assert found.level is Trust.TRUST
    assert found.findings.weights.ess > 1000
    assert any("k̂" in text for text in found.unchecked)
    apart = az.from_dict(posterior={"x": rng.normal(size=(4, 1000)) + np.arange(4)[:, None]})
    assert check(apart).level is Trust.DISTRUST
    single = az.from_dict(posterior={"x": rng.normal(size=(1, 1000))})
    assert check(single).level is Trust.CARE
    with pytest.raises(TypeError, match="with a posterior"):
        check({"x": np.zeros(3)})


def test_the_samplers_second_look_goes_by_the_thresholds_given(sampler):
    """Few particles: too few for the one, enough for the other, however many lines there are."""
    spent = {}
    for num_particles, least in ((64, 0.0), (65, math.inf)):
        probe = Probe(TemperedSMC(num_particles, 1), modes=None)
        found = sampler.check(probe=probe, thresholds=Thresholds(min_particles=least, deviations=1e6))
        spent[least] = found.findings.probe.evaluations.values
    assert spent[math.inf] > 2.5 * spent[0.0]
