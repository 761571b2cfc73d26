# SPDX-License-Identifier: Apache-2.0
"""Gradients: of values of independent rows; and of a loss, where NaN is refused before an optimiser spreads it."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn


def gradient(value: Tensor, at: Tensor, *, create_graph: bool) -> Tensor:
    """``∇ value_n`` with respect to row n of ``at`` (N, D), for values (N,) of independent rows; zero if constant."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(
        value.sum(), at, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found


def backward(loss: Tensor, *programs: Any) -> None:
    """``loss.backward()``; then look for NaN in the gradients of the store and of ``programs`` that are modules.

    Raises:
        ValueError: the loss (a scalar) is NaN, or is finite and a gradient is NaN. The parameters are as they were,
            and hold no gradient.
    """
    loss.backward()
    if bool(torch.isinf(loss.detach())):
        return
    parameters = list(pyro.get_param_store()._params.values())
    parameters += [p for program in programs if isinstance(program, nn.Module) for p in program.parameters()]
    if not bool(loss.detach().isnan()) and not any(
        p.grad is not None and bool(p.grad.isnan().any()) for p in parameters
    ):
        return
    for p in parameters:
        p.grad = None
    raise ValueError(
        f"the loss is {float(loss.detach()):.4g} and its gradient NaN: a second derivative of a log density, of "
        "the model or of the guide, cannot be computed by autograd. A usual cause is torch.logaddexp, whose second "
        "derivative overflows where its arguments are far apart: write torch.logsumexp(torch.stack([a, b]), 0). "
        "Others: torch.where around an overflow, a norm at zero"
    )
