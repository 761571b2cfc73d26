# SPDX-License-Identifier: Apache-2.0
"""AutoDiffusion as a Pyro guide: shapes, densities, parameters, copies, and the handlers it has to live with."""

import copy
import io
import math
import pickle

import models
import pyro
import pyro.distributions as dist
import pytest
import torch
from adapting import move
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.infer.importance import psis_diagnostic
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.indexing import Vindex
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_sm import (
    AutoDiffusion,
    GivenBase,
    ImportanceWeightedScoreMatching,
    ModelDensity,
    ModelRefusedError,
    PyroSMWarning,
)
from pyro_sm.diffusion.flow import FlowSolver
from pyro_sm.diffusion.kernels import reverse_kernel, sample_paths
from pyro_sm.nn.egnn import EGNN
from pyro_sm.nn.mlp import MLP

# PyTorch's forward mode loads decompositions with its own deprecated compiler, once per process.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

SMALL = MLP(width=16, depth=1)
NAMES = [
    "network_weights",
    "base_loc",
    "base_scale_tril",
    "start_loc",
    "log_start_scale",
    "log_variance_factor",
    "ratios",
]
DATA = torch.tensor([1.0, -0.5, 2.0])
LOC = torch.tensor([0.5, -1.0, 0.3, 2.0], dtype=torch.float64)
TRIL = torch.tensor(
    [[0.7, 0, 0, 0], [0.4, 1.3, 0, 0], [-0.2, 0.5, 0.6, 0], [0.1, -0.3, 0.2, 2.0]], dtype=torch.float64
)


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("n", len(y)):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def vectors(y):
    """A site for each support that is not a plain vector, in a plate or not."""
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("k", 3):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    cuts = pyro.sample(
        "cuts",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
        ),
    )
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0))
    interval = pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    loc = weights[..., 0].sum(-1) + cuts[..., 1] + chol[..., 2, 0] + interval
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def simplices():
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("k", 3):
        pyro.sample("weights", dist.Dirichlet(torch.ones(4)))


def mixture(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(Vindex(mu)[..., z], 1.0), obs=y)


def make_guide(model=hierarchy, **options):
    return AutoDiffusion(model, num_steps=8, architecture=SMALL, **options)


def make_objective(**options):
    return ImportanceWeightedScoreMatching(num_particles=64, batch_size=64, steps_per_round=5, **options)


def train(guide, data=DATA, steps=6, model=hierarchy):
    svi = SVI(model, guide, Adam({"lr": 1e-2}), make_objective())
    for _ in range(steps):
        svi.step(data)
    return guide


def perturb(guide, size=0.05):
    """A network that is not zero, without training one."""
    with torch.no_grad():
        for name in ("network_weights", "log_variance_factor", "start_loc", "log_start_scale"):
            parameter = getattr(guide, name)
            parameter.add_(size * torch.randn_like(parameter))
    return guide


def draw(guide, data=DATA, seed=3):
    torch.manual_seed(seed)
    return torch.cat([value.detach().reshape(-1) for value in guide(data).values()])


# ------------------------------------------------------------------------------------------------ plain calls


def test_call_returns_every_site_with_its_shape():
    sites = make_guide()(DATA)
    assert {name: tuple(value.shape) for name, value in sites.items()} == {"mu": (), "t": (3,)}


@pytest.mark.parametrize("max_plate_nesting", [1, float("inf")])
@pytest.mark.parametrize("vectorize", [True, False])
def test_particles_from_the_first_call(vectorize, max_plate_nesting):
    guide = make_guide()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorize, max_plate_nesting=max_plate_nesting)
    assert elbo.loss_and_grads(hierarchy, guide, DATA) > 0
    assert guide.latent_dim == 4  # the particle plate is not part of the model


def test_vectorised_particles_are_single_ones_side_by_side(float64):
    guide, data = make_guide(), DATA.double()
    guide(data)
    with pyro.plate("particles", 6, dim=-2):
        trace = poutine.trace(guide).get_trace(data)
        model_trace = poutine.trace(poutine.replay(hierarchy, trace)).get_trace(data)
    both = []
    for each in (trace, model_trace):
        each.compute_log_prob()
        terms = [s["log_prob"] for s in each.nodes.values() if "log_prob" in s and s["log_prob"].numel() > 1]
        both.append(sum(term.reshape(6, -1).sum(1) for term in terms))
    latents = trace.nodes["_AutoDiffusion_latent"]["value"]
    assert latents.shape == (6, 1, 4)
    for i in range(6):
        one = poutine.trace(poutine.condition(guide, {"_AutoDiffusion_latent": latents[i, 0]})).get_trace(data)
        replayed = poutine.trace(poutine.replay(hierarchy, one)).get_trace(data)
        torch.testing.assert_close(both[0][i], one.log_prob_sum(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(both[1][i], replayed.log_prob_sum(), rtol=1e-10, atol=1e-10)


def test_inside_plates():
    guide = make_guide()
    guide(DATA)
    with pyro.plate("outer", 6, dim=-2):
        sites = guide(DATA)
    assert sites["mu"].shape == (6, 1)
    assert sites["t"].shape == (6, 3)
    with pyro.plate("outermost", 5, dim=-3), pyro.plate("outer", 6, dim=-2):
        trace = poutine.trace(guide).get_trace(DATA)
    assert trace.nodes["t"]["value"].shape == (5, 6, 3)
    trace.compute_log_prob()
    latent = trace.nodes["_AutoDiffusion_latent"]
    assert latent["value"].shape == (5, 6, 1, 4)
    assert latent["log_prob"].shape == (5, 6, 1)
    assert len(latent["value"].reshape(30, 4).unique(dim=0)) == 30


@pytest.mark.parametrize("name", ["nested plates", "sequential plate", "masked and scaled", "conditioned"])
def test_models_of_the_zoo(name):
    model, args, kwargs = models.ZOO[name]()
    guide = make_guide(model)
    prior = poutine.trace(model).get_trace(*args, **kwargs)
    sites = guide(*args, **kwargs)
    assert sites
    for site, value in sites.items():
        assert value.shape == prior.nodes[site]["value"].shape
    assert Trace_ELBO(4, vectorize_particles=True).loss(model, guide, *args, **kwargs) < 1e6


def test_supports():
    guide = make_guide(vectors)
    y = torch.tensor(0.5)
    prototype = poutine.trace(vectors).get_trace(y)
    middle, quantiles = guide.median(y), guide.quantiles([0.1, 0.5, 0.9], y)
    assert list(middle) == ["scale", "weights", "cuts", "chol", "interval"]
    for name, value in guide(y).items():
        site = prototype.nodes[name]
        assert value.shape == site["value"].shape
        assert bool(site["fn"].support.check(value).all())
        assert middle[name].shape == value.shape
        assert bool(site["fn"].support.check(middle[name]).all())
        assert quantiles[name].shape == (3, *value.shape)
        if name != "chol":  # an entry of it is constant
            assert bool((quantiles[name].diff(dim=0) > 0).all())
    Trace_ELBO(3, vectorize_particles=True).loss_and_grads(vectors, guide, y)
    initialised = poutine.trace(
        pyro.infer.autoguide.initialization.InitMessenger(init_to_value(values=middle))(vectors)
    )
    assert torch.isfinite(initialised.get_trace(y).log_prob_sum())


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(parallel):
    guide = make_guide()
    guide(DATA)
    samples = Predictive(hierarchy, guide=guide, num_samples=7, parallel=parallel)(DATA)
    assert samples["t"].shape == (7, 3)
    assert samples["y"].shape == (7, 3)
    assert samples["mu"].reshape(-1).shape == (7,)
    assert len(samples["mu"].unique()) == 7


def test_median_and_quantiles_are_those_of_the_base(float64):
    guide = make_guide(base=GivenBase(LOC, TRIL))
    data = DATA.double()
    middle = guide.median(data, num_draws=20_000)
    packed = torch.cat([middle["mu"][None], middle["t"]])
    scale = TRIL.square().sum(1).sqrt()
    error = 1.2533 * scale / 20_000**0.5
    assert bool(((packed - LOC).abs() < 5 * error).all())
    low, high = guide.quantiles(torch.tensor([0.1587, 0.8413]), data, num_draws=20_000)["t"]
    assert bool(((high - low) / 2 - scale[1:]).abs().max() < 0.08 * scale.max())


def test_positive_improper_site_without_draws():
    def model():
        rate = pyro.sample("rate", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.factor("likelihood", -rate)

    guide = make_guide(model)
    with pytest.warns(PyroSMWarning, match="site 'rate' has an improper prior"):
        sites = guide()
    assert sites["rate"] > 0


# -------------------------------------------------------------------------------------------------- densities


def test_posterior_is_a_distribution():
    guide = perturb_after_call(make_guide())
    posterior = guide.get_posterior(DATA)
    assert posterior.has_rsample
    assert posterior.event_dim == 1
    assert posterior.batch_shape == ()
    assert posterior.event_shape == (4,)
    for shape in ((), (5,), (5, 2), (0,)):
        z = posterior.rsample(shape)
        assert z.shape == (*shape, 4)
        assert posterior.log_prob(z).shape == shape
    wide = posterior.expand((3, 2))
    z = wide.rsample((6,))
    assert wide.batch_shape == (3, 2)
    assert z.shape == (6, 3, 2, 4)
    assert len(z.reshape(36, 4).unique(dim=0)) == 36
    assert wide.log_prob(z).shape == (6, 3, 2)
    assert wide.log_prob(torch.zeros(4)).shape == (3, 2)
    assert wide.log_prob(torch.zeros(6, 1, 1, 4)).shape == (6, 3, 2)
    assert posterior.expand((3,)).expand((2, 3)).sample().shape == (2, 3, 4)


def perturb_after_call(guide, data=DATA, size=0.05):
    guide(data)
    return perturb(guide, size)


def test_untrained_guide_is_its_base(float64):
    guide = make_guide(base=GivenBase(LOC, TRIL))
    guide(DATA.double())
    base = dist.MultivariateNormal(LOC, scale_tril=TRIL)
    posterior = guide.get_posterior()
    z = posterior.rsample((50,))
    torch.testing.assert_close(posterior.log_prob(z), base.log_prob(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.log_prob(z.clone()), base.log_prob(z), rtol=1e-10, atol=1e-10)
    far = 5 * torch.randn(20, 4)
    torch.testing.assert_close(posterior.log_prob(far), base.log_prob(far), rtol=1e-10, atol=1e-10)
    perturb(guide, 0.01)  # the companion: a network that is not zero does not pass
    other = guide.get_posterior()
    z = other.rsample((50,))
    assert (other.log_prob(z) - base.log_prob(z)).abs().max() > 1e-3


def test_untrained_guide_scores_like_a_multivariate_normal(float64):
    """The same draws under AutoMultivariateNormal with this base give the same ELBO, site for site."""
    data = DATA.double()
    guide, normal = make_guide(base=GivenBase(LOC, TRIL)), AutoMultivariateNormal(hierarchy)
    guide(data), normal(data)
    scale = TRIL.diagonal()
    normal.loc = torch.nn.Parameter(LOC.clone())
    pyro.get_param_store()["AutoMultivariateNormal.scale"] = scale
    pyro.get_param_store()["AutoMultivariateNormal.scale_tril"] = TRIL / scale[:, None]
    trace = poutine.trace(guide).get_trace(data)
    latent = trace.nodes["_AutoDiffusion_latent"]["value"]
    other = poutine.trace(poutine.condition(normal, {"_AutoMultivariateNormal_latent": latent})).get_trace(data)
    torch.testing.assert_close(trace.log_prob_sum(), other.log_prob_sum(), rtol=1e-10, atol=1e-10)


def test_two_log_densities_estimate_the_same_thing(float64):
    """``E[exp(log q_flow(z) − log q_path)] = ∫ q_flow = 1`` over the guide's own paths, whatever the network."""
    guide = perturb_after_call(make_guide(base=GivenBase(LOC, TRIL)), DATA.double(), 0.02)
    posterior = guide.get_posterior()
    z = posterior.sample((2000,))
    with torch.no_grad():
        ratio = torch.exp(posterior.log_prob(z.clone()) - posterior.log_prob(z))
    error = ratio.std() / 2000**0.5
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 5 * error
    assert ratio.std() > 1e-3  # they do differ, draw by draw
    forgotten = torch.exp(torch.log(ratio) - TRIL.diagonal().log().sum())
    assert abs(forgotten.mean() - 1) > 10 * error


def test_rsample_is_differentiable_in_every_parameter():
    guide = perturb_after_call(make_guide())
    posterior = guide.get_posterior()
    z = posterior.rsample((8,))
    (posterior.log_prob(z).sum() + z.square().sum()).backward()
    for name in NAMES[:-1]:  # all but the ratios
        gradient = getattr(guide, f"{name}_unconstrained").grad
        assert gradient is not None, name
        assert bool((gradient != 0).any()), name


# --------------------------------------------------------------------------------------------------- training


def test_reverse_kl_trains_every_parameter():
    guide = make_guide()
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-3}), Trace_ELBO(4, vectorize_particles=True))
    svi.step(DATA)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    svi.step(DATA)
    assert sorted(before) == sorted(f"AutoDiffusion.{name}" for name in NAMES)
    for name, value in before.items():
        moved = (pyro.param(name) != value).double()
        if name.endswith("scale_tril"):
            assert bool((moved.tril() == torch.ones(4, 4).tril()).all())
        elif name.endswith("ratios"):  # fitted, not trained: their order must hold
            assert not bool(moved.any())
        else:
            assert moved.mean() > 0.9, name


@pytest.mark.slow
def test_reverse_kl_reaches_the_evidence(float64):
    data = DATA.double()
    covariance = torch.full((3, 3), 4.0) + 2 * torch.eye(3)
    log_evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(data)
    guide = make_guide(base=GivenBase(0.0, 1.0))
    elbo = Trace_ELBO(32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-2}), elbo)
    losses = [svi.step(data) for _ in range(500)]
    assert sum(losses[:10]) / 10 > -log_evidence + 0.5
    final = torch.tensor([elbo.loss(hierarchy, guide, data) for _ in range(50)])
    assert -log_evidence - 5 * final.std() / 50**0.5 < final.mean() < -log_evidence + 0.1


def test_torch_training_without_a_param_store():
    with pyro.settings.context(module_local_params=True):
        guide = make_guide()
        elbo = make_objective()(hierarchy, guide)
        elbo(DATA)
        optimiser = torch.optim.Adam(elbo.parameters(), lr=1e-2)
        before = guide.network_weights_unconstrained.detach().clone()
        for _ in range(7):
            optimiser.zero_grad()
            elbo(DATA).backward()
            optimiser.step()
        assert len(list(elbo.parameters())) == len(NAMES)
        assert bool((guide.network_weights_unconstrained != before).any())
        assert not list(pyro.get_param_store().keys())
        Trace_ELBO()(hierarchy, guide)(DATA).backward()


def test_lightning_style():
    guide = make_guide()
    elbo = make_objective()(hierarchy, guide)
    elbo(DATA)
    optimiser = torch.optim.Adam(elbo.parameters(), lr=1e-2)
    before = draw(guide)
    for _ in range(4):
        optimiser.zero_grad()
        elbo(DATA).backward()
        optimiser.step()
    assert not torch.equal(draw(guide), before)


def test_importance_sampling_of_pyro():
    guide = make_guide()
    guide(DATA)
    covariance = torch.full((3, 3), 4.0) + 2 * torch.eye(3)
    log_evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(DATA)
    importance = Importance(hierarchy, guide, 200).run(DATA)
    weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
    error = (weights - weights.max()).exp()
    error = error.std() / error.mean() / 200**0.5
    assert abs(importance.get_log_normalizer() - log_evidence) < 5 * error
    assert error < 0.5
    assert psis_diagnostic(hierarchy, guide, DATA, num_particles=50) < 2


def stored_dtypes():
    """Of the network, and of everything else in the store."""
    store = dict(pyro.get_param_store().items())
    network = {value.dtype for name, value in store.items() if name.endswith("network_weights")}
    return network, {value.dtype for name, value in store.items() if not name.endswith("network_weights")}


@pytest.mark.parametrize("network_dtype", [torch.float32, torch.float64])
def test_float64_end_to_end(float64, network_dtype):
    data = DATA.double()
    guide = make_guide(network_dtype=network_dtype)
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-2}), make_objective())
    svi.step(data), svi.step(data)
    assert stored_dtypes() == ({network_dtype}, {torch.float64})
    assert {value.dtype for value in guide(data).values()} == {torch.float64}
    z = guide.get_posterior().sample((3,))
    assert guide.get_posterior().log_prob(z).dtype == torch.float64
    assert {draws.dtype for draws in svi.loss.__self__.state.buffer.rounds[0].draws} == {torch.float64}


def test_float64_model_under_a_float32_default():
    guide = train(make_guide(), DATA.double())
    assert stored_dtypes() == ({torch.float32}, {torch.float64})
    assert guide.median(DATA.double())["t"].dtype == torch.float64


# ------------------------------------------------------------------------------------------- models and handlers


def test_mask_false_skips_the_jacobians():
    guide = make_guide(simplices)
    guide()
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace()
    assert all(bool((trace.nodes[name]["fn"].log_density == 0).all()) for name in ("weights", "scale"))
    assert trace.log_prob_sum() == 0
    trace = poutine.trace(guide).get_trace()
    assert all(bool((trace.nodes[name]["fn"].log_density != 0).all()) for name in ("weights", "scale"))


def test_blocked_guide_shows_nothing():
    guide = make_guide()
    guide(DATA)
    trace = poutine.trace(poutine.block(guide)).get_trace(DATA)
    assert set(trace.nodes) == {"_INPUT", "_RETURN"}


def test_discrete_sites_are_left_to_the_objective():
    y = torch.tensor([-1.0, 2.0, 1.8])
    guide = make_guide(mixture)
    assert list(guide(y)) == ["mu"]
    svi = SVI(mixture, guide, Adam({"lr": 1e-2}), make_objective())
    svi.step(y)
    before = guide.network_weights_unconstrained.detach().clone()
    assert math.isfinite(svi.step(y))
    assert bool((guide.network_weights_unconstrained != before).any())
    enumerated = config_enumerate(mixture)
    assert TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(enumerated, guide, y) > 0


def test_locals_of_a_subsampled_plate_are_refused():
    def model(y, indices=None):
        with pyro.plate("rows", 10, subsample=indices, subsample_size=None if indices is not None else 2) as chosen:
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y[chosen])

    with pytest.raises(ModelRefusedError, match="the plate 'rows' draws a random subsample"):
        make_guide(model)(torch.ones(10))
    with pytest.raises(
        ModelRefusedError, match="site 't' is local to the plate 'rows', which is subsampled to 3 of 10"
    ):
        make_guide(model)(torch.ones(10), torch.tensor([1, 3, 5]))


def test_models_without_continuous_latents_are_refused():
    def model():
        pyro.sample("coin", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.raises(ModelRefusedError, match="no continuous latent site"):
        make_guide(model)()


def test_another_model_with_the_sites_in_another_order_is_refused():
    """The packed latent of the density would be permuted against the guide's, silently."""

    def swapped(y):
        t = pyro.sample("t", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(t, 1.0).to_event(1), obs=y)

    guide = make_guide()
    guide(DATA)
    with pytest.raises(ValueError, match=r"the guide covers the sites \['mu', 't'\], the model has \['t', 'mu'\]"):
        SVI(swapped, guide, Adam({"lr": 1e-3}), make_objective()).step(DATA)


def test_data_of_another_size_are_refused():
    guide = make_guide()
    guide(DATA)
    with pytest.raises(ModelRefusedError, match="the new data change the latents"):
        guide.bind(hierarchy, torch.ones(5))


def test_a_failed_first_call_leaves_no_half_made_guide():
    class Base:
        calls = 0

        def fit(self, density):
            self.calls += 1
            if self.calls < 3:
                raise RuntimeError("not yet")
            return GivenBase(0.0, 1.0).fit(density)

    guide = make_guide(base=Base())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not yet"):
            guide(DATA)
    assert list(guide(DATA)) == ["mu", "t"]


def test_context():
    guide = make_guide(context=lambda y: torch.stack([y.mean(), y.std()]))
    perturb_after_call(guide, DATA, 0.3)
    assert not torch.equal(draw(guide, DATA), draw(guide, DATA + 5))
    assert guide.median(DATA)["t"].shape == (3,)
    assert torch.isfinite(guide.get_posterior(DATA).log_prob(torch.zeros(4)))
    train(guide)
    with pytest.raises(NotImplementedError, match="free of the data"):
        guide.get_transform()
    with pytest.raises(ValueError, match="NeuTraReparam only supports guides"):
        NeuTraReparam(guide).reparam(hierarchy)(DATA)
    plain = make_guide(name="plain")
    perturb_after_call(plain, DATA, 0.3)
    assert torch.equal(draw(plain, DATA), draw(plain, DATA + 5))


@pytest.mark.parametrize("own", ["mu", "t"])
@pytest.mark.parametrize("blocked_by", ["hide", "expose"])
def test_part_of_a_guide_list(own, blocked_by):
    other = "t" if own == "mu" else "mu"
    mine = {"hide": [other]} if blocked_by == "hide" else {"expose": [own]}
    guide = AutoGuideList(hierarchy)
    guide.append(make_guide(poutine.block(hierarchy, **mine)))
    guide.append(AutoNormal(poutine.block(hierarchy, expose=[other])))
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-2}), Trace_ELBO(4, vectorize_particles=True))
    svi.step(DATA)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    svi.step(DATA)
    assert "AutoGuideList.0.network_weights" in before
    unmoved = [name for name, value in before.items() if torch.equal(pyro.param(name), value)]
    assert unmoved == ["AutoGuideList.0.ratios"]
    assert {name: tuple(value.shape) for name, value in guide.median(DATA).items()} == {"mu": (), "t": (3,)}
    assert guide(DATA).keys() == {"mu", "t"}


def test_neutra():
    def model():
        pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), 2.0).to_event(1))

    guide = make_guide(model, solver=FlowSolver(1e-3, 1e-3))
    guide()
    perturb(guide, 0.02)
    warped = NeuTraReparam(guide).reparam(model)
    kernel = NUTS(warped, adapt_step_size=False, adapt_mass_matrix=False)
    kernel.setup(1)
    point = {name: torch.zeros_like(value).requires_grad_() for name, value in kernel.initial_params.items()}
    potential = kernel.potential_fn(point)
    (gradient,) = torch.autograd.grad(potential, list(point.values()))
    assert torch.isfinite(potential)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient != 0).any())
    # potential = −log p(T(x)) − log|det T'(x)|
    transform = guide.get_transform()
    (x,) = point.values()
    z = transform(x)
    expected = -dist.Normal(torch.tensor([1.0, -2.0]), 2.0).log_prob(z).sum() - transform.log_abs_det_jacobian(x, z)
    torch.testing.assert_close(potential, expected.squeeze(), rtol=1e-3, atol=1e-3)
    mcmc = MCMC(
        HMC(warped, step_size=0.1, num_steps=1, adapt_step_size=False), 1, warmup_steps=0, disable_progbar=True
    )
    mcmc.run()
    (latent,) = mcmc.get_samples().values()
    assert latent.shape == (1, 2)


def test_flow_transform_is_a_bijection(float64):
    guide = make_guide(base=GivenBase(LOC, TRIL), solver=FlowSolver(1e-6, 1e-6), network_dtype=torch.float64)
    perturb_after_call(guide, DATA.double(), 0.02)
    transform = guide.get_transform()
    with torch.no_grad():
        x = torch.randn(1, 4)
        z = transform(x)
        torch.testing.assert_close(transform.inv(z.clone()), x, rtol=1e-4, atol=1e-4)
        step = 1e-2 * torch.eye(4)
        around = transform(torch.cat([x[:, None] + step, x[:, None] - step], 1))
        expected = ((around[:, :4] - around[:, 4:]) / 2e-2).det().abs().log()
        torch.testing.assert_close(guide.get_transform().log_abs_det_jacobian(x, z), expected, rtol=1e-4, atol=1e-4)
        fresh, at = guide.get_transform(), z.clone()
        back = fresh.inv(at)  # which keeps the determinant for this very pair
        torch.testing.assert_close(fresh.inv.log_abs_det_jacobian(at, back), -expected, rtol=1e-4, atol=1e-4)
        through_flow = guide.get_base_dist().log_prob(x) - expected
        torch.testing.assert_close(guide.get_posterior().log_prob(z), through_flow, rtol=1e-4, atol=1e-4)
    assert (expected - TRIL.diagonal().log().sum()).abs().min() > 1e-3  # not the base's alone


def test_rounding_of_the_network_is_no_error_of_the_density(float64):
    """A float32 network in a float64 model: weights are those of the kernels that made the draws, to rounding."""
    guide = make_guide(base=GivenBase(LOC, TRIL))
    perturb_after_call(guide, DATA.double(), 0.5)
    process = guide.diffusion()
    with torch.no_grad():
        noise = process._noise(len(process.ratios), 64)
        u, ratio = sample_paths(process.denoiser, process.kernels, noise)
        # The same path, kernel by kernel, from its points: what made it is what weighs it.
        y = torch.addcmul(process.kernels.start_loc, noise[-1], process.kernels.start_scale)
        log_q = dist.Normal(process.kernels.start_loc, process.kernels.start_scale).log_prob(y).sum(-1)
        log_f = torch.zeros_like(log_q)
        for k in range(len(process.ratios) - 1, 0, -1):
            mean, variance = reverse_kernel(process.denoiser, process.kernels, y, k)
            new = mean + noise[k - 1] * variance.sqrt()
            gap = (process.ratios[k].square() - process.ratios[k - 1].square()).sqrt()
            log_q = log_q + dist.Normal(mean, variance.sqrt()).log_prob(new).sum(-1)
            log_f = log_f + dist.Normal(new, gap).log_prob(y).sum(-1)
            y = new
    assert u.dtype == torch.float64
    torch.testing.assert_close(u, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ratio, log_f - log_q, rtol=1e-9, atol=1e-9)


def test_the_network_has_floating_numbers():
    with pytest.raises(ValueError, match="network_dtype"):
        AutoDiffusion(hierarchy, network_dtype=torch.int64)


def test_not_gaussian():
    guide = make_guide()
    guide(DATA)
    with pytest.raises(NotImplementedError, match="not Gaussian"):
        guide._loc_scale()
    with pytest.raises(ValueError, match="num_steps >= 2, found 1"):
        AutoDiffusion(hierarchy, num_steps=1)
    with pytest.raises(ValueError, match="call the guide"):
        make_guide().get_posterior()


# --------------------------------------------------------------------------------------- the cache of densities


def test_density_is_cached_by_value_and_bound_anew_for_other_data():
    guide = make_guide()
    guide(DATA)
    data = DATA.clone()
    first = guide.bind(
        hierarchy,
        data,
    ).density
    assert (
        guide.bind(
            hierarchy,
            data.clone(),
        ).density
        is first
    )
    other = guide.bind(
        hierarchy,
        data + 1,
    ).density
    assert other is not first
    assert other.evaluations is first.evaluations
    assert (
        guide.bind(
            hierarchy,
            data,
        ).density
        is first
    )  # a look at other data does not evict it
    z = torch.zeros(1, 4)
    assert first.log_prob(z) != other.log_prob(z)
    data.add_(1)
    changed = guide.bind(
        hierarchy,
        data,
    ).density
    assert changed is not first
    assert changed.log_prob(z) == other.log_prob(z)


def test_a_change_in_place_is_seen_beside_a_fresh_argument():
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)

    guide = make_guide(model)
    x = torch.ones(3)
    guide(x, DATA)
    first = guide.bind(model, x, DATA).density
    x.mul_(2)
    assert guide.bind(model, x, DATA.clone()).density is not first


def test_data_made_in_inference_mode():
    with torch.inference_mode():
        data = DATA * 2
    guide = make_guide()
    guide(data)
    assert (
        guide.bind(
            hierarchy,
            data,
        ).density
        is guide.bind(
            hierarchy,
            data,
        ).density
    )


# -------------------------------------------------------------------------------------------- saving and copying


@pytest.mark.parametrize("call_first", [True, False])
def test_param_store_round_trip(tmp_path, call_first):
    expected = draw(train(make_guide()))
    pyro.get_param_store().save(str(tmp_path / "store.pt"))
    pyro.clear_param_store()
    guide = make_guide()
    if call_first:
        assert not torch.equal(draw(guide), expected)
    pyro.get_param_store().load(str(tmp_path / "store.pt"))
    guide(DATA)
    assert torch.equal(draw(guide), expected)
    train(guide, steps=1)
    assert not torch.equal(draw(guide), expected)


@pytest.mark.parametrize("call_first", [True, False])
def test_state_dict_round_trip(call_first):
    trained = train(make_guide())
    expected, state = draw(trained), copy.deepcopy(trained.state_dict())
    pyro.clear_param_store()
    guide = make_guide()
    if call_first:
        guide(DATA)
    guide.load_state_dict(state)
    if not call_first:
        assert guide.diffusion().draw(3)[0].shape == (3, 4)  # usable before it has seen the model
        assert guide.prototype_trace is None
    guide(DATA)
    assert torch.equal(draw(guide), expected)
    train(guide, steps=1)
    assert not torch.equal(draw(guide), expected)


def test_state_dict_with_a_context():
    context = {"context": lambda y: y[:2]}
    trained = perturb_after_call(make_guide(**context), DATA, 0.2)
    expected, state = draw(trained), copy.deepcopy(trained.state_dict())
    pyro.clear_param_store()
    guide = make_guide(**context)
    guide.load_state_dict(state)
    guide(DATA)
    assert torch.equal(draw(guide), expected)


def test_state_dict_with_a_context_wants_one():
    state = copy.deepcopy(perturb_after_call(make_guide(context=lambda y: y[:2]), DATA, 0.2).state_dict())
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="and the context, if it had one"):
        make_guide().load_state_dict(state)


def test_state_dict_of_another_network_or_model():
    state = copy.deepcopy(train(make_guide()).state_dict())
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="the architecture it was trained with"):
        AutoDiffusion(hierarchy, num_steps=8, architecture=MLP(width=24, depth=1)).load_state_dict(state)
    guide = make_guide()
    guide.load_state_dict(state)
    with pytest.raises(ValueError, match=r"sizes \(4, 0\); this model has \(6, 0\)"):
        guide(torch.ones(5))


def test_deepcopy():
    guide = train(make_guide())
    expected = draw(guide)
    other = copy.deepcopy(guide)
    assert guide.model is not None
    assert other.model is guide.model
    assert torch.equal(draw(guide), expected)
    guide.network_weights.unconstrained()
    train(guide, steps=1)
    pyro.clear_param_store()
    assert torch.equal(draw(other), expected)


def test_pickle():
    guide = train(make_guide())
    expected = draw(guide)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    assert guide.model is not None
    assert torch.equal(draw(guide), expected)
    other = pickle.loads(pickle.dumps(guide))
    train(guide, steps=1)  # the live guide still trains
    assert not torch.equal(draw(guide), expected)
    pyro.clear_param_store()
    assert torch.equal(draw(other), expected)  # draws need the model's shapes only, and those were saved
    pyro.clear_param_store()
    assert torch.equal(draw(torch.load(buffer, weights_only=False)), expected)


def test_pickle_of_a_guide_that_was_never_called():
    other = pickle.loads(pickle.dumps(make_guide()))
    with pytest.raises(ValueError, match="unpickled without its model"):
        other(DATA)
    other.attach(hierarchy)
    assert list(other(DATA)) == ["mu", "t"]


def test_unpickled_guide_gets_its_model_from_the_objective():
    other = pickle.loads(pickle.dumps(train(make_guide())))
    pyro.clear_param_store()
    before = draw(other)
    train(other, steps=2)
    assert not torch.equal(draw(other), before)


# -------------------------------------------------------------------------------------------- names in the store


def test_same_name_and_other_shapes():
    make_guide()(DATA)
    with pytest.raises(ValueError, match=r"already holds 'AutoDiffusion.network_weights' with shape \(\d+,\)"):
        make_guide()(torch.ones(5))


def test_same_name_and_shapes_share_with_a_warning():
    first, second = make_guide(), make_guide()
    perturb_after_call(first, DATA, 0.2)
    with pytest.warns(PyroSMWarning, match="of another guide: this guide shares its parameters"):
        second(DATA)
    assert torch.equal(draw(first), draw(second))


def test_own_names():
    first, second = make_guide(name="first"), make_guide(name="second")
    perturb_after_call(first, DATA, 0.2)
    second(DATA)
    assert not torch.equal(draw(first), draw(second))
    assert set(pyro.get_param_store().keys()) == {
        f"{owner}.{name}" for owner in ("first", "second") for name in NAMES
    }


def test_a_name_can_be_released():
    first, second = make_guide(), make_guide()
    expected = draw(perturb_after_call(first, DATA, 0.2))
    first.release()
    assert not list(pyro.get_param_store().keys())
    second(DATA)  # no warning, and untrained
    assert not torch.equal(draw(second), expected)
    first.release()  # not its own any more
    assert len(pyro.get_param_store()) == len(NAMES)


def test_two_densities_agree():
    """The guide's sites are packed like the density's."""
    guide = make_guide(simplices)
    trace = poutine.trace(guide).get_trace()
    density = ModelDensity(simplices)
    values = {name: trace.nodes[name]["value"][None] for name in ("scale", "weights")}
    latent = trace.nodes["_AutoDiffusion_latent"]["value"]
    torch.testing.assert_close(density.pack(values)[0], latent, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ rebasing


def two_groups():
    torch.manual_seed(3)
    group = torch.arange(600) % 2
    return 5.0 * (2 * group[:, None] - 1) + torch.tensor([1.0, 0.2, 0.5, 2.0]) * torch.randn(600, 4), group


def test_a_guide_moves_to_draws_until_it_is_trained():
    z, _ = two_groups()
    guide = make_guide()
    guide(DATA)
    assert move(guide, z)
    torch.testing.assert_close(guide.base_loc.detach(), z.mean(0), rtol=1e-4, atol=1e-4)
    drawn, _ = guide.diffusion().draw(20_000)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(z.T), rtol=0.1, atol=0.6)
    perturb(guide)
    before = guide.base_loc.clone()
    assert not move(guide, z + 3)
    assert torch.equal(guide.base_loc, before)


def test_a_rebased_guide_has_the_modes_and_keeps_them_through_every_copy(tmp_path):
    z, group = two_groups()
    guide = make_guide()
    guide(DATA)
    assert move(guide, z, group)

    def between(one):
        """Draws between the groups: a normal law of their moments has many, a mixture none."""
        torch.manual_seed(0)
        return one.diffusion().draw(2000)[0]

    drawn = between(guide)
    assert float((drawn[:, 1].abs() < 3).float().mean()) < 0.01
    torch.testing.assert_close(drawn[drawn[:, 1] > 0].std(0), z[group == 1].std(0), rtol=0.15, atol=0.03)
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    torch.testing.assert_close(between(copy.deepcopy(guide)), drawn)
    pyro.get_param_store().save(tmp_path / "store.pt")
    plain = make_guide(name="plain")
    plain(DATA)
    assert move(plain, z)
    assert float((between(plain)[:, 1].abs() < 3).float().mean()) > 0.2
    plain.load_state_dict(state)
    torch.testing.assert_close(between(plain), drawn)
    fresh = make_guide(name="fresh")
    fresh.load_state_dict(state)
    fresh(DATA)
    torch.testing.assert_close(between(fresh), drawn)
    assert move(guide, z)  # without groups: the anchor goes
    assert not any("anchor" in name for name in guide.state_dict())
    assert not any(name.startswith("AutoDiffusion.anchor") for name in pyro.get_param_store())
    guide.load_state_dict(state)
    torch.testing.assert_close(between(guide), drawn)
    guide.release()
    assert not any(name.startswith("AutoDiffusion.") for name in pyro.get_param_store())


def test_the_store_alone_brings_an_anchor_back(tmp_path):
    z, group = two_groups()
    guide = make_guide()
    guide(DATA)
    move(guide, z, group)
    torch.manual_seed(0)
    drawn = guide.diffusion().draw(50)[0]
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    other = make_guide()
    other(DATA)
    torch.manual_seed(0)
    torch.testing.assert_close(other.diffusion().draw(50)[0], drawn)


@pytest.mark.parametrize("emptied", [False, True])
def test_a_store_that_is_loaded_takes_an_anchor_away_and_an_empty_one_does_not(tmp_path, emptied):
    """Else the loaded network would be taken for one beside the anchor. Loading leaves what it does not know."""
    guide = make_guide()
    guide(DATA)
    torch.manual_seed(0)
    drawn = guide.diffusion().draw(50)[0]
    pyro.get_param_store().save(tmp_path / "store.pt")
    move(guide, *two_groups())
    torch.manual_seed(0)
    anchored = guide.diffusion().draw(50)[0]
    assert not torch.allclose(anchored, drawn)
    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.testing.assert_close(guide.diffusion().draw(50)[0], anchored)
    if emptied:
        pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    torch.manual_seed(0)
    torch.testing.assert_close(guide.diffusion().draw(50)[0], drawn)
    assert not any("anchor" in name for name in (*guide.state_dict(), *pyro.get_param_store()))


def test_a_symmetric_network_keeps_a_base_without_directions():
    z, group = two_groups()
    guide = AutoDiffusion(hierarchy, num_steps=8, architecture=EGNN(3, 2, width=8))
    guide(DATA)
    assert move(guide, z, group)
    assert torch.equal(guide.base_loc, torch.zeros(4))
    torch.testing.assert_close(guide.base_scale_tril.detach(), z.square().mean().sqrt() * torch.eye(4))
    assert not any("anchor" in name for name in guide.state_dict())
