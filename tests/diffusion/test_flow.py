# SPDX-License-Identifier: Apache-2.0
"""The probability flow: exact densities where the denoiser is exact, and a bijection where it is not."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from oracles import Mixture, random_network, two_modes, zero_network
from torch.distributions import MultivariateNormal

from pyro_sm.density import value_and_score
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.flow import FlowSolver, ProbabilityFlow
from pyro_sm.diffusion.kernels import gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.divergence import Exact, Hutchinson
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives.importance_weighted.weightings import denoising_loss
from pyro_sm.weights import effective_sample_size, evidence

# torch's own: the first forward-mode derivative of a process scripts a module.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TIGHT = {"rtol": 1e-7, "atol": 1e-7}
LOC = torch.tensor([0.4, -1.0], dtype=torch.float64)
TRIL = torch.tensor([[1.5, 0.0], [-0.9, 0.6]], dtype=torch.float64)


def kernels_between(low, high, dim):
    levels = NoiseRange(low, high).levels(8, dtype=torch.float64, device=torch.device("cpu"))
    return gaussian_kernels(levels, dim)


def flow_of(denoiser, dim, low=0.05, high=5.0, **solver):
    return ProbabilityFlow(denoiser, kernels_between(low, high, dim), FlowSolver(**(TIGHT | solver)))


def exact_kernels(law):
    """From nearly no noise to nearly nothing else, with the start that a fit to the law would find."""
    kernels = kernels_between(1e-3, 300.0, law.dim)
    mean = law.weights @ law.means
    spread = (law.means - mean).square() + law.covariances.diagonal(dim1=1, dim2=2)
    return kernels._replace(start_loc=mean, start_scale=torch.sqrt(law.weights @ spread + kernels.ratios[-1] ** 2))


def exact_flow(law, **solver):
    return ProbabilityFlow(law.denoiser(), exact_kernels(law), FlowSolver(**({"rtol": 1e-6, "atol": 1e-6} | solver)))


def correlated_gaussian():
    return Mixture([1.0], [[0.6, -0.3]], [[[1.4, -0.5], [-0.5, 0.3]]])


@dataclass(frozen=True)
class Mistaken:
    """The exact divergence times something that it must not be multiplied with."""

    factor: float

    def probes(self, x):
        return Exact().probes(x)

    def __call__(self, field, x, probes):
        value, trace = Exact()(field, x, probes)
        return value, self.factor * trace


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("dim", [1, 3])
def test_an_untrained_flow_is_the_base(dim):
    flow = flow_of(Denoiser(zero_network(dim)), dim)
    u = 2 * torch.randn(9, dim, dtype=torch.float64)
    law = MultivariateNormal(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(flow.log_prob(u), law.log_prob(u), rtol=1e-10, atol=1e-10)
    for move in (flow.to_noise, flow.from_noise):
        x, log_det = move(u)
        torch.testing.assert_close(x, u, rtol=1e-12, atol=1e-12)
        assert torch.equal(log_det, torch.zeros(9, dtype=torch.float64))


def test_an_untrained_flow_in_latent_space_is_the_base():
    process = Diffusion(Denoiser(zero_network(2)), kernels_between(0.01, 8.0, 2), LOC, TRIL)
    z = 2 * torch.randn(9, 2, dtype=torch.float64)
    law = MultivariateNormal(LOC, scale_tril=TRIL)
    torch.testing.assert_close(process.log_prob(z), law.log_prob(z), rtol=1e-10, atol=1e-10)


def test_a_fitted_start_is_the_law_of_noise():
    kernels = kernels_between(0.01, 8.0, 2)
    kernels = kernels._replace(start_loc=LOC, start_scale=torch.tensor([7.0, 9.0], dtype=torch.float64))
    flow = ProbabilityFlow(Denoiser(zero_network(2)), kernels)
    norm = math.sqrt(65)
    law = MultivariateNormal(LOC / norm, torch.diag((torch.tensor([7.0, 9.0]).double() / norm) ** 2))
    u = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(u), law.log_prob(u), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", [correlated_gaussian(), two_modes()], ids=["gaussian", "mixture"])
def test_an_exact_denoiser_has_the_density_of_its_law(law):
    u = law.sample(24)
    found = exact_flow(law).log_prob(u)
    torch.testing.assert_close(found, law.log_prob(u), rtol=0, atol=1e-4)
    for factor in (-1.0, 0.0):
        wrong = exact_flow(law, rtol=1e-3, atol=1e-3, divergence=Mistaken(factor)).log_prob(u)
        assert float((wrong - law.log_prob(u)).abs().mean()) > 0.1


def test_noise_becomes_draws_of_the_law():
    """The flow maps the base to the law: moments of the images of exact noise, within five standard errors."""
    law = two_modes()
    n = 2000
    flow = exact_flow(law, rtol=1e-5, atol=1e-5)
    loc, scale = flow.base()
    u, _ = flow.from_noise(loc + scale * torch.randn(n, 2, dtype=torch.float64))
    exact = law.sample(200_000)

    def off(draws):
        features = [torch.cat([x, x.square(), x.prod(1, keepdim=True), (x[:, :1] > 0)], 1) for x in (draws, exact)]
        return float(((features[0].mean(0) - features[1].mean(0)) / (features[0].std(0) / math.sqrt(n))).abs().max())

    assert off(u) < 5
    assert off(u.flip(1)) > 10
    assert off(torch.randn(n, 2, dtype=torch.float64)) > 10


@pytest.mark.parametrize("dim", [1, 3])
def test_the_two_directions_are_inverse(dim):
    flow = flow_of(Denoiser(random_network(dim, 1.0)), dim)
    u = torch.randn(7, dim, dtype=torch.float64)
    x, forward = flow.to_noise(u)
    back, backward = flow.from_noise(x)
    assert float((x - u).abs().max()) > 0.1
    torch.testing.assert_close(back, u, rtol=0, atol=1e-5)
    torch.testing.assert_close(backward, -forward, rtol=0, atol=1e-5)


def test_log_dets_against_the_jacobian_of_the_whole_map():
    flow = flow_of(Denoiser(random_network(2, 1.0)), 2)
    u = torch.randn(4, 2, dtype=torch.float64)
    h = 1e-3
    offsets = h * torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    # One batch, and so one sequence of steps: the solver's error is the same smooth function for all of them.
    x, log_det = flow.to_noise((u + offsets[:, None]).reshape(-1, 2))
    _, right, left, up, down = x.reshape(5, 4, 2)
    expected = torch.linalg.slogdet(torch.stack([right - left, up - down], -1) / (2 * h))[1]
    torch.testing.assert_close(log_det[:4], expected, rtol=0, atol=1e-5)
    assert float(expected.abs().max()) > 0.05


def test_the_density_integrates_to_one():
    """In latent space, with a correlated base: quadrature over a grid that is large enough."""
    axis = torch.linspace(-9, 9, 55, dtype=torch.float64)
    u = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2 * float(torch.linalg.det(TRIL))

    def integral(divergence):
        solver = FlowSolver(rtol=1e-5, atol=1e-5, divergence=divergence)
        network = Denoiser(random)
        process = Diffusion(network, kernels_between(0.05, 5.0, 2), LOC, TRIL, solver)
        return float(process.log_prob(process.to_latent(u)).exp().sum()) * cell

    random = random_network(2, 0.7)
    assert integral(None) == pytest.approx(1, abs=1e-3)
    for factor in (-1.0, 0.0):
        assert abs(integral(Mistaken(factor)) - 1) > 1e-2


def test_one_dimension_integrates_to_one_too():
    u = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    network = Denoiser(random_network(1, 1.0))
    total = float(flow_of(network, 1).log_prob(u[:, None]).exp().sum() * (u[1] - u[0]))
    assert total == pytest.approx(1, abs=1e-5)
    wrong = float(flow_of(network, 1, divergence=Mistaken(-1.0)).log_prob(u[:, None]).exp().sum() * (u[1] - u[0]))
    assert abs(wrong - 1) > 1e-2


# ------------------------------------------------------------------------------------- latent space


def test_log_prob_of_a_latent_changes_variables():
    """Base ``N(m, L Lᵀ)`` and an exact whitened law: the density of ``m + L u`` in closed form."""
    law = correlated_gaussian()
    process = Diffusion(law.denoiser(), exact_kernels(law), LOC, TRIL, FlowSolver(**TIGHT))
    covariance = TRIL @ law.covariances[0] @ TRIL.T
    latent = MultivariateNormal(LOC + TRIL @ law.means[0], covariance)
    z = latent.sample((12,))
    torch.testing.assert_close(process.log_prob(z), latent.log_prob(z), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (6,)])
def test_score_of_a_latent_changes_variables(shape):
    """``∇_z log`` of the law of ``m + L (u + r ε)``; the wrong transpose is something else."""
    law = two_modes()
    process = Diffusion(law.denoiser(), kernels_between(0.01, 8.0, 2), LOC, TRIL)
    z = 2 * torch.randn(6, 2, dtype=torch.float64)
    ratio = torch.full(shape, 0.6, dtype=torch.float64)

    def latent(z):
        return law.law(0.6).log_prob(torch.linalg.solve(TRIL, (z - LOC).T).T)

    _, score = value_and_score(latent, z)
    u = process.to_white(z)
    white = law.denoiser().score(u, ratio)
    torch.testing.assert_close(process.white_score(u, score), white, rtol=1e-9, atol=1e-9)
    assert float((score @ TRIL.T - white).abs().max()) > 0.1


# -------------------------------------------------------------------------------------- enumeration


@dataclass(frozen=True)
class EveryProbe:
    """Hutchinson with all 2^D probes: its mean, without its noise. Or with the first few of them only."""

    first: int | None = None

    def probes(self, x):
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=x.shape[-1])), dtype=x.dtype)[: self.first]
        return signs[:, None].expand(-1, *x.shape)

    def __call__(self, field, x, probes):
        return Hutchinson(len(probes))(field, x, probes)


def test_hutchinson_is_unbiased_along_a_trajectory():
    network = Denoiser(random_network(3, 1.0))
    u = torch.randn(5, 3, dtype=torch.float64)
    exact = flow_of(network, 3).log_prob(u)
    mean = flow_of(network, 3, divergence=EveryProbe()).log_prob(u)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-5)
    one = flow_of(network, 3, divergence=EveryProbe(1)).log_prob(u)
    assert float((one - exact).abs().max()) > 1e-3


def test_hutchinson_draws_its_probes_once_per_trajectory():
    """Fresh probes at every step of an adaptive solver would make the field rough; the same seed, the same answer."""
    network = Denoiser(random_network(3, 1.0))
    u = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for tolerance in (1e-6, 1e-7):
        torch.manual_seed(3)
        flow = flow_of(network, 3, rtol=tolerance, atol=tolerance, divergence=Hutchinson(2))
        results.append(flow.log_prob(u))
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


def test_the_divergence_follows_the_dimension():
    assert FlowSolver().divergence_for(32) == Exact()
    assert FlowSolver().divergence_for(33) == Hutchinson(4)
    assert FlowSolver(divergence=Hutchinson(7)).divergence_for(2) == Hutchinson(7)


def test_float32_stays_float32():
    kernels = gaussian_kernels(kernels_between(0.05, 5.0, 2).ratios.float(), 2)
    network = random_network(2, 0.7)
    u = torch.randn(5, 2, dtype=torch.float64)
    found = ProbabilityFlow(Denoiser(network.float()), kernels).log_prob(u.float())
    assert found.dtype == torch.float32
    expected = flow_of(Denoiser(network.double()), 2, rtol=1e-5, atol=1e-5).log_prob(u)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-4)


# ------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_a_denoiser_learns_two_modes_from_draws():
    """Plain torch: denoising loss on exact draws, then path weights and the flow's density against the truth."""
    law = two_modes()
    data = law.sample(100_000).float()
    loc, tril = data.mean(0), torch.linalg.cholesky(torch.cov(data.T))
    ratios = NoiseRange(0.01, 8.0).levels(32, dtype=torch.float32, device=torch.device("cpu"))
    network = MLP(width=64, depth=2).build(2, 4, 0)
    process = Diffusion(Denoiser(network), gaussian_kernels(ratios, 2), loc, tril)

    def log_weights(process):
        with torch.no_grad():
            z, log_ratio = process.draw(4000)
            return law.log_prob(z.double()).float() + log_ratio

    untrained = effective_sample_size(log_weights(process)) / 4000
    steps = 2000
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    span = (ratios[-1] / ratios[1]).log()
    for _ in range(steps):
        u = process.to_white(data[torch.randint(len(data), (512,))])
        r = ratios[1] * torch.exp(span * torch.rand(512))
        loss = denoising_loss(process, u, r, torch.randn_like(u)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        fitted = Diffusion(process.denoiser, process.fit(data[:20_000]), loc, tril)
    log_w = log_weights(fitted)
    assert effective_sample_size(log_w) / 4000 > 0.8 > untrained
    found = evidence(log_w)
    assert abs(found.log_evidence) < 5 * found.log_evidence_se < 0.1
    z = law.sample(300)
    with torch.no_grad():
        error = fitted.log_prob(z.float()).double() - law.log_prob(z)
    assert float(error.abs().mean()) < 0.1
