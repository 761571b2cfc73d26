# SPDX-License-Identifier: Apache-2.0
r"""A flow learned from data by maximum likelihood, in whose space score matching looks at the tails too.

Score matching weighs every place by how steep the density is there: under heavy tails it learns from the middle
alone. Behind a flow ``y = T(x)`` that makes the data about normal, all of the data count
(:class:`~pyro_sm.DiffusionScoreMatching`, ``m = J⁻¹``). The flow is fitted *first*, by

    ``max_T Σ_n log N(T(x_n); 0, I) + log |det J(x_n)|``,

and then held. It must not be trained by a score-matching loss itself: ``½ E‖mᵀ(s − s_p)‖²`` goes to zero as
``m = J⁻¹`` does, for any model.

Source: "Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 .
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints


class AsinhFlow(TransformModule):
    """``y_d = c_d asinh((x_d − a_d)/b_d) + e_d``: power-law tails become exponential ones. Elementwise, invertible.

    Args:
        dim: D.

    Raises:
        ValueError: ``dim`` < 1.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"expected dim >= 1, found {dim}")
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.log_slope = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def _call(self, x: Tensor) -> Tensor:
        return self.log_slope.exp() * torch.asinh((x - self.loc) / self.log_scale.exp()) + self.shift

    def _inverse(self, y: Tensor) -> Tensor:
        return self.loc + self.log_scale.exp() * torch.sinh((y - self.shift) / self.log_slope.exp())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``Σ_d log c_d − log b_d − ½ log(1 + ((x_d − a_d)/b_d)²)`` (...); ``x``, ``y``: (..., D)."""
        u = (x - self.loc) / self.log_scale.exp()
        return (self.log_slope - self.log_scale - 0.5 * torch.log1p(u.square())).sum(-1)


def fit_flow(flow: Any, data: Tensor, *, num_steps: int = 500, learning_rate: float = 0.02) -> Tensor:
    """Fit ``flow`` to ``data`` by maximum likelihood under a standard normal, and hold it there.

    Afterwards its parameters do not require grad, so that no later loss trains them. Full-batch Adam; data far from
    the origin, or on another scale, are better standardised first.

    Args:
        flow: takes the *data* to y, (N, D) to (N, D): :class:`AsinhFlow`, or any ``TransformModule`` of Pyro (a
            spline, a coupling flow); moved to the dtype of the data.
        data: (N, D).
        num_steps: of Adam.
        learning_rate: of Adam.

    Returns:
        The mean negative log likelihood of every step, (num_steps,), nats.

    Raises:
        TypeError: the flow has no parameters to fit.
        ValueError: the data are not (N, D) or not finite, ``num_steps`` < 1, or the likelihood is not finite.
    """
    if not isinstance(flow, nn.Module) or not list(flow.parameters()):
        raise TypeError(f"expected a transform with parameters (a TransformModule), found {type(flow).__name__}")
    if data.ndim != 2 or num_steps < 1:
        raise ValueError(
            f"expected data of shape (N, D) and num_steps >= 1, found {tuple(data.shape)} and {num_steps}"
        )
    if not bool(torch.isfinite(data).all()):
        raise ValueError(
            f"expected finite data, found {int((~torch.isfinite(data)).sum())} entries that are not finite"
        )
    flow.to(data)
    for parameter in flow.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(flow.parameters(), lr=learning_rate)
    losses = []
    with torch.enable_grad():
        for _ in range(num_steps):
            loss = -_log_likelihood(flow, data).mean()
            if not bool(torch.isfinite(loss)):
                raise ValueError("the likelihood of the data under the flow is not finite: standardise the data")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return torch.stack(losses)


def _log_likelihood(flow: Any, x: Tensor) -> Tensor:
    """``log N(T(x); 0, I) + log|det J|`` (N,), nats."""
    x = x.clone()  # a transform that caches would hand out the graph of the step before for the very same tensor
    y = flow(x)
    log_det = flow.log_abs_det_jacobian(x, y)
    if log_det.ndim == 2:  # an elementwise transform
        log_det = log_det.sum(-1)
    return -0.5 * (y.square() + math.log(2 * math.pi)).sum(-1) + log_det
