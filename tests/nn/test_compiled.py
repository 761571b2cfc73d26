# SPDX-License-Identifier: Apache-2.0
"""A compiled network is the network: same numbers and gradients, from few graphs, and as it is where it must be."""

import copy
import io

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from samplers import DATA, hierarchy

from pyro_sm import AutoDiffusion, DiffusionSampler, ImportanceWeightedScoreMatching, PyroSMWarning, StoppingRule
from pyro_sm.base import Arguments
from pyro_sm.divergence import Exact
from pyro_sm.nn.compiled import CompiledNetwork
from pyro_sm.nn.egnn import EGNN
from pyro_sm.nn.mlp import MLP
from pyro_sm.nn.pieces import InPieces


def function(weights, x, c, context):
    """Row by row, and not linear: ``tanh(x W + c) + mean of the context``."""
    out = torch.tanh(x @ weights.view(x.shape[1], -1) + c[:, None])
    return out if context is None else out + context.mean(-1, keepdim=True)


class Recording(CompiledNetwork):
    """Graphs that are the function itself, and which shapes came for them."""

    def __init__(self, rows=None):
        self.plain = []
        super().__init__(self.as_it_is, rows)
        self.compiled = []

    def as_it_is(self, weights, x, c, context):
        self.plain.append(x.shape[0])
        return function(weights, x, c, context)

    def _compile(self, weights, x, c, context):
        self.compiled.append((x.shape[0], c.shape[0], weights.requires_grad and torch.is_grad_enabled()))
        return function


def inputs(rows, levels, context=None, dtype=torch.float32):
    torch.manual_seed(0)
    given = {None: None, "one": torch.randn(3, dtype=dtype), "rows": torch.randn(rows, 3, dtype=dtype)}[context]
    return torch.randn(12, dtype=dtype), torch.randn(rows, 4, dtype=dtype), torch.randn(levels, dtype=dtype), given


# ------------------------------------------------------------------------------------------------------ which pieces


@pytest.mark.parametrize("context", [None, "one", "rows"])
@pytest.mark.parametrize("common_level", [False, True])
@pytest.mark.parametrize(
    ("rows", "compiled", "plain"),
    [(10, [10], []), (20, [10], []), (27, [10], []), (25, [10], []), (24, [10], [4]), (5, [10], []), (4, [], [4])],
)
def test_pieces_without_gradients(rows, compiled, plain, common_level, context):
    network = Recording(10)
    given = inputs(rows, 1 if common_level else rows, context)
    for _ in range(2):
        torch.testing.assert_close(network(*given), function(*given))
    assert [shape[0] for shape in network.compiled] == compiled
    assert network.plain == 2 * plain
    assert all(not learning and levels == (1 if common_level else 10) for _, levels, learning in network.compiled)


@pytest.mark.parametrize(
    ("rows", "compiled", "plain"), [(4, [4], []), (10, [10], []), (25, [10], []), (24, [10], [4])]
)
def test_a_batch_of_training_has_a_graph_of_its_own(rows, compiled, plain):
    network = Recording(10)
    weights, x, c, _ = inputs(rows, rows)
    weights.requires_grad_()
    out = network(weights, x, c, None)
    torch.testing.assert_close(out, function(weights, x, c, None))
    (found,) = torch.autograd.grad(out.square().sum(), weights)
    (expected,) = torch.autograd.grad(function(weights, x, c, None).square().sum(), weights)
    torch.testing.assert_close(found, expected)
    assert [(shape[0], shape[2]) for shape in network.compiled] == [(n, True) for n in compiled]
    assert network.plain == plain


def test_rows_are_bounded_and_no_rows_are_no_piece():
    assert CompiledNetwork(function).rows == 1024
    assert CompiledNetwork(function, 5000).rows == 1024
    assert CompiledNetwork(function, 7).rows == 7
    network = Recording(10)
    weights, x, c, _ = inputs(3, 1)
    assert network(weights, x[:0], c, None).shape == (0, 3)
    assert network.compiled == []


def test_inputs_that_want_gradients_and_transforms_take_it_as_it_is():
    network = Recording(2)
    weights, x, c, _ = inputs(6, 1)
    leaf = x.clone().requires_grad_()
    out = network(weights, leaf, c, None)
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    assert bool(torch.autograd.grad(first.sum(), leaf)[0].abs().max() > 0)
    torch.func.jvp(lambda y: network(weights, y, c, None), (x,), (x,))
    torch.func.vmap(lambda y: network(weights, y[None], c, None))(x)
    level = c.clone().requires_grad_()
    network(weights, x, level, None)
    context = torch.randn(3, requires_grad=True)
    network(weights, x, c, context)
    assert network.compiled == []
    with torch.no_grad():
        network(weights, leaf, level, context)
    assert len(network.compiled) == 1


def test_networks_of_particles_know_their_rows():
    network = EGNN(13, 3).build(36, 72, 0)
    assert isinstance(network, InPieces)
    assert 50 < network.rows_in_cache < 200
    assert EGNN(55, 3).build(162, 324, 0).rows_in_cache < 10


# ---------------------------------------------------------------------------------------------------- where it fails


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: (_ for _ in ()).throw(RuntimeError("no compiler")))
    network = CompiledNetwork(function, 4)
    given = inputs(8, 8)
    with pytest.warns(PyroSMWarning, match="used as it is: RuntimeError: no compiler"):
        found = network(*given)
    torch.testing.assert_close(found, function(*given))
    torch.testing.assert_close(network(*given), found)  # a second warning would be an error


def test_argument_checks_of_distributions_stay_on(monkeypatch):
    """The compiler turns them off when it first begins, in the whole process."""

    def compile(graph, dynamic):
        torch.distributions.Distribution.set_default_validate_args(False)
        return graph

    monkeypatch.setattr(torch, "compile", compile)
    assert torch.distributions.Distribution._validate_args
    CompiledNetwork(function, 4)(*inputs(8, 8))
    assert torch.distributions.Distribution._validate_args


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_graph_that_disagrees_is_not_used(monkeypatch, wrong):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return 1.01 * g

    def compile(graph, dynamic):
        return lambda *given: 1.01 * graph(*given) if wrong == "value" else Off.apply(graph(*given))

    monkeypatch.setattr(torch, "compile", compile)
    weights, x, c, _ = inputs(8, 8)
    weights.requires_grad_()
    network = CompiledNetwork(function, 4)
    with pytest.warns(PyroSMWarning, match="the compiled graph disagrees with the network"):
        out = network(weights, x, c, None)
    torch.testing.assert_close(out, function(weights, x, c, None))


# ------------------------------------------------------------------------------------------------------- in the guide


def counting_compile(monkeypatch):
    """``torch.compile`` without the wait: graphs run as they were recorded."""
    graphs = []

    def compile(graph, dynamic):
        assert dynamic is False
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", compile)
    return graphs


def trained(**options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoDiffusion(hierarchy, num_steps=8, **options)
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-2}), ImportanceWeightedScoreMatching(256, steps_per_round=20))
    losses = [svi.step(DATA) for _ in range(25)]
    torch.manual_seed(1)
    with torch.no_grad():
        return guide, losses, *guide.diffusion(Arguments((DATA,))).draw(600)


def test_a_guide_learns_the_same(monkeypatch):
    _, losses, z, log_ratio = trained()
    graphs = counting_compile(monkeypatch)
    guide, found_losses, found_z, found_log_ratio = trained(compile=True)
    assert found_losses == pytest.approx(losses, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(found_z, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_log_ratio, log_ratio, rtol=1e-3, atol=1e-3)
    assert 2 <= len(graphs) <= 4  # training; draws, whose level is common to the rows; path weights; kernels' fit
    count = len(graphs)
    SVI(hierarchy, guide, Adam({"lr": 1e-2}), ImportanceWeightedScoreMatching(256)).step(DATA)
    assert len(graphs) == count


def test_copies_and_pickles_compile_anew(monkeypatch):
    graphs = counting_compile(monkeypatch)
    guide, *_ = trained(compile=True)
    count = len(graphs)
    torch.manual_seed(1)
    expected = guide.diffusion().draw(600)[0]
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(guide), torch.load(buffer, weights_only=False)):
        assert other.compiles
        assert other._network._compiled is None
        torch.manual_seed(1)
        with torch.no_grad():
            torch.testing.assert_close(other.diffusion().draw(600)[0], expected, rtol=1e-4, atol=1e-4)
        assert len(graphs) > count
        count = len(graphs)


def test_reverse_kl_and_the_probability_flow_work(monkeypatch):
    """Both differentiate the network by its input."""
    counting_compile(monkeypatch)
    guide, *_ = trained(compile=True)
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    assert torch.isfinite(torch.tensor(svi.step(DATA)))
    posterior = guide.get_posterior(DATA)
    z = guide.diffusion().draw(5)[0].detach()
    assert bool(torch.isfinite(posterior.log_prob(z)).all())


def test_a_context_is_compiled_too(monkeypatch):
    graphs = counting_compile(monkeypatch)
    context = {"context": lambda y: torch.stack([y.mean(), y.std()])}
    _, _, expected, _ = trained(**context)
    assert not graphs
    _, _, found, _ = trained(compile=True, **context)
    assert graphs
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_replicas_that_compile_are_not_forked(monkeypatch):
    monkeypatch.setattr("os.fork", lambda: (_ for _ in ()).throw(AssertionError("forked")))
    counting_compile(monkeypatch)
    pyro.clear_param_store()

    def sampler(num_workers=None):
        guide = AutoDiffusion(hierarchy, num_steps=8, compile=True)
        stopping = StoppingRule(max_evaluations=256)
        objective = ImportanceWeightedScoreMatching(128, steps_per_round=3)
        return DiffusionSampler(
            hierarchy, guide=guide, stopping=stopping, objective=objective, num_chains=2, num_workers=num_workers,
            disable_progbar=True,
        )  # fmt: skip

    sampler().run(DATA)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="expected num_workers=1 or None, found 2: networks are compiled"):
        sampler(2).run(DATA)


# --------------------------------------------------------------------------------------------------- by the compiler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dim", "context_dim", "dtype"),
    [
        (MLP(16, 1), 3, 2, torch.float64),
        (MLP(16, 1), 11, 0, torch.float32),
        (EGNN(4, 2, width=8), 6, 0, torch.float32),
    ],
)
def test_compiled_networks_agree(architecture, dim, context_dim, dtype):
    torch.manual_seed(0)
    network = architecture.build(dim, 2 * dim, context_dim).to(dtype)
    shapes = [(name, p.shape) for name, p in network.named_parameters()]
    weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    weights = (weights + 0.1 * torch.randn_like(weights)).requires_grad_()

    def plain(w, x, c, context):
        pieces = w.split([shape.numel() for _, shape in shapes])
        state = {name: p.view(shape) for (name, shape), p in zip(shapes, pieces, strict=True)}
        return torch.func.functional_call(network, state, (x, c, context))

    compiled = CompiledNetwork(plain, 32)
    x, c = torch.randn(50, dim, dtype=dtype), torch.randn(50, dtype=dtype)
    context = torch.randn(50, context_dim, dtype=dtype) if context_dim else None
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for form in (lambda y: y.square().sum(), lambda y: y[40:].sum()):
        out, expected = compiled(weights, x, c, context), plain(weights, x, c, context)
        torch.testing.assert_close(out, expected, **close)
        (found,), (true,) = (torch.autograd.grad(form(y), weights) for y in (out, expected))
        torch.testing.assert_close(found, true, rtol=close["rtol"], atol=close["atol"] * 10)
    assert len(compiled._graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled(weights, x, c[:1], context), plain(weights, x, c[:1], context), **close)
    assert len(compiled._graphs) == 2
    # Divergences go around the graphs.
    field = lambda y: compiled(weights, y, c[:1], None if context is None else context[0])[:, :dim]  # noqa: E731
    _, divergence = Exact()(field, x, Exact().probes(x))
    assert bool(torch.isfinite(divergence).all())
    assert len(compiled._graphs) == 2
