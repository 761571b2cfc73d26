# SPDX-License-Identifier: Apache-2.0
"""A diffusion guide bound to a model on its data: one value in the place of guide, model and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pyro_sm.base import Arguments, DiffusionProcess
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.model.density import ModelDensity


class HoldsDiffusion(Protocol):
    """A guide that makes its sampler from its current parameters, and takes another one over."""

    def diffusion(self, arguments: Arguments) -> Diffusion:
        """The sampler."""
        ...

    def adapt(self, process: Diffusion, arguments: Arguments) -> None:
        """Take over what was fitted."""
        ...


@dataclass(frozen=True)
class BoundDiffusion:
    """What :meth:`pyro_sm.AutoDiffusion.bind` returns. Satisfies ``pyro_sm.base.Bound``.

    Args:
        guide: whose parameters are looked up when they are needed.
        density: the model's batched density on these arguments.
        arguments: of the model.
    """

    guide: HoldsDiffusion
    density: ModelDensity
    arguments: Arguments

    def diffusion(self) -> Diffusion:
        """The sampler with the guide's current parameters, in plain torch."""
        return self.guide.diffusion(self.arguments)

    def adapt(self, process: DiffusionProcess) -> None:
        """Let the guide take over what was fitted to draws.

        Raises:
            TypeError: ``process`` is no :class:`~pyro_sm.diffusion.diffusion.Diffusion`.
        """
        if not isinstance(process, Diffusion):
            raise TypeError(f"expected a Diffusion, found {type(process).__name__}")
        self.guide.adapt(process, self.arguments)
