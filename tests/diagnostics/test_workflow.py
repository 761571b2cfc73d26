# SPDX-License-Identifier: Apache-2.0
"""From prior to comparison: ArviZ on our export, alone and beside a fit of Pyro's NUTS, without a word."""

import functools
import importlib.util
import math

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer import MCMC, NUTS

from pyro_sm.base import Draws, PyroSMWarning
from pyro_sm.diagnostics import Provenance, draws_to_arviz, plot_khat
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.model.density import ModelDensity

HAS_LINE_1 = importlib.util.find_spec("arviz_base") is not None
LINES = [
    pytest.param(True, id="arviz 0"),
    pytest.param(False, id="arviz 1", marks=pytest.mark.skipif(not HAS_LINE_1, reason="needs arviz-base")),
]
PROVENANCE = Provenance("by hand", 0, 1, 1)
# What ArviZ 0.23 says of its own use of matplotlib 3.11 and pandas 3.1, whatever the data.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
    pytest.mark.filterwarnings("ignore:The (inplace|copy) keyword"),
]

X = torch.tensor([-1.3, -0.9, -0.2, 0.1, 0.4, 0.8, 1.1, 1.3], dtype=torch.float64)
Y = torch.tensor([-1.9, -0.8, -0.3, 0.9, 0.7, 2.0, 1.8, 2.3], dtype=torch.float64)


def line(x, y):
    """Gaussian, with everything a user's model has: a vector, a scalar, a plate and a deterministic site."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
    shift = pyro.sample("shift", dist.Normal(x.new_tensor(0.2), 0.5))
    with pyro.plate("bush", len(x)):
        mean = pyro.deterministic("mean", beta[..., :1] + beta[..., 1:] * x + shift)
        pyro.sample("y", dist.Normal(mean, 0.6), obs=y)


def exact() -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean (3,) and covariance (3, 3) of ``(beta, shift)``."""
    design = torch.stack([torch.ones_like(X), X, torch.ones_like(X)], 1)
    scale = torch.tensor([2.0, 2.0, 0.5], dtype=X.dtype)
    cov = torch.linalg.inv(design.T @ design / 0.36 + torch.diag(scale**-2.0))
    return cov @ (design.T @ Y / 0.36 + torch.tensor([0, 0, 0.2 / 0.25], dtype=X.dtype)), cov


@functools.cache
def export(legacy: bool, num_samples: int = 2000):
    pyro.set_rng_seed(5)
    density = ModelDensity(line, (X, Y))
    mean, cov = exact()
    tril = 1.1 * torch.linalg.cholesky(cov)
    z = mean + torch.randn(4 * num_samples, 3, dtype=X.dtype) @ tril.T
    log_p = density.log_prob(z)
    draws = Draws(z, log_p, log_p - gaussian_log_prob(z, mean, tril))
    return draws_to_arviz(density, draws, num_samples=num_samples, provenance=PROVENANCE, legacy=legacy)


@functools.cache
def nuts():
    """The same model, by Pyro and ArviZ alone."""
    pyro.set_rng_seed(6)
    torch.set_default_dtype(torch.float64)
    try:
        chain = MCMC(NUTS(line), num_samples=500, warmup_steps=150, disable_progbar=True)
        chain.run(X, Y)
        return az.from_pyro(chain, log_likelihood=True)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


# ---------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("legacy", LINES)
def test_prior_and_prior_predictive_are_those_of_the_model(legacy):
    data = export(legacy)
    prior, predictive = data["prior"], data["prior_predictive"]
    assert set(prior.data_vars) == {"beta", "shift", "mean"}
    assert prior["mean"].dims == predictive["y"].dims == ("chain", "draw", "bush")
    beta, shift = prior["beta"].values[0], prior["shift"].values[0]
    mean = beta[:, :1] + beta[:, 1:] * X.numpy() + shift[:, None]
    np.testing.assert_allclose(prior["mean"].values[0], mean, rtol=1e-12)
    y = predictive["y"].values[0]
    n = len(y)
    variance = 4 + 4 * X.numpy() ** 2 + 0.25 + 0.36
    assert (np.abs(y.mean(0) - 0.2) < 5 * np.sqrt(variance / n)).all()
    np.testing.assert_allclose(y.var(0), variance, rtol=5 * math.sqrt(2 / n))
    # drawn from the prior draws beside them, not from others: the rest has the variance of the noise alone
    np.testing.assert_allclose((y - mean).var(), 0.36, rtol=5 * math.sqrt(2 / (n * len(X))))
    assert (data["posterior_predictive"]["y"].values.var((0, 1)) < 0.2 * variance).all()


@pytest.mark.parametrize("legacy", LINES)
def test_log_prior_of_every_site_at_the_posterior(legacy):
    data = export(legacy)
    beta, shift = (torch.tensor(data["posterior"][name].values) for name in ("beta", "shift"))
    expected = {"beta": dist.Normal(0.0, 2.0).log_prob(beta).sum(-1), "shift": dist.Normal(0.2, 0.5).log_prob(shift)}
    assert set(data["log_prior"].data_vars) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(data["log_prior"][name].values, value, rtol=1e-6)
        assert data["log_prior"][name].dims == ("chain", "draw")


def test_the_terms_of_the_log_prior_are_all_of_it():
    """A transformed site in a plate, a dependent one: the sum and the log determinants make ``log_prior``."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("w", dist.Dirichlet(torch.ones(4, dtype=X.dtype)))
        pyro.sample("obs", dist.Normal(scale, 1.0), obs=X[0])

    density = ModelDensity(model, ())
    z = density.prior_draws(7)
    terms = density.log_prior_terms(z)
    assert {name: term.shape for name, term in terms.items()} == {"scale": (7,), "x": (7, 3), "w": (7, 3)}
    total = sum(term.reshape(7, -1).sum(-1) for term in terms.values())
    torch.testing.assert_close(total + density._structure.constrain(z)[1], density.log_prior(z))


@pytest.mark.parametrize("legacy", LINES)
def test_arviz_sees_which_prior_matters(legacy):
    """Power scaling: ``shift`` is known from its prior, the slope from the data."""
    if legacy:
        table = az.psens(export(True), component="prior")
        shift, beta = float(table["shift"]), np.asarray(table["beta"])
        assert shift > 2 * beta[1]
    else:
        stats = pytest.importorskip("arviz_stats")
        table = stats.psense(export(False))
        # Of all variables those that the data do not tell apart follow the prior most.
        assert float(stats.psense_summary(export(False)).loc["shift", "prior"]) > 0.05
        assert np.isfinite(np.asarray(table["beta"])).all()


def test_data_that_the_prior_cannot_give_are_left_out_with_a_reason(monkeypatch):
    density = ModelDensity(line, (X, Y))
    z = density.prior_draws(400)
    draws = Draws(z, density.log_prob(z), 0.1 * torch.randn(400))
    draw_data, calls = density.posterior_predictive, []

    def fails_for_the_prior(part):
        calls.append(part)
        if len(calls) > 1:
            raise ValueError("the rate is infinite")
        return draw_data(part)

    monkeypatch.setattr(density, "posterior_predictive", fails_for_the_prior)
    with pytest.warns(PyroSMWarning, match="no group prior_predictive: the rate is infinite") as said:
        data = draws_to_arviz(density, draws, num_samples=100, provenance=PROVENANCE, legacy=True)
    assert said[0].filename == __file__
    assert {"prior", "posterior_predictive"} <= set(data.groups())
    assert "prior_predictive" not in data.groups()
    with pytest.raises(ValueError, match="infinite"):  # data of the posterior must not be missing
        draws_to_arviz(density, draws, num_samples=100, provenance=PROVENANCE, legacy=True)


def named_like_ours(y):
    log_weight = pyro.sample("log_weight", dist.Normal(y.new_tensor(1.0), 1.0))
    with pyro.plate("bush", len(y)):
        log_q = pyro.sample("log_q", dist.Normal(log_weight, 1.0))
        pyro.sample("lp", dist.Normal(log_q, 1.0), obs=y)


@pytest.mark.parametrize("legacy", LINES)
def test_sites_with_names_of_ours(legacy, tmp_path):
    density = ModelDensity(named_like_ours, (Y,))
    z = density.prior_draws(400)
    log_p, log_w = density.log_prob(z), 0.1 * torch.randn(400, dtype=z.dtype)
    data = draws_to_arviz(density, Draws(z, log_p, log_w), num_samples=100, provenance=PROVENANCE, legacy=legacy)
    data.to_netcdf(str(tmp_path / "names.nc"))
    guide = data["guide"]
    np.testing.assert_allclose(guide["log_weight"].values[0], log_w)
    np.testing.assert_allclose(guide["log_weight_site"].values[0], density.unpack(z)["log_weight"])
    np.testing.assert_allclose(guide["lp"].values[0], log_p)
    assert data["posterior"]["log_q"].dims == ("chain", "draw", "bush")
    assert data["observed_data"]["lp"].dims == data["log_likelihood"]["lp"].dims[2:] == ("bush",)
    assert data["sample_stats"]["lp"].dims == data["sample_stats"]["log_q"].dims == ("chain", "draw")
    plot_khat(data)


# ------------------------------------------------------------------------------------- ArviZ, without a word


ARVIZ_0 = {
    "summary": az.summary,
    "loo": az.loo,
    "loo of every point": lambda data: az.loo(data, pointwise=True),
    "loo_pit": lambda data: az.loo_pit(data, y="y"),
    "extract": az.extract,
    "extract of predictions": lambda data: az.extract(data, group="posterior_predictive", num_samples=10),
    "to_dataframe": lambda data: data.to_dataframe(),
    "hdi": az.hdi,
    "plot_pair": lambda data: az.plot_pair(data, var_names=["beta", "shift"], marginals=True),
    "plot_trace": lambda data: az.plot_trace(data, var_names=["beta", "shift"]),
    "plot_ppc": lambda data: az.plot_ppc(data, num_pp_samples=30),
    "plot_ppc, cumulative": lambda data: az.plot_ppc(data, kind="cumulative", num_pp_samples=30),
    "plot_ppc of the prior": lambda data: az.plot_ppc(data, group="prior", num_pp_samples=30),
    "plot_khat": lambda data: az.plot_khat(az.loo(data, pointwise=True)),
    "plot_posterior": lambda data: az.plot_posterior(data, var_names=["beta"]),
    "plot_forest": lambda data: az.plot_forest(data, combined=True, r_hat=True, ess=True),
    "plot_dist_comparison": lambda data: az.plot_dist_comparison(data, var_names=["beta"]),
    "plot_loo_pit": lambda data: az.plot_loo_pit(data, y="y"),
    "plot_bpv": az.plot_bpv,
    "plot_rank": lambda data: az.plot_rank(data, var_names=["beta"]),
    "plot_autocorr": lambda data: az.plot_autocorr(data, var_names=["beta"]),
}


@pytest.mark.parametrize("name", ARVIZ_0)
def test_arviz_0_says_nothing(name, capsys, caplog):
    assert ARVIZ_0[name](export(True)) is not None  # warnings are errors
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


ARVIZ_1 = ("summary", "loo", "loo_pit", "loo_metrics", "loo_score", "metrics", "rhat", "ess", "mcse", "hdi")


@pytest.mark.parametrize("name", ARVIZ_1)
def test_arviz_1_says_nothing(name, capsys, caplog):
    stats = pytest.importorskip("arviz_stats")
    assert getattr(stats, name)(export(False)) is not None
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_loo_is_that_of_the_exact_posterior():
    """Leaving a point out of a Gaussian posterior has a closed form."""
    mean, cov = exact()
    design = torch.stack([torch.ones_like(X), X, torch.ones_like(X)], 1)
    fit, leverage = design @ mean, (design @ cov * design).sum(1)
    variance = 0.36 * leverage / (0.36 - leverage)
    without = fit + (fit - Y) * leverage / (0.36 - leverage)
    elpd = torch.distributions.Normal(without, (variance + 0.36).sqrt()).log_prob(Y)
    found = az.loo(export(True, 20_000), pointwise=True)
    # the largest k̂ is below 0.5: errors of the order of 1/√20000 for every point
    assert float(found.pareto_k.max()) < 0.5
    np.testing.assert_allclose(found.loo_i.values, elpd, atol=0.03)
    assert found.elpd_loo == pytest.approx(float(elpd.sum()), abs=0.06)
    in_sample = torch.distributions.Normal(fit, (leverage + 0.36).sqrt()).log_prob(Y).sum()
    assert abs(found.elpd_loo - float(in_sample)) > 0.5  # what one would get without leaving anything out


# --------------------------------------------------------------------------------------------- beside NUTS


def test_comparison_with_nuts():
    table = az.compare({"ours": export(True), "NUTS": nuts()}, var_name="y")
    assert abs(table["elpd_loo"].diff().iloc[1]) < 0.3  # two estimates of one number
    assert set(export(True).log_likelihood.data_vars) <= set(nuts().log_likelihood.data_vars)
    np.testing.assert_array_equal(export(True).observed_data["y"], nuts().observed_data["y"])
    az.plot_compare(table)
    az.plot_density([export(True), nuts()], data_labels=["ours", "NUTS"], var_names=["beta"])
    az.plot_forest([export(True), nuts()], model_names=["ours", "NUTS"], var_names=["beta"])


def test_comparison_with_nuts_in_arviz_1():
    stats, base = pytest.importorskip("arviz_stats"), pytest.importorskip("arviz_base")
    theirs = base.convert_to_datatree(nuts())
    assert isinstance(theirs, xarray.DataTree)
    table = stats.compare({"ours": export(False), "NUTS": theirs}, var_name="y")
    assert abs(table["elpd"].diff().iloc[1]) < 0.3


def test_pointwise_log_likelihood_is_that_of_from_pyro():
    """At the same latents: ours of NUTS's draws against what ``from_pyro`` has computed."""
    density = ModelDensity(line, (X, Y))
    theirs = nuts()
    sites = {name: torch.tensor(theirs.posterior[name].values).flatten(0, 1) for name in ("beta", "shift")}
    ours = density.log_likelihood(density.pack(sites))["y"]
    np.testing.assert_allclose(ours, theirs.log_likelihood["y"].values[0], rtol=1e-9)
