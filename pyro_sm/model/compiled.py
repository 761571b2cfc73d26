# SPDX-License-Identifier: Apache-2.0
r"""Compiled scores: ``torch.compile(make_fx(z ↦ (log p̃(z), ∇ log p̃(z))))``, one graph per batch shape.

``torch.compile`` cannot read Pyro's handlers, but it can read the graph of tensor operations they leave
behind, which ``make_fx`` records once per batch shape. Data and parameters are constants of that graph. A
graph is used only if it reproduces the uncompiled result on the batch it was recorded on and on a perturbed
one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_sm.nn.graphs import CompiledGraphs

Scored = Callable[[Tensor], tuple[Tensor, Tensor]]


class CompiledScores:
    """Compiled functions by batch shape. Copies and pickles start without."""

    def __init__(self) -> None:
        self._graphs: CompiledGraphs[Scored] = CompiledGraphs("the score")

    def __call__(self, function: Scored, z: Tensor) -> tuple[Tensor, Tensor]:
        """``function(z)``, through a compiled graph if one can be made; a failure is warned about once."""
        graph = self._graphs.find(z.shape, lambda: self._compile(function, z))
        value, score = function(z) if graph is None else graph(z)
        return value, score

    @staticmethod
    def _compile(function: Scored, z: Tensor) -> Scored:
        graph = make_fx(lambda x: function(x))(z)  # a bound method would be asked for ``self``
        compiled: Scored = torch.compile(graph)
        tolerance = 1e-6 if z.dtype == torch.float64 else 1e-3
        for probe in (
            z,
            z + 0.1 * torch.cos(torch.arange(z.numel(), device=z.device).reshape(z.shape)).to(z.dtype),
        ):
            for found, expected in zip(compiled(probe), function(probe), strict=True):
                if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
                    raise RuntimeError("the compiled graph disagrees with the model")
        return compiled
