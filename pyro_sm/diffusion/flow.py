# SPDX-License-Identifier: Apache-2.0
r"""The probability-flow ODE: the same marginals as the reverse SDE, without noise, and so with a log density.

With ``y = u + r ε`` the flow is ``dy/dr = (y − D(y, r))/r``. In ``x = y/√(1+r²)`` and ``s = log r`` it becomes

    ``dx/ds = −(r/(1+r²)) F(x, ¼ s)``,   ``d log|det|/ds = −(r/(1+r²)) tr ∂F/∂x``

with the denoiser's own network ``F``: an untrained network (F = 0) moves nothing, so the flow starts as the
Gaussian base exactly. Integration runs between ``s_K = log r_K``, where ``x`` is ``N(m_T, diag s_T²)/√(1+r_K²)``, and
``s_1 = log r_1``, where ``x`` is read as the clean point (an error of order ``r_1²`` in whitened units).

``log q(u) = log N(x_K; …) + ∫_{s_1}^{s_K} (d log|det|/ds) ds`` along the trajectory that starts in ``u``.

Source: "Score-Based Generative Modeling through Stochastic Differential Equations"
https://arxiv.org/abs/2011.13456 ; "FFJORD" https://arxiv.org/abs/1810.01367 .
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchdiffeq import odeint

from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.kernels import Kernels
from pyro_sm.divergence import Divergence, Exact, Hutchinson
from pyro_sm.gaussians.gaussian import gaussian_log_prob


@dataclass(frozen=True)
class FlowSolver:
    """How the ODE is solved.

    Args:
        rtol: relative tolerance of the adaptive Dormand–Prince solver.
        atol: absolute tolerance, in whitened units and nats.
        divergence: how the trace is found; None is exact up to 32 dimensions, Hutchinson with 4 probes beyond.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    divergence: Divergence | None = None

    def divergence_for(self, dim: int) -> Divergence:
        """The divergence in use for this dimension."""
        return self.divergence or (Exact() if dim <= 32 else Hutchinson(4))


@dataclass(frozen=True)
class ProbabilityFlow:
    """The flow of a denoiser between its first and last noise level, as a bijection of whitened space.

    Args:
        denoiser: the denoiser.
        kernels: for the levels and the law at the last of them.
        solver: tolerances and divergence.
    """

    denoiser: Denoiser
    kernels: Kernels
    solver: FlowSolver = field(default_factory=FlowSolver)

    def base(self) -> tuple[Tensor, Tensor]:
        """Location (D,) and scale (D,) of the law of ``x_K``."""
        norm = torch.sqrt(1 + self.kernels.ratios[-1].square())
        return self.kernels.start_loc / norm, self.kernels.start_scale / norm

    def _integrate(self, x: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """End point (B, D) and ``∫ tr`` (B,) of the trajectories from ``x`` at ``s = start``."""
        divergence = self.solver.divergence_for(x.shape[-1])
        probes = divergence.probes(x)

        def velocity(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            r = torch.exp(s)
            log_ratio = s.reshape(1)
            value, trace = divergence(lambda at: self.denoiser.field(at, log_ratio)[0], state[0], probes)
            speed = -r / (1 + r * r)
            return speed * value, speed * trace

        zero = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        times = torch.stack([start, end])
        points, logs = odeint(
            velocity, (x, zero), times, rtol=self.solver.rtol, atol=self.solver.atol, method="dopri5"
        )
        return points[-1], logs[-1]

    def _ends(self) -> tuple[Tensor, Tensor]:
        return self.kernels.ratios[1].log(), self.kernels.ratios[-1].log()

    def to_noise(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``x_K`` (B, D) and ``log|det ∂x_K/∂u|`` (B,) for clean points ``u`` (B, D)."""
        first, last = self._ends()
        return self._integrate(u, first, last)

    def from_noise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` (B, D) and ``log|det ∂u/∂x_K|`` (B,) for ``x_K`` (B, D)."""
        first, last = self._ends()
        return self._integrate(x, last, first)

    def log_prob(self, u: Tensor) -> Tensor:
        """``log q(u)`` (B,) in nats for clean points ``u`` (B, D) in whitened space."""
        x, log_det = self.to_noise(u)
        loc, scale = self.base()
        return gaussian_log_prob(x, loc, torch.diag(scale)) + log_det
