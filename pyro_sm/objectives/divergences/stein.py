# SPDX-License-Identifier: Apache-2.0
r"""Kernel Stein discrepancy as a Pyro objective, for guides with reparametrised draws.

``KSD²(q‖p) = E h(z, z')`` over independent draws of the guide (``pyro_sm/stein.py`` has the Stein kernel ``h``),
estimated by the U-statistic (unbiased) or the V-statistic of N draws. Only path gradients of the guide are needed,
not its density: they run through the draws and, by second derivatives of ``log p̃``, through their scores. ``log Z``
drops out. With a diffusion matrix ``m(z)`` it is the diffusion Stein discrepancy, of the operator ``p⁻¹∇·(p m f)``;
with a flow ``y = T(z)`` that of ``m = (∂T/∂z)⁻¹`` with the kernel in y: KSD measured in y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives.diffusion_matrices import Matrix, constant_matrix
from pyro_sm.objectives.divergences.guide_paths import Path
from pyro_sm.objectives.divergences.path_objective import PathObjective
from pyro_sm.stein import IMQ, RadialKernel, stein_statistics, through_flow, through_matrix

Flow = Callable[[Tensor], Tensor]
"""A transform of latents (N, D) to (N, D), each row on its own."""


def stein_discrepancy(
    log_prob: Callable[[Tensor], Tensor],
    z: Tensor,
    kernel: RadialKernel,
    *,
    unbiased: bool = True,
    weight: Tensor | None = None,
    flow: Flow | None = None,
    matrix: Matrix | None = None,
) -> Tensor:
    """``KSD²`` of draws ``z`` (N, D) that carry a path gradient, a scalar; ``log_prob``: (N, D) -> (N,), nats.

    Differentiable in whatever made ``z``. The length scale, if left open, is that of the draws, without gradient.
    ``weight``: (N,), summing to one; by default ``1/N``. ``flow``: from z to where the distance is measured.
    ``matrix``: the diffusion matrix ``m``, (N, D) to (N, D, D). At most one of the two.
    """
    with torch.enable_grad():
        leaf = z if z.requires_grad else z.detach().requires_grad_(True)
        (score,) = torch.autograd.grad(log_prob(leaf).sum(), leaf, create_graph=True)
        points, matrices = leaf, None
        if matrix is not None:
            score, matrices = through_matrix(matrix, leaf, score, create_graph=True)
        if flow is not None:
            points, score = through_flow(flow, leaf, score, create_graph=True)
        found = stein_statistics(points, score, kernel, weight=weight, matrix=matrices, chunk_size=len(leaf))
    return found.u if unbiased else found.v


class SteinDiscrepancy(PathObjective):
    r"""``KSD²(guide ‖ model)`` in unconstrained space: needs draws of the guide, not its density.

    Used like ``Trace_ELBO``, with every guide that ``FisherDivergence`` takes. The value is zero on average at a
    perfect fit; it does not bound the evidence, and hardly sees the relative weight of separated modes.

    Args:
        kernel: ``IMQ()`` (default) or ``RBF()``. Without a length scale, each batch takes the median distance of its
            own draws: robust far from the target, but the loss of different steps is then on different scales.
        num_draws: N ≥ 2, draws per step, 64 by default; the cost is N scores and N² kernel values.
        unbiased: the U-statistic (default; may be negative) or the V-statistic. Of a guide with stratified draws both
            are slightly biased.
        flow: a transform of the unconstrained latents, (N, D) to (N, D), twice differentiable: the diffusion Stein
            discrepancy with the inverse of its Jacobian; ``ContinuousFlow`` for one along an ODE. It is not trained.
        matrix: instead of a flow, the diffusion matrix ``m``: a matrix (D, D), a function from latents (N, D) to
            (N, D, D), each row on its own and twice differentiable, or a ``RiemannianMetric``. The kernel stays that
            of the latents. It is not trained.
        num_particles: Pyro's word for ``num_draws``.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Raises:
        TypeError: a site of the guide is not reparametrised (at the first call).
        ValueError: fewer than two draws, both a flow and a matrix, or a matrix of the wrong shape; at the first
            call, if a plate is subsampled, guide and model have different latents, or the model cannot be
            differentiated twice.
        ModelRefusedError: the model cannot be evaluated in batches (at the first call).

    Sources: "A Kernelized Stein Discrepancy for Goodness-of-fit Tests" https://arxiv.org/abs/1602.03253 ;
    "Minimum Stein Discrepancy Estimators" https://arxiv.org/abs/1906.08283 ;
    "Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 .
    """

    def __init__(
        self,
        kernel: RadialKernel | None = None,
        num_draws: int | None = None,
        *,
        unbiased: bool = True,
        flow: Flow | None = None,
        matrix: Tensor | Matrix | None = None,
        num_particles: int | None = None,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(num_draws, num_particles, default=64, least=2, max_plate_nesting=max_plate_nesting)
        self.kernel = kernel or IMQ()
        self.unbiased = unbiased
        if flow is not None and matrix is not None:
            raise ValueError("expected a flow or a diffusion matrix, found both")
        if isinstance(matrix, Tensor) and (matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]):
            raise ValueError(f"expected a matrix (D, D), found {tuple(matrix.shape)}")
        self.flow = flow
        self.matrix = constant_matrix(matrix) if isinstance(matrix, Tensor) else matrix

    def _divergence(self, path: Path, density: ModelDensity, guide: Any, *, commit: bool) -> Tensor:
        noise = torch.randn(self.num_draws, path.noise_dim, dtype=density.dtype, device=density.device)
        draws = path.draw(noise)
        return stein_discrepancy(
            density.log_prob,
            draws.z,
            self.kernel,
            unbiased=self.unbiased,
            weight=draws.weight,
            flow=self.flow,
            matrix=self.matrix,
        )
