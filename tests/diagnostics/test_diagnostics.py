# SPDX-License-Identifier: Apache-2.0
"""Export to both lines of ArviZ, weighted draws of any guide, and plots."""

import functools
import importlib.util
import math
import subprocess
import sys
import warnings

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
)

from pyro_sm import diagnostics
from pyro_sm.base import Draws, Evaluations, PyroSMWarning, RoundInfo
from pyro_sm.corrections import NoCorrection
from pyro_sm.diagnostics import Provenance, arviz_lines, draw_from_guide, draws_to_arviz, to_arviz
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.model.density import ModelDensity
from pyro_sm.weights import evidence

HAS_LINE_1 = importlib.util.find_spec("arviz_base") is not None
LINES = [
    pytest.param(True, id="arviz 0"),
    pytest.param(False, id="arviz 1", marks=pytest.mark.skipif(not HAS_LINE_1, reason="needs arviz-base")),
]
DATA = torch.tensor([1.0, -0.3, 2.2, 0.7, 1.6], dtype=torch.float64)
PROVENANCE = Provenance("SomeObjective", 7, 123, 45)
HISTORY = [
    RoundInfo(i, (0.2, 0.7, 1.0)[i], 0.01 + 0.2 * i, (0.9, 0.8, 0.3)[i], (-60.0, -9.1, -9.0)[i], 0.1,
              math.nan if i == 0 else 0.5, 1000 * (i + 1), 500 * i, 1.5 * i)
    for i in range(3)
]  # fmt: skip


@pytest.fixture(autouse=True)
def clean_pyro():
    pyro.clear_param_store()
    pyro.set_rng_seed(20)
    yield
    matplotlib.pyplot.close("all")


def hierarchy(y):
    """Gaussian, so everything is known; one plate, one deterministic site, one vector-valued site."""
    one = torch.ones((), dtype=y.dtype)
    mu = pyro.sample("mu", dist.Normal(0.5 * one, 1.5))
    pair = pyro.sample("pair", dist.Normal(one.expand(2), 0.3).to_event(1))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 0.8))
        pyro.deterministic("shifted", theta + pair[..., :1])
        pyro.sample("y", dist.Normal(theta, 1.1), obs=y)


def exact_hierarchy() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Posterior mean (8,) and covariance of ``(mu, pair, theta)``, and log Z."""
    n, eye = len(DATA), torch.eye(len(DATA), dtype=DATA.dtype)
    cov = torch.zeros(n + 3, n + 3, dtype=DATA.dtype)
    cov[0, 0] = 1.5**2
    cov[0, 3:] = cov[3:, 0] = 1.5**2
    cov[1:3, 1:3] = 0.09 * torch.eye(2, dtype=DATA.dtype)
    cov[3:, 3:] = 1.5**2 + 0.64 * eye
    mean = torch.cat([torch.tensor([0.5, 1.0, 1.0], dtype=DATA.dtype), torch.full((n,), 0.5, dtype=DATA.dtype)])
    s = cov[3:, 3:] + 1.21 * eye
    gain = cov[:, 3:] @ torch.linalg.inv(s)
    log_z = torch.distributions.MultivariateNormal(mean[3:], s).log_prob(DATA)
    return mean + gain @ (DATA - mean[3:]), cov - gain @ cov[3:, :], float(log_z)


def hierarchy_draws(n: int = 4000, widen: float = 1.3) -> tuple[ModelDensity, Draws]:
    """Weighted draws from a Gaussian wider than the posterior."""
    density = ModelDensity(hierarchy, (DATA,))
    mean, cov, _ = exact_hierarchy()
    tril = torch.linalg.cholesky(cov) * widen
    z = mean + torch.randn(n, len(mean), dtype=DATA.dtype) @ tril.T
    log_p = density.log_prob(z)
    return density, Draws(z, log_p, log_p - gaussian_log_prob(z, mean, tril))


def make_export(legacy: bool, **options):
    density, draws = hierarchy_draws()
    settings = {"num_samples": 1000, "provenance": PROVENANCE, "history": HISTORY, "legacy": legacy}
    return draws_to_arviz(density, draws, **settings | options)


@functools.cache
def standard_export(legacy: bool):
    """One export for the tests that only look."""
    pyro.set_rng_seed(20)
    return make_export(legacy)


def group(data, name: str) -> xarray.Dataset:
    found = data[name]
    return found.to_dataset() if isinstance(found, xarray.DataTree) else found


# ------------------------------------------------------------------------------------------ the export


def test_importing_diagnostics_imports_neither_arviz_nor_matplotlib():
    code = (
        "import sys, pyro_sm.diagnostics; "
        "print([m for m in ('matplotlib', 'arviz', 'arviz_base', 'xarray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("legacy", LINES)
def test_groups_dimensions_and_labels(legacy):
    data = standard_export(legacy)
    assert isinstance(data, az.InferenceData if legacy else xarray.DataTree)
    sizes = {
        "posterior": {"mu": (4, 250), "pair": (4, 250, 2), "theta": (4, 250, 5), "shifted": (4, 250, 5)},
        "sample_stats": {"lp": (4, 250), "log_q": (4, 250)},
        "log_likelihood": {"y": (4, 250, 5)},
        "log_prior": {"mu": (4, 250), "pair": (4, 250), "theta": (4, 250, 5)},
        "posterior_predictive": {"y": (4, 250, 5)},
        "prior": {"mu": (1, 1000), "pair": (1, 1000, 2), "theta": (1, 1000, 5), "shifted": (1, 1000, 5)},
        "prior_predictive": {"y": (1, 1000, 5)},
        "observed_data": {"y": (5,)},
        "guide": {
            "mu": (1, 4000), "pair": (1, 4000, 2), "theta": (1, 4000, 5),
            "lp": (1, 4000), "log_weight": (1, 4000),
        },
        "training": {name: (3,) for name in RoundInfo._fields if name != "round"},
    }  # fmt: skip
    found = set(data.groups()) if legacy else {path.strip("/") for path in data.groups} - {""}
    assert found == set(sizes)
    for name, expected in sizes.items():
        dataset = group(data, name)
        assert {variable: values.shape for variable, values in dataset.data_vars.items()} == expected
    for name, variable in (
        ("posterior", "theta"),
        ("posterior", "shifted"),
        ("log_likelihood", "y"),
        ("posterior_predictive", "y"),
        ("guide", "theta"),
    ):
        assert group(data, name)[variable].dims == ("chain", "draw", "group")
    assert group(data, "observed_data")["y"].dims == ("group",)
    assert group(data, "posterior")["pair"].dims == ("chain", "draw", "pair_dim_0")
    assert group(data, "posterior")["group"].values.tolist() == [0, 1, 2, 3, 4]
    assert group(data, "training")["gamma"].dims == ("round",)
    np.testing.assert_allclose(group(data, "training")["khat"], [0.9, 0.8, 0.3])
    np.testing.assert_array_equal(group(data, "observed_data")["y"], DATA.numpy())


@pytest.mark.parametrize("legacy", LINES)
def test_every_group_speaks_of_the_same_draws(legacy):
    data = standard_export(legacy)
    density = ModelDensity(hierarchy, (DATA,))
    posterior, stats = group(data, "posterior"), group(data, "sample_stats")
    sites = {name: torch.tensor(posterior[name].values).flatten(0, 1) for name in ("mu", "pair", "theta")}
    z = density.pack(sites)
    lp = stats["lp"].values.reshape(-1)
    np.testing.assert_allclose(density.log_prob(z).numpy(), lp, rtol=1e-10)
    mean, cov, _ = exact_hierarchy()
    log_q = gaussian_log_prob(z, mean, 1.3 * torch.linalg.cholesky(cov))
    np.testing.assert_allclose(log_q.numpy(), stats["log_q"].values.reshape(-1), rtol=1e-9)
    likelihood = torch.distributions.Normal(sites["theta"], 1.1).log_prob(DATA)
    np.testing.assert_allclose(
        likelihood.numpy(), group(data, "log_likelihood")["y"].values.reshape(-1, 5), rtol=1e-10
    )
    shifted = sites["theta"] + sites["pair"][:, :1]
    np.testing.assert_allclose(shifted.numpy(), posterior["shifted"].values.reshape(-1, 5), rtol=1e-10)


@pytest.mark.parametrize("legacy", LINES)
def test_attributes_say_where_the_draws_come_from_and_whether_to_trust_them(legacy):
    attributes = group(standard_export(legacy), "posterior").attrs
    expected = {
        "objective": "SomeObjective",
        "seed": 7,
        "density_evaluations": 123,
        "gradient_evaluations": 45,
        "inference_library": "pyro_sm",
        "correction": "Pareto-smoothed importance resampling",
        "num_raw_draws": 4000,
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
    }
    assert {name: attributes[name] for name in expected} == expected
    assert attributes["created_at"]
    assert attributes["inference_library_version"]
    assert attributes["arviz_version" if legacy else "arviz_base_version"]
    assert all(type(value) in (str, int, float) for value in attributes.values())
    _, _, log_z = exact_hierarchy()
    assert abs(attributes["log_evidence"] - log_z) < 5 * attributes["log_evidence_se"]
    assert 0 < attributes["log_evidence_se"] < 0.1
    assert attributes["pareto_khat"] < 0.5
    assert 0.3 < attributes["importance_ess"] < 1


def test_a_seed_that_is_not_known_is_recorded_as_such():
    unknown = Provenance("SomeObjective", None, 1, 2)
    assert make_export(True, provenance=unknown).posterior.attrs["seed"] == "not recorded"


@pytest.mark.parametrize("legacy", LINES)
def test_netcdf_round_trip(legacy, tmp_path):
    data = standard_export(legacy)
    path = tmp_path / "posterior.nc"
    data.to_netcdf(str(path))
    back = az.from_netcdf(str(path)) if legacy else xarray.open_datatree(path).load()
    for name in ("posterior", "guide", "training", "log_likelihood", "observed_data", "sample_stats"):
        before, after = group(data, name), group(back, name)
        xarray.testing.assert_identical(before.drop_attrs(), after.drop_attrs())
    before, after = group(data, "posterior").attrs, group(back, "posterior").attrs
    assert {k: after[k] for k in before} == before
    diagnostics.plot_khat(back)


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")  # ArviZ 0.23
def test_arviz_0_works_on_it():
    data = standard_export(True)
    table = az.summary(data, var_names=["mu", "theta"])
    mean, cov, _ = exact_hierarchy()
    assert list(table.index) == ["mu", *(f"theta[{i}]" for i in range(5))]
    assert abs(table.loc["mu", "mean"] - float(mean[0])) < 5 * float(cov[0, 0].sqrt()) / math.sqrt(700)
    assert (table["r_hat"] < 1.05).all()
    az.plot_trace(data, var_names=["mu", "theta"])
    az.plot_pair(data, var_names=["mu", "pair"])
    az.plot_ppc(data, num_pp_samples=20)
    result = az.loo(data)
    assert math.isfinite(result.elpd_loo)
    assert result.n_data_points == 5


def test_arviz_1_works_on_it():
    stats = pytest.importorskip("arviz_stats")
    data = standard_export(False)
    table = stats.summary(data, var_names=["mu", "theta"])
    assert list(table.index) == ["mu", *(f"theta[{i}]" for i in range(5))]
    assert stats.loo(data).n_data_points == 5


def test_chains_must_divide_the_samples():
    with pytest.raises(ValueError, match="num_chains to divide num_samples=1000, found 3"):
        make_export(True, num_chains=3)


def test_parts_can_be_left_out():
    data = make_export(True, predictive=False, log_likelihood=False, prior=False, history=())
    assert set(data.groups()) == {"posterior", "sample_stats", "observed_data", "guide"}


def test_raw_draws_are_exported_as_they_are():
    data = make_export(True, correction=NoCorrection(), num_chains=1)
    np.testing.assert_array_equal(data.posterior["mu"][0], data.guide["mu"][0, :1000])
    assert data.posterior.attrs["correction"] == "none (raw draws of the guide)"


def test_untrusted_weights_are_called_so():
    density, draws = hierarchy_draws(widen=0.5)
    with pytest.warns(PyroSMWarning, match=r"Pareto k̂ is \d\.\d\d, above 0.7"):
        data = draws_to_arviz(density, draws, num_samples=400, provenance=PROVENANCE)
    assert data.posterior.attrs["pareto_khat"] > 0.7


def test_weights_too_few_to_judge_are_called_so():
    density, draws = hierarchy_draws(n=16)
    with pytest.warns(PyroSMWarning, match="could not be estimated"):
        draws_to_arviz(density, draws, num_samples=4, num_chains=1, provenance=PROVENANCE)


@pytest.mark.parametrize(
    ("versions", "legacy"),
    [({"arviz": "0.17.1"}, True), ({"arviz": "1.0.0"}, False), ({"arviz-base": "0.8.2"}, False)],
)
def test_the_line_of_arviz_is_read_off_its_version(monkeypatch, versions, legacy):
    def version(package):
        if package not in versions:
            raise arviz_lines.importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(arviz_lines.importlib.metadata, "version", version)
    assert arviz_lines.installed_arviz_is_legacy() is legacy
    versions.clear()
    with pytest.raises(ImportError, match="pip install arviz"):
        arviz_lines.installed_arviz_is_legacy()


# ---------------------------------------------------------------------------------- names of dimensions


def export_model(model, *args, n: int = 200, **options):
    """Draws of the prior, exported with made-up weights: only names and groups matter."""
    density = ModelDensity(model, args)
    z = density.prior_draws(n)
    log_p = density.log_prob(z)
    draws = Draws(z, log_p, 0.1 * torch.randn(n))
    return draws_to_arviz(density, draws, num_samples=100, provenance=PROVENANCE, **options)


def two_plates():
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Dirichlet(torch.ones(4)))
    with rows, columns:
        pyro.sample("obs", dist.Normal(a + b[..., 0], 1.0), obs=torch.zeros(3, 2))


@pytest.mark.parametrize("legacy", LINES)
def test_nested_plates_and_event_dimensions(legacy):
    data = export_model(two_plates, legacy=legacy)
    posterior = group(data, "posterior")
    assert posterior["a"].dims == ("chain", "draw", "row", "a_dim_1")
    assert posterior["a"].shape == (4, 25, 3, 1)
    assert posterior["b"].dims == ("chain", "draw", "column", "b_dim_1")
    assert group(data, "log_likelihood")["obs"].dims == ("chain", "draw", "row", "column")


def colliding_names():
    with pyro.plate("x", 3):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("draw", 2):
        pyro.sample("scope/w", dist.Normal(0.0, 1.0))
    pyro.sample("obs", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(0.3))


@pytest.mark.parametrize("legacy", LINES)
def test_names_that_collide_or_cannot_be_stored(legacy, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroSMWarning)
        data = export_model(colliding_names, legacy=legacy)
    posterior = group(data, "posterior")
    assert posterior["x"].dims == ("chain", "draw", "x_dim")
    assert posterior["scope.w"].dims == ("chain", "draw", "draw_dim")
    data.to_netcdf(str(tmp_path / "names.nc"))


def vector_data():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("n", 6):
        loc = torch.zeros(2)
        pyro.sample("obs", dist.Normal(loc, scale[..., None, None]).to_event(1), obs=torch.ones(6, 2))


@pytest.mark.parametrize("legacy", LINES)
def test_vector_valued_data(legacy):
    data = export_model(vector_data, legacy=legacy)
    assert group(data, "log_likelihood")["obs"].dims == ("chain", "draw", "n")
    assert group(data, "posterior_predictive")["obs"].dims == ("chain", "draw", "n", "obs_dim_1")
    assert group(data, "observed_data")["obs"].shape == (6, 2)


def mixture(y):
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[..., 0] * (k == 0) + locs[..., 1] * (k == 1), 1.0), obs=y)


def test_an_enumerated_model_has_no_log_likelihood_and_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroSMWarning)  # batching of the model, not ours
        density = ModelDensity(mixture, (torch.tensor([-1.0, 0.5, 2.0]),))
    z = density.prior_draws(100)
    draws = Draws(z, density.log_prob(z), 0.1 * torch.randn(100))
    data = draws_to_arviz(density, draws, num_samples=40, provenance=PROVENANCE)
    assert "log_likelihood" not in data.groups()
    assert data.posterior_predictive["y"].shape == (4, 10, 3)


def improper():
    loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("obs", dist.Normal(loc, 1.0), obs=torch.tensor(0.4))


def test_an_improper_prior_is_not_exported():
    assert "prior" not in export_model(improper).groups()


# ------------------------------------------------------------------------- weighted draws of any guide


def positive(n_obs: int = 4):
    """Gamma and Dirichlet latents: a guide in constrained space needs the Jacobian."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0).double(), 2.0))
    probs = pyro.sample("probs", dist.Dirichlet(torch.tensor([1.0, 2.0, 4.0]).double()))
    with pyro.plate("n", n_obs):
        pyro.sample(
            "obs",
            dist.Poisson(rate[..., None] if rate.dim() else rate),
            obs=torch.tensor([2.0, 0, 1, 3]).double(),
        )
    pyro.sample("cat", dist.Categorical(probs), obs=torch.tensor(2))


def positive_log_evidence() -> float:
    """Gamma–Poisson and Dirichlet–categorical, both conjugate."""
    a, b, total, n = 3.0, 2.0, 6.0, 4
    counts = math.lgamma(a + total) - math.lgamma(a) + a * math.log(b) - (a + total) * math.log(b + n)
    return counts - math.log(2 * 1 * 1 * 6) + math.log(4 / 7)


def guide_by_hand(n_obs: int = 4):
    pyro.sample("probs", dist.Dirichlet(torch.tensor([1.2, 2.0, 4.5]).double()))
    pyro.sample("rate", dist.LogNormal(torch.tensor(0.4).double(), 0.4))


def guide_that_cannot_be_batched(n_obs: int = 4):
    rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.4).double(), 0.4))
    shift = 0.5 if float(rate.mean()) > 1.5 else 0.0  # looks at the value: wrong for a batch
    pyro.sample("probs", dist.Dirichlet(torch.tensor([1.2, 2.0, 4.5]).double() + shift))


@pytest.mark.parametrize(("guide", "n"), [(guide_by_hand, 4000), (guide_that_cannot_be_batched, 600)])
def test_guides_written_by_hand_give_the_evidence(guide, n):
    density = ModelDensity(positive, (4,))
    draws = draw_from_guide(guide, density, n, (4,))
    assert density.evaluations.values == n
    found, exact = evidence(draws.log_weight), positive_log_evidence()
    assert abs(found.log_evidence - exact) < 5 * found.log_evidence_se
    for i in range(0, n, n // 7):  # against the guide itself, one draw at a time
        values = {name: value[i] for name, value in density.unpack(draws.z).items()}
        trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(4)
        jacobian = sum(
            site.transform.log_abs_det_jacobian(
                draws.z[i, site.start : site.stop].reshape(site.unconstrained_shape), values[site.name]
            ).sum()
            for site in density.sites
        )
        assert float(draws.log_q[i]) == pytest.approx(float(trace.log_prob_sum() + jacobian), rel=1e-8, abs=1e-8)


def test_a_forgotten_jacobian_would_show():
    density = ModelDensity(positive, (4,))
    draws = draw_from_guide(guide_by_hand, density, 4000, (4,))
    found = evidence(draws.log_weight)
    jacobian = sum(
        site.transform.log_abs_det_jacobian(
            draws.z[:, site.start : site.stop].reshape(-1, *site.unconstrained_shape),
            density.unpack(draws.z)[site.name],
        )
        for site in density.sites
    )
    wrong = evidence(draws.log_weight + jacobian)
    assert abs(wrong.log_evidence - positive_log_evidence()) > 10 * found.log_evidence_se


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_autoguides_give_the_evidence(auto):
    guide = auto(positive, init_scale=0.8, init_loc_fn=init_to_median)
    density = ModelDensity(positive, (4,))
    draws = draw_from_guide(guide, density, 4000, (4,))
    found = evidence(draws.log_weight)
    assert found.log_evidence_se < 0.2
    assert abs(found.log_evidence - positive_log_evidence()) < 5 * found.log_evidence_se


def test_both_normal_autoguides_agree_on_their_density():
    """AutoNormal is drawn by traces, AutoDiagonalNormal from its vector: two routes to one log q."""
    density = ModelDensity(hierarchy, (DATA,))
    torch.set_default_dtype(torch.float64)
    try:
        by_trace = AutoNormal(hierarchy, init_scale=0.7, init_loc_fn=init_to_median)
        draws = draw_from_guide(by_trace, density, 50, (DATA,))
    finally:
        torch.set_default_dtype(torch.float32)
    locs = {s.name: getattr(by_trace.locs, s.name).detach() for s in density.sites}
    scales = {s.name: getattr(by_trace.scales, s.name).detach() for s in density.sites}
    loc = torch.cat([locs[s.name].reshape(-1) for s in density.sites])
    scale = torch.cat([scales[s.name].reshape(-1) for s in density.sites])
    expected = gaussian_log_prob(draws.z, loc, torch.diag(scale))
    torch.testing.assert_close(draws.log_q, expected, rtol=1e-8, atol=1e-8)


def test_a_guide_that_knows_its_weights_is_asked_for_them():
    class Knowing:
        def draw_weighted(self, density, num_draws, arguments):
            return hierarchy_draws(num_draws)[1]

    density = ModelDensity(hierarchy, (DATA,))
    assert draw_from_guide(Knowing(), density, 12).z.shape == (12, 8)


def extra_latent(y):
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    guide_for_hierarchy(y, u)


def guide_for_hierarchy(y, shift=0.0):
    pyro.sample("mu", dist.Normal(0.5 + shift, 1.0))
    pyro.sample("pair", dist.Normal(torch.ones(2), 0.3).to_event(1))
    with pyro.plate("group", len(y)):
        pyro.sample("theta", dist.Normal(0.5, 1.0))


def missing_latent(y):
    pyro.sample("mu", dist.Normal(0.5, 1.0))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (AutoDelta(hierarchy), "mu, pair, theta is a point estimate"),
        (AutoLaplaceApproximation(hierarchy), "laplace_approximation"),
        (extra_latent, "extra_latent: u is not a continuous latent site"),
        (missing_latent, "missing_latent: it has no sample statement for pair, theta"),
        ("guide", "cannot draw from str"),
    ],
    ids=["AutoDelta", "AutoLaplaceApproximation", "extra", "missing", "no guide"],
)
def test_guides_without_a_density_are_refused(guide, message):
    density = ModelDensity(hierarchy, (DATA,))
    with pytest.raises(TypeError, match=message):
        draw_from_guide(guide, density, 10, (DATA,))


def test_to_arviz_end_to_end():
    class Counted:
        evaluations = Evaluations(values=77, scores=66)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyroSMWarning)
        data = to_arviz(hierarchy, guide_for_hierarchy, DATA, num_samples=400, objective=Counted(), seed=3)
        named = to_arviz(hierarchy, guide_for_hierarchy, y=DATA, num_samples=30, pool=50, objective="by hand")
        silent = to_arviz(hierarchy, guide_for_hierarchy, DATA, num_samples=33, pool=50, correction=NoCorrection())
    attributes = data.posterior.attrs
    assert data.posterior["theta"].dims == ("chain", "draw", "group")
    assert data.posterior["theta"].shape == (4, 100, 5)
    assert data.guide["mu"].shape == (1, 1600)
    assert attributes["objective"] == "Counted"
    assert (attributes["seed"], attributes["density_evaluations"], attributes["gradient_evaluations"]) == (
        3,
        77,
        66,
    )
    assert named.posterior["mu"].shape == (2, 15)
    assert named.posterior.attrs["objective"] == "by hand"
    assert named.posterior.attrs["density_evaluations"] == 50
    assert silent.posterior["mu"].shape == (1, 33)
    assert silent.posterior.attrs["objective"] == "not recorded"


def test_to_arviz_refuses_a_pool_smaller_than_the_samples():
    with pytest.raises(ValueError, match="at least num_samples=100 draws"):
        to_arviz(hierarchy, guide_for_hierarchy, DATA, num_samples=100, pool=50)


# ----------------------------------------------------------------------------------------------- plots


def texts(figure) -> str:
    """Everything written in a figure."""
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def save(figure, path) -> None:
    figure.savefig(path / "figure.png")
    assert (path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("legacy", LINES)
def test_plots_from_exported_results(legacy, tmp_path):
    data = standard_export(legacy)
    training = diagnostics.plot_training(data)
    assert [ax.get_ylabel().split("\n")[0] for ax in training.axes] == [
        "damping γ", "effective sample size", "log evidence",
    ]  # fmt: skip
    assert "nats" in texts(training)
    assert "k̂ > 0.7" in texts(training)
    corner = diagnostics.plot_raw_vs_weighted(data, ["mu", "pair", "theta"], max_variables=4)
    assert len(corner.axes) == 16
    assert "pair[1]" in texts(corner)
    tail = diagnostics.plot_khat(data)
    assert "the weights can be trusted" in texts(tail)
    for figure in (training, corner, tail):
        save(figure, tmp_path)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_training_plot_from_a_history_of_any_length(rounds, tmp_path):
    save(diagnostics.plot_training(HISTORY[:rounds]), tmp_path)


def test_training_plot_of_a_run_that_went_wrong(tmp_path):
    bad = [
        info._replace(ess=0.0, khat=math.inf, log_evidence=-math.inf, log_evidence_se=math.inf) for info in HISTORY
    ]
    save(diagnostics.plot_training(bad), tmp_path)


def test_plots_into_given_axes():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(4, 1)
    assert diagnostics.plot_training(HISTORY, axes[:3]) is figure
    assert diagnostics.plot_khat(standard_export(True), axes[3]) is figure
    with pytest.raises(ValueError, match="expected three axes, found 2"):
        diagnostics.plot_training(HISTORY, axes[:2])


def test_khat_plot_of_bad_weights_says_so():
    density, draws = hierarchy_draws(widen=0.5)
    with pytest.warns(PyroSMWarning):
        data = draws_to_arviz(density, draws, num_samples=400, provenance=PROVENANCE)
    assert "cannot be trusted" in texts(diagnostics.plot_khat(data))


def test_plots_of_what_is_not_there():
    data = make_export(True, history=())
    with pytest.raises(ValueError, match="expected results with the group 'training', found only posterior"):
        diagnostics.plot_training(data)
    with pytest.raises(ValueError, match="at least one round"):
        diagnostics.plot_training([])
    with pytest.raises(ValueError, match="expected variables among mu, pair, theta"):
        diagnostics.plot_raw_vs_weighted(data, ["nothing"])
    flat = make_export(True)
    flat.guide["log_weight"][:] = 0.0
    with pytest.raises(ValueError, match="tail to fit"):
        diagnostics.plot_khat(flat)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_sm\[plots\]'"):
        diagnostics.plot_training(HISTORY)
