# SPDX-License-Identifier: Apache-2.0
"""Noise ranges: geometric levels between the two ends."""

import math

import pytest
import torch

from pyro_sm.diffusion.noise_range import NoiseRange

LOW, HIGH = 0.003, 20.0
exact = {"rtol": 1e-10, "atol": 0.0}


def test_levels_are_geometric_between_the_two_ends():
    found = NoiseRange(LOW, HIGH).levels(23, dtype=torch.float64, device=torch.device("cpu"))
    t = torch.linspace(0, 1, 23, dtype=torch.float64)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], LOW * torch.exp(math.log(HIGH / LOW) * t), **exact)
    torch.testing.assert_close(found[[1, -1]], torch.tensor([LOW, HIGH], dtype=torch.float64), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_have_the_dtype_that_was_asked_for(dtype):
    assert NoiseRange().levels(4, dtype=dtype, device=torch.device("cpu")).dtype == dtype


def test_fewer_than_two_steps_are_refused():
    with pytest.raises(ValueError, match="at least 2 steps, found 1"):
        NoiseRange().levels(1, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_ranges_that_are_none_are_refused(low, high):
    with pytest.raises(ValueError, match="expected 0 < min < max, found min="):
        NoiseRange(low, high)
