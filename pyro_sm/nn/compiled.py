# SPDX-License-Identifier: Apache-2.0
r"""A network through ``torch.compile``, for so many rows at a time that each graph serves again and again.

``make_fx`` records the network as a function ``(weights, x, c, context) -> out`` of the whole vector of its weights,
one graph for each set of shapes, which inductor compiles, with its backward pass where gradients are wanted. Shapes
are few: batches are cut into pieces of as many rows as stay in the cache, and what is left over is filled up, or,
where that would be mostly filling, evaluated as it is. A graph is used only if it gives what the network gives, and
its gradient; where there is no compiler, or it fails, this is said once, and the network is used as it is.

Second derivatives, and transforms of ``torch.func``, are not for compiled graphs: an input that wants a gradient
itself, or such a transform around the call, takes the network as it is. Nor is a second backward pass through the
same output (``retain_graph=True``): torch refuses it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_sm.nn.graphs import CompiledGraphs

Function = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

_MOST_ROWS = 1024  # a training batch; larger pieces gain nothing
# Between compiled and eager: sums in another order, through a few layers. Wrong code is off by far more.
_RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def _is_plain(inputs: list[Tensor]) -> bool:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _padded(x: Tensor, rows: int) -> Tensor:
    """Filled up with copies of its last row."""
    return torch.cat([x, x[-1:].expand(rows - x.shape[0], *x.shape[1:])])


class CompiledNetwork:
    """``function(weights, x (B, D), c (B,) or (1,), context (C,), (B, C) or None)``, compiled.

    Args:
        function: the network, row by row.
        rows: as many of them as stay in the cache, where that is known.
    """

    def __init__(self, function: Function, rows: int | None = None) -> None:
        self.function = function
        self.rows = min(rows or _MOST_ROWS, _MOST_ROWS)
        self._graphs: CompiledGraphs[Function] = CompiledGraphs("the network")

    def __call__(self, weights: Tensor, x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        """The network's output (B, ·), in pieces."""
        inputs = [x, c] if context is None else [x, c, context]
        learning = torch.is_grad_enabled() and weights.requires_grad
        if self._graphs.given_up or not _is_plain(inputs) or x.shape[0] == 0:
            return self.function(weights, x, c, context)
        # A batch of training comes thousands of times, and deserves a graph of its own; a few draws do not.
        rows = min(self.rows, x.shape[0]) if learning else self.rows
        pieces = []
        for first in range(0, x.shape[0], rows):
            part = x[first : first + rows]
            at = c if c.shape[0] == 1 else c[first : first + rows]
            by_row = context is not None and context.ndim == 2
            given = context[first : first + rows] if context is not None and by_row else context
            found = part.shape[0]
            if found == rows:
                pieces.append(self._piece(weights, part, at, given))
            elif 2 * found < rows:
                pieces.append(self.function(weights, part, at, given))
            else:
                at = at if at.shape[0] == 1 else _padded(at, rows)
                given = _padded(given, rows) if given is not None and by_row else given
                pieces.append(self._piece(weights, _padded(part, rows), at, given)[:found])
        return torch.cat(pieces)

    def _piece(self, weights: Tensor, x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        key = (
            x.shape, c.shape, None if context is None else context.shape, x.dtype, x.device,
            torch.is_grad_enabled() and weights.requires_grad,
        )  # fmt: skip
        graph = self._graphs.find(key, lambda: self._compile(weights, x, c, context))
        use = self.function if graph is None else graph
        return use(weights, x, c, context)

    def _compile(self, weights: Tensor, x: Tensor, c: Tensor, context: Tensor | None) -> Function:
        recorded = weights.detach().requires_grad_(weights.requires_grad)
        graph = make_fx(lambda w, a, b, d: self.function(w, a, b, d))(recorded, x, c, context)
        compiled: Function = torch.compile(graph, dynamic=False)
        tolerance = _RELATIVE_TOLERANCE.get(x.dtype, 2e-2)
        for found, expected in zip(
            _value_and_gradient(compiled, recorded, x, c, context),
            _value_and_gradient(self.function, recorded, x, c, context),
            strict=True,
        ):
            if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
                raise RuntimeError("the compiled graph disagrees with the network")
        return compiled


def _value_and_gradient(
    function: Function, weights: Tensor, x: Tensor, c: Tensor, context: Tensor | None
) -> tuple[Tensor, ...]:
    """The output, and, where gradients are wanted, that of a form whose rows all count."""
    out = function(weights, x, c, context)
    if not out.requires_grad:
        return (out,)
    along = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return out.detach(), *torch.autograd.grad((out * along).sum(), weights)
