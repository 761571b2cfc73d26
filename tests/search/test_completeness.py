# SPDX-License-Identifier: Apache-2.0
"""Good-Turing against what is missed in truth, the rule of three, and what is said of it."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_sm.search.completeness import Completeness


def test_the_estimate_is_right_on_average():
    """Places with chances that fall geometrically: the share of unseen ones is known for every sample."""
    share = torch.softmax(-0.3 * torch.arange(40, dtype=torch.float64), 0)
    off = []
    for _ in range(400):
        count = torch.bincount(torch.multinomial(share, 60, replacement=True), minlength=40)
        found = Completeness(60, count[count > 0].tolist())
        off.append(found.num_alone / 60 - float(share[count == 0].sum()))
    off = torch.tensor(off)
    assert abs(float(off.mean())) < 5 * float(off.std()) / math.sqrt(len(off)) + 0.002  # n₁/N is biased by O(1/N²)
    # The share of places that were reached, taken for that of starts, is seen to be wrong.
    assert float(share[30:].sum()) < 0.001


def test_rule_of_three():
    found = Completeness(64, [64])
    assert found.unseen == pytest.approx(3 / 64)
    assert (1 - found.unseen) ** 64 == pytest.approx(0.05, abs=0.005)
    assert found.is_complete
    assert str(found) == "64 of 64 ascents ended at one place: fewer than 4.7% of starts lead elsewhere"


def test_many_places_reached_once_are_not_complete():
    found = Completeness(1000, [990, *[1] * 7, 2])
    assert found.unseen == pytest.approx(7 / 999)
    assert found.missed_places == pytest.approx(7 * 6 / 4)
    assert not found.is_complete
    assert "7 of them reached once" in str(found)
    assert "to 10 or more places" in str(found)


def test_words_of_the_other_cases():
    assert str(Completeness(9, [])) == "none of 9 ascents ended at a mode"
    assert Completeness(9, []).unseen == 1
    assert not Completeness(9, []).is_complete
    assert "and there are more" in str(Completeness(99, [9] * 11, truncated=True))
    assert "in 3 stages" in str(Completeness(99, [50, 49], 3))
    assert Completeness(99, [50, 49], 3).is_complete
    with pytest.raises(ValueError, match="expected every place to be reached"):
        Completeness(3, [3, 0])
