# SPDX-License-Identifier: Apache-2.0
r"""What all objectives share: the four methods that ``SVI`` and other users of ``pyro.infer.ELBO`` call.

An objective is one number for a model, a guide and the arguments both are called with; a training step is such a
number with its gradient. It is an average: over *draws*, as they are called here, or *particles*, Pyro's word, which
is taken as well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyro_sm.base import Arguments


class ScoreObjective(ELBO):
    """The interface of ``ELBO`` from one method, :meth:`_loss`, which a subclass defines.

    Args:
        num_draws: draws per loss; of what, the subclass says. None for its ``default``.
        num_particles: the same in Pyro's word.
        default: how many, if neither is given.
        least: how many it takes.
        max_plate_nesting: as in ``ELBO``; used by ``_get_trace`` only.

    Attributes:
        num_particles: the number of draws, where users of Pyro's ``ELBO`` look for it.

    Raises:
        ValueError: both words are given and differ; or fewer draws than ``least``.
    """

    def __init__(
        self,
        num_draws: int | None,
        num_particles: int | None,
        *,
        default: int,
        least: int = 1,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if num_draws is not None and num_particles is not None and num_draws != num_particles:
            raise ValueError(
                f"num_draws and num_particles are two words for one number, found {num_draws} and {num_particles}"
            )
        name, given = ("num_particles", num_particles) if num_draws is None else ("num_draws", num_draws)
        found = default if given is None else given
        if found < least:
            raise ValueError(f"expected {name} >= {least}, found {found}")
        super().__init__(num_particles=found, max_plate_nesting=max_plate_nesting)

    @property
    def num_draws(self) -> int:
        """How many draws a loss averages over; the same number as Pyro's ``num_particles``."""
        return self.num_particles

    @abstractmethod
    def _loss(self, model: Callable[..., Any], guide: Any, arguments: Arguments, *, commit: bool) -> Tensor:
        """The loss of one batch, a scalar.

        With ``commit`` it is a training step: the loss is to be differentiated, and the objective may change its
        state, or the guide's. Without, both stay as they are, and the loss needs no graph.
        """

    def _backward(self, loss: Tensor, model: Callable[..., Any], guide: Any) -> None:
        """Add the gradients of the ``loss`` of a training step to the parameters."""
        loss.backward()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """A guide trace and the model replayed against it, as ELBO subclasses offer."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss of one batch; leaves model, guide and objective as they are."""
        with torch.no_grad():
            return float(self._loss(model, guide, Arguments(args, kwargs), commit=False).detach())

    def differentiable_loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch as a scalar tensor; counts as a training step, unless gradients are switched off."""
        commit = torch.is_grad_enabled()
        loss = self._loss(model, guide, Arguments(args, kwargs), commit=commit)
        return loss if commit else loss.detach()

    def loss_and_grads(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss of one batch, its gradients added to the parameters that are trained: the guide's, or the model's.

        Raises:
            ValueError: the loss or a gradient is NaN, where the objective looks for it.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        self._backward(loss, model, guide)
        return float(loss.detach())
