# SPDX-License-Identifier: Apache-2.0
"""The mixture Fisher divergence in three steps: the correction, the blindness table, and whether it sees weights."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam, ClippedAdam
from torch import Size
from torch.distributions import constraints

from pyro_sm.gaussians.gaussian import GaussianDensity, gaussian_log_prob
from pyro_sm.objectives.energies.bridge import BridgeDensityEstimation, CorrectedDensity, correction, gaussian_bridge
from pyro_sm.objectives.energies.density_estimation import (
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    ImplicitScoreMatching,
)
from pyro_sm.objectives.energies.energy_objective import no_guide
from pyro_sm.objectives.energies.score_estimation import explicit

exact = {"rtol": 1e-10, "atol": 1e-12}


def two_modes(x, share, a):
    """``log [share N(−a, 1) + (1 − share) N(a, 1)]`` (B,) for ``x`` (B, 1)."""
    x = x[:, 0]
    terms = torch.stack([math.log(share) - 0.5 * (x + a) ** 2, math.log(1 - share) - 0.5 * (x - a) ** 2])
    return torch.logsumexp(terms, 0) - 0.5 * math.log(2 * math.pi)


def bridge_1d(a, dtype=torch.float64):
    return GaussianDensity(torch.zeros(1, dtype=dtype), torch.full((1, 1), math.sqrt(1 + a**2), dtype=dtype))


def grid(a, n=20_001):
    reach = 9 * math.sqrt(1 + a**2)
    x = torch.linspace(-reach, reach, n, dtype=torch.float64)[:, None]
    return x, 2 * reach / (n - 1)


def mixed(log_p, log_m, beta):
    return torch.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_m)


# ------------------------------------------------------------------------------------------ the blindness table

TABLE = {  # a: FD, KL, MFD β=.5, MFD β=.9
    1: (1.455e-1, 0.1161, 3.38e-2, 1.146e-1),
    2: (7.82e-2, 0.2063, 2.76e-2, 6.41e-2),
    3: (1.005e-2, 0.2221, 2.23e-2, 1.79e-2),
    4: (4.11e-4, 0.2231, 2.23e-2, 1.37e-2),
    6: (2.84e-8, 0.2231, 2.09e-2, 1.06e-2),
    8: (3.2e-14, 0.2231, 1.91e-2, 8.66e-3),
}


@pytest.mark.parametrize("a", TABLE)
def test_the_blindness_table(a):
    """Twice the explicit loss of the bridged densities, by quadrature, to the printed digits."""
    x, step = grid(a)
    leaf = x.clone().requires_grad_(True)
    p, q, m = two_modes(leaf, 0.2, a), two_modes(leaf, 0.5, a), bridge_1d(a).log_prob(leaf)

    def divergence(log_q, log_p):
        s_q, s_p = (torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (log_q, log_p))
        return float((log_q.detach().exp() * 2 * explicit(s_q, s_p)).sum() * step)

    found = (
        divergence(q, p),
        float((q.exp() * (q - p)).detach().sum() * step),
        divergence(mixed(q, m, 0.5), mixed(p, m, 0.5)),
        divergence(mixed(q, m, 0.9), mixed(p, m, 0.9)),
    )
    for value, expected in zip(found, TABLE[a], strict=True):
        assert value == pytest.approx(expected, rel=1e-2 if expected < 1e-10 else 4e-3)


# ------------------------------------------------------------------------------------------------ the correction


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_correction_is_its_formula(beta):
    ratio = torch.linspace(-6, 6, 201, dtype=torch.float64)
    plain = (ratio.exp() - (1 - beta)) / beta
    found = correction(ratio, beta)
    torch.testing.assert_close(found[plain > 0], plain[plain > 0].log(), rtol=1e-8, atol=1e-8)
    assert bool((found[plain <= 0] == -math.inf).all())
    assert float(correction(torch.tensor([800.0], dtype=torch.float64), beta)) == pytest.approx(800 - math.log(beta))
    assert float(correction(torch.tensor([-math.inf]), beta)) == -math.inf
    floored = correction(ratio, beta, 0.01)
    torch.testing.assert_close(floored, (plain * beta).clamp(min=0.01).log() - math.log(beta), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_a_perfect_energy_is_corrected_to_the_density_itself(beta, float64):
    """``f = log[βp + (1−β)m] + c``: the density, its normaliser and its draws come back."""
    a, shift = 4.0, 7.3
    bridge = bridge_1d(a)

    def energy(x):
        return mixed(two_modes(x, 0.2, a), bridge.log_prob(x), beta) + shift

    q = CorrectedDensity(energy, bridge, beta, num_draws=20_000)
    assert abs(q.log_z - shift) < 5 * q.log_z_se
    assert q.khat < 0.5
    assert abs(q.log_mass) < 0.05
    x, step = grid(a)
    truth, found = two_modes(x, 0.2, a), q.log_prob(x)
    mass = float(found.exp().sum() * step)
    assert mass == pytest.approx(1, abs=0.03)
    kl = float((truth.exp() * (truth - found.clamp(min=-60))).sum() * step)
    assert abs(kl) < 0.01
    uncorrected = energy(x) - q.log_z
    assert float((truth.exp() * (truth - uncorrected)).sum() * step) > 0.05, "the bridge must be taken off"
    draws = q.sample(4000)
    assert draws.shape == (4000, 1)
    error = 5 * (0.16 / 4000 * (1 + 1 / 16 / 0.2)) ** 0.5 + 0.02
    assert abs(float((draws < 0).double().mean()) - 0.2) < error
    assert abs(float((draws.abs() - a).std()) - 1) < 0.1


def test_a_model_out_of_reach_is_refused():
    bridge = bridge_1d(1.0)
    with pytest.raises(ValueError, match="reach the model, found log Z -inf"):
        CorrectedDensity(lambda x: torch.full_like(x[:, 0], -math.inf), bridge, 0.5, num_draws=100)
    with pytest.raises(ValueError, match="floor >= 0, found -1"):
        CorrectedDensity(lambda x: x[:, 0], bridge, 0.5, floor=-1.0)


# ------------------------------------------------------------------------------------------------- the objective


def flat(dim):
    return dist.ImproperUniform(constraints.real_vector, Size(), Size((dim,)))


def correlated(n=400):
    return torch.randn(n, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.8]]) + torch.tensor([0.5, -1.0])


def gaussian():
    precision = pyro.param("precision", lambda: torch.eye(2), constraint=constraints.positive_definite)
    x = pyro.sample("x", flat(2))
    pyro.factor("f", -0.5 * (x * (x @ precision)).sum(-1))


def test_gaussian_bridge_has_the_moments_of_the_data():
    x = correlated(50).double()
    bridge = gaussian_bridge(x)
    torch.testing.assert_close(bridge.loc, x.mean(0), **exact)
    torch.testing.assert_close(bridge.scale_tril @ bridge.scale_tril.T, torch.cov(x.T), **exact)
    wide = gaussian_bridge(x, 2.0)
    torch.testing.assert_close(wide.scale_tril, 2 * bridge.scale_tril, **exact)
    torch.testing.assert_close(
        wide.log_prob(x), gaussian_log_prob(x, x.mean(0), torch.linalg.cholesky(4 * torch.cov(x.T))), **exact
    )
    assert gaussian_bridge(x[:, :1]).dim == 1


@pytest.mark.parametrize(
    ("inner", "data_loss"),
    [
        (ImplicitScoreMatching(), lambda s, h: 0.5 * s.square().sum(1) + h.diagonal().sum()),
        (
            DiffusionScoreMatching(torch.tensor([[2.0, 0.0], [1.0, 1.0]])),
            lambda s, h: (
                0.5 * (s @ torch.tensor([[2.0, 0.0], [1.0, 1.0]])).square().sum(1)
                + torch.trace(torch.tensor([[4.0, 2.0], [2.0, 2.0]]) @ h)
            ),
        ),
    ],
    ids=["implicit", "diffusion"],
)
def test_bridge_rows_have_the_mean_of_the_inner_loss(inner, data_loss):
    """``−s·∇log m`` stands for the trace: equal means, and the wrong sign is far off."""
    torch.manual_seed(0)
    bridge = GaussianDensity(torch.tensor([0.5, -1.0]), torch.tensor([[2.0, 0.0], [0.5, 1.5]]))
    precision = torch.tensor([[1.0, 0.3], [0.3, 0.5]])

    def log_prob(x):
        return -0.5 * (x * (x @ precision)).sum(1)

    x = bridge.sample(200_000)
    _, known = bridge.log_prob_and_score(x)
    found = inner.known_losses(log_prob, x, known).detach()
    expected = data_loss(-x @ precision, -precision)
    error = float((found - expected).std() / len(x) ** 0.5)
    assert abs(float(found.mean() - expected.mean())) < 4 * error
    wrong = inner.known_losses(log_prob, x, -known).detach()
    assert abs(float(wrong.mean() - expected.mean())) > 40 * error


def test_the_loss_is_the_mixture_of_both():
    """β of the data's loss and 1−β of the bridge's; the wrong variant forgets the shares."""
    torch.manual_seed(0)
    x = correlated(50_000)
    bridge = gaussian_bridge(x, 2.0)
    values = {}
    for beta in (0.2, 0.8):
        values[beta] = BridgeDensityEstimation(bridge, beta).loss(gaussian, no_guide, x)
    own = ImplicitScoreMatching().loss(gaussian, no_guide, x)
    slope = (values[0.8] - values[0.2]) / 0.6
    assert values[0.8] + 0.2 * slope == pytest.approx(own, rel=0.03)
    assert values[0.2] - 0.2 * slope != pytest.approx(own, rel=0.2)


@pytest.mark.parametrize(
    "inner",
    [
        ImplicitScoreMatching(),
        DenoisingScoreMatching(0.2),
        DiffusionScoreMatching(torch.tensor([[2.0, 0.0], [1.0, 1.0]])),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_the_contract(inner):
    x = correlated(40)
    loss = BridgeDensityEstimation(gaussian_bridge(x), loss=inner)
    svi = SVI(gaussian, no_guide, Adam({"lr": 0.05}), loss)
    found = []
    for _ in range(2):
        values = []
        for name in ("loss", "differentiable_loss", "loss_and_grads"):
            pyro.set_rng_seed(0)
            value = getattr(loss, name)(gaussian, no_guide, x)
            values.append(value if isinstance(value, float) else float(value.detach()))
        assert values[0] == values[1] == values[2]
        assert float(pyro.get_param_store()._params["precision"].grad.abs().sum()) > 0
        pyro.set_rng_seed(0)
        assert svi.evaluate_loss(x) == values[0]
        pyro.set_rng_seed(0)
        assert svi.step(x) == values[0]
        found.append(values[0])
    assert found[0] != found[1]
    q = loss.corrected(gaussian, x, num_draws=500)
    assert math.isfinite(q.log_z)
    assert q.log_prob(x).shape == (40,)
    assert q.sample(7).shape == (7, 2)
    assert not q.log_prob(x).requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BridgeDensityEstimation(bridge_1d(1.0), 1.0), r"beta in \(0, 1\), found 1.0"),
        (
            lambda: BridgeDensityEstimation(bridge_1d(1.0)).loss(gaussian, no_guide, correlated(4)),
            r"\(N, 1\), as the bridge",
        ),
        (lambda: gaussian_bridge(torch.ones(3)), r"\(N, D\) with N >= 2, found \(3,\)"),
        (lambda: gaussian_bridge(torch.ones(5, 2)), "positive definite covariance"),
    ],
)
def test_arguments_that_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------------ learning

A = 6.0


def weighted(components):
    """An energy whose only parameters are the weights of given normalised components, equal at first."""

    def energy():
        weights = pyro.param(
            "weights", lambda: torch.ones(len(components)) / len(components), constraint=constraints.simplex
        )
        x = pyro.sample("x", flat(1))
        terms = torch.stack([log_prob(x.reshape(-1, 1)).reshape(x.shape[:-1]) for log_prob in components], -1)
        pyro.factor("f", torch.logsumexp(terms + weights.log(), -1))

    return energy


def mode(centre):
    return lambda x: -0.5 * (x[:, 0] - centre) ** 2 - 0.5 * math.log(2 * math.pi)


def kl(log_q, a=A):
    x, step = grid(a, 4001)
    truth = two_modes(x, 0.2, a)
    value = log_q(x).clamp(min=-60)
    value = value - torch.logsumexp(value, 0) - math.log(step)  # the estimate of log Z has an error of its own
    return float((truth.exp() * (truth - value)).sum() * step)


def sample_modes(n, a=A):
    centre = torch.where(torch.rand(n, 1) < 0.2, -a, a)
    return centre + torch.randn(n, 1)


@pytest.mark.slow
def test_the_bridge_sees_the_weights_and_the_plain_loss_does_not(float64):
    """At a = 8 the gradient of the plain loss is 1e-12, less than Adam's own epsilon."""
    a = 8.0
    x = sample_modes(12_000, a)
    plain = weighted([mode(-a), mode(a)])
    svi = SVI(plain, no_guide, Adam({"lr": 0.02}), ImplicitScoreMatching())
    for _ in range(50):
        svi.step(x)
    weights = pyro.param("weights").detach().clone()
    blind = kl(lambda x: two_modes(x, float(weights[0]), a), a)
    assert abs(float(weights[0]) - 0.5) < 0.01, "score matching leaves the weights where they were"

    pyro.clear_param_store()
    bridge = gaussian_bridge(x)
    loss = BridgeDensityEstimation(bridge, 0.8)
    bridged = weighted([mode(-a), mode(a), bridge.log_prob])
    svi = SVI(bridged, no_guide, ClippedAdam({"lr": 0.05, "lrd": 0.985}), loss)
    for _ in range(300):
        svi.step(x)
    q = loss.corrected(bridged, x)
    seen = kl(q.log_prob, a)
    assert seen < blind / 10
    assert abs(float((q.sample(4000) < 0).double().mean()) - 0.2) < 0.05
    assert q.log_z_se < 0.02


@pytest.mark.slow
def test_a_network_learns_two_modes_over_the_bridge():
    """A multilayer perceptron knows nothing of modes; the plain loss gives them any weights."""
    x = sample_modes(4000)
    bridge = gaussian_bridge(x)
    found = {}
    for name, loss in (("bridge", BridgeDensityEstimation(bridge)), ("plain", ImplicitScoreMatching())):
        pyro.clear_param_store()
        torch.manual_seed(2)
        net = torch.nn.Sequential(
            torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )

        def energy(net=net):
            pyro.module("net", net)
            z = pyro.sample("x", flat(1))
            pyro.factor("f", 10 * net(z / A).squeeze(-1) - 0.5 * (z / (1.5 * A)).square().sum(-1))

        svi = SVI(energy, no_guide, ClippedAdam({"lr": 5e-3, "lrd": 0.998}), loss)
        for _ in range(1500):
            svi.step(x[torch.randint(len(x), (512,))])
        if isinstance(loss, BridgeDensityEstimation):
            found[name] = kl(loss.corrected(energy, x).log_prob)
            continue
        f = net
        points, step = grid(A, 4001)
        with torch.no_grad():
            z = points.float()
            value = (10 * f(z / A).squeeze(-1) - 0.5 * (z / (1.5 * A)).square().sum(-1)).double()
        log_z = torch.logsumexp(value, 0) + math.log(step)
        found[name] = kl(lambda _, value=value, log_z=log_z: value - log_z)
    assert found["bridge"] < 0.05
    assert found["bridge"] < found["plain"] / 4
