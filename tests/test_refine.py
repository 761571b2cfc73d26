# SPDX-License-Identifier: Apache-2.0
"""From a guide that weights do not save to the posterior: tempered SMC, independent Metropolis, and Pyro's NUTS."""

import importlib.util
import math
import warnings

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer import MCMC, NUTS, SVI, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import constraints

from pyro_sm import (
    AutoDiffusion,
    GivenBase,
    ImportanceResampling,
    ImportanceWeightedScoreMatching,
    ModelDensity,
    NoCorrection,
    Trust,
    TrustWarning,
    check,
    compare_evidence,
    nuts_from_guide,
    temper_guide,
)
from pyro_sm.corrections import IndependentMetropolis
from pyro_sm.diagnostics import draw_from_guide
from pyro_sm.nn.mlp import MLP
from pyro_sm.smc import TemperedSMC
from pyro_sm.smc.mixture_start import damped_covariance
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth

LINES = [
    pytest.param(True, id="arviz 0"),
    pytest.param(
        False,
        id="arviz 1",
        marks=pytest.mark.skipif(importlib.util.find_spec("arviz_base") is None, reason="needs arviz-base"),
    ),
]
QUICK = TemperedSMC(num_particles=2048, num_moves=5)

# ------------------------------------------------------------------------------------------- known answers

LEFT = 0.3
CENTRES = torch.tensor([[-2.0, 1.0], [2.0, -1.0]])
WIDTHS = torch.tensor([[0.5, 0.8], [0.6, 0.4]])
LOG_Z = 1.7


def two_modes():
    """Modes of .3 and .7, latents ``a`` and ``b`` of their own, a flat prior: ``log Z = 1.7``."""
    flat = dist.ImproperUniform(constraints.real, (), ())
    x = torch.stack([pyro.sample("a", flat), pyro.sample("b", flat)], -1)
    parts = [dist.Normal(m.to(x), s.to(x)).log_prob(x).sum(-1) for m, s in zip(CENTRES, WIDTHS, strict=True)]
    pyro.factor("y", torch.logaddexp(parts[0] + math.log(LEFT), parts[1] + math.log(1 - LEFT)) + LOG_Z)


def on_one_mode(width=1.25):
    """A Gaussian on the smaller mode, whose tail reaches into the other."""
    values = {"a": CENTRES[0, 0], "b": CENTRES[0, 1]}
    guide = AutoNormal(two_modes, init_loc_fn=init_to_value(values=values), init_scale=width)
    guide()
    return guide


def moments_of_two_modes():
    """Mean and variance (2,) of ``(a, b)``."""
    share = torch.tensor([LEFT, 1 - LEFT])[:, None]
    mean = (share * CENTRES).sum(0)
    return mean, (share * (WIDTHS.square() + CENTRES.square())).sum(0) - mean.square()


def errors_of_two_modes(samples, effective):
    """Of means, variances and the share of the smaller mode, in standard errors of ``effective`` draws."""
    x = torch.stack([samples["a"], samples["b"]], -1).double()
    mean, variance = (m.double() for m in moments_of_two_modes())
    centred = (x - mean).square()
    left = (x[:, 0] < 0).double()
    return torch.cat(
        [
            (x.mean(0) - mean).abs() / (variance / effective).sqrt(),
            (centred.mean(0) - variance).abs() / (centred.var(0) / effective).sqrt(),
            ((left.mean() - LEFT).abs() / math.sqrt(LEFT * (1 - LEFT) / effective))[None],
        ]
    )


def particles_worth(run):
    return 1 / (run.log_evidence_se**2 + 1 / len(run.particles.z))


def pool_of(model, guide, n, seed=3):
    torch.manual_seed(seed)
    return draw_from_guide(guide, ModelDensity(model), n)


LOC = torch.tensor([1.0, -2.0, 0.5])
TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.2, 0.0], [-0.5, 0.3, 2.0]])


def correlated():
    """A Gaussian with a ridge; ``log Z = 1.7``."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    pyro.factor("y", dist.MultivariateNormal(LOC, scale_tril=TRIL).log_prob(x) + LOG_Z)


def too_narrow():
    """The right place, scales five times too small, and nothing of the ridge."""
    guide = AutoMultivariateNormal(correlated, init_loc_fn=init_to_value(values={"x": LOC}), init_scale=0.2)
    guide()
    return guide


def shifted_diffusion():
    """Never trained, on the smaller mode; its covering component reaches a little further."""
    base = GivenBase(CENTRES[0], torch.tensor([1.0, 1.0]))
    guide = AutoDiffusion(two_modes, base=base, num_steps=8, architecture=MLP(width=8, depth=1))
    guide()
    return guide


# ------------------------------------------------------------------------------------------- bad guides


@pytest.mark.parametrize("make", [on_one_mode, shifted_diffusion])
def test_a_guide_on_one_of_two_modes_is_put_right_by_smc(make):
    guide = make()
    pool = pool_of(two_modes, guide, 4000)
    assert pareto_smooth(pool.log_weight).khat > 1
    run = temper_guide(two_modes, guide)
    assert 0.01 < run.log_evidence_se < 0.08
    assert abs(run.log_evidence - LOG_Z) < 5 * run.log_evidence_se
    worth = particles_worth(run)
    assert float(errors_of_two_modes(run.samples, worth).max()) < 5
    raw = {"a": pool.z[:, 0], "b": pool.z[:, 1]}
    assert float(errors_of_two_modes(raw, worth).max()) > 10
    weighted = evidence(pool.log_weight)  # wrong, or so uncertain that it says nothing
    assert abs(weighted.log_evidence - LOG_Z) > 5 * run.log_evidence_se or weighted.log_evidence_se > 0.2


def test_a_guide_that_is_too_narrow_is_put_right_by_smc():
    guide = too_narrow()
    pool = pool_of(correlated, guide, 4000)
    assert pareto_smooth(pool.log_weight).khat > 0.9
    run = temper_guide(correlated, guide)
    assert run.log_evidence_se < 0.05
    assert abs(run.log_evidence - LOG_Z) < 5 * run.log_evidence_se
    worth = particles_worth(run)

    def worst(x):
        white = torch.linalg.solve_triangular(TRIL, (x - LOC).T, upper=False).T
        second = (white.T @ white / len(white) - torch.eye(3)).abs().max() * math.sqrt(worth / 2)
        return max(float(white.mean(0).abs().max()) * math.sqrt(worth), float(second))

    assert worst(run.samples["x"]) < 5
    assert worst(pool.z) > 10
    assert worst(pool.z[ImportanceResampling().apply(pool, 2000)]) > 10  # weights alone do not do it


@pytest.mark.slow
@pytest.mark.parametrize("make", [on_one_mode, shifted_diffusion])
def test_independent_metropolis_gets_there_given_enough_evaluations(make):
    """The heaviest draw holds a chain for thousands of proposals: 4000 draws say nothing, four million do."""
    guide = make()
    few, many = (pool_of(two_modes, guide, n) for n in (4000, 4_000_000))
    assert pareto_smooth(few.log_weight).khat > 1
    chains = IndependentMetropolis(100)
    held = many.z[chains.walk(many.log_weight).visited].double()  # (S, C, 2)
    mean, variance = (m.double() for m in moments_of_two_modes())
    square = (held - mean).square()
    left = (held[..., :1] < 0).double()
    truths = [mean, variance, torch.tensor([LEFT], dtype=torch.float64)]
    for values, truth, most in zip((held, square, left), truths, (0.2, 0.2, 0.05), strict=True):
        average = values.mean(0)  # one of every chain: they are independent but for where they begin
        error = average.std(0) / math.sqrt(len(average))
        assert bool(((average.mean(0) - truth).abs() < 5 * error).all())
        assert float(error.max()) < most
    worth = effective_sample_size(many.log_weight)
    chosen = many.z[chains.apply(many, 4000)]
    assert float(errors_of_two_modes({"a": chosen[:, 0], "b": chosen[:, 1]}, worth / 2).max()) < 5
    short = few.z[IndependentMetropolis(4).apply(few, 2000)]
    raw = many.z[NoCorrection().apply(many, 4000)]
    for wrong in (short, raw):
        assert float(errors_of_two_modes({"a": wrong[:, 0], "b": wrong[:, 1]}, worth).max()) > 10


def test_what_a_run_leaves():
    guide = on_one_mode()
    state = torch.get_rng_state()
    runs = [temper_guide(two_modes, guide, smc=QUICK, num_draws=500, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].samples["a"], runs[1].samples["a"])
    assert not torch.equal(runs[0].samples["a"], runs[2].samples["a"])
    run = runs[0]
    assert run.samples["a"].shape == (2048,)
    assert torch.equal(torch.stack([run.samples["a"], run.samples["b"]], 1), run.particles.z)
    steps = len(run.particles.history)
    assert run.evaluations.scores == 2048 * (1 + 5 * steps)
    assert run.evaluations.values == 500 + run.evaluations.scores
    spent = run.evaluations.values
    run.density.log_prob(run.particles.z)
    assert run.evaluations.values == spent
    assert "ModelDensity" not in repr(run)


def test_a_guide_of_few_draws_is_enough_for_a_start():
    run = temper_guide(two_modes, on_one_mode(), smc=QUICK, num_draws=30)
    assert abs(run.log_evidence - LOG_Z) < 5 * run.log_evidence_se < 2


# ------------------------------------------------------------------------------------------- other models


def with_prior(y):
    """Normal prior and likelihood: the evidence is a normal density of the data."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(-1.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evidence_of_a_model_with_data(dtype):
    y = torch.tensor([1.4, 2.1, 0.3], dtype=dtype)

    def guide(y):
        pyro.sample("mean", dist.Normal(y.new_tensor(-1.0), 0.5))

    run = temper_guide(with_prior, guide, y, smc=QUICK)
    truth = dist.MultivariateNormal(torch.full((3,), -1.0), 0.25 * torch.eye(3) + 4.0).log_prob(y.float())
    assert run.samples["mean"].dtype == dtype
    assert abs(run.log_evidence - float(truth)) < 5 * run.log_evidence_se < 1


@config_enumerate
def many_sites(*, data):
    """Sites whose alphabetical order is not the model's, of three supports, a plate, and groups summed out."""
    width = pyro.sample("width", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 3):
        centre = pyro.sample("centre", dist.Normal(torch.zeros(2), 4.0).to_event(1))
    with pyro.plate("data", len(data)):
        group = pyro.sample("group", dist.Categorical(share))
        pyro.sample("y", dist.Normal(centre[group], width).to_event(1), obs=data)


DATA = torch.tensor([[-4.0, 0.0], [-3.5, 0.5], [0.0, 3.0], [0.5, 3.5], [4.0, -1.0], [3.0, -1.5], [3.5, -0.5]])
START = {
    "width": torch.tensor(0.6),
    "share": torch.tensor([0.3, 0.3, 0.4]),
    "centre": torch.tensor([[-3.8, 0.2], [0.2, 3.2], [3.5, -1.0]]),
}


def guide_of_many_sites():
    guide = AutoMultivariateNormal(
        pyro.poutine.block(many_sites, hide=["group"]), init_loc_fn=init_to_value(values=START), init_scale=0.3
    )
    guide(data=DATA)
    # Something to tell blocks by: correlations between sites, and widths of their own.
    dim = guide.latent_dim
    tril = torch.eye(dim) + 0.2 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)).tril(-1)
    guide.scale_tril = tril
    guide.scale = torch.linspace(0.1, 0.4, dim)
    return guide


def test_sites_of_all_kinds_have_their_own_draws_again():
    run = temper_guide(many_sites, guide_of_many_sites(), data=DATA, smc=QUICK)
    shapes = {name: tuple(value.shape[1:]) for name, value in run.samples.items()}
    assert shapes == {"width": (), "share": (3,), "centre": (3, 2)}
    assert bool((run.samples["width"] > 0).all())
    torch.testing.assert_close(run.samples["share"].sum(1), torch.ones(2048))
    density = ModelDensity(many_sites, (), {"data": DATA})
    torch.testing.assert_close(density.log_prob(density.pack(run.samples)), run.particles.log_p, rtol=1e-3, atol=1e-3)


def test_the_mass_matrix_has_the_blocks_of_the_sites_it_is_for():
    guide = guide_of_many_sites()
    mcmc = nuts_from_guide(many_sites, guide, data=DATA, num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(data=DATA)
    ((names, found),) = mcmc.kernel.inverse_mass_matrix.items()
    assert names == ("centre", "share", "width")
    density = ModelDensity(many_sites, (), {"data": DATA})
    pyro.set_rng_seed(0)
    pool = draw_from_guide(guide, density, 4000, (), {"data": DATA})
    values = density.unpack(pool.z)
    supports = {"width": constraints.positive, "share": constraints.simplex, "centre": constraints.real}
    flat = [torch.distributions.biject_to(supports[n]).inv(values[n]).reshape(4000, -1) for n in names]
    log_weight, _ = damped_covariance(pool, 100 / 4000)
    expected = torch.cat(flat, 1).double().T.cov(correction=0, aweights=torch.softmax(log_weight, 0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    order = [6, 7, 8, 0, 1, 2, 3, 4, 5]  # that of the model is another
    assert not torch.allclose(found.double(), expected[order][:, order], rtol=0.1, atol=0.01)
    assert not mcmc.kernel._adapter.adapt_mass_matrix


@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu")
def test_chains_begin_at_draws_of_the_guide():
    guide = guide_of_many_sites()
    mcmc = nuts_from_guide(many_sites, guide, data=DATA, num_chains=2, num_draws=300, disable_progbar=True)
    first = mcmc.sampler.initial_params
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "width": (2,),
        "share": (2, 2),
        "centre": (2, 3, 2),
    }
    pyro.set_rng_seed(0)
    density = ModelDensity(many_sites, (), {"data": DATA})
    z = draw_from_guide(guide, density, 300, (), {"data": DATA}).z
    packed = torch.cat([first[name].reshape(2, -1) for name in ("width", "share", "centre")], 1)
    assert all(bool((z == row).all(1).any()) for row in packed)
    assert not torch.equal(packed[0], packed[1])


@pytest.mark.filterwarnings("ignore:num_chains=200 is more than available_cpu")
def test_many_chains_begin_in_the_shares_of_the_weighted_draws():
    def guide():
        parts = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.8, 0.2])), dist.Independent(dist.Normal(CENTRES, WIDTHS), 1)
        )
        x = pyro.sample("x", parts, infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(x[..., 0]))
        pyro.sample("b", dist.Delta(x[..., 1]))

    mcmc = nuts_from_guide(two_modes, guide, num_chains=200, disable_progbar=True)
    raw = nuts_from_guide(two_modes, guide, num_chains=200, correction=NoCorrection(), disable_progbar=True)
    left = [float((run.sampler.initial_params["a"] < 0).float().mean()) for run in (mcmc, raw)]
    assert left[0] == pytest.approx(LEFT, abs=0.1)
    assert left[1] == pytest.approx(0.8, abs=0.15)


# ------------------------------------------------------------------------------------------- NUTS


def regression(dtype=torch.float32):
    """Four regressors that are nearly one: ``(model, guide, X, y, mean, covariance, count of evaluations)``.

    The guide is off by half a standard deviation and twice as wide in variance, and knows the correlations.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = normal(100, 1) + 0.1 * normal(100, 4)
    y = x @ torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=dtype) + 0.5 * normal(100)
    covariance = torch.linalg.inv(x.T @ x / 0.25 + torch.eye(4, dtype=dtype) / 25)
    mean = covariance @ x.T @ y / 0.25
    count = [0]

    def model(x, y):
        count[0] += 1
        b = pyro.sample("b", dist.Normal(x.new_zeros(4), 5.0).to_event(1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal((x @ b.unsqueeze(-1)).squeeze(-1), 0.5), obs=y)

    def guide(x, y):
        off = mean + 0.5 * covariance.diagonal().sqrt()
        pyro.sample("b", dist.MultivariateNormal(off, 2 * covariance))

    return model, guide, x, y, mean, covariance, count


def worst_of_regression(b, mean, covariance):
    """Of means and variances of the white coefficients, as if every fourth draw were new, in standard errors."""
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (b - mean).T, upper=False).T
    worth = len(white) / 4
    return max(
        float(white.mean(0).abs().max()) * math.sqrt(worth),
        float((white.var(0) - 1).abs().max()) * math.sqrt(worth / 2),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nuts_from_a_guide_is_right_and_cheaper_than_cold(dtype):
    model, guide, x, y, mean, covariance, count = regression(dtype)
    mcmc = nuts_from_guide(model, guide, x, y, num_samples=300, disable_progbar=True)
    count[0] = 0
    mcmc.run(x, y)
    warm, b = count[0], mcmc.get_samples()["b"]
    assert b.dtype == dtype
    assert b.shape == (300, 4)
    assert worst_of_regression(b, mean, covariance) < 5
    raw = dist.MultivariateNormal(mean + 0.5 * covariance.diagonal().sqrt(), 2 * covariance).sample((300,))
    assert worst_of_regression(raw, mean, covariance) > 10
    if dtype == torch.float64:  # the count is the same for both; a cold run takes ten times as long
        return
    cold = MCMC(NUTS(model), 30, warmup_steps=100, disable_progbar=True)
    count[0] = 0
    cold.run(x, y)
    assert warm < count[0] / 2, "a tenth of the draws at twice the cost"


def test_arviz_takes_what_pyro_made():
    model, guide, x, y, *_ = regression()
    mcmc = nuts_from_guide(model, guide, x, y, num_samples=60, warmup_steps=30, num_draws=500, disable_progbar=True)
    mcmc.run(x, y)
    idata = az.from_pyro(mcmc)
    assert idata.posterior["b"].shape == (1, 60, 4)
    assert idata.sample_stats["diverging"].sum() == 0


def test_nuts_on_an_improper_prior_stays_where_it_begins():
    """Each chain in its mode, as documented; from a guide on the smaller one, the other is not seen."""
    values = {"a": CENTRES[0, 0], "b": CENTRES[0, 1]}
    guide = AutoNormal(two_modes, init_loc_fn=init_to_value(values=values), init_scale=0.4)
    guide()
    mcmc = nuts_from_guide(two_modes, guide, num_samples=300, disable_progbar=True)
    mcmc.run()
    x = torch.stack([mcmc.get_samples()["a"], mcmc.get_samples()["b"]], -1)
    white = (x - CENTRES[0]) / WIDTHS[0]
    assert float(white.mean(0).abs().max()) < 5 / math.sqrt(300 / 4)
    assert float((white.var(0) - 1).abs().max()) < 5 * math.sqrt(2 / (300 / 4))


def test_nuts_on_sites_of_all_kinds():
    guide = guide_of_many_sites()
    mcmc = nuts_from_guide(
        many_sites, guide, data=DATA, num_samples=20, warmup_steps=20, num_draws=500, disable_progbar=True
    )
    mcmc.run(data=DATA)
    found = mcmc.get_samples()
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "width": (20,), "share": (20, 3), "centre": (20, 3, 2),
    }  # fmt: skip
    assert float(found["width"].std()) > 0


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("legacy", LINES)
def test_particles_as_arviz_data(legacy, tmp_path):
    y = torch.tensor([1.4, 2.1, 0.3])
    run = temper_guide(with_prior, AutoNormal(with_prior), y, smc=TemperedSMC(4097, 5), seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idata = run.to_arviz(legacy=legacy, objective="Trace_ELBO")
    posterior = idata.posterior
    assert posterior["mean"].shape == (4, 1024)
    assert torch.equal(torch.as_tensor(posterior["mean"].values).flatten(), run.samples["mean"][:4096])
    assert list(idata.sample_stats.data_vars) == ["lp"]
    for name in ("observed_data", "posterior_predictive", "prior", "log_likelihood"):
        assert hasattr(idata, name), name
    assert not hasattr(idata, "guide")
    attributes = posterior.attrs
    assert not {"pareto_khat", "importance_ess"} & set(attributes)
    assert attributes["correction"] == "tempered SMC from the guide"
    assert attributes["log_evidence"] == run.log_evidence
    assert attributes["log_evidence_se"] == run.log_evidence_se
    assert attributes["density_evaluations"] == run.evaluations.values
    assert attributes["gradient_evaluations"] == run.evaluations.scores
    assert (attributes["objective"], attributes["seed"]) == ("Trace_ELBO", 5)
    path = tmp_path / "tempered.nc"
    idata.to_netcdf(path)
    read = az.from_netcdf(path) if legacy else xarray.open_datatree(path)
    for data in (idata, read):
        verdict = check(data)
        assert verdict == run.check()
        assert verdict.level is Trust.CARE
        assert verdict.findings.weights.khat is None
        assert any("nothing has looked elsewhere" in reason.finding for reason in verdict.reasons)
        assert verdict.findings.weights.ess == pytest.approx(particles_worth(run))
    read.close()


def test_particles_that_are_worth_little_are_called_so():
    run = temper_guide(two_modes, on_one_mode(0.3), smc=TemperedSMC(128, 1), num_draws=100)
    assert particles_worth(run) < 100
    with pytest.warns(TrustWarning, match="effective draws"):
        idata = run.to_arviz(num_samples=100, num_chains=2)
    assert idata.posterior["a"].shape == (2, 50)
    assert check(idata).level is Trust.DISTRUST


def test_an_export_of_part_of_the_particles():
    run = temper_guide(correlated, too_narrow(), smc=TemperedSMC(2048, 10))
    assert run.to_arviz(num_samples=6, num_chains=1).posterior["x"].shape == (1, 6, 3)
    with pytest.raises(ValueError, match="num_chains to divide num_samples=7"):
        run.to_arviz(num_samples=7, num_chains=2)
    with pytest.raises(ValueError, match="found 2048"):
        run.to_arviz(num_samples=4096)
    with pytest.raises(ValueError, match="found 0"):
        run.to_arviz(num_chains=0)


def test_models_are_compared_by_the_evidence_of_particles():
    y = torch.tensor([1.4, 2.1, 0.3])

    def sharper(y):
        mean = pyro.sample("mean", dist.Normal(1.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    runs = {f.__name__: temper_guide(f, AutoNormal(f), y, smc=QUICK) for f in (with_prior, sharper)}
    found = compare_evidence(runs)
    assert found.models[0].name == "sharper"


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (nuts_from_guide, {"num_chains": 0}, "num_chains >= 1, found 0"),
        (nuts_from_guide, {"num_samples": 0}, "num_samples >= 1, found 0"),
        (nuts_from_guide, {"num_draws": 1}, "num_draws >= 2, found 1"),
        (temper_guide, {"num_draws": 1}, "num_draws >= 2, found 1"),
    ],
)
def test_bad_counts_are_refused_before_anything_runs(function, options, words):
    def untouched():
        pytest.fail("the model was run")

    with pytest.raises(ValueError, match=words):
        function(untouched, untouched, **options)


@pytest.mark.parametrize("function", [nuts_from_guide, temper_guide])
def test_guides_without_a_density_are_refused_before_any_evaluation(function, monkeypatch):
    model = regression()[0]
    args = regression()[2:4]
    guide = AutoDelta(model)
    guide(*args)
    counted = []
    original = ModelDensity.log_prob
    monkeypatch.setattr(ModelDensity, "log_prob", lambda self, z: counted.append(z) or original(self, z))
    monkeypatch.setattr(ModelDensity, "log_prob_and_score", lambda self, z: pytest.fail("evaluated"))
    with pytest.raises(TypeError, match="point estimate"):
        function(model, guide, *args)
    with pytest.raises(TypeError, match="expected a Pyro guide"):
        function(model, "guide", *args)
    assert counted == []


@pytest.mark.parametrize("function", [nuts_from_guide, temper_guide])
def test_a_guide_that_is_nowhere_near(function):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("inside", torch.where(x.abs() < 3, 0.0, -math.inf))

    def guide():
        pyro.sample("x", dist.Normal(50.0, 0.1))

    with pytest.raises(ValueError, match="at least one finite log weight"):
        function(model, guide)


def test_draws_that_overflow_do_not_count():
    """A guide in a constrained space that overflows has latents of infinity, and weights of NaN."""

    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.factor("y", -0.5 * (s.log() - 1).square())

    def guide():
        pyro.sample("s", dist.LogNormal(60.0, 30.0))

    pool = pool_of(model, guide, 4000)
    assert 100 < int((~torch.isfinite(pool.z)).sum()) < 1000
    run = temper_guide(model, guide, smc=QUICK)
    truth = math.log(math.sqrt(0.5)) - 0.25  # N(0, 1) times exp(−(z−1)²/2)
    assert abs(run.log_evidence - truth) < 5 * run.log_evidence_se < 1
    mcmc = nuts_from_guide(model, guide, num_samples=5, warmup_steps=5, disable_progbar=True)
    (matrix,) = mcmc.kernel.mass_matrix_adapter._covariance.values()
    assert bool(torch.isfinite(matrix).all())


def test_neutra_on_a_guide_that_was_only_trained():
    """Score matching never calls the guide, and the plates that NeuTra asks for are made when it is set up."""

    def model(y):
        with pyro.plate("n", 2):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    guide = AutoDiffusion(model, num_steps=4, architecture=MLP(width=8, depth=1))
    y = torch.tensor([1.0, 2.0])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), ImportanceWeightedScoreMatching(64))
    svi.step(y)
    warped = NeuTraReparam(guide).reparam(model)
    assert bool(torch.isfinite(pyro.poutine.trace(warped).get_trace(y).log_prob_sum()))
