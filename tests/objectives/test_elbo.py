# SPDX-License-Identifier: Apache-2.0
"""What all objectives share: ELBO's four methods stand once, and one number has two words."""

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD

from pyro_sm import objectives
from pyro_sm.base import Arguments
from pyro_sm.objectives import (
    BridgeDensityEstimation,
    DenoisingScoreMatching,
    DiffusionScoreMatching,
    DrawsScoreMatching,
    FisherDivergence,
    ImplicitScoreMatching,
    ImportanceWeightedScoreMatching,
    MixtureFisherDivergence,
    SteinDiscrepancy,
    gaussian_bridge,
)
from pyro_sm.objectives.elbo import ScoreObjective

COUNTED = {
    "FisherDivergence": (FisherDivergence, 32),
    "MixtureFisherDivergence": (MixtureFisherDivergence, 64),
    "SteinDiscrepancy": (SteinDiscrepancy, 64),
    "ImplicitScoreMatching": (ImplicitScoreMatching, 1),
    "DenoisingScoreMatching": (lambda **given: DenoisingScoreMatching(0.1, **given), 1),
    "DiffusionScoreMatching": (lambda **given: DiffusionScoreMatching(torch.eye(2), **given), 1),
    "ImportanceWeightedScoreMatching": (ImportanceWeightedScoreMatching, 2048),
}
every_objective = pytest.mark.parametrize(("make", "default"), COUNTED.values(), ids=COUNTED)


@every_objective
def test_the_number_of_draws_has_two_words(make, default):
    counts = [(o.num_draws, o.num_particles) for o in (make(), make(num_draws=7), make(num_particles=7))]
    assert counts == [(default, default), (7, 7), (7, 7)]
    assert make(num_draws=7, num_particles=7).num_draws == 7


@every_objective
def test_two_words_for_two_numbers_are_refused(make, default):
    with pytest.raises(ValueError, match="two words for one number, found 8 and 9"):
        make(num_draws=8, num_particles=9)


@every_objective
@pytest.mark.parametrize("word", ["num_draws", "num_particles"])
def test_too_few_draws_are_refused_in_the_word_they_were_given_in(make, default, word):
    with pytest.raises(ValueError, match=rf"expected {word} >= \d, found 0"):
        make(**{word: 0})


def test_objectives_that_take_their_count_from_elsewhere():
    data = torch.randn(20, 2)
    bridge = BridgeDensityEstimation(gaussian_bridge(data), loss=ImplicitScoreMatching(num_draws=3))
    assert (bridge.num_draws, DrawsScoreMatching(data, batch_size=5).num_draws) == (3, 5)


def test_the_methods_of_the_elbo_stand_once():
    """Else they drift apart: which of them counts as a step, and which looks for NaN."""
    found = [value for value in vars(objectives).values() if inspect.isclass(value) and issubclass(value, ELBO)]
    assert len(found) > 8
    for objective in found:
        assert issubclass(objective, ScoreObjective)
        for name in ("loss", "differentiable_loss", "_get_trace"):
            assert getattr(objective, name) is getattr(ScoreObjective, name), objective


class Recording(ScoreObjective):
    """The square of a parameter, times what it was called with."""

    def __init__(self):
        super().__init__(None, None, default=1)
        self.calls = []

    def _loss(self, model, guide, arguments, *, commit):
        assert isinstance(arguments, Arguments)
        self.calls.append((commit, torch.is_grad_enabled(), arguments.args, arguments.kwargs))
        return pyro.param("x", torch.tensor(3.0)).square() * arguments.args[0] + arguments.kwargs["shift"]


def model(factor, shift):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def test_what_counts_as_a_training_step():
    loss = Recording()
    assert loss.loss(model, model, 2.0, shift=1.0) == 19.0
    live = loss.differentiable_loss(model, model, 2.0, shift=1.0)
    with torch.no_grad():
        dead = loss.differentiable_loss(model, model, 2.0, shift=1.0)
    assert (live.requires_grad, dead.requires_grad) == (True, False)
    assert loss.loss_and_grads(model, model, 2.0, shift=1.0) == 19.0
    assert float(pyro.get_param_store()._params["x"].grad) == 12.0
    assert [commit for commit, _, _, _ in loss.calls] == [False, True, False, True]
    assert [enabled for _, enabled, _, _ in loss.calls] == [False, True, False, True]
    assert {(args, *kwargs.items()) for _, _, args, kwargs in loss.calls} == {((2.0,), ("shift", 1.0))}


def test_svi_trains_with_it():
    svi = SVI(model, lambda factor, shift: pyro.param("x", torch.tensor(3.0)), SGD({"lr": 0.1}), Recording())
    losses = [svi.step(1.0, shift=0.0) for _ in range(3)]
    assert losses == pytest.approx([9.0, 9.0 * 0.64, 9.0 * 0.64**2])
    assert svi.evaluate_loss(1.0, shift=0.0) == pytest.approx(9.0 * 0.64**3)


def test_a_trace_of_guide_and_model_can_be_had():
    guide = AutoNormal(model)
    replayed, trace = FisherDivergence()._get_trace(model, guide, (1.0,), {"shift": 0.0})
    assert replayed.nodes["z"]["value"] is trace.nodes["z"]["value"]
    assert math.isfinite(float(replayed.log_prob_sum().detach()))
