# SPDX-License-Identifier: Apache-2.0
"""Particle systems: energies written out, symmetries, the mean-free view, and published means by tempered SMC."""

import math

import pytest
import torch

from pyro_sm.density import FunctionDensity, value_and_score
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.nn.mean_free import MeanFree, helmert
from pyro_sm.smc.moves import HamiltonianMove
from pyro_sm.smc.tempered import TemperedSMC
from pyro_sm.targets import DoubleWellParticles, LennardJones

pytestmark = pytest.mark.usefixtures("float64")
SYSTEMS = {"dw4": DoubleWellParticles, "lj13": LennardJones, "lj55": lambda: LennardJones(55)}


def positions(target, count=3, spread=1.5):
    n, s = target.particles.num_bodies, target.particles.space_dim
    return spread * torch.randn(count, n * s)


def written_out(x, n, pair, spring):
    points = x.reshape(n, -1)
    total = sum(pair(float((points[i] - points[j]).norm())) for i in range(n) for j in range(n) if i != j)
    return total + spring * float((points - points.mean(0)).square().sum()) / 2


def test_double_well_energy():
    target = DoubleWellParticles()
    x = positions(target)
    expected = [written_out(one, 4, lambda r: (0.9 * (r - 4) ** 4 - 4 * (r - 4) ** 2) / 2, 0.0) for one in x]
    torch.testing.assert_close(target.energy(x), torch.tensor(expected), rtol=1e-11, atol=1e-11)


def test_lennard_jones_energy_sums_over_ordered_pairs():
    target = LennardJones(5)
    x = positions(target)
    x = x[(target.particles.squared_distances(x) > 0.4).all(1)]
    assert len(x) > 0
    expected = [written_out(one, 5, lambda r: r**-12 - 2 * r**-6, 1.0) for one in x]
    torch.testing.assert_close(target.energy(x), torch.tensor(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SYSTEMS)
def test_symmetries(name):
    target = SYSTEMS[name]()
    n, s = target.particles.num_bodies, target.particles.space_dim
    x = positions(target, spread=2.0)
    value = target.energy(x)
    points = x.unflatten(1, (n, s))
    turn = torch.linalg.qr(torch.randn(s, s)).Q
    for moved in (points[:, torch.randperm(n)], points @ turn, points + 3.0):
        torch.testing.assert_close(target.energy(moved.flatten(1)), value, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(target.energy(1.01 * x), value)


@pytest.mark.parametrize(("n", "s"), [(2, 1), (4, 2), (13, 3)])
def test_the_mean_free_basis(n, s):
    basis = helmert(n)
    torch.testing.assert_close(basis.T @ basis, torch.eye(n - 1), rtol=0, atol=1e-14)
    assert float(basis.sum(0).abs().max()) < 1e-14
    view = MeanFree(n, s)
    z = torch.randn(4, view.dim)
    x = view.to_positions(z)
    assert x.shape == (4, n * s)
    torch.testing.assert_close(x.unflatten(1, (n, s)).mean(1), torch.zeros(4, s), rtol=0, atol=1e-14)
    torch.testing.assert_close(view.to_latents(x), z)
    torch.testing.assert_close(view.to_latents((x.unflatten(1, (n, s)) + 7.0).flatten(1)), z)
    torch.testing.assert_close(x.norm(dim=1), z.norm(dim=1))
    torch.testing.assert_close(view.squared_radii(x), z.square().sum(1))


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_two_views_agree(name):
    target = SYSTEMS[name]()
    z = 1.5 * torch.randn(3, target.dim)
    x = target.particles.to_positions(z)
    torch.testing.assert_close(target.log_prob(z), -target.energy(x), rtol=1e-12, atol=1e-12)
    _, score = value_and_score(target.log_prob, z)
    _, slope = value_and_score(target.energy, x)
    torch.testing.assert_close(-(z * score).sum(1), (x * slope).sum(1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(target.particles.to_latents(slope), -score, rtol=1e-8, atol=1e-8)


def test_the_core_continues_value_and_force():
    target = LennardJones(2)
    core = target.core_radius

    def pair(r):
        r = torch.as_tensor(r).reshape(-1, 1).clone().requires_grad_(True)
        value = target.pair_scale * target._pair(r.square()).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), r)[0][:, 0]

    value, slope = pair([core - 1e-7, core + 1e-7])
    assert float(value[1]) == pytest.approx(833, abs=1)  # kT, as the file says
    torch.testing.assert_close(value[0], value[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(slope[0], slope[1], rtol=1e-4, atol=0)
    value, slope = pair(torch.linspace(0.0, 0.99, 100))
    assert bool((value.diff() < 0).all())
    assert bool((slope[1:] < 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SYSTEMS)
def test_all_is_finite_where_particles_meet(name, dtype):
    target = SYSTEMS[name]()
    for distance in (0.0, 1e-30, 1e-20, 1e-8, 1e-3):
        z = torch.zeros(1, target.dim, dtype=dtype)
        z[0, 0] = distance
        value, score = value_and_score(target.log_prob, z)
        assert bool(torch.isfinite(value).all() & torch.isfinite(score).all()), distance


def tempered(target, num_particles):
    density = FunctionDensity(target.log_prob, target.dim)
    start = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
    move = HamiltonianMove(5, target_acceptance=0.8)
    return TemperedSMC(num_particles, 10, move).run(density, start)


def test_double_well_published_energy_and_virial():
    target = DoubleWellParticles()
    draws = tempered(target, 10_000)
    n = draws.z.shape[0]
    # Published: mean -22.45, sd 1.90 of a set of draws. Particles of one family are correlated: ten naive errors.
    assert abs(float(draws.log_p.mean()) - 22.45) < 10 * 1.9 / math.sqrt(n)
    assert float(draws.log_p.std()) == pytest.approx(1.90, abs=0.1)
    virial = -(draws.z * draws.score).sum(1)
    error = float(virial.std()) / math.sqrt(n)
    assert abs(float(virial.mean()) - target.dim) < 5 * error
    assert abs(0.5 * float(virial.mean()) - target.dim) > 5 * error  # pairs counted half
    # By importance sampling from a Gaussian as wide as the target: another way to log Z and the mean energy.
    start = GaussianDensity(torch.zeros(6), 2.1 * torch.eye(6))
    parts = [start.sample(250_000) for _ in range(8)]
    log_p = torch.cat([target.log_prob(z) for z in parts])
    log_w = log_p - torch.cat([start.log_prob(z) for z in parts])
    log_evidence = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    w = torch.softmax(log_w, 0)
    error = float(w.norm())
    assert error < 0.05
    assert abs(draws.log_evidence - log_evidence) < 5 * error
    assert abs(float(draws.log_p.mean()) - float(w @ log_p)) < 5 * 1.9 * error


def test_lennard_jones_published_energy_and_virial():
    target = LennardJones()
    draws = tempered(target, 800)
    n = draws.z.shape[0]
    # Published: mean -43.13, sd 7.02.
    assert abs(float(draws.log_p.mean()) - 43.13) < 10 * 7.02 / math.sqrt(n)
    assert float(draws.log_p.std()) == pytest.approx(7.02, abs=1.0)
    virial = -(draws.z * draws.score).sum(1)
    error = float(virial.std()) / math.sqrt(n)
    assert abs(float(virial.mean()) - 36) < 5 * error

    def halved(z):
        x = target.particles.to_positions(z)
        return -0.5 * target.energy(x) - 0.25 * target.particles.squared_radii(x)

    _, score = value_and_score(halved, draws.z)
    wrong = -(draws.z * score).sum(1)
    assert abs(float(wrong.mean()) - 36) > 5 * float(wrong.std()) / math.sqrt(n)
    distances = target.particles.squared_distances(target.particles.to_positions(draws.z)).sqrt()
    assert float(distances.min()) > target.core_radius + 0.1
