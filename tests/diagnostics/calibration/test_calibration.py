# SPDX-License-Identifier: Apache-2.0
"""Ranks of exact posterior draws are uniform, those of wrong ones are not, and the tests have their size exactly."""

import functools
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import config_enumerate

from pyro_sm import ModelDensity, ModelRefusedError
from pyro_sm.diagnostics.calibration.rank_uniformity import (
    _pointwise,
    _stays,
    ecdf_difference,
    simultaneous_band,
    uniformity,
)
from pyro_sm.diagnostics.calibration.simulation import (
    LOG_LIKELIHOOD,
    Calibration,
    Fitted,
    Replication,
    ranks_of,
    simulate,
    simulation_based_calibration,
)
from pyro_sm.diagnostics.plots.calibration import plot_calibration

# ------------------------------------------------------------------------------------------------- uniformity


def all_rank_vectors(num_ranks, num_draws):
    return np.array(list(itertools.product(range(num_draws + 1), repeat=num_ranks)))


def level(ranks, num_draws):
    """The pointwise level of a trajectory, from scipy's binomial law."""
    n = len(ranks)
    pairs = [(int((ranks < i).sum()), i / (num_draws + 1)) for i in range(1, num_draws + 1)]
    return min(2 * min(scipy.stats.binom.cdf(k, n, at), scipy.stats.binom.sf(k - 1, n, at)) for k, at in pairs)


@pytest.mark.parametrize(("num_ranks", "num_draws"), [(7, 4), (60, 99)])
def test_pointwise_levels_are_binomial(num_ranks, num_draws):
    k, at = np.arange(num_ranks + 1), np.arange(1, num_draws + 1)[:, None] / (num_draws + 1)
    tails = np.minimum(scipy.stats.binom.cdf(k, num_ranks, at), scipy.stats.binom.sf(k - 1, num_ranks, at))
    np.testing.assert_allclose(_pointwise(num_ranks, num_draws), 2 * tails, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("num_ranks", "num_draws"), [(1, 1), (1, 5), (5, 1), (4, 3), (3, 5)])
def test_p_values_are_those_of_all_rank_vectors(num_ranks, num_draws):
    vectors = all_rank_vectors(num_ranks, num_draws)
    levels = np.array([level(ranks, num_draws) for ranks in vectors])
    expected = [(levels <= one * (1 + 1e-9)).mean() for one in levels]
    found = [uniformity(ranks, num_draws).p_value for ranks in vectors]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("confidence", [0.3, 0.8, 0.95])
def test_the_band_is_the_narrowest_that_holds(confidence):
    vectors = all_rank_vectors(4, 3)
    band = simultaneous_band(4, 3, confidence)
    differences = np.array([ecdf_difference(ranks, 3) for ranks in vectors])
    inside = ((differences >= band.lower - 1e-12) & (differences <= band.upper + 1e-12)).all(1)
    levels = np.array([level(ranks, 3) for ranks in vectors])
    assert inside.mean() >= confidence
    # Leaving out the next level, too, would be one too many.
    assert (levels > levels[inside].min() * (1 + 1e-9)).mean() < confidence


def test_a_curve_leaves_the_band_exactly_if_its_p_value_says_so():
    rng = np.random.default_rng(1)
    band = simultaneous_band(40, 19)
    outcomes = []
    for skew in np.linspace(1.0, 2.2, 60):
        ranks = np.floor(20 * rng.random(40) ** skew).astype(int)
        difference = ecdf_difference(ranks, 19)
        outside = bool(((difference < band.lower - 1e-12) | (difference > band.upper + 1e-12)).any())
        assert outside == (uniformity(ranks, 19).p_value <= 0.05), ranks
        outcomes.append(outside)
    assert 10 < sum(outcomes) < 50


def test_uniform_ranks_stay_in_the_band_as_often_as_it_says():
    """And leave a pointwise one, which is the mistake to make, far more often."""
    num_ranks, num_draws, runs = 50, 99, 2000
    ranks = np.random.default_rng(2).integers(0, num_draws + 1, (runs, num_ranks))
    differences = np.array([ecdf_difference(one, num_draws) for one in ranks])
    band = simultaneous_band(num_ranks, num_draws)
    pointwise = _pointwise(num_ranks, num_draws)
    left = ((differences < band.lower - 1e-12) | (differences > band.upper + 1e-12)).any(1).mean()
    error = math.sqrt(0.05 * 0.95 / runs)
    exact = 0.05 - 0.01  # discrete: between four and five per cent
    assert exact - 5 * error < left < 0.05 + 5 * error
    counts = np.round((differences + band.at) * num_ranks).astype(int)
    assert (pointwise[np.arange(num_draws), counts] < 0.05).any(1).mean() > 0.3
    assert 1 - _stays(pointwise >= 0.05) > 0.3


def test_p_values_of_uniform_ranks_are_uniform():
    runs = 2000
    rng = np.random.default_rng(3)
    found = [uniformity(rng.integers(0, 100, 100), 99) for _ in range(runs)]
    for p_values in np.array(found).T:
        for at in (0.05, 0.25, 0.5, 0.75):
            assert abs((p_values <= at).mean() - at) < 5 * math.sqrt(at * (1 - at) / runs) + 0.005


def test_chi_square_is_scipys_with_bins_of_unequal_width():
    ranks = np.random.default_rng(4).integers(0, 100, 60)
    edges = [math.ceil(b * 100 / 12) for b in range(13)]  # 60 ranks: twelve bins
    counts = np.histogram(ranks, edges)[0]
    expected = scipy.stats.chisquare(counts, 60 * np.diff(edges) / 100).pvalue
    assert uniformity(ranks, 99).chi_square == pytest.approx(expected, rel=1e-10)
    assert uniformity([0] * 9, 99).chi_square == 1.0
    assert uniformity([0] * 10, 99).chi_square < 0.01


def test_ecdf_difference_by_hand():
    np.testing.assert_allclose(ecdf_difference([0, 0, 3, 4], 4), [0.5 - 0.2, 0.5 - 0.4, 0.5 - 0.6, 0.75 - 0.8])


@pytest.mark.parametrize("call", [uniformity, ecdf_difference])
@pytest.mark.parametrize(
    ("ranks", "num_draws", "message"),
    [([], 5, "whole ranks"), ([[1]], 5, "whole ranks"), ([0.5], 5, "float64"), ([6], 5, "0..5, found 6..6"),
     ([-1], 5, "found -1"), ([0], 0, "0..0")],
)  # fmt: skip
def test_bad_ranks_are_refused(call, ranks, num_draws, message):
    with pytest.raises(ValueError, match=message):
        call(ranks, num_draws)


@pytest.mark.parametrize("bad", [(0, 5, 0.9), (5, 0, 0.9), (5, 5, 0.0), (5, 5, 1.0)])
def test_bad_bands_are_refused(bad):
    with pytest.raises(ValueError, match="expected num_ranks >= 1"):
        simultaneous_band(*bad)


# ------------------------------------------------------------------------------------------------ simulation

PRIOR = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
DESIGN = torch.tensor([[1.0, 0.5], [-0.3, 1.2], [0.7, 0.1]])
NOISE = 0.8


def linear(y, design, *, noise):
    """Conjugate, correlated, with a deterministic site."""
    theta = pyro.sample("theta", dist.MultivariateNormal(torch.tensor([0.5, -1.0]), PRIOR))
    pyro.deterministic("sum", theta.sum(-1))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal((design * theta).sum(-1), noise), obs=y)


def posterior(y, *, temper=1.0):
    """Mean and covariance; ``temper`` = 0: the prior's."""
    precision = torch.linalg.inv(PRIOR) + temper * DESIGN.T @ DESIGN / NOISE**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (torch.linalg.solve(PRIOR, torch.tensor([0.5, -1.0])) + temper * DESIGN.T @ y / NOISE**2)
    return mean, covariance


def exact_fit(*, widen=1.0, shift=0.0, temper=1.0, num_draws=198):
    def fit(simulated):
        mean, covariance = posterior(simulated.data["y"], temper=temper)
        root = torch.linalg.cholesky(covariance)
        noise = torch.randn(num_draws, 2, generator=torch.Generator().manual_seed(simulated.seed))
        theta = mean + (widen * noise + shift) @ root.T
        return Fitted({"theta": theta, "sum": theta.sum(-1)}, {"norm": float(mean.norm())})

    return fit


@functools.cache
def exact_calibration(**wrong):
    """150 data sets, ranked among draws of the exact posterior, or of a wrong one."""
    return calibrate(exact_fit(**wrong))


def calibrate(fit, datasets=range(150), **options):
    options = {"num_draws": 99, "sites": ["theta", "sum"], **options}
    done = simulation_based_calibration(
        linear, fit, (torch.zeros(3), DESIGN), {"noise": NOISE}, datasets=datasets, **options
    )
    return Calibration.of(done, options["num_draws"])


def test_exact_posterior_draws_have_uniform_ranks():
    found = exact_calibration()
    assert list(found.ranks) == ["theta[0]", "theta[1]", "sum", LOG_LIKELIHOOD]
    for name, test in found.tests().items():
        assert test.p_value > 1e-4, name
        assert test.chi_square > 1e-4, name
        mean, spread = found.shape(name)
        assert abs(mean - 0.5) < 5 * math.sqrt(1 / 12 / 150), name
        assert abs(spread - 1) < 5 * math.sqrt(1 / 5 / 150), name


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"widen": 1.8}, ["theta[0]", "sum"]),
        ({"widen": 1 / 1.8}, ["theta[0]", "sum"]),
        ({"shift": 0.7}, ["theta[0]", "sum"]),
        ({"temper": 3.0}, ["theta[0]"]),
        ({"temper": 0.0}, [LOG_LIKELIHOOD]),
    ],
)
def test_wrong_posteriors_fail(wrong, names):
    found = exact_calibration(**wrong)
    for name in names:
        assert found.tests()[name].p_value < 1e-6, name
        assert found.tests()[name].chi_square < 1e-3, name


def test_only_the_log_likelihood_sees_that_the_data_were_ignored():
    found = exact_calibration(temper=0.0)
    for name, test in found.tests().items():
        assert (test.p_value < 1e-10) if name == LOG_LIKELIHOOD else (test.p_value > 1e-4), name


def test_the_shape_says_what_is_wrong():
    assert exact_calibration(widen=1.8).shape("sum")[1] < 0.85
    assert exact_calibration(widen=1 / 1.8).shape("sum")[1] > 1.15
    assert exact_calibration(shift=0.7).shape("sum")[0] < 0.4
    assert Calibration({"x": np.arange(100)}, 99).shape("x") == pytest.approx((0.5, 1.0))


def resampled_fit(pool):
    """Importance resampling of ``pool`` draws of a wide proposal."""
    inner = exact_fit(widen=1.5, num_draws=pool)

    def fit(simulated):
        theta = inner(simulated).samples["theta"]
        mean, covariance = posterior(simulated.data["y"])
        target = torch.distributions.MultivariateNormal(mean, covariance)
        proposal = torch.distributions.MultivariateNormal(mean, 1.5**2 * covariance)
        log_w = target.log_prob(theta) - proposal.log_prob(theta)
        generator = torch.Generator().manual_seed(simulated.seed + 1)
        chosen = torch.multinomial(log_w.softmax(0), 99, replacement=True, generator=generator)
        return Fitted({"theta": theta[chosen]})

    return fit


def test_few_draws_of_a_large_pool_are_as_good_as_exact_ones_and_many_of_a_small_pool_are_not():
    assert calibrate(resampled_fit(4000), sites=["theta"]).smallest()[1] > 1e-4
    assert calibrate(resampled_fit(8), sites=["theta"]).smallest()[1] < 1e-6


def test_a_stopped_run_goes_on_with_what_is_missing():
    whole = calibrate(exact_fit(), range(6))
    again = calibrate(exact_fit(), [3, 5])
    for name, ranks in whole.ranks.items():
        assert list(again.ranks[name]) == [ranks[3], ranks[5]], name
    other = calibrate(exact_fit(), range(6), seed=1)
    assert any((other.ranks[name] != whole.ranks[name]).any() for name in whole.ranks)


def test_a_data_set_is_ready_as_soon_as_it_is_yielded():
    fits = []

    def fit(simulated):
        fits.append(simulated)
        return exact_fit()(simulated)

    args, kwargs = (torch.zeros(3), DESIGN), {"noise": NOISE}
    runs = simulation_based_calibration(linear, fit, args, kwargs, datasets=[4, 7])
    first = next(runs)
    assert len(fits) == 1
    assert first.dataset == 4
    assert set(first.ranks) == {"theta[0]", "theta[1]", LOG_LIKELIHOOD}
    mean, _ = posterior(fits[0].data["y"])
    assert first.info == {"norm": float(mean.norm())}
    assert next(runs).dataset == 7
    assert not torch.equal(fits[0].data["y"], fits[1].data["y"])


def test_a_simulated_data_set_is_a_model_on_other_data(float64):
    args = (torch.zeros(3), DESIGN.double())
    with pytest.raises(RuntimeError):  # float32 constants against float64 arguments: the model's own affair
        linear(*args, noise=NOISE)

    def model(y, design, *, noise):
        theta = pyro.sample("theta", dist.Normal(torch.tensor([0.5, -1.0]), 1.3).to_event(1))
        pyro.deterministic("sum", theta.sum(-1))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal((design * theta).sum(-1), noise), obs=y)

    state = torch.get_rng_state()
    one = simulate(model, args, {"noise": NOISE}, index=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.data.keys() == {"y"}
    assert one.truth.keys() == {"theta", "sum"}
    assert one.truth["sum"] == one.truth["theta"].sum()
    again, other = (simulate(model, args, {"noise": NOISE}, index=i) for i in (2, 3))
    assert torch.equal(one.data["y"], again.data["y"])
    assert not torch.equal(one.data["y"], other.data["y"])
    assert not torch.equal(one.data["y"], simulate(model, args, {"noise": NOISE}, index=2, seed=1).data["y"])
    density = ModelDensity(one.model, one.args, one.kwargs)
    z = torch.randn(5, 2)
    prior = dist.Normal(torch.tensor([0.5, -1.0]), 1.3).log_prob(z).sum(1)
    likelihood = dist.Normal(z @ args[1].T, NOISE).log_prob(one.data["y"]).sum(1)
    torch.testing.assert_close(density.log_prob(z), prior + likelihood, rtol=1e-10, atol=1e-10)


def test_the_rank_of_the_log_likelihood_is_by_hand(float64):
    def model(y):
        theta = pyro.sample("theta", dist.Normal(2.0, 3.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)

    draws = torch.linspace(-6, 10, 300)
    chosen = draws[::10]
    inner = set()
    for index in range(6):
        one = simulate(model, (torch.tensor(0.0),), index=index)
        found = ranks_of(one, {"theta": draws}, ModelDensity(one.model, one.args), num_draws=30)
        truth, y = one.truth["theta"], one.data["y"]
        farther = int(((chosen - y).abs() > (truth - y).abs()).sum())
        assert found == {"theta": int((chosen < truth).sum()), LOG_LIKELIHOOD: farther}
        inner |= {name for name, rank in found.items() if 0 < rank < 30}
    assert inner == {"theta", LOG_LIKELIHOOD}


def test_parameters_and_data_are_drawn_jointly():
    """Also where a continuous prior depends on a discrete latent, which then is no parameter."""

    @config_enumerate
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        theta = pyro.sample("theta", dist.Normal(4.0 * k, 0.5))
        pyro.sample("y", dist.Normal(theta + 3.0 * k, 0.5), obs=y)

    draws = [simulate(model, (torch.tensor(0.0),), index=i) for i in range(400)]
    theta = torch.stack([one.truth["theta"] for one in draws])
    y = torch.stack([one.data["y"] for one in draws])
    k = torch.stack([one.truth["k"] for one in draws])
    assert abs(float(k.mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 400)
    assert abs(float((y - theta - 3 * k).std()) - 0.5) < 5 * 0.5 / math.sqrt(800)
    assert abs(float((theta - 4 * k).std()) - 0.5) < 5 * 0.5 / math.sqrt(800)
    density = ModelDensity(draws[0].model, draws[0].args)
    assert not density.has_prior  # so that the joint density stands in for the likelihood
    found = ranks_of(draws[0], {"theta": torch.linspace(-2, 6, 99)}, density)
    z = torch.cat([theta[:1], torch.linspace(-2, 6, 99)])[:, None]
    log_joint = density.log_prob(z)
    assert found[LOG_LIKELIHOOD] == int((log_joint[1:] < log_joint[0]).sum())


def test_data_may_be_conditioned_on_instead():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5))
        pyro.sample("x", dist.Normal(theta, 2.0))

    one = simulate(poutine.condition(model, data={"y": torch.tensor(9.0)}))
    assert one.data.keys() == {"y"}
    assert one.data["y"] != 9.0
    assert one.truth.keys() == {"theta", "x"}
    density = ModelDensity(one.model, one.args)
    assert torch.equal(density.observed["y"], one.data["y"])


def test_a_fit_is_not_on_the_stream_that_drew_the_truth():
    one = simulate(linear, (torch.zeros(3), DESIGN), {"noise": NOISE})
    pyro.set_rng_seed(one.seed)
    for _ in range(5):
        trace = poutine.trace(linear).get_trace(torch.zeros(3), DESIGN, noise=NOISE)
        assert not torch.allclose(trace.nodes["theta"]["value"], one.truth["theta"])


def test_ties_are_broken_evenly():
    def model(y):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    one = simulate(model, (torch.tensor(0.0),))
    density = ModelDensity(one.model, one.args)
    draws = torch.cat([torch.full((3,), -9.0), one.truth["theta"].expand(4), torch.full((2,), 9.0)])
    rng = np.random.default_rng(5)
    found = [ranks_of(one, {"theta": draws}, density, num_draws=9, generator=rng)["theta"] for _ in range(200)]
    counts = np.bincount(found, minlength=10)
    assert counts[:3].sum() == counts[8:].sum() == 0
    assert (abs(counts[3:8] - 40) < 5 * math.sqrt(200 * 0.2 * 0.8)).all()


def mixed_up(**changes):
    args, kwargs = (torch.zeros(3), DESIGN), {"noise": NOISE}
    one = simulate(linear, args, kwargs)
    samples = {**exact_fit()(one).samples, **changes}
    return one, {name: value for name, value in samples.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "sites", "message"),
    [
        ({"theta": None}, None, "expected the site 'theta' in the samples, found sum"),
        ({}, ["nowhere"], "expected the site 'nowhere' in the model, found theta, sum"),
        ({"theta": torch.zeros(200, 3)}, None, r"expected draws \(M, 2\), M >= 99, found \(200, 3\)"),
        ({"theta": torch.zeros(50, 2)}, None, r"M >= 99, found \(50, 2\)"),
        ({"sum": torch.full((99,), math.nan)}, ["sum"], "expected numbers for the test quantity 'sum', found NaN"),
    ],
)
def test_draws_that_do_not_fit_are_refused(changes, sites, message):
    one, samples = mixed_up(**changes)
    with pytest.raises(ValueError, match=message):
        ranks_of(one, samples, ModelDensity(one.model, one.args, one.kwargs), sites=sites)


def with_factor(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    pyro.factor("penalty", -theta.abs())


def with_scale(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def improper(y):
    theta = pyro.sample("theta", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def without_data(y):
    pyro.sample("theta", dist.Normal(0.0, 1.0))


def broken(y):
    raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_factor, "'penalty' is a factor"),
        (with_scale, "'y' is scaled"),
        (improper, "prior of 'theta' is improper"),
        (without_data, "observes nothing"),
        (broken, "no such thing"),
    ],
)
def test_models_without_a_law_of_data_are_refused(model, message):
    with pytest.raises(ModelRefusedError, match=message):
        simulate(model, (torch.tensor(0.0),))


# ---------------------------------------------------------------------------------------------- what is said


def test_data_sets_are_gathered_and_judged():
    done = [Replication(i, {"a": i % 10, "b": i % 8}, {}) for i in range(40)]
    found = Calibration.of(done, 9)
    assert list(found.ranks["a"]) == [i % 10 for i in range(40)]
    p_value = found.tests()["b"].p_value
    assert 0.001 < p_value < 0.4
    assert found.smallest() == ("b", 2 * p_value)
    assert Calibration({"a": np.arange(10), "b": np.arange(10)}, 9).smallest()[1] == 1.0
    text = str(found).splitlines()
    assert text[1].split()[0] == "a"
    assert text[-1] == f"smallest of 2: b, p = {2 * p_value:.3f} after Bonferroni; 40 data sets"
    with pytest.raises(ValueError, match="at least one data set"):
        Calibration.of([], 9)
    with pytest.raises(ValueError, match="expected the test quantities a, b in all data sets, found a in number 7"):
        Calibration.of([*done, Replication(7, {"a": 1}, {})], 9)


def test_the_picture_has_a_panel_per_quantity_and_marks_what_fails(tmp_path):
    good = np.random.default_rng(6).integers(0, 100, 50)
    first = Calibration({**{f"q{i}": good for i in range(7)}, "bad": good // 3}, 99)
    second = Calibration({"alone": good[:20]}, 99)
    figure = plot_calibration({"one": first, "two": second})
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left").split(",")[0] for ax in panels] == [*first.ranks, "alone"]
    colours = {ax.get_title(loc="left").split(",")[0]: ax.lines[-1].get_color() for ax in panels}
    assert colours["bad"] == "#D55E00"
    assert colours["q0"] == colours["alone"] == "#0072B2"
    curve = panels[0].lines[-1].get_ydata()
    np.testing.assert_allclose(curve[1:-1], ecdf_difference(good, 99))
    band = panels[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(simultaneous_band(50, 99).upper.max())
    assert [block.get_suptitle() for block in figure.subfigs] == [
        "one: 50 data sets, band of 95 % for all points of a panel at once",
        "two: 20 data sets, band of 95 % for all points of a panel at once",
    ]
    figure.savefig(tmp_path / "calibration.png")
    with pytest.raises(ValueError, match="at least one calibration"):
        plot_calibration({})
