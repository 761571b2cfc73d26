# SPDX-License-Identifier: Apache-2.0
"""Rounds and the replay buffer: damping, picking in proportion, and forgetting."""

import math

import pytest
import torch

from pyro_sm.base import Draws
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round, damped_round, round_statistics
from pyro_sm.weights import effective_sample_size, pareto_smooth


def draws_of(log_weight):
    log_weight = torch.as_tensor(log_weight, dtype=torch.float64)
    z = torch.arange(2.0 * len(log_weight), dtype=torch.float64).reshape(-1, 2)
    return Draws(z, log_weight - 1, log_weight)


def round_of(weight, offset=0.0):
    weight = torch.tensor(weight, dtype=torch.float64)
    draws = draws_of(weight.log())
    return Round(draws._replace(z=draws.z + offset), weight / weight.sum(), 1.0, len(weight))


# ------------------------------------------------------------------------------------------- one round


def test_good_weights_are_not_damped():
    draws = draws_of([0.0, 0.2, -0.3, 0.1, -math.inf])
    found = damped_round(draws, 3, 0.5)
    assert found.gamma == 1.0
    assert found.num_guide == 3
    assert found.draws is draws
    torch.testing.assert_close(found.weight, torch.softmax(draws.log_weight, 0), rtol=1e-10, atol=0)
    assert found.weight[-1] == 0


def test_bad_weights_are_damped_to_the_trust_region():
    draws = draws_of(4 * torch.randn(200, dtype=torch.float64) - 500)
    found = damped_round(draws, 200, 0.4)
    assert 0 < found.gamma < 1
    expected = torch.softmax(found.gamma * draws.log_weight, 0)
    torch.testing.assert_close(found.weight, expected, rtol=1e-10, atol=0)
    assert float(found.weight.sum()) == pytest.approx(1, rel=1e-10)
    assert float(1 / found.weight.square().sum()) == pytest.approx(80, rel=1e-6)
    assert effective_sample_size(draws.log_weight) < 40


def test_a_round_without_a_finite_density_is_an_error():
    with pytest.raises(ValueError, match="none of 3 draws has a finite density"):
        damped_round(draws_of([-math.inf] * 3), 3, 0.3)


def test_a_round_with_a_weight_that_is_not_a_number_is_an_error():
    with pytest.raises(ValueError, match="1 NaN"):
        damped_round(draws_of([0.0, math.nan, 1.0]), 3, 0.3)


def test_statistics_are_those_of_the_undamped_weights():
    log_w = 2 * torch.randn(500, dtype=torch.float64) + 7
    found = round_statistics(log_w)
    w = log_w.exp()
    assert found.ess == pytest.approx(float(w.sum() ** 2 / w.square().sum()) / 500, rel=1e-10)
    assert found.log_evidence == pytest.approx(float(w.mean().log()), rel=1e-10)
    assert found.log_evidence_se == pytest.approx(float(w.std() / w.mean()) / math.sqrt(500), rel=1e-10)
    assert found.khat == pareto_smooth(log_w).khat


# -------------------------------------------------------------------------------------------- buffer


def test_push_keeps_the_last_and_leaves_the_old_buffer_alone():
    rounds = [round_of([1.0, 2.0], offset) for offset in range(4)]
    buffer = Buffer()
    sizes = []
    for new in rounds:
        before = buffer
        buffer = before.push(new, 3)
        sizes.append((len(before.rounds), len(buffer.rounds)))
    assert sizes == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert [id(r) for r in buffer.rounds] == [id(r) for r in rounds[1:]]
    assert [id(r) for r in buffer.push(rounds[0], 1).rounds] == [id(rounds[0])]


def test_rounds_count_alike_whatever_their_size():
    one, two = round_of([1.0, 3.0]), round_of([2.0, 2.0, 0.0, 4.0], 100.0)
    buffer = Buffer((one, two))
    expected = torch.tensor([0.25, 0.75, 0.25, 0.25, 0.0, 0.5], dtype=torch.float64) / 2
    torch.testing.assert_close(buffer.weights(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(buffer.latents(), torch.cat([one.draws.z, two.draws.z]))
    assert float(buffer.weights()[:2].sum()) == pytest.approx(0.5)


@pytest.mark.parametrize("weight", [[1, 3, 0, 4, 2], [0, 0, 5], [7], [2, 0], [0, 1, 0, 1, 0]])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_pick_is_proportional_by_enumeration(weight, scale):
    """Uniforms on a fine lattice hit each index exactly in proportion to its weight."""
    weight = torch.tensor(weight, dtype=torch.float64)
    cells = 1000 * int(weight.sum())
    uniform = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    index = Buffer().pick(scale * weight, uniform)
    expected = (1000 * weight).long()
    assert torch.equal(torch.bincount(index, minlength=len(weight)), expected)
    # What picks in proportion to the square, or alike, does not.
    for wrong in (weight**2, torch.ones_like(weight)):
        other = torch.bincount(Buffer().pick(wrong, uniform), minlength=len(weight))
        degenerate = len(weight) == 1 or (wrong / wrong.sum() - weight / weight.sum()).abs().max() < 1e-9
        assert degenerate or not torch.equal(other, expected)


@pytest.mark.parametrize("uniform", [0.0, 1.0])
@pytest.mark.parametrize("weight", [[0.0, 0.5, 0.0, 0.5, 0.0, 0.0], [0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]])
def test_weight_zero_is_never_picked(weight, uniform):
    """Also not at the ends: a stratified float32 uniform can round to one."""
    weight = torch.tensor(weight)
    index = Buffer().pick(weight, torch.tensor([uniform]))
    assert float(weight[index]) > 0


def test_stratified_float32_picks_can_round_to_one():
    """What makes the end above worth a test."""
    assert (torch.tensor(255.0) + torch.tensor(1 - 2**-24)) / 256 == 1
