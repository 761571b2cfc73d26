# SPDX-License-Identifier: Apache-2.0
"""What objectives on diffusion guides share: the four methods that ``SVI`` and other users of ``ELBO`` call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class GuideObjective(ELBO):
    """An objective whose loss needs model and guide; a subclass defines :meth:`_loss`."""

    def _loss(self, model: Callable[..., Any], guide: Any, args: Args, kwargs: Kwargs, *, commit: bool) -> Tensor:
        """The loss of one batch, a scalar; with ``commit`` it is a training step and may change the state."""
        raise NotImplementedError

    def _get_trace(self, model: Any, guide: Any, args: Args, kwargs: Kwargs) -> Any:
        """A guide trace and the model replayed against it, as ELBO subclasses offer."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss of one batch; leaves guide and training state as they are."""
        with torch.no_grad():
            return float(self._loss(model, guide, args, kwargs, commit=False))

    def differentiable_loss(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch as a scalar tensor; counts as a training step."""
        return self._loss(model, guide, args, kwargs, commit=torch.is_grad_enabled())

    def loss_and_grads(self, model: Callable[..., Any], guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss of one batch, its gradients added to the guide's parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())
