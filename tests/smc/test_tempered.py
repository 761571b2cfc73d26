# SPDX-License-Identifier: Apache-2.0
"""Tempered SMC: log Z and its error against known answers, the path, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.model.density import ModelDensity
from pyro_sm.smc import Bridge, HamiltonianMove, Power, PriorStart, TemperedSMC
from pyro_sm.smc import tempered as tempered_module
from pyro_sm.smc.moves import Move
from pyro_sm.smc.path import OnPath, width
from pyro_sm.smc.tempered import genealogical_error
from pyro_sm.targets import ManyWell, UnequalModes
from pyro_sm.targets.metrics import mode_total_variation
from pyro_sm.weights import evidence

LOG_Z = 2.0


def gaussian(dtype=torch.float64):
    """A correlated Gaussian of known evidence, and a start that is off its place and scale."""
    loc = torch.tensor([1.5, -1.0, 0.5], dtype=dtype)
    tril = torch.tensor([[1.0, 0, 0], [0.6, 0.5, 0], [-0.3, 0.2, 0.3]], dtype=dtype)
    law = GaussianDensity(loc, tril)
    start = GaussianDensity(torch.zeros(3, dtype=dtype), 2 * torch.eye(3, dtype=dtype))
    return FunctionDensity(lambda z: law.log_prob(z) + LOG_Z, 3, dtype=dtype), start, law


def problem(target):
    start = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
    return FunctionDensity(target.log_prob, target.dim, dtype=target.dtype), start


# ----------------------------------------------------------------------------------------- the path


def test_bridge_and_power_written_out():
    density, start, _ = gaussian()
    z = torch.randn(6, 3, dtype=torch.float64)
    beta = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    for path in (Bridge(), Power(0.1)):
        points = path.points(start, density, z)
        found = path.chains(points, beta)
        for i in range(6):
            own, row = float(beta[i]), z[i : i + 1]
            value, score = (own * x for x in density.log_prob_and_score(row))
            if isinstance(path, Bridge):  # log p̃_β = (1 − β) log b + β log p̃
                from_start = start.log_prob_and_score(row)
                value, score = value + (1 - own) * from_start[0], score + (1 - own) * from_start[1]
            torch.testing.assert_close(found.log_p[i : i + 1], value, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.score[i : i + 1], score, rtol=1e-10, atol=1e-10)
        slope = (path.chains(points, beta + 1e-3).log_p - path.chains(points, beta - 1e-3).log_p) / 2e-3
        torch.testing.assert_close(path.gain(points), slope, rtol=1e-8, atol=1e-8)
        on_path = OnPath(path, start, density, beta)
        torch.testing.assert_close(on_path(z)[1], found.score)
        torch.testing.assert_close(on_path.last.log_p, density.log_prob(z))


def test_points_are_taken_row_by_row():
    density, start, _ = gaussian()
    first, second = (Bridge().points(start, density, torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
    keep = torch.tensor([True, False, False, True])
    mixed = first.where(keep, second)
    for found, a, b in zip(mixed, first, second, strict=True):
        assert torch.equal(found, torch.stack([a[0], b[1], b[2], a[3]]))
    assert torch.equal(first.at(torch.tensor([2, 2])).score_p, first.score_p[[2, 2]])


def test_width_of_a_gaussian():
    _, _, law = gaussian()
    _, score = law.log_prob_and_score(law.sample(200_000))
    precision = torch.linalg.inv(law.scale_tril @ law.scale_tril.T)
    torch.testing.assert_close(width(score.square().mean(0)), precision.diagonal().rsqrt(), rtol=0.01, atol=0)
    assert width(torch.zeros(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("hottest", [0.0, 1.1])
def test_a_power_out_of_range(hottest):
    with pytest.raises(ValueError, match=rf"hottest in \(0, 1\], found {hottest}"):
        Power(hottest)


# ------------------------------------------------------------------------------ the estimated error


def test_error_of_one_temperature_is_that_of_importance_sampling():
    log_w = 2 * torch.randn(500, dtype=torch.float64)
    assert genealogical_error(log_w, torch.arange(500)) == pytest.approx(evidence(log_w).log_evidence_se, rel=1e-10)


def test_error_counts_families_not_particles():
    log_w = torch.zeros(6)
    assert genealogical_error(log_w, torch.arange(6)) < 1e-7
    assert genealogical_error(log_w, torch.tensor([0, 0, 0, 3, 3, 3])) == pytest.approx(math.sqrt(2 / 6 * 6 / 5))
    assert genealogical_error(log_w, torch.full((6,), 4)) == math.inf
    assert genealogical_error(torch.tensor([0.0, -math.inf]), torch.arange(2)) == math.inf


def test_the_error_covers_over_repeated_runs():
    density, start, _ = gaussian()
    runs = [TemperedSMC(150, 4).run(density, start) for _ in range(60)]
    error = torch.tensor([run.log_evidence - LOG_Z for run in runs])
    se = torch.tensor([run.log_evidence_se for run in runs])
    found, stated = float(error.std()), float(se.square().mean().sqrt())
    assert 0.7 < stated / found < 1.5  # the sd of 60 runs is known to 9 %
    assert float((error.abs() < 2 * se).double().mean()) > 0.85
    # A known wrong variant: the last weights alone, as if the particles were independent.
    naive = torch.tensor([1 / (run.history[-1].effective_share * 150) - 1 / 150 for run in runs]).mean().sqrt()
    assert float(naive) < 0.7 * found


# -------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_leapfrog", [1, 4])
def test_gaussian(dtype, num_leapfrog):
    density, start, law = gaussian(dtype)
    run = TemperedSMC(4000, 5, HamiltonianMove(num_leapfrog)).run(density, start)
    assert run.z.dtype == run.log_p.dtype == dtype
    assert 0.005 < run.log_evidence_se < 0.06
    assert abs(run.log_evidence - LOG_Z) < 5 * run.log_evidence_se
    covariance = law.scale_tril @ law.scale_tril.T
    # Resampled particles are correlated: three times the error of independent ones.
    error = 3 * covariance.diagonal().sqrt() / math.sqrt(4000)
    assert bool(((run.z.mean(0) - law.loc).abs() < 5 * error).all())
    torch.testing.assert_close(run.z.T.cov(), covariance, rtol=0, atol=0.15)
    value, score = density.log_prob_and_score(run.z)
    torch.testing.assert_close(run.log_p, value)
    torch.testing.assert_close(run.score, score)


def test_a_run_without_moves_is_seen(monkeypatch):
    def stay(self, evaluate, chains, step_size, scale):
        evaluate(chains.z)
        return Move(chains, torch.zeros_like(chains.log_p).bool(), torch.zeros_like(chains.log_p))

    density, start, _ = gaussian()
    monkeypatch.setattr(HamiltonianMove, "apply", stay)
    run = TemperedSMC(4000, 5).run(density, start)
    assert len(run.z.unique(dim=0)) < 1000
    assert run.log_evidence_se > 0.04  # with moves .03: the repeated particles are in the genealogy


def test_weights_of_the_wrong_sign_are_seen(monkeypatch):
    original = tempered_module.resample
    density, start, _ = gaussian()
    monkeypatch.setattr(tempered_module, "resample", lambda log_w, n: original(-log_w, n))
    run = TemperedSMC(2000, 1, max_temperatures=50).run(density, start)
    assert abs(run.log_evidence - LOG_Z) > 5 * 0.06


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unequal_modes(seed):
    torch.manual_seed(seed)
    target = UnequalModes(dtype=torch.float64)
    run = TemperedSMC(2000, 5, HamiltonianMove(5, 0.8)).run(*problem(target))
    assert run.log_evidence_se < 0.12
    assert abs(run.log_evidence) < 4 * run.log_evidence_se
    assert mode_total_variation(target.mode_shares(run.z), target.mode_weights()) < 0.12
    one_mode = target.mode_shares(run.z[(run.z[:, :4] > 0).all(1)])
    assert mode_total_variation(one_mode, target.mode_weights()) > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_well(seed):
    torch.manual_seed(seed)
    target = ManyWell(32, dtype=torch.float64)
    run = TemperedSMC(1500, 15, HamiltonianMove(5, 0.8)).run(*problem(target))  # the error is for moves that mix
    assert target.log_evidence == pytest.approx(164.6957, abs=1e-3)
    assert run.log_evidence_se < 0.45
    assert abs(run.log_evidence - target.log_evidence) < 4 * run.log_evidence_se
    assert abs(target.minority_share(run.z) - (1 - target.right_weight)) < 0.06
    # One well of every pair alone would miss 16 log(1 / right_weight).
    assert -16 * math.log(target.right_weight) > 4 * 0.45


class NormalPrior(FunctionDensity):
    """``N(-1, 2²)`` and three observations of it with noise 0.5."""

    has_prior = True

    def __init__(self, y):
        super().__init__(lambda z: self.log_prior(z) + dist.Normal(z, 0.5).log_prob(y).sum(1), 1, dtype=torch.float32)

    def prior_draws(self, num_draws):
        return dist.Normal(-1.0, 2.0).sample((num_draws, 1))

    def log_prior(self, z):
        return dist.Normal(-1.0, 2.0).log_prob(z[:, 0])


@pytest.mark.parametrize(
    "kind",
    [
        "function",
        "model",
    ],
)
def test_prior_start(kind):
    """Normal prior and likelihood: the evidence is a normal density of the data."""
    y = torch.tensor([1.4, 2.1, 0.3])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(-1.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    density = ModelDensity(model, (y,)) if kind == "model" else NormalPrior(y)
    run = TemperedSMC(2000, 5).run(density, PriorStart(density))
    covariance = 0.25 * torch.eye(3) + 4.0
    truth = float(torch.distributions.MultivariateNormal(torch.full((3,), -1.0), covariance).log_prob(y))
    assert run.log_evidence_se < 0.06
    assert abs(run.log_evidence - truth) < 5 * run.log_evidence_se
    precision = 1 / 4 + 3 / 0.25
    assert abs(float(run.z.mean()) - (-1 / 4 + float(y.sum()) / 0.25) / precision) < 0.03
    assert float(run.z.std()) == pytest.approx(precision**-0.5, rel=0.15)


def test_a_density_without_prior():
    density, _, _ = gaussian()
    with pytest.raises(TypeError, match="no prior that can be drawn from"):
        PriorStart(density)


def test_half_of_space_is_outside_the_support():
    """A half normal: log Z = −log 2 of the normal, and no particle where the density is zero."""
    start = GaussianDensity(torch.full((1,), 0.5, dtype=torch.float64), 1.5 * torch.eye(1, dtype=torch.float64))

    def log_prob(z):
        return torch.where(z[:, 0] > 0, -0.5 * z[:, 0].square(), -math.inf)

    run = TemperedSMC(4000, 5).run(FunctionDensity(log_prob, 1, dtype=torch.float64), start)
    assert abs(run.log_evidence - 0.5 * math.log(math.pi / 2)) < 5 * run.log_evidence_se < 0.3
    assert float(run.z.min()) > 0
    assert abs(float(run.z.mean()) - math.sqrt(2 / math.pi)) < 0.05


# --------------------------------------------------------------------------------- the course of a run


def test_history_evaluations_and_progress():
    density, start, _ = gaussian()
    told = []
    run = TemperedSMC(300, 4, HamiltonianMove(3), effective_share=0.7).run(density, start, progress=told.append)
    assert tuple(told) == run.history
    assert density.evaluations.values == density.evaluations.scores == 300 + len(told) * 4 * 3 * 300
    betas = [step.beta for step in told]
    assert betas == sorted(betas)
    assert betas[-1] == 1.0
    assert run.log_evidence == told[-1].log_evidence
    assert all(step.effective_share == pytest.approx(0.7, abs=1e-3) for step in told[:-1])
    assert told[-1].effective_share >= 0.7 - 1e-3
    assert all(0 < step.acceptance < 1 for step in told)
    assert [step.lines for step in told] == sorted((step.lines for step in told), reverse=True)


def test_the_step_size_finds_its_target():
    density, start, _ = gaussian()
    history = TemperedSMC(2000, 15, HamiltonianMove(3, 0.8)).run(density, start).history
    assert history[-1].acceptance == pytest.approx(0.8, abs=0.05)


def test_a_seed_says_it_all():
    density, start, _ = gaussian()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(TemperedSMC(100, 2).run(density, start))
    assert torch.equal(runs[0].z, runs[1].z)
    assert runs[0].history == runs[1].history
    assert not torch.equal(runs[0].z, runs[2].z)


def test_grad_mode_is_left_alone():
    density, start, _ = gaussian()
    assert not TemperedSMC(50, 1).run(density, start).z.requires_grad
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["num_particles", "num_moves", "max_temperatures"])
def test_counts(name):
    with pytest.raises(ValueError, match=f"{name} >= 1, found 0"):
        TemperedSMC(**{name: 0})


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share(share):
    with pytest.raises(ValueError, match=rf"effective_share in \(0, 1\), found {share}"):
        TemperedSMC(effective_share=share)


@pytest.mark.parametrize(
    ("value", "message"), [(-math.inf, "found 0 finite and 0 .inf"), (math.inf, "found 0 finite and 50 .inf")]
)
def test_impossible_densities(value, message):
    _, start, _ = gaussian()
    density = FunctionDensity(lambda z: 0 * z.sum(1) + value, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        TemperedSMC(50).run(density, start)


def test_too_far():
    _, start, _ = gaussian()
    density = FunctionDensity(lambda z: -1e6 * (z - 5).square().sum(1), 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="after 3 temperatures: start closer"):
        TemperedSMC(50, 1, max_temperatures=3).run(density, start)
