# SPDX-License-Identifier: Apache-2.0
"""When training ends and how it goes there, by the rounds and steps of a run."""

import pytest
import torch
from samplers import DATA, make

from pyro_sm import GivenBase, StoppingRule

# The posterior of the hierarchy: weights are good from the start, and no effective sample size rises.
PRECISION = torch.tensor([[3.25, -1, -1, -1], [-1, 2, 0, 0], [-1, 0, 2, 0], [-1, 0, 0, 2]])
COVARIANCE = torch.linalg.inv(PRECISION)
POSTERIOR = GivenBase(COVARIANCE @ torch.cat([torch.zeros(1), DATA]), torch.linalg.cholesky(COVARIANCE))
PER_ROUND = 2


def fitted(**stopping):
    """A sampler whose base is the posterior, with rounds of two tiny steps."""
    return make(
        guide={"base": POSTERIOR, "num_steps": 2},
        objective={"num_particles": 32, "batch_size": 4, "steps_per_round": PER_ROUND},
        stopping=StoppingRule(**stopping),
        learning_rate=1e-4,
    )


@pytest.fixture
def steps(monkeypatch):
    """Learning rate and norm of all gradients of every optimiser step."""
    taken, real = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        taken.append((self.param_groups[0]["lr"], float(torch.linalg.norm(torch.cat(gradients).double()))))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return taken


@pytest.mark.parametrize(("patience", "rounds"), [(3, 6 + 8), (14, 28 + 9)])
def test_a_converged_run_anneals_for_eight_rounds_or_a_third_of_those_it_took(patience, rounds):
    """Converged as soon as there are twice ``patience`` rounds to compare."""
    sampler = fitted(max_evaluations=100_000, patience=patience)
    sampler.run(DATA)
    assert len(sampler.history) == rounds
    assert all(info.gamma == 1 for info in sampler.history)


def test_the_rounds_to_anneal_for_can_be_given():
    sampler = fitted(max_evaluations=100_000, patience=3, anneal_rounds=4)
    sampler.run(DATA)
    assert len(sampler.history) == 6 + 4


def test_the_rate_is_held_for_half_the_budget_and_then_goes_linearly_to_zero(steps):
    sampler = fitted(max_evaluations=12 * 32, patience=100)
    sampler.run(DATA)
    assert len(sampler.history) == 12
    rate = torch.tensor([lr for lr, _ in steps]) / 1e-4
    # Whether to anneal is decided after the first step of a round.
    held = 5 * PER_ROUND + 1
    assert len(rate) == 12 * PER_ROUND
    torch.testing.assert_close(rate[:held], torch.ones(held))
    left = torch.arange(len(rate) - held, 0, -1) / (len(rate) - held + 1)
    torch.testing.assert_close(rate[held:], left, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("norm", "expected"), [(9.5, 9.5), (12.0, 10.0), (1e6, 10.0)])
def test_gradients_are_clipped_to_a_norm_of_ten(steps, norm, expected):
    sampler = fitted(max_evaluations=2 * 32)
    real = sampler.objective.backward

    def backward(loss):
        real(loss)
        gradients = [p.grad for p in sampler.guide.parameters() if p.grad is not None]
        size = torch.linalg.norm(torch.cat([g.flatten() for g in gradients]))
        for gradient in gradients:
            gradient.mul_(norm / size)

    sampler.objective.backward = backward
    sampler.run(DATA)
    assert [found for _, found in steps] == pytest.approx([expected] * len(steps), rel=1e-4)
