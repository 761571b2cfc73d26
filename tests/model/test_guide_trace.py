# SPDX-License-Identifier: Apache-2.0
"""Guides known by running them: which sites are free, points or auxiliary, and one run against many."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sm.base import Arguments
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.guide_trace import (
    close,
    guide_name,
    is_free,
    is_point,
    log_jacobian,
    read_guide,
    run_guide,
    run_guide_batched,
    sites_log_prob,
    subsampled_plate,
    verified,
)

Y = torch.tensor([0.4, 1.1, -0.3])


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.7))
    with pyro.plate("n", len(y)):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(t, s), obs=y)


def guide(y):
    pyro.sample("mu", dist.Normal(0.5, 0.6))
    pyro.sample("s", dist.LogNormal(0.1, 0.3))
    with pyro.plate("n", len(y)):
        pyro.sample("t", dist.Normal(0.2, 0.4))


def mixed(y):
    """A bit of everything: a latent that is missing, a foreign site, an auxiliary one, points and data."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(z[..., 0]))
    pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
    with pyro.plate("n", len(y)):
        pyro.sample("t", dist.Delta(z[..., 1:]).expand([len(y)]).mask(True))


def test_a_point_is_seen_through_its_wrappers():
    delta = dist.Delta(torch.zeros(3))
    assert all(is_point(fn) for fn in (delta, delta.to_event(1), delta.mask(True), delta.expand([2, 3])))
    assert not any(is_point(fn) for fn in (dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(3), 1.0).to_event(1)))


def test_what_one_run_shows():
    density = ModelDensity(model, (Y,))
    found = read_guide(mixed, density, Arguments((Y,)))
    assert list(found.sites) == ["z", "mu", "w", "seen", "t"]
    assert list(found.free) == ["z", "w"]
    assert (found.missing, found.points, found.auxiliary) == (["s"], ["mu", "t"], ["z"])
    assert found.foreign == ["w", "seen"]
    assert found.depth == 1
    plain = read_guide(guide, density, Arguments(kwargs={"y": Y}))
    assert plain.free.keys() == plain.latent
    assert (plain.missing, plain.points, plain.auxiliary, plain.foreign) == ([], [], [], [])


def test_sites_of_a_conditioned_guide_are_not_free():
    sites = run_guide(poutine.condition(guide, {"mu": torch.tensor(1.0)}), Arguments((Y,)))
    assert [is_free(site) for site in sites.values()] == [False, True, True]


def test_a_subsampled_plate_is_found():
    def part(y):
        with pyro.plate("n", len(y), subsample_size=2):
            pyro.sample("t", dist.Normal(0.0, 1.0))

    frame = subsampled_plate(poutine.trace(part).get_trace(Y))
    assert (frame.name, frame.size, frame.full_size) == ("n", 2, 3)
    assert subsampled_plate(poutine.trace(guide).get_trace(Y)) is None


def test_log_q_of_a_batched_run_is_that_of_its_draws():
    arguments = Arguments((Y,))
    sites = run_guide_batched(guide, arguments, 5, 1)
    log_q = sites_log_prob(sites, 5)
    assert log_q.shape == (5,)
    for i in range(5):
        values = {name: site["value"].reshape(5, -1)[i].squeeze() for name, site in sites.items()}
        trace = poutine.trace(poutine.condition(guide, values)).get_trace(Y)
        torch.testing.assert_close(log_q[i], trace.log_prob_sum())
    with pytest.raises(ValueError, match="does not have the batch dimension"):
        sites_log_prob(sites, 7)


def test_the_jacobian_is_that_of_the_bijections():
    density = ModelDensity(model, (Y,))
    z = torch.randn(4, density.dim)
    start = next(site.start for site in density.sites if site.name == "s")
    torch.testing.assert_close(log_jacobian(density, z), z[:, start])  # log |d e^z / dz|, all others are identities


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError])
def test_a_batched_run_that_fails_does_not_count(error):
    def fails(*_):
        raise error

    assert verified(lambda: 3, lambda found: found == 3) == 3
    assert verified(lambda: 3, lambda found: found == 4) is None
    assert verified(fails, lambda _: True) is None
    assert verified(lambda: 3, fails) is None


def test_a_mistake_of_another_kind_is_not_hidden():
    def fails():
        raise KeyError("a mistake in the guide")

    with pytest.raises(KeyError):
        verified(fails, lambda _: True)


def test_close_allows_rounding_only():
    a = torch.tensor([1.0, 100.0])
    assert close(a, a * (1 + 1e-5))
    assert not close(a, a * 1.01)


def test_what_a_guide_is_called():
    assert guide_name(guide) == "guide"
    assert guide_name(dist.Normal(0.0, 1.0)) == "Normal"
