# SPDX-License-Identifier: Apache-2.0
"""Divergence: against the full Jacobian, and unbiased over every probe there is."""

import itertools

import pytest
import torch

from pyro_sm.divergence import Exact, Hutchinson

# torch's own: the first forward-mode derivative of a process scripts a module.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

DIM = 4
exact = {"rtol": 1e-10, "atol": 1e-12}


def field(x):
    """Nonlinear, and with an asymmetric Jacobian."""
    a, b, c, d = x.unbind(-1)
    return torch.stack([torch.sin(a * b) + c**2, a**3 - b * d, torch.exp(0.3 * c) * a, torch.tanh(d) + b * c], -1)


def points(n=6):
    return torch.randn(n, DIM, dtype=torch.float64)


def jacobians(function, x):
    return torch.stack([torch.autograd.functional.jacobian(function, row) for row in x])


def traces(function, x):
    return jacobians(function, x).diagonal(dim1=1, dim2=2).sum(-1)


def every_probe(x):
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=x.shape[-1])), dtype=x.dtype)
    return signs[:, None, :].expand(-1, x.shape[0], -1)


# ---------------------------------------------------------------------------------------------- exact


def test_exact_is_the_trace_of_the_jacobian():
    x, divergence = points(), Exact()
    value, trace = divergence(field, x, divergence.probes(x))
    torch.testing.assert_close(value, field(x), **exact)
    torch.testing.assert_close(trace, traces(field, x), **exact)
    whole = jacobians(field, x)
    assert float((whole - whole.mT).abs().amax((1, 2)).min()) > 0.1, "the field must not be a gradient"
    # The sum of the whole Jacobian, which a probe of ones would give, is something else.
    assert float((whole.sum((1, 2)) - trace).abs().min()) > 1e-3


@pytest.mark.parametrize("probes", [1, 3])
def test_hutchinson_is_the_mean_of_quadratic_forms(probes):
    x, divergence = points(), Hutchinson(probes)
    v = divergence.probes(x)
    value, trace = divergence(field, x, v)
    expected = torch.einsum("pbi,bij,pbj->pb", v, jacobians(field, x), v).mean(0)
    torch.testing.assert_close(value, field(x), **exact)
    torch.testing.assert_close(trace, expected, **exact)


def test_one_probe_is_exact_where_the_jacobian_is_diagonal():
    def diagonal(x):
        return torch.sin(x) + torch.arange(1.0, DIM + 1, dtype=x.dtype) * x**3

    x, divergence = points(), Hutchinson()
    _, trace = divergence(diagonal, x, divergence.probes(x))
    torch.testing.assert_close(trace, traces(diagonal, x), **exact)
    # Normal probes are unbiased too, but not exact here: the signs matter.
    _, normal = divergence(diagonal, x, torch.randn(1, *x.shape, dtype=x.dtype))
    assert float((normal - trace).abs().min()) > 1e-3


# ---------------------------------------------------------------------------------------- enumeration


def test_hutchinson_is_unbiased_over_all_probes():
    x = points()
    v = every_probe(x)
    _, trace = Hutchinson(len(v))(field, x, v)
    torch.testing.assert_close(trace, traces(field, x), **exact)
    # One fixed probe for all is not.
    _, fixed = Hutchinson()(field, x, torch.ones_like(v[:1]))
    assert float((fixed - trace).abs().min()) > 1e-3


def test_probes_are_fair_independent_signs():
    x = torch.zeros(2000, DIM, dtype=torch.float64)
    v = Hutchinson(5).probes(x)
    assert v.shape == (5, 2000, DIM)
    assert v.dtype == x.dtype
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    flat = v.reshape(-1, DIM)
    second = flat.T @ flat / len(flat)
    assert float(flat.mean(0).abs().max()) < 5 / len(flat) ** 0.5
    assert float((second - torch.eye(DIM)).abs().max()) < 5 / len(flat) ** 0.5
    # Independent between probes of one row, and between rows.
    assert abs(float((v[0] * v[1]).mean())) < 5 / x.numel() ** 0.5
    assert abs(float((v[0, :-1] * v[0, 1:]).mean())) < 5 / x.numel() ** 0.5


def test_dtype_is_kept():
    x = points().float()
    for divergence in (Exact(), Hutchinson(2)):
        value, trace = divergence(field, x, divergence.probes(x))
        assert value.dtype == trace.dtype == torch.float32


@pytest.mark.parametrize("num_probes", [0, -1])
def test_no_probes_are_refused(num_probes):
    with pytest.raises(ValueError, match=f"num_probes >= 1, found {num_probes}"):
        Hutchinson(num_probes)
