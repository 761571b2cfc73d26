# SPDX-License-Identifier: Apache-2.0
"""The state of torch's generators, taken and given back: a training has its own, the global one is left untouched."""

from __future__ import annotations

import torch
from torch import Tensor


def devices() -> list[int]:
    """The CUDA devices, whose generators are part of the state."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def rng_state() -> list[Tensor]:
    """The state of the generators in use, the CPU's first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices())]


def set_rng_state(states: list[Tensor]) -> None:
    """Put the generators into these states; those of devices that are not here are left out."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices(), states[1:], strict=False):
        torch.cuda.set_rng_state(state, device)
