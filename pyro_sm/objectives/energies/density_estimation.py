# SPDX-License-Identifier: Apache-2.0
r"""Fitting an unnormalised Pyro model to data by score matching; no normaliser is ever computed.

The model is an energy of the data (see ``model/energy.py``): its one latent site is the data vector ``x`` (D,), its
factors are ``log p̃(x; θ)``. The first argument of ``svi.step`` is the data, (N, D), or a mini-batch of them, as a
tensor or as a ``DataLoader`` over a ``TensorDataset`` yields it; further arguments go to the model:

    def energy():
        precision = pyro.param("precision", torch.eye(2), constraint=constraints.positive_definite)
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("f", -0.5 * (x * (x @ precision)).sum(-1))

    svi = SVI(energy, no_guide, Adam({"lr": 0.01}), loss=ImplicitScoreMatching())
    for batch in batches:
        svi.step(batch)

A guide has nothing to do, since all latents are given: pass :func:`no_guide`; it is never called. All losses have
the factor ½ and are on one scale: the number returned estimates ``J_ISM`` on the data (implicit), ``J_ISM^σ`` on
the noised data (denoising: ``J_DSM`` less its constant ``D/(2σ²)``), so curves can be laid over each other;
adding ``½ I(p)`` gives the explicit loss, which is zero at the truth. Formulas: ``score_estimation.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_sm.divergence import Divergence, Exact
from pyro_sm.objectives.diffusion_matrices import Matrix, constant_matrix, flow_matrix
from pyro_sm.objectives.energies.energy_objective import EnergyObjective
from pyro_sm.objectives.energies.score_estimation import (
    denoising_centred,
    denoising_controlled,
    diffusion_implicit,
    implicit,
    live_score,
    score_and_forms,
    weighted_score_and_forms,
)


class ImplicitScoreMatching(EnergyObjective):
    r"""``E[½‖∇log p̃‖² + tr ∇²log p̃]`` over the data: Hyvärinen's score matching for an unnormalised Pyro model.

    Used as ``SVI(energy, no_guide, optim, loss=ImplicitScoreMatching())``, ``svi.step(data)`` with data (N, D); see
    the head of this file. The value estimates ``J_ISM = J_ESM − ½ I(p)``, in nats per squared unit of x. It cannot
    see the relative weight of separated modes: see :class:`~pyro_sm.BridgeDensityEstimation`.

    Args:
        divergence: ``Exact()`` (default; D second derivatives), ``Hutchinson(n)`` or ``Sliced(n)``: the trace.
        num_draws: probe draws per row, on top of the divergence's own; 1 by default.
        num_particles: Pyro's word for ``num_draws``.

    Raises:
        ModelRefusedError: other latents than one vector, no parameters, or ReLU-like second derivatives.
        TypeError: the first argument of the step is no floating-point tensor.
        ValueError: the data are not (N, D).

    Source: "Estimation of Non-Normalized Statistical Models by Score Matching"
    https://jmlr.org/papers/v6/hyvarinen05a.html .
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        *,
        num_draws: int | None = None,
        num_particles: int | None = None,
    ) -> None:
        super().__init__(num_draws, num_particles)
        self.divergence = divergence or Exact()

    def row_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``½‖s‖² + tr ∇s`` (B,) of rows ``x`` (B, D), the trace by the divergence."""
        probes = self.divergence.probes(x)
        score, forms = score_and_forms(log_prob, x, probes, create_graph=torch.is_grad_enabled())
        return implicit(score, self.divergence.combine(forms))


class DenoisingScoreMatching(EnergyObjective):
    r"""``½ E‖∇log p̃(x + σε) + ε/σ‖²`` less its constant: first derivatives only; learns ``p_σ``, the noised data.

    The value estimates ``J_DSM − D/(2σ²) = J_ISM^σ``, so that it can be laid over
    :class:`ImplicitScoreMatching`; :meth:`constant` is what was left out.

    Args:
        sigma: σ > 0, in units of the data. The model fits the data blurred by it.
        control_variate: subtract ``s(x)·ε/σ``, of mean zero, at the price of a second score per row. Without it
            the spread of the loss grows as 1/σ.
        num_draws: noise draws per row, 1 by default.
        num_particles: Pyro's word for ``num_draws``.

    Raises:
        ValueError: σ is not positive; the data are not (N, D).
        ModelRefusedError: other latents than one vector, or no parameters.

    Source: "A Connection Between Score Matching and Denoising Autoencoders" https://doi.org/10.1162/NECO_a_00142 .
    """

    needs_curvature = False

    def __init__(
        self,
        sigma: float,
        control_variate: bool = True,
        *,
        num_draws: int | None = None,
        num_particles: int | None = None,
    ) -> None:
        if not sigma > 0:
            raise ValueError(f"expected sigma > 0, found {sigma}")
        super().__init__(num_draws, num_particles)
        self.sigma = sigma
        self.control_variate = control_variate

    def row_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``½‖s(y)‖² + s(y)·ε/σ`` (B,) of rows ``x`` (B, D) noised once; less its control variate, if asked for."""
        noise = torch.randn_like(x)
        noised = x + self.sigma * noise
        if not self.control_variate:
            return denoising_centred(live_score(log_prob, noised.requires_grad_(True)), noise, self.sigma)
        both = live_score(log_prob, torch.cat([noised, x]).requires_grad_(True))
        score, clean = both.split(len(x))
        return denoising_controlled(score, clean, noise, self.sigma)


class DiffusionScoreMatching(EnergyObjective):
    r"""``E[½‖mᵀ∇log p̃‖² + ∇·(m mᵀ ∇log p̃)]``: score matching weighted by a diffusion matrix ``m(x)``, or by a flow.

    With a flow ``y = T(x)``, ``m = (∂T/∂x)⁻¹``, this is implicit score matching in y-space up to a constant: the cure
    for heavy tails, where the plain loss only looks at the middle. (Half of the source's form, so that ``m = I`` is
    :class:`ImplicitScoreMatching`.)

    Args:
        matrix: ``m``: a matrix (D, D), a function (B, D) -> (B, D, D) acting on each row by itself, a
            ``RiemannianMetric``, or a transform that takes the *data* to y: a ``ContinuousFlow``, a flow from
            ``fit_flow``, or, for a normalising flow from base to data, its ``.inv``. It is not trained by this loss,
            whose infimum over flows is a degenerate one.
        divergence: as in :class:`ImplicitScoreMatching`.
        num_draws: as in :class:`ImplicitScoreMatching`.
        num_particles: Pyro's word for ``num_draws``.

    Raises:
        TypeError: ``matrix`` is none of these.
        ModelRefusedError: as :class:`ImplicitScoreMatching`.
        ValueError: the data are not (N, D), or the matrix not (B, D, D).

    Source: "Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 .
    """

    def __init__(
        self,
        matrix: Tensor | Matrix | Transform,
        divergence: Divergence | None = None,
        *,
        num_draws: int | None = None,
        num_particles: int | None = None,
    ) -> None:
        super().__init__(num_draws, num_particles)
        if isinstance(matrix, Transform):
            self.matrix = flow_matrix(matrix)
        elif isinstance(matrix, Tensor):
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"expected a matrix (D, D), found {tuple(matrix.shape)}")
            self.matrix = constant_matrix(matrix)
        elif callable(matrix):
            self.matrix = matrix
        else:
            raise TypeError(f"expected a matrix, a function or a transform, found {type(matrix).__name__}")
        self.divergence = divergence or Exact()

    def row_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``½‖mᵀs‖² + ∇·(m mᵀ s)`` (B,) of rows ``x`` (B, D)."""
        expected, found = (1, x.shape[1], x.shape[1]), tuple(self.matrix(x[:1]).shape)
        if found != expected:
            raise ValueError(f"expected a diffusion matrix of shape {expected} for one row, found {found}")
        probes = self.divergence.probes(x)
        weighted = weighted_score_and_forms(log_prob, self.matrix, x, probes, create_graph=torch.is_grad_enabled())
        return diffusion_implicit(weighted.score, self.divergence.combine(weighted.forms))

    def known_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor, known: Tensor) -> Tensor:
        """``½‖mᵀs‖² − mᵀs·mᵀ∇log m``; see :class:`EnergyObjective`."""
        leaf = x.detach().requires_grad_(True)
        score, m = live_score(log_prob, leaf), self.matrix(leaf).mT
        own, other = (torch.einsum("bij,bj->bi", m, v) for v in (score, known))
        return 0.5 * own.square().sum(-1) - (own * other).sum(-1)
