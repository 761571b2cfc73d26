# SPDX-License-Identifier: Apache-2.0
"""Importance-weighted score matching as a Pyro objective: the ELBO contract, its books, and whether it learns."""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.util import torch_item
from pyro.optim import Adam, ClippedAdam, ExponentialLR
from pyro.optim.lr_scheduler import PyroLRScheduler

from pyro_sm import (
    AutoDiffusion,
    GivenBase,
    ImportanceWeightedScoreMatching,
    MarginalWeights,
    ModelRefusedError,
    PathWeights,
    PyroSMWarning,
    WideCovering,
)
from pyro_sm.base import Arguments, DiffusionGuide
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.examples import eight_schools
from pyro_sm.nn.mlp import MLP
from pyro_sm.weights import evidence

DATA = torch.tensor([1.0, -0.5, 2.0])
WEIGHTINGS = [PathWeights(), MarginalWeights(num_inner=3)]
both = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)


# Of (mu, t) given the data: precision by adding the terms of prior and likelihood.
COVARIANCE = torch.linalg.inv(torch.tensor([[3.25, -1, -1, -1], [-1, 2, 0, 0], [-1, 0, 2, 0], [-1, 0, 0, 2]]))
POSTERIOR = GivenBase(COVARIANCE @ torch.cat([torch.zeros(1), DATA]), torch.linalg.cholesky(COVARIANCE))


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("n", len(y)):
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(t, 1.0), obs=y)


def make_guide(model=hierarchy, **options):
    return AutoDiffusion(model, **{"num_steps": 8, "architecture": MLP(width=16, depth=1), **options})


def make_objective(**options):
    return ImportanceWeightedScoreMatching(**{"num_particles": 64, "batch_size": 64, "steps_per_round": 5, **options})


def make_svi(guide=None, model=hierarchy, **options):
    objective = make_objective(**options)
    guide = guide or make_guide(model)
    return SVI(model, guide, Adam({"lr": 1e-2}), objective), guide, objective


def store():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------- the ELBO contract


@both
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_the_three_losses_agree_after_reseeding(weighting, steps):
    """As ``assert_ok`` in Pyro's own tests, and exactly; with a fresh objective, and between two rounds."""
    svi, guide, _ = make_svi(weighting=weighting)
    guide(DATA)
    with torch.no_grad():  # an untrained network's loss is zero whatever the noise
        weights = pyro.param("AutoDiffusion.network_weights")
        weights.add_(0.1 * torch.randn_like(weights))
    for _ in range(steps):
        svi.step(DATA)
    objective, found = svi.loss.__self__, []
    state = objective.state
    for name in ("loss", "differentiable_loss", "loss_and_grads"):
        objective.state = state
        pyro.set_rng_seed(0)
        found.append(torch_item(getattr(objective, name)(hierarchy, guide, DATA)))
    assert found[0] == found[1] == found[2]
    assert math.isfinite(found[0])
    pyro.set_rng_seed(1)
    assert objective.loss(hierarchy, guide, DATA) != found[0]  # it is random, so that the above says something


@both
def test_differentiable_loss_has_the_gradient_of_loss_and_grads(weighting):
    objective, guide = make_objective(weighting=weighting), make_guide()
    guide(DATA)
    gradients = []
    for name in ("differentiable_loss", "loss_and_grads"):
        guide.zero_grad()
        objective.state = type(objective.state)()
        pyro.set_rng_seed(0)
        loss = getattr(objective, name)(hierarchy, guide, DATA)
        if isinstance(loss, torch.Tensor):
            assert loss.shape == ()
            loss.backward()
        gradients.append(guide.network_weights_unconstrained.grad.clone())
    assert torch.equal(*gradients)
    assert bool((gradients[0] != 0).any())


def test_a_sample_of_traces_is_offered_as_by_elbo_subclasses():
    objective, guide = make_objective(max_plate_nesting=1), make_guide()
    guide(DATA)
    model_trace, guide_trace = objective._get_trace(hierarchy, guide, (DATA,), {})
    assert torch.equal(model_trace.nodes["t"]["value"], guide_trace.nodes["t"]["value"])


@both
def test_loss_changes_nothing(weighting):
    svi, guide, objective = make_svi(weighting=weighting)
    for _ in range(3):
        svi.step(DATA)
    state, before = objective.state, store()
    assert math.isfinite(objective.loss(hierarchy, guide, DATA))
    assert math.isfinite(svi.evaluate_loss(DATA))
    assert math.isfinite(objective.loss(hierarchy, guide, DATA + 1))
    assert objective.state is state
    assert same(store(), before)


def test_loss_before_the_first_step_leaves_training_as_it_would_be():
    found = []
    for look in (True, False):
        pyro.clear_param_store()
        svi, guide, objective = make_svi(make_guide(base=GivenBase(0.0, 2.0)))
        pyro.set_rng_seed(1)
        guide(DATA)
        if look:
            svi.evaluate_loss(DATA)
            assert objective.state == type(objective.state)()
        pyro.set_rng_seed(2)
        svi.step(DATA)
        svi.step(DATA)
        found.append(store())
    assert same(*found)


@pytest.mark.parametrize("first", ["evaluate_loss", "step"])
def test_every_step_trains(first):
    svi, guide, _ = make_svi()
    getattr(svi, first)(DATA)
    for _ in range(2):
        before = guide.network_weights_unconstrained.detach().clone()
        assert isinstance(svi.step(DATA), float)
        assert bool((guide.network_weights_unconstrained != before).any())


def test_held_out_data_are_looked_at_with_their_own_draws():
    """A loss on other data neither uses the rounds of the training data nor throws them away."""
    svi, guide, objective = make_svi()
    svi.step(DATA)
    svi.step(DATA)
    evaluations = guide.bind(
        hierarchy,
        DATA,
    ).density.evaluations
    assert evaluations.values == 64
    objective.loss(hierarchy, guide, DATA + 3)
    assert evaluations.values == 128
    objective.loss(hierarchy, guide, DATA)
    svi.step(DATA)
    assert evaluations.values == 128
    assert len(objective.history) == 1
    assert objective.state.steps == 3


# --------------------------------------------------------------------------------------------------------- books


@both
def test_evaluations_are_counted_exactly(weighting):
    """N per round, scores too if they are asked for; K · B of both per step; a round before every fifth step."""
    svi, guide, objective = make_svi(weighting=weighting)
    inner = weighting.num_inner * 64
    scored = 64 * weighting.needs_score
    for step in range(1, 13):
        svi.step(DATA)
        rounds = -(-step // 5)
        evaluations = guide.bind(
            hierarchy,
            DATA,
        ).density.evaluations
        assert evaluations.values == 64 * rounds + inner * step
        assert evaluations.scores == scored * rounds + inner * step
        assert len(objective.history) == rounds
    assert [info.density_evaluations for info in objective.history] == [64, 128 + 5 * inner, 192 + 10 * inner]
    gradients = [scored, 2 * scored + 5 * inner, 3 * scored + 10 * inner]
    assert [info.gradient_evaluations for info in objective.history] == gradients
    assert objective.evaluations_per_round == 64 + 5 * inner
    assert objective.evaluations is evaluations


def test_the_wide_component_is_part_of_the_count():
    for share in (0.0, 0.1, 0.5):
        pyro.clear_param_store()
        svi, guide, objective = make_svi(covering=WideCovering(share=share))
        svi.step(DATA)
        assert guide.bind(hierarchy, DATA).density.evaluations.values == 64
        (only,) = objective.state.buffer.rounds
        assert only.num_guide == 64 - round(64 * share)


def test_history():
    svi, _, objective = make_svi(buffer_rounds=2)
    losses = [svi.step(DATA) for _ in range(16)]
    history = objective.history
    assert [info.round for info in history] == [1, 2, 3, 4]
    assert math.isnan(history[0].loss)
    for i in (1, 2, 3):
        assert history[i].loss == pytest.approx(sum(losses[5 * (i - 1) : 5 * i]) / 5)
        assert history[i].seconds > history[i - 1].seconds
    assert all(0 < info.gamma <= 1 and 0 < info.ess <= 1 and info.log_evidence_se > 0 for info in history)
    assert len(objective.state.buffer.rounds) == 2
    newest = objective.state.buffer.rounds[-1].draws.log_weight
    assert history[-1].log_evidence == pytest.approx(evidence(newest).log_evidence, abs=1e-5)


def test_evidence_of_every_round_is_unbiased():
    covariance = torch.full((3, 3), 4.0) + 2 * torch.eye(3)
    truth = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(DATA)
    svi, _, objective = make_svi(num_particles=2000, steps_per_round=3)
    for _ in range(12):
        svi.step(DATA)
    for info in objective.history:
        assert info.log_evidence_se < 0.15
        assert abs(info.log_evidence - truth) < 5 * info.log_evidence_se


def test_damping_is_a_trust_region():
    far = dist.Normal(4.0, 0.3)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", far.log_prob(x))

    svi, _, objective = make_svi(model=model, num_particles=500, effective_share=0.4, population=None)
    svi.step()
    (first,) = objective.state.buffer.rounds
    assert 0 < first.gamma < 0.5
    assert 1 / first.weight.square().sum() == pytest.approx(0.4 * 500, rel=1e-3)
    assert first.weight.sum() == pytest.approx(1, rel=1e-5)
    svi, _, objective = make_svi(make_guide(base=POSTERIOR, name="exact"), num_particles=500)
    svi.step(DATA)
    assert objective.history[0].gamma == 1


def test_refit_follows_the_rounds():
    svi, guide, _ = make_svi(make_guide(base=GivenBase(0.0, 5.0)), num_particles=500)
    for _ in range(5):
        svi.step(DATA)
    wide = guide.log_start_scale_unconstrained.detach().clone()
    svi.step(DATA)
    assert bool((guide.log_start_scale_unconstrained != wide).all())
    assert bool((guide.log_variance_factor_unconstrained != 0).all())


def test_a_coupling_may_begin_in_the_early_rounds_only(monkeypatch):
    """And is offered the buffer, resampled by its weights, before the kernels are refitted."""
    svi, _, objective = make_svi(steps_per_round=1)
    calls, real = [], Diffusion.refitted

    def noncentred(self, z, *, begin=True):
        buffer = objective.state.buffer
        assert bool(torch.isin(z[:, 0], buffer.latents()[:, 0][buffer.weights() > 0]).all())
        calls.append((len(objective.history), begin, len(z)))

    def refitted(self, z):
        calls.append(len(z))
        return real(self, z)

    monkeypatch.setattr(Diffusion, "noncentred", noncentred)
    monkeypatch.setattr(Diffusion, "refitted", refitted)
    for _ in range(16):
        svi.step(DATA)
    asked, refitted = calls[::2], calls[1::2]
    assert [rounds for rounds, _, _ in asked] == list(range(1, 16))
    assert [rounds for rounds, begin, _ in asked if begin] == list(range(2, 13))
    assert [size for _, _, size in asked] == refitted


def test_score_matching_leaves_the_base_alone_path_weights():
    check_base_is_left_alone(PathWeights())


def test_score_matching_leaves_the_base_alone_marginal_weights():
    check_base_is_left_alone(MarginalWeights(num_inner=3))


def check_base_is_left_alone(weighting):
    svi, _, _ = make_svi(weighting=weighting)
    svi.step(DATA)
    before = store()
    for _ in range(7):
        svi.step(DATA)
    assert torch.equal(pyro.param("AutoDiffusion.base_loc"), before["AutoDiffusion.base_loc"])
    assert torch.equal(pyro.param("AutoDiffusion.base_scale_tril"), before["AutoDiffusion.base_scale_tril"])


# --------------------------------------------------------------------------------------- other data, other guides


def test_other_data_begin_a_new_buffer():
    svi, _, objective = make_svi()
    for _ in range(7):
        svi.step(DATA)
    assert len(objective.state.buffer.rounds) == 2
    svi.step(DATA + 5)
    assert len(objective.state.buffer.rounds) == 1
    assert objective.state.steps == 1
    assert len(objective.history) == 3  # the history goes on
    svi.step((DATA + 5).clone())  # equal values are the same data
    assert len(objective.history) == 3
    assert objective.state.steps == 2


def test_data_changed_in_place_begin_a_new_buffer():
    svi, _, objective = make_svi()
    data = DATA.clone()
    svi.step(data)
    svi.step(data)
    data += 1
    svi.step(data)
    assert len(objective.history) == 2
    assert len(objective.state.buffer.rounds) == 1


def test_another_guide_begins_afresh():
    svi, guide, objective = make_svi()
    for _ in range(7):
        svi.step(DATA)
    other = make_guide(name="other")
    state = objective.state
    objective.loss(hierarchy, other, DATA)
    assert objective.state is state
    SVI(hierarchy, other, Adam({"lr": 1e-2}), objective).step(DATA)
    assert len(objective.history) == 1
    assert objective.history[0].density_evaluations == 64 + 64  # the look, and the round
    assert objective.state.steps == 1
    assert guide.bind(hierarchy, DATA).density.evaluations.values == 128


# --------------------------------------------------------------------------------------------------------- errors


def test_guide_without_the_capability():
    guide = AutoNormal(hierarchy)
    with pytest.raises(TypeError) as caught:
        SVI(hierarchy, guide, Adam({"lr": 1e-2}), make_objective()).step(DATA)
    message = str(caught.value)
    assert message.startswith("ImportanceWeightedScoreMatching cannot train AutoNormal")
    assert "DiffusionGuide" in message
    assert all(name in message for name in ("bind", "diffusion"))
    assert isinstance(make_guide(), DiffusionGuide)


def test_refused_models():
    def model(y):
        if torch.rand(()) < 0.5:
            pyro.sample("sometimes", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    svi, _, _ = make_svi(model=model)
    with pytest.raises(ModelRefusedError, match="sometimes"):
        svi.step(DATA)
    svi, _, _ = make_svi()
    with pytest.raises(ModelRefusedError, match="missing 1 required positional argument: 'y'"):
        svi.step()


@both
def test_no_draw_with_a_finite_density(weighting):
    """The model's support lies where neither the guide nor its covering component draws."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("support", torch.where(x > -5.0, 0.0, -math.inf))

    guide = make_guide(model, base=GivenBase(-60.0, 1.0))
    svi, _, _ = make_svi(guide, model, weighting=weighting, covering=WideCovering())
    with pytest.raises(ValueError, match=r"none of 64 draws has a finite density.*Give a base"):
        svi.step()


def test_marginal_weights_without_a_finite_inner_draw():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("support", torch.where(x > -5.0, 0.0, -math.inf))

    svi, _, objective = make_svi(make_guide(model), model, weighting=MarginalWeights(num_inner=2))
    svi.step()
    low = objective.state.buffer.rounds[0]
    gone = low._replace(draws=low.draws._replace(z=low.draws.z - 1e4))
    objective.state = objective.state._replace(buffer=type(objective.state.buffer)((gone,)))
    with pytest.raises(ValueError, match="no inner draw has a finite density"):
        svi.step()


@both
def test_part_of_space_impossible(weighting):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("support", torch.where(x > 0.5, -x, math.nan))

    svi, guide, _ = make_svi(model=model, weighting=weighting)
    for _ in range(12):
        assert math.isfinite(svi.step())
    assert bool(torch.isfinite(guide.network_weights_unconstrained).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles >= 1, found 0"),
        ({"buffer_rounds": 0}, "buffer_rounds >= 1, found 0"),
        ({"steps_per_round": -1}, "steps_per_round >= 1, found -1"),
        ({"batch_size": 0}, "batch_size >= 1, found 0"),
        ({"effective_share": 0.0}, r"effective_share in \(0, 1\), found 0.0"),
        ({"effective_share": 1.0}, r"effective_share in \(0, 1\), found 1.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**options)


def test_model_with_parameters_warns():
    def model(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, scale).expand([3]).to_event(1), obs=y)

    svi, _, _ = make_svi(model=model)
    with pytest.warns(PyroSMWarning, match=r"trainable parameters \(scale\)"):
        svi.step(DATA)
    svi.step(DATA)
    assert "scale" not in pyro.get_param_store() or pyro.param("scale") == 1


# ----------------------------------------------------------------------------------------------------- optimisers


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda: Adam({"lr": 1e-2}),
        lambda: ClippedAdam({"lr": 1e-2, "clip_norm": 1.0}),
        lambda: ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5}),
    ],
    ids=["Adam", "ClippedAdam", "PyroLRScheduler"],
)
def test_optimisers_of_pyro(optimiser):
    guide, optimiser = make_guide(), optimiser()
    svi = SVI(hierarchy, guide, optimiser, make_objective())
    moves = []
    for _ in range(12):
        before = guide.network_weights_unconstrained.detach().clone() if guide._network is not None else None
        svi.step(DATA)
        if before is not None:
            moves.append(float((guide.network_weights_unconstrained.detach() - before).abs().max()))
        if isinstance(optimiser, PyroLRScheduler):
            optimiser.step()
    assert all(move > 0 for move in moves)
    if isinstance(optimiser, PyroLRScheduler):
        assert moves[-1] < 0.01 * moves[0]


def test_optimiser_of_torch():
    guide = make_guide()
    loss = make_objective()(hierarchy, guide)
    loss(DATA)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
    before = guide.network_weights_unconstrained.detach().clone()
    for _ in range(5):
        optimiser.zero_grad()
        value = loss(DATA)
        assert value.shape == ()
        value.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 10.0)
        optimiser.step()
    assert bool((guide.network_weights_unconstrained != before).any())


@both
def test_float64(float64, weighting):
    svi, _, objective = make_svi(weighting=weighting)
    svi.step(DATA.double())
    assert objective.state.buffer.rounds[0].weight.dtype == torch.float64
    assert objective.differentiable_loss(hierarchy, svi.guide, DATA.double()).dtype == torch.float64


def test_two_runs_with_one_seed_are_equal():
    found = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        svi, _, _ = make_svi()
        for _ in range(7):
            svi.step(DATA)
        found.append(store())
    assert same(*found)


def test_after_reverse_kl():
    """Two objectives on one guide, one after the other."""
    guide = make_guide()
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(DATA)
    svi = SVI(hierarchy, guide, Adam({"lr": 1e-3}), make_objective())
    assert math.isfinite(svi.step(DATA))


# ------------------------------------------------------------------------------------------------------- learning


def test_the_loss_of_an_untrained_guide_is_zero():
    guide = make_guide(base=POSTERIOR)
    assert make_objective().loss(hierarchy, guide, DATA) == 0.0


def test_loss_falls_on_eight_schools():
    guide = AutoDiffusion(eight_schools.noncentered, num_steps=8, architecture=MLP(width=32, depth=1))
    objective = make_objective(num_particles=256, batch_size=256, steps_per_round=20)
    svi = SVI(eight_schools.noncentered, guide, Adam({"lr": 5e-3}), objective)
    losses = [svi.step(*eight_schools.data()) for _ in range(160)]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses[0] == 0.0
    assert sum(losses[-40:]) / 40 < 2 * sum(losses[:10]) / 10 < 0


def correlated(y):
    x = pyro.sample("x", dist.MultivariateNormal(torch.tensor([0.5, -1.0]), torch.tensor([[4.0, 1.0], [1.0, 2.0]])))
    mean = x @ torch.tensor([[1.0, 0.3], [-1.0, 2.0]])
    pyro.sample("y", dist.Normal(mean, torch.tensor([0.8, 1.5])).to_event(1), obs=y)


def correlated_answer(y):
    prior = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    matrix, noise = torch.tensor([[1.0, 0.3], [-1.0, 2.0]]).T, torch.tensor([0.8, 1.5]).square().diag()
    precision = torch.linalg.inv(prior) + matrix.T @ torch.linalg.inv(noise) @ matrix
    covariance = torch.linalg.inv(precision)
    start = torch.tensor([0.5, -1.0])
    loc = covariance @ (torch.linalg.inv(prior) @ start + matrix.T @ torch.linalg.inv(noise) @ y)
    return loc, covariance, dist.MultivariateNormal(matrix @ start, noise + matrix @ prior @ matrix.T).log_prob(y)


class Lesson(NamedTuple):
    """How to train with a weighting, and what can be asked of it then."""

    weighting: PathWeights | MarginalWeights
    batch_size: int
    ess: tuple[float, float]
    """Least effective share at the end: for the Gaussian, for the two modes."""
    moments: tuple[float, float]
    """Largest error of the guide's own mean and covariance, in posterior standard deviations."""
    share: float
    """Largest error of the guide's own share in a mode."""


# The paper's form has no clean points to learn from, only noisy scores: the same steps take it less far.
learning = pytest.mark.parametrize(
    "lesson",
    [
        Lesson(PathWeights(), 256, (0.85, 0.6), (0.1, 0.15), 0.05),
        Lesson(MarginalWeights(num_inner=32), 128, (0.6, 0.2), (0.25, 0.3), 0.15),
    ],
    ids=["PathWeights", "MarginalWeights"],
)


def learn(model, args, lesson, steps):
    guide = AutoDiffusion(model, num_steps=16, architecture=MLP(width=48, depth=2), levels=NoiseRange(0.01, 4.0))
    objective = ImportanceWeightedScoreMatching(
        num_particles=512, batch_size=lesson.batch_size, steps_per_round=25, weighting=lesson.weighting
    )
    optimiser = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 4e-3}, "gamma": 0.9965})
    svi = SVI(model, guide, optimiser, objective)
    for _ in range(steps):
        svi.step(*args)
        optimiser.step()
    bound = guide.bind(model, *args)
    objective.refit(bound)
    density = bound.density
    return objective, guide.draw_weighted(density, 8000, Arguments(args))


@pytest.mark.slow
@learning
def test_learns_a_correlated_gaussian(lesson):
    y = torch.tensor([3.0, 1.0])
    loc, covariance, log_evidence = correlated_answer(y)
    objective, draws = learn(correlated, (y,), lesson, 750)
    estimate = evidence(draws.log_weight)
    assert estimate.log_evidence_se < 0.01
    assert abs(estimate.log_evidence - log_evidence) < 5 * estimate.log_evidence_se
    assert objective.history[0].ess < 0.4
    assert objective.history[-1].ess > lesson.ess[0]
    assert objective.history[-1].gamma == 1
    own = draws.z[:7200]  # the guide's own, without their weights
    scale = covariance.diagonal().sqrt()
    assert bool(((own.mean(0) - loc).abs() < lesson.moments[0] * scale).all())
    assert bool(((own.T.cov() - covariance).abs() < lesson.moments[1] * torch.outer(scale, scale)).all())
    # with weights: within five standard errors
    weight = torch.softmax(draws.log_weight.double(), 0)
    error = (weight[:, None].square() * (draws.z - loc).square()).sum(0).sqrt()
    assert bool(((weight @ draws.z.double() - loc).abs() < 5 * error).all())
    assert bool((error < 0.02 * scale).all())


LEFT = dist.MultivariateNormal(torch.tensor([-2.5, 1.0]), torch.tensor([[0.3, 0.1], [0.1, 0.4]]))
RIGHT = dist.MultivariateNormal(torch.tensor([2.5, -1.0]), torch.tensor([[0.5, -0.2], [-0.2, 0.3]]))


def bimodal():
    """``p̃ = e^{1.7} (0.8 left + 0.2 right)``."""
    prior = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    x = pyro.sample("x", prior)
    modes = torch.stack([math.log(0.8) + LEFT.log_prob(x), math.log(0.2) + RIGHT.log_prob(x)])
    pyro.factor("likelihood", 1.7 + torch.logsumexp(modes, 0) - prior.log_prob(x))


@pytest.mark.slow
@learning
def test_learns_two_modes_of_unequal_weight(lesson):
    objective, draws = learn(bimodal, (), lesson, 1250)
    estimate = evidence(draws.log_weight)
    assert estimate.log_evidence_se < 0.03
    assert abs(estimate.log_evidence - 1.7) < 5 * estimate.log_evidence_se
    assert objective.history[-1].ess > lesson.ess[1]
    assert objective.history[0].ess < 0.15
    left = draws.z[:, 0] < 0
    assert abs(left[:7200].double().mean() - 0.8) < lesson.share  # the guide's own, without their weights
    weight = torch.softmax(draws.log_weight.double(), 0)
    share = (weight * left).sum()
    error = (weight * (left.double() - 0.8)).square().sum().sqrt()
    assert abs(share - 0.8) < 5 * error
    assert error < 0.02
