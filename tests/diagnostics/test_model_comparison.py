# SPDX-License-Identifier: Apache-2.0
"""Comparison by evidence: closed forms, errors against Monte Carlo, and everything that is refused."""

import importlib.util
import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_sm
from pyro_sm.base import Draws
from pyro_sm.diagnostics import (
    Findings,
    ProbeFindings,
    Provenance,
    TrustWarning,
    Unknown,
    WeightFindings,
    compare_evidence,
    draws_to_arviz,
    judge,
)
from pyro_sm.diagnostics.evidence import LARGE_ERROR, posterior_probabilities
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.model.density import ModelDensity
from pyro_sm.weights import Evidence, evidence

HAS_LINE_1 = importlib.util.find_spec("arviz_base") is not None
LINES = [
    pytest.param(True, id="arviz 0"),
    pytest.param(False, id="arviz 1", marks=pytest.mark.skipif(not HAS_LINE_1, reason="needs arviz-base")),
]
X = torch.tensor([-1.2, -0.4, 0.1, 0.9, 1.7, 2.2], dtype=torch.float64)
Y = torch.tensor([-0.8, 0.3, 0.6, 1.1, 2.9, 2.4], dtype=torch.float64)
SCALE = 0.7
PROVENANCE = Provenance("by hand", 0, 1, 1)
GOOD_WEIGHTS = WeightFindings(num_draws=4000, khat=0.1, ess=3000.0)


def columns(name: str) -> torch.Tensor:
    """Designs (6, K) of the three models."""
    one = torch.ones_like(X)
    return torch.stack({"constant": [one], "line": [one, X], "parabola": [one, X, X**2]}[name], 1)


def regression(design, y, site="y"):
    """Conjugate: β ~ N(0.3, 1.5²), y ~ N(design·β, 0.7²)."""
    beta = pyro.sample("beta", dist.Normal(0.3 * torch.ones_like(design[0]), 1.5).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample(site, dist.Normal((design * beta.unsqueeze(-2)).sum(-1), SCALE), obs=y)


def exact_log_evidence(design, y=Y) -> float:
    cov = 1.5**2 * design @ design.T + SCALE**2 * torch.eye(len(y), dtype=y.dtype)
    return float(torch.distributions.MultivariateNormal(0.3 * design.sum(1), cov).log_prob(y))


def export(model, args, *, n=4000, widen=1.2, **options):
    """An export with weighted draws of a Gaussian wider than the posterior of :func:`regression`."""
    density = ModelDensity(model, args)
    design, y = args[0], args[1]
    precision = design.T @ design / SCALE**2 + torch.eye(design.shape[1], dtype=y.dtype) / 1.5**2
    cov = torch.linalg.inv(precision)
    mean = cov @ (design.T @ y / SCALE**2 + 0.3 / 1.5**2)
    tril = widen * torch.linalg.cholesky(cov)
    z = mean + torch.randn(n, len(mean), dtype=y.dtype) @ tril.T
    log_p = density.log_prob(z)
    draws = Draws(z, log_p, log_p - gaussian_log_prob(z, mean, tril))
    options = {"num_samples": 400, "provenance": PROVENANCE, "predictive": False, "prior": False} | options
    return draws_to_arviz(density, draws, **options)


NAMES = ("constant", "line", "parabola")


@pytest.mark.parametrize("legacy", LINES)
def test_bayes_factors_of_conjugate_models(legacy):
    found = compare_evidence({name: export(regression, (columns(name), Y), legacy=legacy) for name in NAMES})
    exact = {name: exact_log_evidence(columns(name)) for name in NAMES}
    assert [model.name for model in found.models] == sorted(NAMES, key=lambda name: -exact[name])
    for one in NAMES:
        for other in NAMES:
            factor = found.log_bayes_factor(one, other)
            assert abs(factor.value - (exact[one] - exact[other])) <= 5 * factor.se
            assert 0 <= factor.se < 0.05
    total = sum(math.exp(x) for x in exact.values())
    for name in NAMES:
        model = found[name]
        assert abs(model.probability - math.exp(exact[name]) / total) < 5 * model.probability_se
        assert 0 < model.probability_se < 0.01
        assert model.warning == ""
    # the best two are 2 nats apart: an evidence without the ½ of a Gaussian's log-determinant would turn them round
    assert exact["line"] - exact["parabola"] > 1


def test_errors_are_those_of_monte_carlo():
    """A thousand runs: log Bayes factors and probabilities scatter as the errors say."""
    generator = torch.Generator().manual_seed(3)
    exact = [exact_log_evidence(columns(name)) for name in NAMES]
    spread = (0.5, 0.9, 0.7)  # of the log weights, so that every model has an error of its own
    factors, probabilities, single = [], [], []
    for _ in range(1000):
        runs = {}
        for name, log_z, sd in zip(NAMES, exact, spread, strict=True):
            noise = torch.randn(400, dtype=torch.float64, generator=generator)
            runs[name] = evidence(log_z - sd**2 / 2 + sd * noise)
        found = compare_evidence(runs)
        factors.append(found.log_bayes_factor("line", "parabola"))
        probabilities.append((found["parabola"].probability, found["parabola"].probability_se))
        single.append((found["line"].se, found["parabola"].se))
    # the relative standard error of a standard deviation from a thousand runs is 2.2 %
    for values, errors in (np.transpose(factors), np.transpose(probabilities)):
        assert np.std(values) == pytest.approx(np.mean(errors), rel=0.11)
    one, other = np.mean(single, 0)
    scatter = np.std([factor.value for factor in factors])
    for wrong in (one, other, one + other):  # the error of one model alone, or errors added as if they went together
        assert abs(scatter / wrong - 1) > 0.2


def test_probabilities_and_their_errors_against_autograd():
    log_z = torch.tensor([-3.2, -1.9, -2.4, -700.0], dtype=torch.float64, requires_grad=True)
    se = torch.tensor([0.03, 0.11, 0.06, 0.2], dtype=torch.float64)
    prior = torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.softmax(x + prior.log(), 0), log_z)
    expected = torch.softmax(log_z + prior.log(), 0).detach()
    p, error = posterior_probabilities(log_z.detach().numpy(), se.numpy(), prior.numpy())
    np.testing.assert_allclose(p, expected, rtol=1e-12)
    np.testing.assert_allclose(error, (jacobian @ torch.diag(se**2) @ jacobian.T).diagonal().sqrt(), rtol=1e-10)
    wrong = expected * se  # an error that forgets the denominator
    assert float((torch.tensor(error) / wrong - 1).abs().max()) > 0.2
    equal, _ = posterior_probabilities(log_z.detach().numpy(), se.numpy(), np.full(4, 0.25))
    assert abs(equal[1] - p[1]) > 0.1


def test_the_limit_of_the_first_order_error():
    """For a small probability ``p = e^x`` with x ~ N(log p̂, s²), the root mean square error has a closed form."""
    s = math.hypot(LARGE_ERROR, LARGE_ERROR)
    # E[(e^d − 1)²] for d ~ N(0, s²)
    exact = math.sqrt(math.exp(2 * s**2) - 2 * math.exp(s**2 / 2) + 1)
    assert 0.85 < s / exact < 0.95


def test_impossible_models_and_extreme_evidence():
    models = {"a": Evidence(-50_000.0, 0.1), "b": Evidence(-40_000.0, 0.1), "c": Evidence(-40_001.0, 0.1)}
    found = compare_evidence(models, prior={"a": 1, "b": 0, "c": 3})
    assert [found[name].probability for name in "abc"] == [0, 0, 1]
    assert [found[name].prior for name in "abc"] == [0.25, 0, 0.75]
    assert found["c"].log_bayes_factor == pytest.approx(1)  # of the best, b, over it: priors of models play no part


def test_a_table_for_arviz_users():
    found = compare_evidence({"small": (-12.0, 0.02), "large": (-10.5, 0.05), "huge": (-10.52, 0.04)})
    table = found.to_dataframe()
    assert list(table.index) == ["large", "huge", "small"]
    assert list(table["rank"]) == [0, 1, 2]
    assert list(table.columns) == [
        "rank", "log_evidence", "se", "log_bayes_factor", "dse", "prior", "probability", "probability_se", "warning",
    ]  # fmt: skip
    assert table["probability"].sum() == pytest.approx(1)
    assert table.loc["small", "log_bayes_factor"] == pytest.approx(1.5)
    assert table.loc["small", "dse"] == pytest.approx(math.hypot(0.02, 0.05))
    assert not table["warning"].any()
    text = str(found)
    assert "-10.500 ± 0.050" in text
    assert "1.500 ± 0.054" in text
    assert "leave open whether large or huge is best" in text
    assert "leave open" not in str(compare_evidence({"small": (-12.0, 0.02), "large": (-10.5, 0.05)}))
    assert len({len(line) for line in text.splitlines()[:4]}) == 1  # columns stand below each other
    assert found.log_bayes_factor("huge", "huge") == (0, 0)
    with pytest.raises(KeyError, match="expected one of large, huge, small, found 'none'"):
        found.log_bayes_factor("none", "none")


# -------------------------------------------------------------------------------------------- what is refused


def test_heavy_weights_are_called_so():
    with pytest.warns(TrustWarning, match="Pareto k̂"):
        heavy = export(regression, (columns("parabola"), Y), widen=0.4)
    good = export(regression, (columns("line"), Y))
    with pytest.warns(TrustWarning, match=r"evidence of 'parabola': Pareto k̂ is \d\.\d\d, above 0.7") as said:
        found = compare_evidence({"line": good, "parabola": heavy})
    assert said[0].filename == __file__
    assert len(said) == 1
    assert "Do not trust parabola" in str(found)
    assert list(found.to_dataframe().loc[["line", "parabola"], "warning"]) == [False, True]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_cannot_be_judged_are_called_so(value):
    good, other = (export(regression, (columns(n), Y)) for n in ("line", "constant"))
    other.posterior.attrs["pareto_khat"] = value
    with pytest.warns(TrustWarning, match="'constant': Pareto"):
        compare_evidence({"line": good, "constant": other})
    other.posterior.attrs["pareto_khat"] = -math.inf  # no tail at all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_evidence({"line": good, "constant": other})


def test_a_bad_verdict_is_remembered():
    bad = judge(Findings(GOOD_WEIGHTS, probe=ProbeFindings("", unknown=Unknown(0.5, 0.01))))
    with pytest.warns(TrustWarning, match="do not trust"):
        lost = export(regression, (columns("parabola"), Y), verdict=bad)
    care = export(regression, (columns("line"), Y), verdict=judge(Findings(GOOD_WEIGHTS)))
    assert care.posterior.attrs["verdict"] == "use with care"
    with pytest.warns(TrustWarning, match="of 'parabola': the verdict on its draws is 'do not trust'") as said:
        compare_evidence({"line": care, "parabola": lost})
    assert len(said) == 1


def test_an_error_too_large_is_called_so():
    with pytest.warns(TrustWarning, match=r"its error of 0\.26 nats is above 0\.25"):
        compare_evidence({"a": (-3.0, 0.26), "b": (-2.0, 0.25)})


def flat(design, y):
    beta = pyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (design.shape[1],)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal((design * beta.unsqueeze(-2)).sum(-1), SCALE), obs=y)


@pytest.mark.parametrize("legacy", LINES)
def test_improper_priors_are_refused(legacy, tmp_path):
    improper = export(flat, (columns("line"), Y), legacy=legacy)
    proper = export(regression, (columns("line"), Y), legacy=legacy)
    assert improper["posterior"].attrs["improper_prior"] == "beta"
    assert "improper_prior" not in proper["posterior"].attrs
    improper.to_netcdf(str(tmp_path / "flat.nc"))
    read = az.from_netcdf(str(tmp_path / "flat.nc")) if legacy else xarray.open_datatree(tmp_path / "flat.nc").load()
    for one in (improper, read):
        with pytest.raises(ValueError, match=r"the prior of beta in 'flat' is improper.*arbitrary constant"):
            compare_evidence({"proper": proper, "flat": one})


def test_different_data_are_refused():
    good = export(regression, (columns("line"), Y))
    for other in (Y + torch.tensor([0, 0, 0, 0, 0, 1e-3]), Y[:5], Y.exp()):
        design = columns("line")[: len(other)]
        with pytest.raises(ValueError, match=r"'other' and 'line' have different ones .*Jacobian"):
            compare_evidence({"line": good, "pair": (-3.0, 0.1), "other": export(regression, (design, other))})


def renamed(design, y):
    regression(design, y, site="height")


def test_the_same_data_under_another_name_or_precision_are_the_same():
    good = export(regression, (columns("line"), Y))
    again = export(renamed, (columns("constant"), Y))
    single = export(regression, (columns("line").float(), Y.float()))
    found = compare_evidence({"line": good, "renamed": again, "single": single})
    assert abs(found.log_bayes_factor("line", "single").value) < 0.05


def twice(design, y):
    regression(design, y)
    pyro.sample("more", dist.Normal(0.0, 1.0), obs=y.new_tensor(0.3))


def test_one_more_observation_is_other_data():
    models = {"line": export(regression, (columns("line"), Y)), "more": export(twice, (columns("line"), Y))}
    for order in (("line", "more"), ("more", "line")):
        with pytest.raises(ValueError, match="expected models of the same data"):
            compare_evidence({name: models[name] for name in order})


def test_what_has_no_evidence_is_refused():
    draws = az.from_dict({"mu": np.zeros((2, 50))})
    pair = (-3.0, 0.1)
    with pytest.raises(ValueError, match=r"evidence of 'mcmc'.*found none: MCMC does not estimate it"):
        compare_evidence({"mcmc": draws, "pair": pair})
    with pytest.raises(TypeError, match="as 'number', found float"):
        compare_evidence({"number": -3.0, "pair": pair})
    with pytest.raises(TypeError, match="of 'triple', found 3 values"):
        compare_evidence({"triple": (1.0, 2.0, 3.0), "pair": pair})
    with pytest.raises(ValueError, match="at least two models to compare, found 1"):
        compare_evidence({"pair": pair})
    for broken in ((math.nan, 0.1), (-math.inf, math.inf), (-3.0, -0.1)):
        with pytest.raises(ValueError, match="finite log evidence and error of 'broken'"):
            compare_evidence({"broken": broken, "pair": pair})


@pytest.mark.parametrize(
    "prior", [{"a": 1.0}, {"a": 1, "c": 1}, {"a": -1, "b": 2}, {"a": 0, "b": 0}, {"a": math.nan, "b": 1}]
)
def test_prior_probabilities_that_do_not_fit_are_refused(prior):
    with pytest.raises(ValueError, match="expected prior probabilities"):
        compare_evidence({"a": (-3.0, 0.1), "b": (-2.0, 0.1)}, prior=prior)


@pytest.mark.slow
def test_samplers_are_compared_as_they_are():
    samplers = {}
    for name in ("constant", "line"):
        samplers[name] = pyro_sm.DiffusionSampler(
            regression, stopping=pyro_sm.StoppingRule(max_evaluations=8_000), disable_progbar=True
        )
        samplers[name].run(columns(name), Y)
    found = compare_evidence(samplers)
    exact = exact_log_evidence(columns("line")) - exact_log_evidence(columns("constant"))
    factor = found.log_bayes_factor("line", "constant")
    assert abs(factor.value - exact) < 5 * factor.se
    assert factor.se < 0.05
    assert found["line"].log_evidence == samplers["line"].log_evidence
