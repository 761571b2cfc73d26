# SPDX-License-Identifier: Apache-2.0
"""A diffusion guide bound to a model on its data: one value that is handed on, in the place of guide and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pyro_sm.base import Arguments
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.model.density import ModelDensity


class _Guide(Protocol):
    def diffusion(self, args: tuple, kwargs: dict) -> Diffusion: ...


@dataclass(frozen=True)
class BoundDiffusion:
    """What :meth:`pyro_sm.AutoDiffusion.bind` returns. Satisfies ``pyro_sm.base.Bound``.

    Args:
        guide: the guide, whose parameters are looked up when they are needed.
        density: the model's batched density on these arguments.
        arguments: of the model.
    """

    guide: _Guide
    density: ModelDensity
    arguments: Arguments

    def diffusion(self) -> Diffusion:
        """The sampler with the guide's current parameters, in plain torch."""
        return self.guide.diffusion(self.arguments.args, self.arguments.kwargs)
