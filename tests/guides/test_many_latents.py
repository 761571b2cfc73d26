# SPDX-License-Identifier: Apache-2.0
"""Hundreds of latents: a base from a fitted Gaussian guide, what is made once per buffer, and the word said early."""

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gauss_hermite
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam

from pyro_sm import (
    AutoDiffusion,
    BatchAndMatch,
    BatchAndMatchBase,
    DiffusionSampler,
    GivenBase,
    GuideBase,
    ImportanceWeightedScoreMatching,
    ModelDensity,
    PyroSMWarning,
    StoppingRule,
)
from pyro_sm.base import Draws
from pyro_sm.diagnostics.verdict.verdict import Trust
from pyro_sm.diffusion.covering import WideCovering
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.kernels import gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives.importance_weighted import weightings
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round
from pyro_sm.objectives.importance_weighted.weightings import PathWeights, draw_step_noise, training_points
from pyro_sm.weights import effective_sample_size

MANY = 150
LOADING = torch.stack([torch.linspace(-1.0, 2.0, MANY), torch.cos(torch.arange(MANY) / 7)], 1).double()
DIAGONAL = torch.linspace(0.2, 3.0, MANY, dtype=torch.float64)
LOC = torch.sin(torch.arange(MANY, dtype=torch.float64))
LOG_Z = 1.7


def factors():
    """A law of two factors, times Z: its posterior is itself."""
    pyro.sample("x", dist.LowRankMultivariateNormal(LOC, LOADING, DIAGONAL))
    pyro.factor("evidence", torch.tensor(LOG_Z, dtype=torch.float64))


def mixed():
    pyro.sample("a", dist.LogNormal(0.3, 0.7))
    with pyro.plate("n", 3):
        pyro.sample("b", dist.Normal(torch.tensor([0.0, 2.0, -1.0]), 1.5))


def low_rank_guide(model, loc, diagonal, factor):
    """A low-rank guide with these parameters, as a fit would leave it."""
    pyro.clear_param_store()
    guide = AutoLowRankMultivariateNormal(model, rank=factor.shape[1])
    guide()
    with torch.no_grad():
        guide.loc.copy_(loc)
        guide.cov_factor.copy_(factor / diagonal.sqrt()[:, None])
        guide.scale = diagonal.sqrt()
    return guide


def jiggled(guide):
    """Parameters that differ from each other, as after a fit."""
    guide()
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return guide


# ---------------------------------------------------------------------------------- exact: what the base is


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_the_base_is_the_law_of_the_guide(float64, kind):
    guide = jiggled(kind(mixed))
    base = GuideBase(guide).fit(ModelDensity(mixed))
    found = dist.MultivariateNormal(base.loc, scale_tril=base.scale_tril)
    z = torch.randn(20, 4)
    with torch.no_grad():
        expected = guide.get_posterior().log_prob(z)
    torch.testing.assert_close(found.log_prob(z), expected, rtol=1e-10, atol=1e-10)
    assert base.loc.dtype == base.scale_tril.dtype == torch.float64
    if kind is not AutoDiagonalNormal:  # a factor on the wrong side would show
        wrong = dist.MultivariateNormal(base.loc, base.scale_tril.T @ base.scale_tril)
        assert float((wrong.log_prob(z) - expected).abs().max()) > 1e-2
    wider = GuideBase(guide, inflate=1.5).fit(ModelDensity(mixed))
    torch.testing.assert_close(wider.scale_tril, 1.5 * base.scale_tril)


def test_the_base_of_auto_normal_packs_its_sites(float64):
    guide = jiggled(AutoNormal(mixed))
    base = GuideBase(guide).fit(ModelDensity(mixed))
    torch.testing.assert_close(base.loc, torch.cat([guide.locs.a.reshape(1), guide.locs.b]).detach())
    scale = torch.cat([guide.scales.a.reshape(1), guide.scales.b]).detach()
    torch.testing.assert_close(base.scale_tril, scale.diag())


def test_the_base_of_laplace_approximation(float64):
    pyro.clear_param_store()
    guide = AutoLaplaceApproximation(mixed)
    guide()
    base = GuideBase(guide.laplace_approximation()).fit(ModelDensity(mixed))
    torch.testing.assert_close(base.scale_tril, torch.tensor([0.7, 1.5, 1.5, 1.5]).diag())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in forward mode
def test_the_untrained_diffusion_is_the_guide(float64):
    base = GuideBase(jiggled(AutoLowRankMultivariateNormal(mixed, rank=2)))
    guide = AutoDiffusion(mixed, base=base, num_steps=8, architecture=MLP(width=16, depth=1))
    guide()
    z = torch.randn(10, 4)
    law = dist.MultivariateNormal(base.gaussian.loc, scale_tril=base.gaussian.scale_tril)
    torch.testing.assert_close(guide.get_posterior().log_prob(z), law.log_prob(z), rtol=1e-10, atol=1e-10)


def test_the_base_keeps_what_it_read():
    guide = jiggled(AutoLowRankMultivariateNormal(mixed, rank=1))
    base = GuideBase(guide)
    then = base.gaussian.loc.clone()
    with torch.no_grad():
        guide.loc.add_(5.0)
    pyro.clear_param_store()
    for same in (base, copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(same.fit(ModelDensity(mixed)).loc, then.float())
    assert repr(base) == "GuideBase(AutoLowRankMultivariateNormal of 4 latents, inflate=1.0)"


def test_the_base_counts_no_evaluations():
    density = ModelDensity(mixed)
    before = density.evaluations.values
    GuideBase(jiggled(AutoNormal(mixed))).fit(density)
    assert density.evaluations.values == before


# ------------------------------------------------------------------------------------- errors


def test_a_guide_that_was_never_called_is_refused():
    with pytest.raises(ValueError, match="AutoLowRankMultivariateNormal has never been called: fit it first"):
        GuideBase(AutoLowRankMultivariateNormal(mixed))
    with pytest.raises(ValueError, match="AutoNormal has never been called"):
        GuideBase(AutoNormal(mixed))


def test_other_guides_are_refused():
    guide = AutoDelta(mixed)
    guide()
    with pytest.raises(TypeError, match=r"expected a Gaussian guide.*found AutoDelta"):
        GuideBase(guide)
    with pytest.raises(TypeError, match="found function"):
        GuideBase(lambda: None)
    diffusion = AutoDiffusion(mixed, num_steps=4, architecture=MLP(width=8, depth=1))
    diffusion()
    with pytest.raises(TypeError, match="found AutoDiffusion"):
        GuideBase(diffusion)


def test_a_diverged_guide_is_refused():
    guide = AutoDiagonalNormal(mixed)
    guide()
    with torch.no_grad():
        guide.loc[1] = math.nan
    with pytest.raises(ValueError, match="AutoDiagonalNormal is not finite or not positive definite"):
        GuideBase(guide)


def test_a_guide_for_another_model_is_refused():
    guide = jiggled(AutoNormal(mixed))
    with pytest.raises(ValueError, match=r"AutoNormal covers the latent sites \{'a': 1, 'b': 3\}.*\{'x': 150\}"):
        GuideBase(guide).fit(ModelDensity(factors))


@pytest.mark.parametrize("inflate", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_factor_is_refused(inflate):
    with pytest.raises(ValueError, match="inflate > 0 and finite"):
        GuideBase(jiggled(AutoNormal(mixed)), inflate=inflate)


# -------------------------------------------------------------------------- exact, enumeration: once per buffer


def correlated_process(tril):
    levels = NoiseRange(0.1, 5.0).levels(6, dtype=torch.float64, device=torch.device("cpu"))
    zero = Denoiser(lambda x, c, context: torch.cat([torch.sin(3 * x), 0.1 * x], -1))
    return Diffusion(zero, gaussian_kernels(levels, 2), torch.tensor([1.0, -2.0], dtype=torch.float64), tril)


TRIL = torch.tensor([[2.0, 0.0], [0.8, 1.1]], dtype=torch.float64)
PRECISION = torch.tensor([[1.5, -0.6], [-0.6, 0.9]], dtype=torch.float64)


def quadrature_buffer():
    """A normal law's nodes and weights, exact for its second moments, and its scores there; in two rounds."""
    nodes, weights = gauss_hermite(6)
    unit, weight = torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).reshape(-1)
    z = unit @ torch.linalg.cholesky(torch.linalg.inv(PRECISION)).T
    half = len(z) // 2
    rounds = []
    for part in (slice(0, half), slice(half, None)):
        draws = Draws(
            z[part], torch.zeros(len(z[part])).double(), torch.zeros(len(z[part])).double(), -z[part] @ PRECISION
        )
        rounds.append(Round(draws, weight[part], 1.0, len(z[part])))
    return Buffer(tuple(rounds))


def test_the_information_is_that_of_the_whitened_law():
    """``diag(Lᵀ Σ⁻¹ L)`` by quadrature; that of the latents themselves, or by the wrong factor, is another."""
    made = training_points(correlated_process(TRIL), quadrature_buffer(), with_score=True)
    expected = (TRIL.T @ PRECISION @ TRIL).diagonal()
    torch.testing.assert_close(made.information, expected, rtol=1e-10, atol=1e-10)
    for wrong in (PRECISION.diagonal(), (TRIL @ PRECISION @ TRIL.T).diagonal()):
        assert float((made.information - wrong).abs().max()) > 0.1


def test_lessons_without_scores():
    buffer = quadrature_buffer()
    made = training_points(correlated_process(TRIL), buffer, with_score=False)
    assert made[2:] == (None, None)
    bare = Buffer(tuple(r._replace(draws=r.draws._replace(score=None)) for r in buffer.rounds))
    unknown = training_points(correlated_process(TRIL), bare, with_score=True)
    assert unknown[2:] == (None, None)


def path_loss(buffer, tril, noise, weighting=None):
    process = correlated_process(tril)
    return (weighting or PathWeights()).loss(process, None, WideCovering(), buffer, noise)


def test_steps_on_one_buffer_share_what_is_made_of_it(monkeypatch):
    made = []
    monkeypatch.setattr(weightings, "training_points", lambda *a, **k: made.append(1) or training_points(*a, **k))
    buffer, noise = quadrature_buffer(), draw_step_noise(correlated_process(TRIL).ratios, 40, 2, 0)
    first = path_loss(buffer, TRIL, noise)
    assert torch.equal(path_loss(buffer, TRIL, noise), first)
    assert len(made) == 1
    newer = buffer.push(buffer.rounds[0], 2)
    assert not torch.equal(path_loss(newer, TRIL, noise), first)
    assert len(made) == 2
    path_loss(buffer, TRIL, noise, PathWeights(target_score=False))
    assert len(made) == 3


@pytest.mark.parametrize("entry", [(0, 0), (1, 0), (1, 1)])
def test_a_base_that_was_moved_is_noticed(entry):
    """Another objective may train the base between two steps: what was made for the old one must not be used."""
    buffer, noise = quadrature_buffer(), draw_step_noise(correlated_process(TRIL).ratios, 40, 2, 0)
    stale = path_loss(buffer, TRIL, noise)
    moved = TRIL.clone()
    moved[entry] += 1e-3
    found = path_loss(buffer, moved, noise)
    assert torch.equal(found, path_loss(quadrature_buffer(), moved, noise))
    assert not torch.equal(found, stale)


# ---------------------------------------------------------------------------------------------- statistical


def deviations(factor):
    """How far draws from this base are from the law, in standard errors: along its factors, and in their sum."""
    base = GuideBase(low_rank_guide(factors, LOC, DIAGONAL, factor))
    pyro.clear_param_store()
    guide = AutoDiffusion(factors, base=base, num_steps=8, architecture=MLP(width=8, depth=1))
    guide()
    with torch.no_grad():
        drawn = guide.draw_weighted(guide.bind(factors).density, 2000, covering=WideCovering(0.0))
    along = torch.cat([LOADING, LOADING.sum(1, keepdim=True)], 1)
    square = ((drawn.z - LOC) @ along).square()
    covariance = LOADING @ LOADING.T + DIAGONAL.diag()
    expected = (along.T @ covariance @ along).diagonal()
    off = (square.mean(0) - expected).abs() / (square.std(0) / math.sqrt(len(square)))
    return float(off.max()), drawn.log_weight


def test_a_low_rank_base_draws_from_many_correlated_latents(float64):
    """Without the factors, with one of them turned, or in the units of the guide, the draws are others."""
    found, log_weight = deviations(LOADING)
    assert found < 5
    torch.testing.assert_close(log_weight, torch.full_like(log_weight, LOG_Z), rtol=0, atol=1e-8)
    for wrong in (torch.zeros_like(LOADING), LOADING * torch.tensor([1.0, -0.5]), LOADING / DIAGONAL.sqrt()[:, None]):
        off, other = deviations(wrong)
        assert off > 10
        # All of them count where the base is right. Heavy tails: of 2000 draws .04 to .39 with one factor turned.
        assert effective_sample_size(other) < 0.5 * len(other)


# ------------------------------------------------------------------------------------------------ what it says


def narrow(dim):
    """A posterior a hundred times narrower than the prior, in every latent."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.factor("likelihood", -0.5 * (x / 0.01).square().sum(-1))

    return model


def first_round(dim, base, **options):
    pyro.clear_param_store()
    model = narrow(dim)
    guide = AutoDiffusion(model, base=base, num_steps=4, architecture=MLP(width=8, depth=1))
    objective = ImportanceWeightedScoreMatching(64, batch_size=8, **options)
    SVI(model, guide, Adam({"lr": 1e-3}), objective).step()


@pytest.mark.parametrize("options", [{}, {"population": None}])
def test_too_many_latents_for_the_base_are_said_at_once(options):
    with pytest.warns(PyroSMWarning, match=r"in 301 latents a few carry all the weight.*GuideBase.*NUTS"):
        first_round(301, GivenBase(0.0, 1.0), **options)


def test_nothing_is_said_of_a_base_that_fits_or_of_few_latents():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_round(301, GivenBase(0.0, 0.01))
        first_round(4, GivenBase(0.0, 1.0), population=None)


def test_many_latents_with_refused_weights_are_refused_at_once():
    """The probe does not begin in so many dimensions, and says so."""
    pyro.clear_param_store()
    model = narrow(301)
    sampler = DiffusionSampler(
        model,
        guide=AutoDiffusion(model, base=GivenBase(0.0, 0.01), num_steps=2, architecture=MLP(width=8, depth=1)),
        objective=ImportanceWeightedScoreMatching(64, batch_size=8, steps_per_round=2, population=None),
        stopping=StoppingRule(max_evaluations=128),
        disable_progbar=True,
    )
    sampler.run()  # kernels fitted to 128 draws of 301 latents: weights that are no good
    verdict = sampler.check()
    assert verdict.level is Trust.DISTRUST
    assert verdict.findings.probe.evaluations.values == 0
    assert "301 latents are more than the 300" in str(verdict)


# ------------------------------------------------------------------------------------------------ learning


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no site of the model is observed")
def test_from_an_elbo_to_a_sampler_of_many_latents(float64):
    """Elbo, matching and diffusion in a row, on a law of two factors with a bend in it: k̂ and evidence come out."""
    dim = 40

    def model():
        x = pyro.sample("x", dist.LowRankMultivariateNormal(LOC[:dim], LOADING[:dim], DIAGONAL[:dim]))
        pyro.sample("t", dist.StudentT(8.0, x[..., 0], 1.0))

    pyro.clear_param_store()
    guide = AutoLowRankMultivariateNormal(model, rank=3, init_scale=0.3)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    BatchAndMatch(num_batches=60).fit(guide)
    sampler = DiffusionSampler(
        model,
        guide=AutoDiffusion(model, base=GuideBase(guide), num_steps=12, architecture=MLP(width=64, depth=1)),
        objective=ImportanceWeightedScoreMatching(1024, batch_size=256, steps_per_round=30),
        stopping=StoppingRule(max_evaluations=6000),
        disable_progbar=True,
    )
    sampler.run()
    assert sampler.khat < 0.7
    assert sampler.ess > 0.5
    assert abs(sampler.log_evidence) < 5 * sampler.log_evidence_se + 0.02


# ------------------------------------------------------------------------------ many latents, nothing fitted before

GROUPS = 120


def effects_model():
    """120 centred group effects and their scales, as in the radon data."""
    torch.manual_seed(3)
    group = torch.arange(8 * GROUPS) % GROUPS
    y = (1.2 + 0.4 * torch.randn(GROUPS))[group] + 0.75 * torch.randn(8 * GROUPS)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0))
        with pyro.plate("groups", GROUPS):
            effect = pyro.sample("effect", dist.Normal(mean, spread))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(effect[group], noise), obs=y)

    return model


def test_a_matched_base_weighs_many_centred_effects():
    """``BatchAndMatchBase`` alone; a batch of 32 scores, as is enough in few dimensions, leaves no weights."""
    model = effects_model()
    density = ModelDensity(model)
    torch.manual_seed(0)

    def weights(base):
        law = base.fit(density)
        z = law.loc + torch.randn(4000, density.dim) @ law.scale_tril.T
        log_q = dist.MultivariateNormal(law.loc, scale_tril=law.scale_tril).log_prob(z)
        return effective_sample_size(density.log_prob(z) - log_q) / 4000

    assert weights(BatchAndMatchBase()) > 0.05
    assert weights(BatchAndMatchBase(rank=11)) < 0.01


@pytest.mark.parametrize(("dim", "expected"), [(3, 1.2), (10, 1.2), (100, 1.02)])
def test_a_base_is_the_less_inflated_the_more_latents_there_are(float64, dim, expected):
    scale = torch.linspace(0.5, 2.0, dim)

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(dim), scale).to_event(1))

    found = BatchAndMatchBase().fit(ModelDensity(model)).scale_tril
    torch.testing.assert_close(found.diagonal() / scale, torch.full((dim,), expected), rtol=0.02, atol=0)
