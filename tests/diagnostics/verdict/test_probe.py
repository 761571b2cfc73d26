# SPDX-License-Identifier: Apache-2.0
"""The probe finds what a guide has lost, and only that; where it fails it says so."""

import math
from dataclasses import replace

import pyro
import pytest
import torch
import torch.distributions as dist
from oracles import LOG_Z, density_of, process_of, random_network

from pyro_sm.base import Evaluations
from pyro_sm.density import FunctionDensity
from pyro_sm.diagnostics import Probe, ProbeResult
from pyro_sm.diagnostics.verdict.probe import start_for
from pyro_sm.diagnostics.verdict.probe_findings import effective_particles, unknown_share
from pyro_sm.diffusion.covering import WideCovering, process_log_weight
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.model.density import ModelDensity
from pyro_sm.smc import PriorStart, TemperedSMC
from pyro_sm.smc.mixture_start import widened
from pyro_sm.targets import UnequalModes
from pyro_sm.weights import pareto_smooth

TARGET = UnequalModes(4)  # modes of .64, .16, .16 and .04


def mixture(weights, width=0.55):
    """A guide with exact densities: normal laws at the four modes, in the order of ``mode_weights``."""
    loc = torch.tensor([[3.0 if (i >> k) & 1 else -3.0 for k in range(2)] + [0.0] * 2 for i in range(4)])
    scale = torch.tensor([width, width, 1.1, 1.1])
    weights = torch.as_tensor(weights)
    kept = weights > 0
    parts = dist.Independent(dist.Normal(loc[kept], scale.expand(int(kept.sum()), 4)), 1)
    return dist.MixtureSameFamily(dist.Categorical(weights[kept] / weights.sum()), parts)


def pool_of(guide, n=8000):
    z = guide.sample((n,))
    return TARGET.log_prob(z) - guide.log_prob(z)


@pytest.fixture
def probed():
    start = TARGET.start
    return Probe().run(FunctionDensity(TARGET.log_prob, 4), widened(start.loc, start.scale.diag()))


def unknown(guide, probed):
    return unknown_share(pool_of(guide), probed, probed.log_p - guide.log_prob(probed.z))


def test_the_probe_finds_the_posterior(probed):
    assert probed.failure == ""
    assert len(probed.z) == 2048
    assert abs(probed.log_evidence) < 5 * probed.log_evidence_se
    shares = TARGET.mode_shares(probed.z)
    exact = TARGET.mode_weights()
    assert bool(((shares - exact).abs() < 5 * (exact * (1 - exact) / effective_particles(probed)).sqrt()).all())
    assert 0 < probed.evaluations.scores <= probed.evaluations.values < 60_000


def test_a_good_guide_knows_all(probed):
    found = unknown(mixture([0.04, 0.16, 0.16, 0.64]), probed)
    assert found.share <= 0.002
    assert 0 < found.se < 0.005


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_lost_mode_is_unknown_and_its_mass_is_told(probed, lost):
    weights = [0.04, 0.16, 0.16, 0.64]
    mass, weights[lost] = weights[lost], 0.0
    guide = mixture(weights)
    assert pareto_smooth(pool_of(guide)).khat < 0.7  # which sees nothing
    found = unknown(guide, probed)
    assert abs(found.share - mass) < 5 * found.se
    assert found.share > 5 * found.se


def test_wrong_shares_of_the_modes_do_not_condemn(probed):
    """A guide that has a mode twenty times too rarely is put right by its weights; comparing shares would not do."""
    guide = mixture([0.002, 0.4, 0.4, 0.198])
    assert unknown(guide, probed).share <= 0.005
    own = TARGET.mode_shares(guide.sample((8000,)))
    assert float((own - TARGET.mode_shares(probed.z)).abs().max()) > 0.3


def test_noise_of_the_particles_does_not_condemn():
    """Particles whose shares resampling has spoilt, on a good guide."""
    z = mixture([0.5, 0.1, 0.1, 0.3], width=0.5).sample((2000,))
    spoilt = ProbeResult(z, TARGET.log_prob(z), 0.0, 0.1, "", Evaluations())
    assert unknown(mixture([0.04, 0.16, 0.16, 0.64]), spoilt).share <= 0.002


def test_few_lines_mean_a_large_error(probed):
    guide = mixture([0.0, 0.16, 0.16, 0.64])
    few = probed._replace(log_evidence_se=0.3)
    assert effective_particles(few) == pytest.approx(1 / (0.09 + 1 / 2048))
    found = unknown(guide, few)
    assert found.share - 2 * found.se < 0 < unknown(guide, probed).share - 2 * unknown(guide, probed).se
    assert effective_particles(probed._replace(log_evidence_se=math.inf)) == 1


def test_places_where_the_guide_is_zero_are_unknown(probed):
    log_weight = torch.zeros(2048)
    log_weight[:100], log_weight[100:200] = math.inf, math.nan
    assert unknown_share(torch.zeros(1000), probed, log_weight).share == pytest.approx(200 / 2048)


@pytest.mark.parametrize(
    ("density", "probe", "words"),
    [
        (lambda z: z.sum(-1) - math.inf, Probe(), "finite"),
        (TARGET.log_prob, Probe(TemperedSMC(256, max_temperatures=1), modes=None), "after 1 temperatures"),
    ],
)
def test_a_probe_that_fails_says_why(density, probe, words):
    counted = FunctionDensity(density, 4)
    found = probe.run(counted, widened(torch.full((4,), 50.0), torch.eye(4)))
    assert words in found.failure
    assert len(found.z) == 0
    assert found.evaluations == Evaluations(counted.evaluations.values, counted.evaluations.scores)


def test_nan_that_it_meets_are_counted():
    """Those of this look only, and none of a density that has none."""

    def broken(z):
        value = -0.5 * z.square().sum(-1)
        return torch.where(z[:, 0] < -1.0, torch.nan, value)

    small = Probe(TemperedSMC(64, 2), modes=None)
    density = FunctionDensity(broken, 2)
    density.log_prob(torch.full((5, 2), -2.0))
    assert density.evaluations.not_a_number == 5
    found = small.run(density, widened(torch.zeros(2), torch.eye(2)))
    assert found.evaluations.not_a_number == density.evaluations.not_a_number - 5 > 0
    assert found.evaluations.values == density.evaluations.values - 5
    whole = small.run(FunctionDensity(TARGET.log_prob, 4), widened(torch.zeros(4), torch.eye(4)))
    assert whole.evaluations.values > 0
    assert whole.evaluations.not_a_number == 0


def test_with_too_many_latents_it_does_not_begin():
    told, counted = [], FunctionDensity(TARGET.log_prob, 4)
    found = Probe(max_dim=3).run(counted, widened(torch.zeros(4), torch.eye(4)), progress=told.append)
    assert "4 latents are more than the 3" in found.failure
    assert found.evaluations == Evaluations()
    assert (counted.evaluations.values, told, len(found.z)) == (0, [], 0)
    few = Probe(TemperedSMC(64, 1), modes=None, max_dim=4)
    assert few.run(counted, widened(torch.zeros(4), TARGET.start.scale.diag())).failure == ""


def test_a_stronger_probe_has_twice_of_all_but_repeats():
    probe = Probe(TemperedSMC(100, 3, effective_share=0.7), modes=None, max_dim=7, num_repeats=2)
    assert probe.stronger == Probe(TemperedSMC(200, 6, effective_share=0.7), modes=None, max_dim=7, num_repeats=1)


def test_progress_may_stop_it():
    def stop(beta):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Probe().run(FunctionDensity(TARGET.log_prob, 4), widened(torch.zeros(4), torch.eye(4)), progress=stop)


def test_the_start_is_the_prior_where_there_is_one():
    def proper():
        pyro.sample("x", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))

    assert isinstance(start_for(ModelDensity(proper, (), {}), lambda: pytest.fail("not needed")), PriorStart)
    base = (torch.ones(2), torch.eye(2))
    assert not isinstance(start_for(FunctionDensity(TARGET.log_prob, 2), lambda: base), PriorStart)


def test_the_base_of_a_process():
    process = process_of(Denoiser(random_network(2, 0.3)))
    loc, scale = process.covering_gaussian()
    u = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(process.to_latent(u), loc + u @ scale.T)
    assert torch.equal(scale, scale.tril())


@pytest.mark.parametrize("wide", [None, WideCovering(0.1, 1.5), WideCovering(0.0)])
def test_weights_at_draws_of_the_target_are_those_of_the_pool(wide):
    """``E_p[1/w] = 1/Z`` for exact draws of p, whatever the guide; the sign of R matters, and so does the mixture."""
    process = process_of(Denoiser(random_network(2, 0.05)))
    law = dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), 0.8 * torch.eye(2, dtype=torch.float64))
    density = density_of(process, law)
    z = process.to_latent(law.sample((20_000,)))
    log_p = density.log_prob(z)
    ratio = LOG_Z - process_log_weight(process, density, wide, z, log_p)
    mean, se = ratio.exp().mean(), ratio.exp().std() / len(z) ** 0.5
    assert abs(float(mean) - 1) < 5 * float(se) < 0.1
    wrong = LOG_Z - (log_p - process.path_log_ratio(z))
    assert abs(float(wrong.exp().mean()) - 1) > 10 * float(se)
    if wide is not None and wide.share:
        bound = log_p - wide.log_prob(process, density, z) - torch.tensor(wide.share).log()
        assert bool((process_log_weight(process, density, wide, z, log_p) <= bound + 1e-6).all())


# ------------------------------------------------------------------------------------- the settings, by what they do


def gaussian(dim):
    return FunctionDensity(lambda z: -0.5 * z.square().sum(-1), dim)


@pytest.mark.parametrize(("dim", "begins"), [(300, True), (301, False)])
def test_three_hundred_latents_are_the_most(dim, begins):
    probe = Probe(TemperedSMC(8, 1, max_temperatures=1), modes=None)
    found = probe.run(gaussian(dim), widened(torch.full((dim,), 9.0), torch.eye(dim)))
    assert ("more than the 300" in found.failure) is not begins
    assert ("after 1 temperatures" in found.failure) is begins


def test_one_repeat_is_the_default():
    assert (Probe().num_repeats, Probe().stronger.num_repeats) == (1, 0)


def test_it_gives_up_after_two_hundred_temperatures():
    few = Probe(replace(Probe().smc, num_particles=8), modes=None)
    found = few.run(gaussian(1), widened(torch.full((1,), 1e4), torch.eye(1)))
    assert "after 200 temperatures" in found.failure


def test_a_step_of_temperature_leaves_three_fifths_of_the_particles_which_move_five_times():
    density = gaussian(4)
    smc = replace(Probe().smc, crossover=None)
    found = smc.run(density, widened(torch.full((4,), 20.0), torch.eye(4)))
    *steps, _last = found.history
    assert len(steps) > 3
    assert [step.effective_share for step in steps] == pytest.approx([0.6] * len(steps), abs=1e-3)
    assert density.evaluations.values == 2048 * (1 + 5 * len(found.history))


def test_two_hundred_and_fifty_six_ascents_of_forty_steps():
    """On a slope without an end every one takes all its steps."""
    density, counted = FunctionDensity(lambda z: z.sum(-1), 2), []
    start = widened(torch.zeros(2), torch.eye(2))
    Probe().modes.run(density, start, progress=lambda: counted.append(density.evaluations.scores))
    assert counted[:40] == [256 * (1 + step) for step in range(1, 41)]
    assert counted[40] - counted[39] < 256  # no ascent any more: the curvature at an end
