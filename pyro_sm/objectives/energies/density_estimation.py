# SPDX-License-Identifier: Apache-2.0
r"""Fitting an unnormalised Pyro model to data by score matching; no normaliser is ever computed.

The model is an energy of the data (see ``model_energy.py``): its one latent site is the data vector ``x`` (D,), its
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
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_sm.base import ModelRefusedError
from pyro_sm.divergence import Divergence, Exact
from pyro_sm.model.energy import ModelEnergy
from pyro_sm.objectives.diffusion_matrices import Matrix, constant_matrix, flow_matrix
from pyro_sm.objectives.energies.score_estimation import (
    denoising_centred,
    denoising_constant,
    denoising_controlled,
    diffusion_implicit,
    implicit,
    live_score,
    score_and_forms,
    score_jumps,
    weighted_score_and_forms,
)
from pyro_sm.objectives.gradients import backward

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of an energy model: there is nothing to guide."""


def _batch(given: Any) -> Any:
    """A ``DataLoader`` over a ``TensorDataset`` yields lists of tensors; one of a single tensor is that tensor."""
    return given[0] if isinstance(given, list | tuple) and len(given) == 1 else given


def checked_data(args: Args) -> tuple[Tensor, Args]:
    """The data (N, D) and the model's own arguments, from the arguments of ``svi.step``.

    Raises:
        TypeError: the first argument is missing or no floating-point tensor.
        ValueError: it is not of shape (N, D) with N ≥ 1, or not finite.
    """
    if not args or not isinstance(_batch(args[0]), Tensor):
        found = type(args[0]).__name__ if args else "no argument"
        raise TypeError(f"expected the data, a tensor (N, D), as the first argument of svi.step, found {found}")
    data = _batch(args[0])
    if not data.is_floating_point():
        raise TypeError(f"expected floating-point data, found {data.dtype}")
    if data.ndim != 2 or data.shape[0] < 1:
        raise ValueError(f"expected data of shape (N, D), found {tuple(data.shape)}")
    if not torch.isfinite(data).all():
        raise ValueError(f"expected finite data, found {int((~torch.isfinite(data)).sum())} entries that are not")
    return data.detach(), args[1:]


class EnergyObjective(ELBO):
    """What the losses on energy models share: the interface of ``ELBO`` and the batched energy.

    A subclass says what a batch costs (:meth:`row_losses`) and whether it needs second derivatives.

    Args:
        num_particles: noise draws per row of data.
    """

    sigma: float = 0.0
    """Noise added to the data; the loss is about ``p_σ``."""
    needs_curvature: bool = True

    def __init__(self, num_particles: int = 1) -> None:
        if num_particles < 1:
            raise ValueError(f"expected num_particles >= 1, found {num_particles}")
        super().__init__(num_particles=num_particles)
        self._energy: ModelEnergy | None = None
        self._calls = 0

    def row_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Loss (B,) of every row of ``x`` (B, D), differentiable in the parameters of ``log_prob``.

        Draws its own noise. ``log_prob``: (B, D) -> (B,), nats, twice differentiable.
        """
        raise NotImplementedError

    def known_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor, known: Tensor) -> Tensor:
        """Loss (B,) of rows ``x`` (B, D) drawn from a density whose score ``known`` (B, D) is known.

        ``½‖s‖² − s·∇log m``: as ``E_m[tr ∇s] = −E_m[s·∇log m]``, its mean is ``J_ISM`` on such rows, with less
        variance and without second derivatives.
        """
        score = live_score(log_prob, x.detach().requires_grad_(True))
        return 0.5 * score.square().sum(-1) - (score * known).sum(-1)

    def constant(self, dim: int) -> float:
        """What this loss leaves out of the textbook form, ``D/(2σ²)`` for denoising, else 0."""
        return denoising_constant(dim, self.sigma) if self.sigma else 0.0

    def explicit_loss(self, value: float, information: float) -> float:
        """``J_ESM``: a returned value with its constant removed; zero at the truth, never negative on average.

        ``information``: ``I(p_σ)``, from ``gaussian_information`` or ``estimated_information``.
        """
        return value + 0.5 * information

    # -- the model ---------------------------------------------------------------------------------------------

    def energy(self, model: Callable[..., Any], args: Args, kwargs: Kwargs, x: Tensor) -> ModelEnergy:
        """The batched energy of the model on its own arguments; kept while those stay the same.

        Checked on rows of data against a loop, and for vanishing second derivatives, at calls 1, 10, 100, …
        """
        kept = self._energy
        same = (
            kept is not None
            and kept.model is model
            and kept.dim == x.shape[1]
            and kept.density.dtype == x.dtype
            and len(kept.args) == len(args)
            and all(a is b for a, b in zip(kept.args, args, strict=True))
            and kept.kwargs.keys() == kwargs.keys()
            and all(kept.kwargs[name] is kwargs[name] for name in kwargs)
        )
        if kept is None or not same:
            kept, self._calls = ModelEnergy(model, args, kwargs, x), 0
            self._energy = kept
        kept.refresh()
        self._calls += 1
        if str(self._calls).strip("0") == "1":
            kept.recheck(x)
            with torch.no_grad():
                kept.log_prob(x)  # refuses rows without a density, before anything else is said about them
            if self.needs_curvature and score_jumps(kept.density.log_prob, x[:64]):
                raise ModelRefusedError(
                    f"{type(self).__name__} needs second derivatives of the energy, but its score jumps between the "
                    "data: ReLU-like activations hide the curvature in kinks, where autograd finds none; use tanh, "
                    "softplus or SiLU, or DenoisingScoreMatching"
                )
        return kept

    def _get_trace(self, model: Any, guide: Any, args: Args, kwargs: Kwargs) -> Any:
        """A guide trace and the model replayed against it, as ELBO subclasses offer."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _loss(self, model: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor:
        x, rest = checked_data(args)
        energy = self.energy(model, rest, kwargs, x)
        particles = x.repeat(self.num_particles, 1) if self.num_particles > 1 else x
        return self.row_losses(energy.log_prob, particles).mean()

    # -- the ELBO interface ------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The mean loss of the data, a float."""
        with torch.no_grad():
            return float(self._loss(model, args, kwargs))

    def differentiable_loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The mean loss of the data, a scalar tensor, differentiable in the model's parameters."""
        loss = self._loss(model, args, kwargs)
        return loss if torch.is_grad_enabled() else loss.detach()

    def loss_and_grads(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The mean loss of the data, its gradients added to the model's parameters.

        Raises:
            ModelRefusedError: Pyro saw no parameter in the model, so nothing would be trained.
            ValueError: the loss or a gradient is NaN.
        """
        return self.add_gradients(self.differentiable_loss(model, guide, *args, **kwargs), model)

    def add_gradients(self, loss: Tensor, model: Callable[..., Any]) -> float:
        """Backward pass of a loss on the energy used last; see :meth:`loss_and_grads`."""
        local = pyro.settings.get("module_local_params")
        if not loss.requires_grad or not (local or (self._energy is not None and self._energy.params)):
            raise ModelRefusedError(
                "the energy model has no parameter that Pyro can see: use pyro.param, a PyroModule, or "
                'pyro.module("net", net) inside the model'
            )
        backward(loss, model)
        return float(loss.detach())


class ImplicitScoreMatching(EnergyObjective):
    r"""``E[½‖∇log p̃‖² + tr ∇²log p̃]`` over the data: Hyvärinen's score matching for an unnormalised Pyro model.

    Used as ``SVI(energy, no_guide, optim, loss=ImplicitScoreMatching())``, ``svi.step(data)`` with data (N, D); see
    the head of this file. The value estimates ``J_ISM = J_ESM − ½ I(p)``, in nats per squared unit of x. It cannot
    see the relative weight of separated modes: see :class:`~pyro_sm.BridgeDensityEstimation`.

    Args:
        divergence: ``Exact()`` (default; D second derivatives), ``Hutchinson(n)`` or ``Sliced(n)``: the trace.
        num_particles: probe draws per row, on top of the divergence's own.

    Raises:
        ModelRefusedError: other latents than one vector, no parameters, or ReLU-like second derivatives.
        TypeError: the first argument of the step is no floating-point tensor.
        ValueError: the data are not (N, D).

    Source: "Estimation of Non-Normalized Statistical Models by Score Matching"
    https://jmlr.org/papers/v6/hyvarinen05a.html .
    """

    def __init__(self, divergence: Divergence | None = None, *, num_particles: int = 1) -> None:
        super().__init__(num_particles)
        self.divergence = divergence or Exact()

    def row_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See :class:`EnergyObjective`."""
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
        num_particles: noise draws per row.

    Raises:
        ValueError: σ is not positive; the data are not (N, D).
        ModelRefusedError: other latents than one vector, or no parameters.

    Source: "A Connection Between Score Matching and Denoising Autoencoders" https://doi.org/10.1162/NECO_a_00142 .
    """

    needs_curvature = False

    def __init__(self, sigma: float, control_variate: bool = True, *, num_particles: int = 1) -> None:
        if not sigma > 0:
            raise ValueError(f"expected sigma > 0, found {sigma}")
        super().__init__(num_particles)
        self.sigma = sigma
        self.control_variate = control_variate

    def row_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See :class:`EnergyObjective`."""
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
        num_particles: as in :class:`ImplicitScoreMatching`.

    Raises:
        TypeError: ``matrix`` is none of these.
        ModelRefusedError: as :class:`ImplicitScoreMatching`.
        ValueError: the data are not (N, D), or the matrix not (B, D, D).

    Source: "Interpreting diffusion score matching using normalizing flow" https://arxiv.org/abs/2107.10072 .
    """

    def __init__(
        self, matrix: Tensor | Matrix | Transform, divergence: Divergence | None = None, *, num_particles: int = 1
    ) -> None:
        super().__init__(num_particles)
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
        """See :class:`EnergyObjective`."""
        expected = (x.shape[0], x.shape[1], x.shape[1])
        found = tuple(self.matrix(x[:1]).shape)
        if found != (1, *expected[1:]):
            raise ValueError(f"expected a diffusion matrix of shape {(1, *expected[1:])} for one row, found {found}")
        probes = self.divergence.probes(x)
        weighted = weighted_score_and_forms(log_prob, self.matrix, x, probes, create_graph=torch.is_grad_enabled())
        return diffusion_implicit(weighted.score, self.divergence.combine(weighted.forms))

    def known_losses(self, log_prob: Callable[[Tensor], Tensor], x: Tensor, known: Tensor) -> Tensor:
        """``½‖mᵀs‖² − mᵀs·mᵀ∇log m``; see :class:`EnergyObjective`."""
        leaf = x.detach().requires_grad_(True)
        score, m = live_score(log_prob, leaf), self.matrix(leaf).mT
        own, other = (torch.einsum("bij,bj->bi", m, v) for v in (score, known))
        return 0.5 * own.square().sum(-1) - (own * other).sum(-1)
