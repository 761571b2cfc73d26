# SPDX-License-Identifier: Apache-2.0
"""``ModelDensity``: right value and score on a zoo of models, refusals by name, and no trace left behind."""

import copy
import math
import pickle
import warnings
import zlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import ZOO, in_place, mixing_sum, supports
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch.distributions import constraints

from pyro_sm.base import Density, Evaluations, ModelRefusedError, PyroSMWarning
from pyro_sm.bench.batching_models import PROBLEMS
from pyro_sm.model.density import ModelDensity, OneByOne, OuterPlate, VMap
from pyro_sm.model.transforms import CholeskyBijection, PositiveDefiniteBijection


@pytest.fixture(autouse=True)
def double(request):
    """Float64, one thread, a seed from the test's name, an empty param store."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(zlib.crc32(request.node.name.encode()) % 2**31)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def close(found, expected, rtol=1e-10, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def score_by_loop(density, z):
    leaf = z.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(density.log_prob_one_by_one(leaf).sum(), leaf)
    return score


# ---------------------------------------------------------------- exact: the zoo


@pytest.mark.parametrize("name", ZOO)
def test_zoo_agrees_with_the_loop(name):
    model, args, kwargs = ZOO[name]()
    density = ModelDensity(model, args, kwargs)
    assert isinstance(density, Density)
    assert density.batching_method != "one by one"
    z = 0.7 * torch.randn(5, density.dim)
    expected, score = density.log_prob_one_by_one(z), score_by_loop(density, z)
    assert torch.isfinite(expected).all()
    for size in (1, 2, 5):
        value, found = density.log_prob_and_score(z[:size])
        close(value, expected[:size])
        close(found, score[:size])
        close(density.log_prob(z[:size]), expected[:size])
        assert not value.requires_grad
        assert not found.requires_grad
    assert density.log_prob(z[:0]).shape == (0,)
    assert density.log_prob_and_score(z[:0])[1].shape == (0, density.dim)


@pytest.mark.parametrize("name", ZOO)
def test_both_batched_ways_that_work_agree(name):
    """VMap is never wrong; OuterPlate only where the automatic choice takes it."""
    model, args, kwargs = ZOO[name]()
    automatic = ModelDensity(model, args, kwargs)
    z = 0.7 * torch.randn(4, automatic.dim)
    if name != "sequential plate":
        vmap = ModelDensity(model, args, kwargs, batching=VMap())
        assert vmap.batching_method == "vmap"
        close(vmap.log_prob(z), automatic.log_prob(z))
    assert ModelDensity(model, args, kwargs, batching=OneByOne()).batching_method == "one by one"


@pytest.mark.parametrize("name", ["eight schools", "hierarchical logistic", "enumerated mixture", "hidden Markov"])
def test_log_prob_is_differentiable_twice(name):
    model, args, kwargs = ZOO[name]()
    density = ModelDensity(model, args, kwargs)
    z = 0.5 * torch.randn(3, density.dim)
    direction = torch.randn(3, density.dim)
    leaf = z.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(density.log_prob(leaf).sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad((score * direction).sum(), leaf)
    step = 1e-5
    ahead, behind = (density.log_prob_and_score(z + s * step * direction)[1] for s in (1, -1))
    close(product, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not density.log_prob(z).requires_grad


# ---------------------------------------------------------------- exact: formulas by hand


def test_eight_schools_by_hand():
    model, (y, sigma) = PROBLEMS["eight schools"]()
    density = ModelDensity(model, (y, sigma))
    z = torch.randn(6, 10)
    mu, log_tau, eta = z[:, 0], z[:, 1], z[:, 2:]
    tau = log_tau.exp()

    def normal(x, loc, scale):
        return -0.5 * ((x - loc) / scale) ** 2 - torch.log(torch.as_tensor(scale)) - 0.5 * math.log(2 * math.pi)

    half_cauchy = math.log(2 / (math.pi * 5)) - torch.log1p((tau / 5) ** 2)
    likelihood = normal(y, mu[:, None] + tau[:, None] * eta, sigma).sum(1)
    expected = normal(mu, 0.0, 5.0) + half_cauchy + log_tau + normal(eta, 0.0, 1.0).sum(1) + likelihood
    close(density.log_prob(z), expected)
    assert (expected - log_tau - density.log_prob(z)).abs().min() > 1e-3  # without the Jacobian it is wrong
    assert [(s.name, s.start, s.stop, s.plates) for s in density.sites] == [
        ("mu", 0, 1, ()),
        ("tau", 1, 2, ()),
        ("eta", 2, 10, (("school", -1, 8),)),
    ]
    assert density.deterministic == ("theta",)
    assert list(density.observed) == ["y"]
    close(density.observed["y"], y)


def mixture_by_hand(density, z, y):
    values = density.unpack(z)
    weights, locs, scales = values["weights"], values["locs"], values["scales"]
    u = z[:, density.sites[0].start : density.sites[0].stop]
    log_det = density.sites[0].transform.log_abs_det_jacobian(u, weights) + scales.log().sum(1)
    prior = (
        dist.Dirichlet(torch.ones(3)).log_prob(weights)
        + dist.Normal(0.0, 5.0).log_prob(locs).sum(1)
        + dist.LogNormal(0.0, 1.0).log_prob(scales).sum(1)
    )
    terms = weights.log()[:, None] + dist.Normal(locs[:, None], scales[:, None]).log_prob(y[None, :, None])
    return prior + log_det, torch.logsumexp(terms, -1).sum(1)


@pytest.mark.parametrize("name", ["enumerated mixture", "wrapped enumeration"])
def test_enumerated_mixture_by_hand(name):
    model, (y,), _ = ZOO[name]()
    density = ModelDensity(model, (y,))
    z = torch.randn(5, density.dim)
    prior, likelihood = mixture_by_hand(density, z, y)
    close(density.log_prob(z), prior + likelihood)


def scaled_coin(x):
    """One binary label for one observation, everything under a scale of 3."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.poutine.scale(scale=3.0):
        label = pyro.sample("label", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu + 2 * label, 1.0), obs=x)


@pytest.mark.parametrize("batching", [None, OuterPlate(), VMap(), OneByOne()])
def test_scale_is_applied_outside_of_the_enumeration(batching):
    x = torch.tensor(2.5)
    density = ModelDensity(scaled_coin, (x,), batching=batching)
    mu = torch.linspace(-1, 1, 4)
    terms = torch.stack([math.log(p) + dist.Normal(mu + 2 * k, 1.0).log_prob(x) for k, p in enumerate((0.7, 0.3))])
    prior = dist.Normal(0.0, 1.0).log_prob(mu)
    close(density.log_prob(mu[:, None]), prior + 3 * torch.logsumexp(terms, 0))
    inside = prior + torch.logsumexp(3 * terms, 0)  # Pyro's HMC
    assert (inside - density.log_prob(mu[:, None])).abs().max() > 1


def test_scale_agrees_with_trace_enum_elbo():
    """The guide is a point: minus the loss of ``TraceEnum_ELBO`` is the log density."""
    density = ModelDensity(scaled_coin, (torch.tensor(2.5),))

    def guide(x):
        pyro.sample("mu", dist.Delta(torch.tensor(0.4)))

    model = pyro.infer.config_enumerate(scaled_coin)
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide, torch.tensor(2.5))
    close(density.log_prob(torch.tensor([[0.4]])), torch.tensor([-loss]))


def test_different_scales_inside_one_enumeration_are_refused():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        label = pyro.sample("label", dist.Bernoulli(0.3))
        with pyro.poutine.scale(scale=3.0):
            pyro.sample("x", dist.Normal(mu + 2 * label, 1.0), obs=x)

    with pytest.raises(ModelRefusedError, match="'label': 1, 'x': 3"):
        ModelDensity(model, (torch.tensor(2.5),))


def test_mask_and_scale_by_hand():
    model, (y, mask), _ = ZOO["masked and scaled"]()
    density = ModelDensity(model, (y, mask))
    mu = torch.randn(5, 1)
    likelihood = dist.Normal(mu, 1.0).log_prob(y)[:, mask].sum(1)
    close(density.log_prob(mu), dist.Normal(0.0, 1.0).log_prob(mu[:, 0]) + 2.5 * likelihood)


def free_entries(name, value):
    """As many coordinates of a constrained value as the density of its law is measured by."""
    if name == "simplex":
        return value[:-1]
    if name == "chol":
        return value[tuple(torch.tril_indices(3, 3, -1))]
    if name == "definite":
        return value[tuple(torch.tril_indices(2, 2))]
    return value.reshape(-1)


def test_jacobians_by_autograd():
    model, args, kwargs = supports()
    density = ModelDensity(model, args, kwargs)
    z = 0.5 * torch.randn(density.dim)
    for site in density.sites:
        u = z[site.start : site.stop].reshape(site.unconstrained_shape)

        def free(flat, site=site, shape=u.shape):
            return free_entries(site.name, site.transform(flat.reshape(shape)))

        jacobian = torch.autograd.functional.jacobian(free, u.reshape(-1))
        found = site.transform.log_abs_det_jacobian(u, site.transform(u)).sum()
        close(found, torch.linalg.slogdet(jacobian).logabsdet)
    assert density.improper == ("improper_positive", "definite")


@pytest.mark.parametrize("transform", [CholeskyBijection(), PositiveDefiniteBijection()])
def test_matrix_bijections(transform):
    u = torch.randn(2, 6)
    matrix = transform(u)
    assert matrix.shape == transform.forward_shape(u.shape) == (2, 3, 3)
    assert transform.inverse_shape(matrix.shape) == u.shape
    assert transform.codomain.check(matrix).all()
    close(transform.inv(matrix), u)
    rows, columns = torch.tril_indices(3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x)[rows, columns], u[0])
    close(transform.log_abs_det_jacobian(u, matrix)[0], torch.linalg.slogdet(jacobian).logabsdet)
    assert (transform == CholeskyBijection()) == (type(transform) is CholeskyBijection)


# ---------------------------------------------------------------- choosing the batching


def test_unverified_outer_plate_is_wrong_where_the_automatic_choice_is_right():
    model, args, _ = mixing_sum()
    automatic = ModelDensity(model, args)
    trusted = ModelDensity(model, args, batching=OuterPlate())
    z = torch.randn(4, 2)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(1) + dist.Normal(z.sum(1), 1.0).log_prob(args[0])
    close(automatic.log_prob(z), expected)
    assert automatic.batching_method == "vmap"
    assert "first at site 'y'" in automatic.batching_reasons[0]
    assert (trusted.log_prob(z) - expected).abs().max() > 0.1


def test_the_loop_comes_with_a_warning_that_says_why():
    model, args, _ = in_place()
    with pytest.warns(PyroSMWarning, match=r"outer plate gives a wrong log density, first at site 'y'.*vmap failed"):
        density = ModelDensity(model, args)
    assert density.batching_method == "one by one"
    z = torch.randn(3, 2)
    close(density.log_prob(z), ModelDensity(*mixing_sum()).log_prob(z))
    close(density.log_prob_and_score(z)[1], ModelDensity(*mixing_sum()).log_prob_and_score(z)[1])


def test_value_dependent_branch_is_evaluated_one_by_one():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(1.0 if theta > 0 else -1.0, 1.0), obs=x)

    with pytest.warns(PyroSMWarning, match="one latent at a time"):
        density = ModelDensity(model, (torch.tensor(1.0),))
    z = torch.tensor([[0.5], [-0.5]])
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(z[:, 0].sign(), 1.0).log_prob(torch.ones(()))
    close(density.log_prob(z), expected)


@pytest.mark.parametrize("name", ["eight schools", "enumerated mixture"])
def test_chunks_change_nothing(name):
    model, args, kwargs = ZOO[name]()
    whole, chunked = ModelDensity(model, args, kwargs), ModelDensity(model, args, kwargs, chunk_size=3)
    z = torch.randn(7, whole.dim)
    close(chunked.log_prob(z), whole.log_prob(z))
    for found, expected in zip(chunked.log_prob_and_score(z), whole.log_prob_and_score(z), strict=True):
        close(found, expected)
    with pytest.raises(ValueError, match="positive chunk_size"):
        ModelDensity(model, args, kwargs, chunk_size=0)


@pytest.mark.parametrize(
    ("num_data", "way", "kind", "rows"),
    [
        (6, OuterPlate(), "observed", 2**18 // 7),
        (6, OuterPlate(), "enumerated", 4096),
        (6, VMap(), "observed", 4096),
        (500, OuterPlate(), "observed", 2**18 // 501),
        (500, OuterPlate(), "factor", 2**18 // 501),
        (5000, OuterPlate(), "observed", 256),
        (5000, OuterPlate(), "enumerated", 256),
        (5000, VMap(), "observed", 1024),
    ],
)
def test_a_chunk_fits_into_a_cache(num_data, way, kind, rows):
    """Data count whether a site observes them or a factor hides them."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        if kind == "enumerated":
            mean = mean + pyro.sample("side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        if kind == "factor":
            pyro.factor("y", dist.Normal(mean[..., None], 1.0).log_prob(y).sum(-1))
        else:
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert ModelDensity(model, (torch.zeros(num_data),), batching=way).chunk_size == rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["eight schools", "enumerated mixture"])
def test_compiled_scores_agree(name):
    model, args, kwargs = ZOO[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PyroSMWarning)
        compiled = ModelDensity(model, args, kwargs, compile=True)
        z = torch.randn(16, compiled.dim)
        found = compiled.log_prob_and_score(z)
    for a, b in zip(found, ModelDensity(model, args, kwargs).log_prob_and_score(z), strict=True):
        close(a, b)


def test_failed_compilation_warns_once_and_falls_back(monkeypatch):
    model, args, kwargs = ZOO["eight schools"]()
    density = ModelDensity(model, args, kwargs, compile=True)
    monkeypatch.setattr(torch, "compile", lambda graph: (_ for _ in ()).throw(RuntimeError("no compiler here")))
    z = torch.randn(4, density.dim)
    with pytest.warns(PyroSMWarning, match="no compiler here"):
        value, _ = density.log_prob_and_score(z)
    close(value, density.log_prob(z))
    density.log_prob_and_score(torch.randn(5, density.dim))  # no second warning (they are errors here)


# ---------------------------------------------------------------- refusals


def refused(model, match, args=(), kwargs=None):
    with pytest.raises(ModelRefusedError, match=match):
        ModelDensity(model, args, kwargs)


def test_dynamic_sites_are_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            pyro.sample("extra", dist.Normal(0.0, 1.0))

    refused(model, "site 'extra' is there in one call and not in another")


def test_dynamic_shapes_are_refused():
    def model():
        n = 2 + int(torch.rand(()) > 0.5)
        pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))

    refused(model, r"site 'x' has shape \(.*changes from call to call")


def test_rare_new_latent_is_refused_when_it_appears():
    calls = []

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if calls:
            pyro.sample("late", dist.Normal(x, 1.0))

    density = ModelDensity(model)
    calls.append(1)
    with pytest.raises(ModelRefusedError, match="'late' was not there"):
        density.log_prob(torch.zeros(2, 1))


def test_poisson_latent_is_refused():
    def model():
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("count", dist.Poisson(rate))

    refused(model, r"'count' is discrete \(Poisson\) and cannot be enumerated")


def test_drawn_subsample_is_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    refused(model, r"plate 'data' draws a random subsample \(2 of 5\)", (torch.zeros(5),))


def test_no_latents_is_refused():
    refused(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)), "no continuous latent site")
    refused(lambda: pyro.sample("k", dist.Bernoulli(0.5)), r"only discrete ones: k")


def test_nowhere_finite_is_refused_with_counts():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("nan", x * math.nan)

    refused(model, r"none of 128 draws from the prior \(128 NaN, 0 infinite")

    def outside(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(x, x + 1), obs=y)

    refused(outside, r"\(0 NaN, 128 infinite", (torch.tensor(100.0),))


def test_missing_argument_is_one_clear_line():
    model, _, _ = ZOO["eight schools"]()
    with pytest.raises(ModelRefusedError, match="missing 1 required positional argument: 'sigma'") as caught:
        ModelDensity(model, (torch.zeros(8),))
    assert "\n" not in str(caught.value)
    refused(model, "unexpected keyword argument 'z'", (torch.zeros(8), torch.ones(8)), {"z": 1})


def test_errors_inside_the_model_name_the_site():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + undefined, 1.0), obs=y)  # noqa: F821

    refused(model, "failed at or after site 'mu': NameError", (torch.zeros(2),))


def test_shapes_that_do_not_fit_are_refused():
    def plate():
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0))

    refused(plate, "plate.'n'. at site x dim -1, 3 vs 2")

    def data(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    refused(data, r"observed site 'y' has data of shape \(2,\)", (torch.zeros(2),))
    refused(data, r"'y'.*broadcast to \(3, 3\)", (torch.zeros(3, 1),))


def test_delta_and_moving_supports_are_refused():
    refused(lambda: pyro.sample("x", dist.Delta(torch.tensor(1.0))), "'x' is a Delta.*pyro.deterministic")

    def model():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, a))

    refused(model, "support of the latent site 'b' depends on other latents")


def test_hidden_randomness_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("noise", x * torch.randn(()))

    refused(model, "random numbers outside pyro.sample")


def test_wrong_device_and_wrong_shape_are_value_errors():
    model, args, kwargs = ZOO["eight schools"]()
    with pytest.raises(ValueError, match="expected the model's latents on meta"):
        ModelDensity(model, args, kwargs, device="meta")
    density = ModelDensity(model, args, kwargs)
    for z in (torch.zeros(10), torch.zeros(3, 9)):
        with pytest.raises(ValueError, match=r"shape \(B, 10\)"):
            density.log_prob(z)
    with pytest.raises(ValueError, match="found none for 'eta'"):
        density.pack({"mu": torch.zeros(2), "tau": torch.ones(2)})
    with pytest.raises(ValueError, match="for the site 'mu'"):
        density.pack({"mu": torch.zeros(2, 3), "tau": torch.ones(2), "eta": torch.zeros(2, 8)})


# ---------------------------------------------------------------- points without a density


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batching": OneByOne()},
        {"chunk_size": 2},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nan_are_counted_with_and_without_a_score(options):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.sqrt(x).log())  # NaN below zero, -inf at zero

    density = ModelDensity(model, **options)
    z = torch.tensor([[-1.0], [2.0], [-3.0], [0.0], [math.nan]])
    for method in (density.log_prob, density.log_prob_and_score):
        before = density.evaluations.not_a_number
        method(z)
        assert density.evaluations.not_a_number - before == 3
    assert bool(torch.isfinite(density.log_prob_and_score(z)[1]).all())
    assert density.evaluations == Evaluations(values=15, scores=10, not_a_number=9)


def test_no_latents_at_all():
    model, args, kwargs = ZOO["eight schools"]()
    value, score = ModelDensity(model, args, kwargs).log_prob_and_score(torch.empty(0, 10))
    assert (value.shape, score.shape) == ((0,), (0, 10))


def test_impossible_points_are_minus_infinity_with_a_zero_score():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.sqrt(x).log())  # NaN below zero

    density = ModelDensity(model)
    value, score = density.log_prob_and_score(torch.tensor([[-1.0], [2.0], [math.nan], [math.inf]]))
    assert value.isneginf().tolist() == [True, False, True, True]
    close(score[:, 0], torch.tensor([0.0, -2.0 + 0.25, 0.0, 0.0]))
    value, score = density.log_prob_and_score(torch.tensor([[-1.0]]))
    assert value.isneginf().all()
    close(score, torch.zeros(1, 1))


@pytest.mark.parametrize("batching", [OuterPlate(), VMap(), OneByOne()])
def test_values_outside_of_a_support_are_impossible_not_an_error(batching):
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(x, x + 1), obs=y)

    with pyro.validation_enabled(True):
        density = ModelDensity(model, (torch.tensor(0.5),), batching=batching)
        value, score = density.log_prob_and_score(torch.tensor([[0.2], [0.8], [-0.9]]))
        assert torch.isfinite(value).tolist() == [True, False, False]
        close(score[:, 0], torch.tensor([-0.2, 0.0, 0.0]))
        assert density.log_likelihood(torch.tensor([[0.2], [0.8]]))["y"].tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("batching", [OuterPlate(), VMap(), OneByOne()])
def test_a_singular_matrix_does_not_take_its_batch_down(batching):
    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        row = torch.stack([torch.ones_like(x[..., :1]), x[..., :1]], -1)
        gram = torch.cat([row, row.flip(-1)], -2)  # positive definite where |x_0| < 1
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), gram), obs=y)

    density = ModelDensity(model, (torch.ones(2),), batching=batching)
    z = torch.tensor([[0.5, 0.0], [2.0, 0.0], [-0.5, 1.0], [-3.0, 1.0], [0.1, 0.2]])
    value, score = density.log_prob_and_score(z)
    good = z[:, 0].abs() < 1
    assert torch.isfinite(value).tolist() == good.tolist()
    close(value[good], density.log_prob_one_by_one(z[good]))
    close(score[~good], torch.zeros(2, 2))


# ---------------------------------------------------------------- types, counts, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["eight schools", "hierarchical logistic", "enumerated mixture", "LKJ correlations"])
def test_dtype_is_that_of_the_model(name, dtype):
    torch.set_default_dtype(dtype)
    density = ModelDensity(*ZOO[name]())
    assert density.dtype == dtype
    z = density.prior_draws(3)
    value, score = density.log_prob_and_score(z.double())
    assert z.dtype == value.dtype == score.dtype == dtype
    close(value, density.log_prob_one_by_one(z), rtol=1e-4 if dtype == torch.float32 else 1e-10)


def test_mixed_dtypes_are_promoted():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    density = ModelDensity(model)
    assert density.dtype == torch.float64
    z = torch.randn(3, 4)
    close(density.log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(1))
    assert ModelDensity(model, dtype=torch.float32).log_prob(z).dtype == torch.float32


def test_evaluations_are_counted():
    density = ModelDensity(*ZOO["eight schools"]())
    assert density.evaluations == Evaluations(0, 0)
    assert density.verification_evaluations.values > 0
    z = torch.zeros(7, 10)
    density.log_prob(z)
    density.log_prob_and_score(z[:4])
    density.log_prob_one_by_one(z[:2])
    assert density.evaluations == Evaluations(13, 4)


@pytest.mark.parametrize("name", ["eight schools", "supports", "PyroModule"])
def test_copies(name):
    density = ModelDensity(*ZOO[name]())
    z = torch.randn(3, density.dim)
    twin = copy.deepcopy(density)
    close(twin.log_prob(z), density.log_prob(z))
    assert twin.evaluations is not density.evaluations


def test_pickle():
    density = ModelDensity(scaled_coin, (torch.tensor(1.0),), compile=True)
    z = torch.randn(3, 1)
    close(pickle.loads(pickle.dumps(density)).log_prob(z), density.log_prob(z))


# ---------------------------------------------------------------- draws and read-outs


@pytest.mark.parametrize("name", ZOO)
def test_pack_inverts_unpack_and_prior_draws_are_in_the_support(name):
    density = ModelDensity(*ZOO[name]())
    z = density.prior_draws(6)
    assert z.shape == (6, density.dim)
    assert torch.isfinite(z).all()
    values = density.unpack(z)
    for site in density.sites:
        assert values[site.name].shape == (6, *site.shape)
        assert site.support.check(values[site.name]).all()
    close(density.pack(values), z, rtol=1e-7, atol=1e-7)
    assert density.prior_draws(1).shape == (1, density.dim)
    assert len({tuple(row.tolist()) for row in z}) == 6


@pytest.mark.parametrize("batching", [None, VMap(), OneByOne()])
def test_prior_draws_follow_the_prior_not_the_data(batching):
    density = ModelDensity(*ZOO["nested plates"](), batching=batching)
    n = 400 if batching == OneByOne() else 4000
    values = density.unpack(density.prior_draws(n))
    close(values["scale"].log().mean(), torch.zeros(()), atol=5 / n**0.5)
    close(values["scale"].log().var(), torch.ones(()), atol=5 * (2 / n) ** 0.5)
    column, cell = values["column"], values["cell"]
    white = (cell - column[:, None]) / values["scale"][:, None, None]
    assert cell.shape == (n, 2, 3)
    close(white.var(0), torch.ones(2, 3), atol=5 * (2 / n) ** 0.5)
    close((column[:, 0] * column[:, 1]).mean(), torch.zeros(()), atol=5 / n**0.5)


def test_improper_sites_are_uniform_when_unconstrained():
    density = ModelDensity(*supports())
    (site,) = (site for site in density.sites if site.name == "improper_positive")
    u = density.prior_draws(500)[:, site.start : site.stop]
    assert u.abs().max() <= 2
    close(u.var(), torch.tensor(16 / 12), atol=0.25)


def test_log_likelihood_by_hand():
    model, (y, sigma), _ = ZOO["eight schools"]()
    density = ModelDensity(model, (y, sigma))
    z = torch.randn(5, 10)
    theta = density.deterministics(z)["theta"]
    close(theta, z[:, :1] + z[:, 1:2].exp() * z[:, 2:])
    close(density.log_likelihood(z)["y"], dist.Normal(theta, sigma).log_prob(y))
    close(density.log_likelihood(z[:1])["y"], dist.Normal(theta[:1], sigma).log_prob(y))


@pytest.mark.parametrize("name", ["masked and scaled", "undeclared batch", "hierarchical logistic", "nested plates"])
def test_log_likelihood_agrees_with_the_loop(name):
    model, args, kwargs = ZOO[name]()
    density = ModelDensity(model, args, kwargs)
    loop = ModelDensity(model, args, kwargs, batching=OneByOne())
    z = torch.randn(4, density.dim)
    found, expected = density.log_likelihood(z), loop.log_likelihood(z)
    assert found.keys() == expected.keys() == density.observed.keys()
    for key in found:
        assert found[key].shape == (4, *density.observed[key].shape)
        close(found[key], expected[key])


def test_log_likelihood_with_discrete_latents_is_not_implemented():
    with pytest.raises(NotImplementedError, match="'z'"):
        ModelDensity(*ZOO["enumerated mixture"]()).log_likelihood(torch.zeros(2, 8))


def test_deterministics_that_mix_a_batch_are_caught():
    """The log density does not depend on the sum, so only the check of the read-out can see it."""

    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("total", theta.sum())

    density = ModelDensity(model)
    assert density.batching_method == "outer plate"
    z = torch.randn(5, 3)
    close(density.deterministics(z)["total"], z.sum(1))
    close(density.posterior_predictive(z)["total"], z.sum(1))
    zeros = torch.cat([torch.zeros(3, 3), z])  # rows on which the mistake does not show
    close(density.deterministics(zeros)["total"], zeros.sum(1))


@pytest.mark.parametrize("name", ["eight schools", "hierarchical logistic", "enumerated mixture", "nested plates"])
def test_posterior_predictive(name):
    model, args, kwargs = ZOO[name]()
    density = ModelDensity(model, args, kwargs)
    draws = density.posterior_predictive(density.prior_draws(4))
    assert set(draws) == {*density.observed, *density.deterministic}
    for key, value in density.observed.items():
        assert draws[key].shape == (4, *value.shape)
        assert not torch.equal(draws[key], value.expand_as(draws[key]))
        assert len({tuple(row.reshape(-1).tolist()) for row in draws[key]}) == 4


def test_posterior_predictive_follows_the_latents():
    model, (y, sigma), _ = ZOO["eight schools"]()
    density = ModelDensity(model, (y, sigma))
    z = torch.zeros(4000, 10)
    z[:, 0] = 3.0
    draws = density.posterior_predictive(z)
    white = (draws["y"] - 3) / sigma
    close(white.mean(0), torch.zeros(8), atol=5 / 4000**0.5)
    close(white.var(0), torch.ones(8), atol=5 * (2 / 4000) ** 0.5)
    close(draws["theta"], torch.full((4000, 8), 3.0))


# ---------------------------------------------------------------- other data


def test_with_data():
    model, (x, group, y), _ = ZOO["hierarchical logistic"]()
    density = ModelDensity(model, (x, group, y))
    part = density.with_data((x[:50], group[:50], y[:50]))
    z = torch.randn(4, density.dim)
    close(part.log_prob(z), ModelDensity(model, (x[:50], group[:50], y[:50])).log_prob(z))
    assert part.batching_method == density.batching_method
    assert part.evaluations is density.evaluations
    assert density.evaluations.values == 4
    assert part.observed["y"].shape == (50,)
    assert density.observed["y"].shape == (200,)
    with pytest.raises(
        ModelRefusedError, match=r"site 'beta' has shape \(9,\).*shape \(4,\).*ModelDensity of its own"
    ):
        density.with_data((x[:, :4], group, y))


# ---------------------------------------------------------------- no trace


def snapshot():
    return (
        dict(pyro.get_param_store().items()).keys(),
        torch.get_rng_state().tolist(),
        pyro.util.get_rng_state()["random"],
        torch.distributions.Distribution._validate_args,
        pyro.distributions.is_validation_enabled(),
        pyro.infer.util.is_validation_enabled(),
        torch.is_grad_enabled(),
        list(_DIM_ALLOCATOR._stack),
        list(_PYRO_STACK),
        torch.get_default_dtype(),
    )


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", ["eight schools", "hidden Markov", "sequential plate", "PyroModule"])
def test_nothing_leaks(name, validate):
    model, args, kwargs = ZOO[name]()
    with pyro.validation_enabled(validate):
        before = snapshot()
        density = ModelDensity(model, args, kwargs)
        assert snapshot() == before
        density.log_prob_and_score(torch.zeros(3, density.dim))
        with torch.no_grad():
            density.log_prob_and_score(torch.zeros(3, density.dim))
        with torch.inference_mode():
            ModelDensity(model, args, kwargs)
            value, score = density.log_prob_and_score(torch.zeros(3, density.dim))
        close(score, score_by_loop(density, torch.zeros(3, density.dim)))
        assert not value.is_inference()
        density.with_data(args, kwargs)
        assert snapshot() == before


def test_nothing_leaks_when_the_model_raises():
    def model(y):
        for i in pyro.plate("i", 3):
            with pyro.plate("j", 2):
                pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))
                raise KeyError("oops")

    before = snapshot()
    refused(model, "at or after site 'x_0': KeyError", (torch.zeros(3),))
    assert snapshot() == before


def test_construction_is_reproducible_and_ignores_the_global_seed():
    model, args, kwargs = ZOO["hierarchical logistic"]()
    pyro.set_rng_seed(1)
    first = ModelDensity(model, args, kwargs)
    pyro.set_rng_seed(2)
    second = ModelDensity(model, args, kwargs)
    assert first.verification_evaluations == second.verification_evaluations


@pytest.mark.parametrize("name", ["eight schools", "nested plates", "enumerated mixture", "hidden Markov"])
def test_surroundings_do_not_matter(name):
    density = ModelDensity(*ZOO[name]())
    z = torch.randn(4, density.dim)
    expected = density.log_prob(z)

    def probe():
        pyro.sample("outside", dist.Normal(0.0, 1.0))
        close(density.log_prob(z), expected)
        pyro.sample("still_outside", dist.Normal(0.0, 1.0))

    with pyro.plate("outer", 5, dim=-3), pyro.plate("school", 2, dim=-1), pyro.poutine.mask(mask=False):
        trace = pyro.poutine.trace(pyro.poutine.scale(probe, scale=7.0)).get_trace()
    assert [name for name in trace.nodes if name[0] != "_"] == ["outside", "still_outside"]
    assert trace.nodes["still_outside"]["value"].shape == (5, 1, 2)
    with pyro.poutine.enum(first_available_dim=-3):
        pyro.sample("coin", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        close(density.log_prob(z), expected)
        coin = pyro.sample("other", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        assert coin.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)])
def test_inside_svi(elbo):
    """Called by the guide of a running SVI step, vectorised particles included."""
    model, args, kwargs = ZOO["eight schools"]()
    density = ModelDensity(model, args, kwargs)
    z = torch.randn(2, 10)
    expected = density.log_prob(z)
    inner, seen = AutoNormal(model), []

    def guide(*data):
        seen.append(density.log_prob_and_score(z)[0])
        return inner(*data)

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        svi.step(*args)
    assert len(seen) >= 2
    for value in seen:
        close(value, expected)


# ---------------------------------------------------------------- parameters


def with_param(y):
    bias = pyro.param("bias", lambda: torch.randn(()), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu + bias, 1.0), obs=y)


def test_params_are_live_but_never_created():
    y = torch.tensor(0.5)
    with pytest.warns(PyroSMWarning, match=r"trainable parameters \(bias\)"):
        density = ModelDensity(with_param, (y,))
    z = torch.randn(3, 1)
    frozen = density.log_prob(z)
    close(density.log_prob(z), frozen)  # the private value is drawn once
    assert len(pyro.get_param_store()) == 0
    pyro.param("bias", torch.tensor(2.0), constraint=constraints.positive)
    for bias in (2.0, 3.0):
        pyro.get_param_store()["bias"] = torch.tensor(bias)
        expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(z[:, 0] + bias, 1.0).log_prob(y)
        close(density.log_prob(z), expected)
        assert (expected - frozen).abs().max() > 1e-3
    with pyro.poutine.trace(param_only=True) as capture:
        density.log_prob(z)
    assert list(capture.trace.nodes) == ["bias"]
    pyro.clear_param_store()
    with pyro.poutine.trace(param_only=True) as capture:
        close(density.log_prob(z), frozen)
    assert list(capture.trace.nodes) == []


def test_module_parameters_are_live_but_never_enter_the_store():
    module = torch.nn.Linear(1, 1)

    def model(y):
        net = pyro.module("net", module)
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net(mu).squeeze(-1), 1.0), obs=y)

    y = torch.tensor(0.5)
    with pytest.warns(PyroSMWarning, match="weight"):
        density = ModelDensity(model, (y,))
    z = torch.randn(3, 1)
    for _ in range(2):
        with torch.no_grad():
            module.weight += 1
            expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(module(z)[:, 0], 1.0).log_prob(y)
        close(density.log_prob(z).detach(), expected)
    assert len(pyro.get_param_store()) == 0


def test_enumeration_across_plates_by_hand():
    """A discrete latent outside of a plate, another inside: Σ_a p(a) Π_n Σ_b p(b | a) p(y_n | b, μ)."""
    y = torch.tensor([0.3, -1.0, 2.0])
    first = torch.tensor([0.4, 0.6])
    second = torch.tensor([[0.1, 0.9], [0.7, 0.3]])
    locs = torch.tensor([-1.0, 1.0])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Categorical(first))
        with pyro.plate("n", 3):
            b = pyro.sample("b", dist.Categorical(Vindex(second)[a]))
            pyro.sample("y", dist.Normal(mu + locs[b], 1.0), obs=y)

    density = ModelDensity(model)
    z = torch.randn(4, 1)
    emission = dist.Normal(z[:, None] + locs, 1.0).log_prob(y[None, :, None]).exp()  # (B, n, b)
    inner = torch.einsum("ab,znb->zna", second, emission).prod(1)
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + (inner @ first).log()
    close(density.log_prob(z), expected)
    vmap = ModelDensity(model, batching=VMap())
    close(vmap.log_prob(z), expected)


def test_log_prior_is_the_density_of_prior_draws():
    """Against torch.distributions by hand: no data, no scale, no mask, with the Jacobian."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfCauchy(2.0))
        with pyro.poutine.scale(scale=3.0), pyro.plate("group", 3):
            theta = pyro.sample("theta", dist.Normal(1.0, tau))
        pyro.factor("extra", -theta.sum(-1))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    density = ModelDensity(model, (torch.zeros(3),))
    z = density.prior_draws(6)
    tau, theta = density.unpack(z)["tau"], density.unpack(z)["theta"]
    by_hand = dist.HalfCauchy(2.0).log_prob(tau) + tau.log() + dist.Normal(1.0, tau[:, None]).log_prob(theta).sum(1)
    assert density.has_prior
    assert torch.allclose(density.log_prior(z), by_hand, rtol=1e-4, atol=1e-4)
    counted = density.evaluations.values
    density.log_prior(z)
    assert density.evaluations.values == counted


def test_log_prior_needs_a_proper_prior_free_of_discrete_latents():
    def improper():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, torch.Size(), torch.Size()))
        pyro.factor("f", -x.square())

    def mixed():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        x = pyro.sample("x", dist.Normal(torch.tensor([-3.0, 3.0])[k], 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    def local():
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(x * k, 1.0), obs=torch.ones(4))

    assert not ModelDensity(improper).has_prior
    assert not ModelDensity(mixed).has_prior
    density = ModelDensity(local)
    assert density.has_prior
    z = torch.tensor([[0.3], [-2.0]])
    assert torch.allclose(density.log_prior(z), dist.Normal(0.0, 2.0).log_prob(z[:, 0]))
