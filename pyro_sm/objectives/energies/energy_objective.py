# SPDX-License-Identifier: Apache-2.0
r"""What all losses on energy models share: data as the first argument of a step, and the batched energy of the model.

The loss of a batch of data (N, D) is the mean over its rows of :meth:`EnergyObjective.row_losses`, each row taken
``num_draws`` times, with noise of its own. What is trained are the parameters of the *model*; there is no guide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sm.base import Arguments, ModelRefusedError
from pyro_sm.model.energy import ModelEnergy
from pyro_sm.objectives.elbo import ScoreObjective
from pyro_sm.objectives.energies.score_estimation import denoising_constant, live_score, score_jumps
from pyro_sm.objectives.gradients import backward

# Rows between which a jump of the score is looked for. A kink is seen if it has rows on both sides: one that cuts off
# a twentieth of the data is missed once in 27 times, .95^64, one that cuts off a tenth once in 850.
_CHECKS = 64


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of an energy model: there is nothing to guide."""


def _batch(given: Any) -> Any:
    """A ``DataLoader`` over a ``TensorDataset`` yields lists of tensors; one of a single tensor is that tensor."""
    return given[0] if isinstance(given, list | tuple) and len(given) == 1 else given


def checked_data(arguments: Arguments) -> tuple[Tensor, Arguments]:
    """The data (N, D) and the model's own arguments, from the arguments of ``svi.step``.

    Raises:
        TypeError: the first argument is missing or no floating-point tensor.
        ValueError: it is not of shape (N, D) with N ≥ 1, or not finite.
    """
    args = arguments.args
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
    return data.detach(), Arguments(args[1:], arguments.kwargs)


class EnergyObjective(ScoreObjective):
    """What the losses on energy models share: the batched energy, and the mean over the rows of data.

    A subclass says what a batch costs (:meth:`row_losses`) and whether it needs second derivatives.

    Args:
        num_draws: noise draws per row of data, 1 by default.
        num_particles: Pyro's word for ``num_draws``.

    Raises:
        ValueError: ``num_draws`` < 1.
    """

    sigma: float = 0.0
    """Noise added to the data; the loss is about ``p_σ``."""
    needs_curvature: bool = True
    """Whether the loss has second derivatives of the energy in it."""

    def __init__(self, num_draws: int | None = None, num_particles: int | None = None) -> None:
        super().__init__(num_draws, num_particles, default=1)
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

    def energy(self, model: Callable[..., Any], arguments: Arguments, x: Tensor) -> ModelEnergy:
        """The batched energy of the model on its own arguments; kept while those stay the same.

        Checked on rows of the data ``x`` (N, D) against a loop, and for vanishing second derivatives, at calls 1, 10,
        100, …

        Raises:
            ModelRefusedError: as :class:`~pyro_sm.model.energy.ModelEnergy`; or the loss needs second derivatives,
                and they are hidden in kinks.
            ValueError: the density is not finite at some row.
        """
        if self._energy is None or not self._energy.is_of(model, arguments, x):
            self._energy, self._calls = ModelEnergy(model, arguments, x), 0
        kept = self._energy
        kept.refresh()
        self._calls += 1
        if str(self._calls).strip("0") == "1":
            kept.recheck(x)
            with torch.no_grad():
                kept.log_prob(x)  # refuses rows without a density, before anything else is said about them
            if self.needs_curvature and score_jumps(kept.density.log_prob, x[:_CHECKS]):
                raise ModelRefusedError(
                    f"{type(self).__name__} needs second derivatives of the energy, but its score jumps between the "
                    "data: ReLU-like activations hide the curvature in kinks, where autograd finds none; use tanh, "
                    "softplus or SiLU, or DenoisingScoreMatching"
                )
        return kept

    # -- the ELBO interface ------------------------------------------------------------------------------------

    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        x, rest = checked_data(arguments)
        energy = self.energy(model, rest, x)
        rows = x.repeat(self.num_draws, 1) if self.num_draws > 1 else x
        return self.row_losses(energy.log_prob, rows).mean()

    def _backward(self, loss: Tensor, model: Callable[..., Any], guide: Any) -> None:
        self.add_gradients(loss, model)

    def add_gradients(self, loss: Tensor, model: Callable[..., Any]) -> None:
        """Backward pass of a loss on the energy used last.

        Raises:
            ModelRefusedError: Pyro saw no parameter in the model, so nothing would be trained.
            ValueError: the loss or a gradient is NaN.
        """
        local = pyro.settings.get("module_local_params")
        if not loss.requires_grad or not (local or (self._energy is not None and self._energy.params)):
            raise ModelRefusedError(
                "the energy model has no parameter that Pyro can see: use pyro.param, a PyroModule, or "
                'pyro.module("net", net) inside the model'
            )
        backward(loss, model)
