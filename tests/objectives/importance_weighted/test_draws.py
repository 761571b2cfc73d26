# SPDX-License-Identifier: Apache-2.0
"""A diffusion guide fitted to draws that already exist."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ExponentialLR

from pyro_sm import AutoDiffusion
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives import DrawsScoreMatching
from pyro_sm.weights import effective_sample_size, evidence

SMALL = MLP(width=32, depth=2)


def model():
    """Two modes at ±3, weights .2 and .8, and a log-normal latent of its own; log Z = 0."""
    x = pyro.sample("x", dist.Normal(torch.zeros(()), 4.0))
    mixture = torch.stack([math.log(0.2) + dist.Normal(-3.0, 1.0).log_prob(x),
                           math.log(0.8) + dist.Normal(3.0, 1.0).log_prob(x)])  # fmt: skip
    pyro.factor("posterior", torch.logsumexp(mixture, 0) - dist.Normal(0.0, 4.0).log_prob(x))
    pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))


def exact(num_draws):
    sign = torch.where(torch.rand(num_draws) < 0.2, -3.0, 3.0)
    return {"x": sign + torch.randn(num_draws), "scale": torch.randn(num_draws).exp()}


def trained(draws, steps, make=DrawsScoreMatching, lr=3e-3, decay=1.0):
    guide = AutoDiffusion(model, architecture=SMALL, num_steps=24)
    loss = make(draws)
    optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": decay})
    svi = SVI(model, guide, optim, loss)
    values = []
    for _ in range(steps):
        values.append(svi.step())
        optim.step()
    loss.refit(guide.bind(model))
    return guide, loss, svi, values


def weighted(guide, num_draws=8000):
    return guide.draw_weighted(guide.bind(model).density, num_draws)


# ---------------------------------------------------------------------------------------- does it learn the draws?


def test_learns_the_draws_and_gets_the_evidence():
    given = exact(4000)
    # With a constant rate the last batches' noise moves the share by as much as 0.04, from seed to seed.
    guide, _, svi, values = trained(given, 400, lr=6e-3, decay=0.99)
    assert values[0] == 0
    draws = weighted(guide)
    found = evidence(draws.log_weight)
    assert abs(found.log_evidence) < 4 * found.log_evidence_se + 1e-3
    assert found.log_evidence_se < 0.02
    raw = guide.diffusion().draw(8000)[0]
    x = raw[:, 0]  # before weighting: what the network itself has learned
    assert abs(float((x < 0).float().mean()) - float((given["x"] < 0).float().mean())) < 0.03
    assert svi.evaluate_loss() < -0.02


def test_weights_of_the_draws_are_used():
    draws = exact(4000)
    flat = torch.where(draws["x"] < 0, 0.8 / 0.2, 0.2 / 0.8)  # turns .2/.8 round
    guide, *_ = trained(draws, 400, partial(DrawsScoreMatching, weight=flat))
    share = float((guide.diffusion().draw(8000)[0][:, 0] < 0).float().mean())
    assert abs(share - 0.8) < 0.04
    guide.release()
    guide, *_ = trained(draws, 400)  # the known wrong variant: weights forgotten
    assert abs(float((guide.diffusion().draw(8000)[0][:, 0] < 0).float().mean()) - 0.8) > 0.4


def test_the_model_corrects_draws_with_wrong_shares():
    """As long as every mode is covered, the weights put right what the draws had wrong."""
    draws = exact(4000)
    even = torch.where(draws["x"] < 0, 0.5 / 0.2, 0.5 / 0.8)
    guide, *_ = trained(draws, 400, partial(DrawsScoreMatching, weight=even))
    found = weighted(guide)
    w = torch.softmax(found.log_weight, 0)
    assert abs(float(w[found.z[:, 0] < 0].sum()) - 0.2) < 0.03
    assert effective_sample_size(found.log_weight) > 0.4


def test_held_out_loss_turns_upwards_when_draws_are_remembered():
    draws = {name: value[:40] for name, value in exact(40).items()}
    guide = AutoDiffusion(model, architecture=MLP(width=64, depth=2), num_steps=24)
    loss = DrawsScoreMatching(draws, held_out=0.25)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss)
    for _ in range(600):
        training = svi.step()
    assert svi.evaluate_loss() > training + 0.1


# ----------------------------------------------------------------------------------------------- Pyro's contract


def test_a_seed_determines_the_run_and_evaluation_leaves_it_alone():
    def run(look):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        draws = exact(200)
        guide = AutoDiffusion(model, architecture=SMALL, num_steps=8)
        svi = SVI(model, guide, Adam({"lr": 1e-3}), DrawsScoreMatching(draws, refit_every=2))
        values = []
        for _ in range(5):
            values.append(svi.step())
            if look:
                state = torch.get_rng_state()
                svi.evaluate_loss()
                torch.set_rng_state(state)
        return values

    assert run(False) == run(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_are_as_good_as_sites_in_either_precision(dtype):
    torch.set_default_dtype(dtype)
    try:
        draws = exact(300)
        latents = torch.stack([draws["x"], draws["scale"].log()], 1)
        values = []
        for given in (draws, latents):
            pyro.clear_param_store()
            torch.manual_seed(1)
            values.append(trained(given, 3)[3])
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_network_weight_gets_a_gradient():
    guide = AutoDiffusion(model, architecture=SMALL, num_steps=8)
    loss = DrawsScoreMatching(exact(100))
    loss.loss_and_grads(model, guide)
    weights = next(p for name, p in guide.named_parameters() if "network_weights" in name)
    assert weights.grad is not None
    assert bool(torch.isfinite(weights.grad).all())
    loss.loss_and_grads(model, guide)
    trace, replayed = loss._get_trace(model, guide, (), {})
    assert {"x", "scale"} <= set(trace.nodes) & set(replayed.nodes)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DrawsScoreMatching({}), "found none"),
        (lambda: DrawsScoreMatching({"x": torch.zeros(1)}), "at least two"),
        (lambda: DrawsScoreMatching({"x": torch.zeros(3), "y": torch.zeros(4)}), "same number of draws"),
        (lambda: DrawsScoreMatching(torch.zeros(3, 2), weight=torch.ones(2)), "weights of shape"),
        (lambda: DrawsScoreMatching(torch.zeros(3, 2), weight=-torch.ones(3)), "non-negative"),
        (lambda: DrawsScoreMatching(torch.zeros(3, 2), weight=torch.zeros(3)), "not all of them zero"),
        (lambda: DrawsScoreMatching(torch.zeros(3, 2), batch_size=0), "positive counts"),
        (lambda: DrawsScoreMatching(torch.zeros(3, 2), held_out=1.0), "held_out"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({"x": torch.zeros(4)}, "scale"),
        ({"x": torch.zeros(4, 2), "scale": torch.ones(4)}, "shape"),
        ({"x": torch.zeros(4), "scale": -torch.ones(4)}, "not finite in unconstrained space"),
        (torch.zeros(4, 3), r"\(N, 2\)"),
    ],
)
def test_draws_that_do_not_fit_the_model(draws, message):
    guide = AutoDiffusion(model, architecture=SMALL, num_steps=8)
    with pytest.raises(ValueError, match=message):
        SVI(model, guide, Adam({"lr": 1e-3}), DrawsScoreMatching(draws)).step()


def test_other_guides_are_named():
    with pytest.raises(TypeError, match="DrawsScoreMatching cannot train AutoNormal"):
        SVI(model, AutoNormal(model), Adam({"lr": 1e-3}), DrawsScoreMatching(exact(10))).step()
