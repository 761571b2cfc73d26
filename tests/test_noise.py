# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: closed forms, finite differences, and the two schedules as one."""

import math

import pytest
import torch

from pyro_sm.noise import VE, VP, drift_and_diffusion, ratio, ratio_levels

# torch's own: the first forward-mode derivative of a process scripts a module.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

LOW, HIGH = 0.003, 20.0
SLOPE = math.log(HIGH / LOW)
T = torch.linspace(0, 1, 23, dtype=torch.float64)
SCHEDULES = [VE(LOW, HIGH), VP(LOW, HIGH)]
exact = {"rtol": 1e-10, "atol": 0.0}


@pytest.mark.parametrize("noise", SCHEDULES, ids=["VE", "VP"])
def test_ratios_are_geometric_between_the_two_ends(noise):
    expected = LOW * torch.exp(SLOPE * T)
    torch.testing.assert_close(ratio(noise, T), expected, **exact)
    ends = ratio(noise, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([LOW, HIGH], dtype=torch.float64), **exact)


def test_ve_keeps_the_signal_and_vp_the_variance():
    alpha, sigma = VE(LOW, HIGH)(T)
    assert torch.equal(alpha, torch.ones_like(T))
    assert float(sigma.max()) > 1
    alpha, sigma = VP(LOW, HIGH)(T)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(T), **exact)


def test_drift_and_diffusion_in_closed_form():
    r = LOW * torch.exp(SLOPE * T)
    f, square = drift_and_diffusion(VE(LOW, HIGH), T)
    assert torch.equal(f, torch.zeros_like(T))
    torch.testing.assert_close(square, 2 * SLOPE * r**2, **exact)
    # α² + σ² = 1 makes g² = −2f.
    f, square = drift_and_diffusion(VP(LOW, HIGH), T)
    torch.testing.assert_close(f, -SLOPE * r**2 / (1 + r**2), **exact)
    torch.testing.assert_close(square, 2 * SLOPE * r**2 / (1 + r**2), **exact)


def five_point(function, t, h=1e-3):
    return (function(t - 2 * h) - 8 * function(t - h) + 8 * function(t + h) - function(t + 2 * h)) / (12 * h)


@pytest.mark.parametrize("noise", SCHEDULES, ids=["VE", "VP"])
def test_drift_and_diffusion_against_finite_differences(noise):
    f, square = drift_and_diffusion(noise, T)
    expected = five_point(lambda t: noise(t)[0].log(), T)
    torch.testing.assert_close(f, expected, rtol=1e-7, atol=1e-7)
    growth = five_point(lambda t: noise(t)[1] ** 2, T)
    expected = growth - 2 * expected * noise(T)[1] ** 2
    torch.testing.assert_close(square, expected, rtol=1e-7, atol=1e-7)
    # g in the place of g² would be seen.
    assert float((square.sqrt() - expected).abs().max()) > 0.1


@pytest.mark.parametrize("noise", SCHEDULES, ids=["VE", "VP"])
def test_the_sde_transports_the_variance(noise):
    """``d Var/dt = 2 f Var + g²`` for ``Var = α² s² + σ²``, the law that the coefficients are for."""
    s2 = 2.3
    f, square = drift_and_diffusion(noise, T)

    def variance(t):
        alpha, sigma = noise(t)
        return alpha**2 * s2 + sigma**2

    torch.testing.assert_close(2 * f * variance(T) + square, five_point(variance, T), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_of_both_schedules_agree(dtype):
    levels = {type(n): ratio_levels(n, 9, dtype=dtype, device=torch.device("cpu")) for n in SCHEDULES}
    for found in levels.values():
        assert found.dtype == dtype
        assert found.shape == (10,)
        assert found[0] == 0
        assert bool((found.diff() > 0).all())
    torch.testing.assert_close(levels[VE], levels[VP], rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
    expected = LOW * (HIGH / LOW) ** (torch.arange(9, dtype=dtype) / 8)
    torch.testing.assert_close(levels[VE][1:], expected)


@pytest.mark.parametrize("schedule", [VE, VP])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 2.0), (3.0, 1.0), (math.nan, 1.0)])
def test_bad_ranges_are_refused(schedule, low, high):
    with pytest.raises(ValueError, match=r"0 < ratio_min < ratio_max, found .* and "):
        schedule(low, high)


@pytest.mark.parametrize("num_steps", [1, 0, -3])
def test_too_few_levels_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"at least 2 steps, found {num_steps}"):
        ratio_levels(VE(), num_steps, dtype=torch.float32, device=torch.device("cpu"))
