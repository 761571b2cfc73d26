# SPDX-License-Identifier: Apache-2.0
"""The mixture Fisher divergence: known numbers, its books on log Z, and the weights of modes that it sees."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch.distributions import constraints

from pyro_sm.base import Arguments
from pyro_sm.guides.mixture import AutoGaussianMixture
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives import (
    BaseSpace,
    EstimatedLogZ,
    FisherDivergence,
    GivenMixing,
    Identity,
    MixtureFisherDivergence,
    PriorMixing,
)
from pyro_sm.objectives.divergences.fisher import squared_norm
from pyro_sm.objectives.divergences.mixing import MixingDensity
from pyro_sm.objectives.divergences.mixture_fisher import mixed_log_prob, mixture_values, pooled
from pyro_sm.weights import Evidence

F64 = torch.float64


def modes(a, weight):
    parts = dist.Normal(torch.tensor([-a, a], dtype=F64), torch.ones(2, dtype=F64))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([weight, 1 - weight], dtype=F64)), parts)
    return lambda z: mixture.log_prob(z[:, 0])


def gaussian_mixing(dim, scale):
    return MixingDensity(torch.zeros(dim, dtype=F64), scale * torch.eye(dim, dtype=F64))


# -------------------------------------------------------------------------------------------------- estimators

TABLE = [
    (1, 3.38e-2, 1.146e-1),
    (2, 2.76e-2, 6.41e-2),
    (3, 2.23e-2, 1.79e-2),
    (4, 2.23e-2, 1.37e-2),
    (6, 2.09e-2, 1.06e-2),
    (8, 1.91e-2, 8.66e-3),
]


def quadrature(a, beta, metric=None, log_p=None, log_q=None):
    z = torch.linspace(-12 * a - 15, 12 * a + 15, 60001, dtype=F64)[:, None]
    mixing = gaussian_mixing(1, math.sqrt(1 + a * a))
    log_q = log_q or modes(float(a), 0.5)
    log_p = log_p or modes(float(a), 0.2)
    values = mixture_values(log_q, log_p, mixing, z, beta, metric or Identity(), create_graph=False)
    weight = mixed_log_prob(log_q(z), mixing.log_prob(z), beta).exp() * (z[1, 0] - z[0, 0])
    return float((weight * values).sum())


@pytest.mark.parametrize(("a", "half", "most"), TABLE)
def test_table(a, half, most):
    assert quadrature(a, 0.5) == pytest.approx(half, rel=3e-3)
    assert quadrature(a, 0.9) == pytest.approx(most, rel=4e-3)


def test_whitened_by_the_mixing_density():
    assert quadrature(6, 0.5, BaseSpace()) == pytest.approx(37 * quadrature(6, 0.5), rel=1e-9)


def test_beta_one_is_the_fisher_divergence():
    assert quadrature(2, 1 - 1e-7) == pytest.approx(7.82e-2, rel=5e-3)


def test_zero_at_the_target_only_with_the_right_normaliser():
    p = modes(3.0, 0.2)
    assert quadrature(3, 0.5, log_q=p) < 1e-25
    assert quadrature(3, 0.5, log_q=p, log_p=lambda z: p(z) + 0.5) > 1e-4


def test_mixed_scores_are_weighted_by_responsibilities():
    z = torch.randn(9, 2, dtype=F64) * 2
    q = dist.MultivariateNormal(torch.ones(2, dtype=F64), torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64))
    p = dist.Normal(torch.zeros(2, dtype=F64), 1.5).to_event(1)
    mixing, beta, log_z = gaussian_mixing(2, 3.0), 0.3, 0.7

    def mixed(log_prob):
        at = z.clone().requires_grad_(True)
        (score,) = torch.autograd.grad(log_prob(at).sum(), at)
        logit = log_prob(z) + math.log(beta) - mixing.log_prob(z) - math.log(1 - beta)
        r = torch.sigmoid(logit)[:, None]
        return r * score - (1 - r) * z / 9

    def shifted(x):
        return p.log_prob(x) - log_z

    expected = squared_norm(mixed(q.log_prob) - mixed(shifted))
    found = mixture_values(q.log_prob, shifted, mixing, z, beta, Identity())
    assert torch.allclose(found, expected, rtol=1e-9)


def test_gradients_are_finite_where_one_term_is_negligible():
    """log p̃ a thousand nats below log m: torch.logaddexp has a NaN second derivative here."""
    loc = torch.zeros(1, requires_grad=True)
    q = dist.Normal(loc, 1.0).to_event(1)
    z = torch.cat([loc + torch.tensor([[0.1], [0.3]]), torch.tensor([[50.0], [-90.0]])])
    values = mixture_values(
        q.log_prob,
        lambda x: -0.5 * x.square().sum(1) / 0.1,
        MixingDensity(torch.zeros(1), 30 * torch.eye(1)),
        z,
        0.5,
        Identity(),
    )
    (grad,) = torch.autograd.grad(values.sum(), loc)
    assert grad.isfinite().all()
    assert values.isfinite().all()


def test_where_the_target_is_impossible_its_mixture_is_the_mixing_density():
    q = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
    mixing, z = gaussian_mixing(1, 2.0), torch.tensor([[0.5]], dtype=F64)
    value = mixture_values(q.log_prob, lambda x: torch.full_like(x[:, 0], -torch.inf), mixing, z, 0.5, Identity())
    at = z.clone().requires_grad_(True)
    (mixed,) = torch.autograd.grad(mixed_log_prob(q.log_prob(at), mixing.log_prob(at), 0.5).sum(), at)
    assert torch.allclose(value, squared_norm(mixed + z / 4))


def test_pooling():
    assert pooled([Evidence(1.0, 0.1), Evidence(3.0, 0.1)]) == pytest.approx(2.0)
    assert pooled([Evidence(1.0, 0.1), Evidence(3.0, 0.3)]) == pytest.approx(1.2)
    assert pooled([Evidence(1.0, math.inf), Evidence(3.0, 0.3)]) == pytest.approx(3.0)
    assert pooled([Evidence(1.0, 0.1), Evidence(3.0, 0.0)]) == 3.0
    assert pooled([Evidence(1.0, math.inf)]) == 1.0


# ------------------------------------------------------------------------------------------- choices and books


def two_modes():
    """.2 N(−6, 1) + .8 N(6, 1), times e³."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    target = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.8])), dist.Normal(torch.tensor([-6.0, 6.0]), 1.0)
    )
    pyro.factor("f", target.log_prob(z) - dist.Normal(0.0, 10.0).log_prob(z) + 3.0)


def improper():
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("f", -0.5 * z.square())


def guide_at_modes(shift=0.5):
    return AutoGaussianMixture(two_modes, 2, init_locs=torch.tensor([[-6.0 + shift], [6.0 + shift]]))


def test_prior_mixing_has_the_moments_of_the_prior():
    found = PriorMixing(num_draws=4000).fit(ModelDensity(two_modes))
    assert float(found.loc) == pytest.approx(0.0, abs=5 * 10 / math.sqrt(4000))
    assert float(found.scale_tril) == pytest.approx(10.0, rel=0.06)
    torch.manual_seed(0)
    one = PriorMixing().fit(ModelDensity(two_modes)).scale_tril
    torch.manual_seed(0)
    assert torch.allclose(PriorMixing(inflate=2.0).fit(ModelDensity(two_modes)).scale_tril, 2 * one)


def test_prior_mixing_of_a_prior_without_moments():
    def cauchy():
        pyro.sample("z", dist.Normal(pyro.sample("x", dist.Cauchy(1.0, 2.0)), 1.0))

    found = PriorMixing().fit(ModelDensity(cauchy))
    assert (found.loc - 1.0).abs().max() < 3.0
    assert (found.scale_tril.diagonal() < 15.0).all()


def test_an_improper_prior_needs_a_given_mixing_density():
    with pytest.raises(ValueError, match="mixing=GivenMixing"):
        PriorMixing().fit(ModelDensity(improper))


@pytest.mark.parametrize(
    "mixing",
    [
        GivenMixing(torch.zeros(2), 1.0),
        GivenMixing(0.0, torch.ones(2)),
        GivenMixing(0.0, -1.0),
        GivenMixing(0.0, torch.ones(2, 2)),
    ],
)
def test_given_mixing_is_checked(mixing):
    with pytest.raises(ValueError, match="expected"):
        mixing.fit(ModelDensity(two_modes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixtureFisherDivergence(1),
        lambda: MixtureFisherDivergence(beta=1.0),
        lambda: MixtureFisherDivergence(beta=0.0),
        lambda: EstimatedLogZ(1),
        lambda: EstimatedLogZ(every=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_a_guide_without_density_at_a_latent_is_named():
    def guide():
        x = pyro.sample("x", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(x))

    with pytest.raises(TypeError, match=r"use FisherDivergence\(sobolev"):
        MixtureFisherDivergence().loss(two_modes, guide)


def test_log_z_is_estimated_pooled_and_reported():
    loss, guide = MixtureFisherDivergence(16, log_z=EstimatedLogZ(2000, every=3)), guide_at_modes()
    svi = SVI(two_modes, guide, ClippedAdam({"lr": 0.0}), loss)
    for _ in range(7):
        svi.step()
    svi.evaluate_loss()
    assert [info.step for info in loss.history] == [0, 3, 6]
    for info in loss.history:
        assert abs(info.log_evidence - 3.0) < 5 * info.log_evidence_se
        assert 0 < info.log_evidence_se < 0.05
        assert 0 < info.ess <= 1
        assert info.khat < 0.7
    last = loss.history[-1]
    assert last.log_z == pytest.approx(pooled([Evidence(i.log_evidence, i.log_evidence_se) for i in loss.history]))
    assert loss.history[0].log_z == loss.history[0].log_evidence


def test_estimates_do_not_disturb_the_noise_of_the_steps():
    losses = []
    for every in (1, 100):
        loss = MixtureFisherDivergence(16, mixing=GivenMixing(0.0, 10.0), log_z=EstimatedLogZ(64, every=every))
        guide = guide_at_modes()
        loss.differentiable_loss(two_modes, guide)
        torch.manual_seed(1)
        loss.state = loss.state._replace(history=loss.history[:1])
        z, _ = loss._draw_mixture(
            loss._path(guide, loss._density(two_modes, Arguments()), Arguments()), loss.state.mixing, 16
        )
        losses.append(z)
        pyro.clear_param_store()
    assert torch.equal(*losses)


def test_a_given_log_z_is_used():
    guide = guide_at_modes(0.0)
    with torch.no_grad():
        guide()
        guide.logits.copy_(torch.tensor([0.2, 0.8]).log())
    right, wrong = (MixtureFisherDivergence(64, log_z=z) for z in (3.0, 4.0))
    assert right.loss(two_modes, guide) < 1e-6
    assert wrong.loss(two_modes, guide) > 1e-2
    assert right.history == ()


def test_a_target_that_nothing_reaches():
    def nowhere():
        x = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x.abs() < 3, torch.zeros_like(x), torch.full_like(x, -torch.inf)))

    guide = AutoNormal(nowhere, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(50.0)}))
    with pytest.raises(ValueError, match="give a mixing density that"):
        MixtureFisherDivergence(8, mixing=GivenMixing(100.0, 1.0)).loss(nowhere, guide)


# ---------------------------------------------------------------------------------------------------- learning


def learned_weights(loss, steps=500):
    guide = guide_at_modes()
    svi = SVI(two_modes, guide, ClippedAdam({"lr": 0.03, "lrd": 0.995}), loss)
    moved = []
    for _ in range(steps):
        svi.step()
        moved.append(float(guide.components()[0][0].detach().exp()))
    return guide, moved


@pytest.mark.slow
@pytest.mark.parametrize("metric", [BaseSpace(), Identity()])
def test_the_fisher_divergence_leaves_the_weights_of_modes(metric):
    """Once the components sit on the modes nothing moves the weights any more."""
    guide = guide_at_modes(0.0)
    svi = SVI(two_modes, guide, ClippedAdam({"lr": 0.03, "lrd": 0.995}), FisherDivergence(64, metric=metric))
    for _ in range(500):
        svi.step()
    assert float(guide.components()[0][0].detach().exp()) == pytest.approx(0.5, abs=0.02)
    _, moved = learned_weights(FisherDivergence(64, metric=metric))
    assert abs(moved[-1] - 0.2) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        FisherDivergence(64, sobolev=0.5),
        FisherDivergence(64, sobolev=0.5, metric=Identity()),
        MixtureFisherDivergence(128),
        MixtureFisherDivergence(128, mixing=GivenMixing(0.0, 6.0), metric=Identity()),
        MixtureFisherDivergence(128, log_z=3.0, beta=0.9),
    ],
    ids=["sobolev", "sobolev identity", "mixture", "mixture identity", "mixture given"],
)
def test_sobolev_and_mixture_recover_the_weights_of_modes(loss):
    guide, moved = learned_weights(loss)
    assert moved[-1] == pytest.approx(0.2, abs=0.02)
    assert torch.allclose(guide.locs.detach(), torch.tensor([[-6.0], [6.0]]), atol=0.05)
