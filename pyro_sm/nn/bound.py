# SPDX-License-Identifier: Apache-2.0
r"""A network as a function of its input and of *one* weight vector.

A guide keeps all weights of its network as one parameter ``w`` (W,): one look-up in the parameter store per call, not
one per layer and step, and one tensor for the optimiser. :class:`FlatNetwork` is the network without its weights, a
skeleton for ``torch.func.functional_call``, and the sizes it was made for; :meth:`FlatNetwork.at` binds it to ``w``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sm.nn.compiled import CompiledNetwork
from pyro_sm.nn.mlp import Architecture
from pyro_sm.nn.pieces import InPieces

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class FlatNetwork:
    """The network of an architecture for given sizes, with its weights taken out.

    Args:
        architecture: builds the module; its first weights are drawn from torch's global generator.
        dim: D, numbers in; 2D come out.
        context_dim: entries of the context, 0 for none.
        compiles: whether to evaluate it through ``torch.compile``.
    """

    def __init__(self, architecture: Architecture, dim: int, context_dim: int, *, compiles: bool = False) -> None:
        self.dim, self.context_dim, self.compiles = dim, context_dim, compiles
        self._skeleton = architecture.build(dim, 2 * dim, context_dim)
        self._shapes = [(name, p.shape) for name, p in self._skeleton.named_parameters()]
        self._compiled: CompiledNetwork | None = None

    @property
    def num_weights(self) -> int:
        """W."""
        return sum(shape.numel() for _, shape in self._shapes)

    def first_weights(self) -> Tensor:
        """What the module was built with, (W,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._skeleton.parameters()])

    def _bound(self, weights: Tensor) -> Network:
        pieces = weights.split([shape.numel() for _, shape in self._shapes])
        state = {name: p.view(shape) for (name, shape), p in zip(self._shapes, pieces, strict=True)}
        state |= {name: buffer.to(weights) for name, buffer in self._skeleton.named_buffers()}
        return lambda *given: torch.func.functional_call(self._skeleton, state, given)

    def at(self, weights: Tensor) -> Network:
        """``(x (B, D), c (B,) or (1,), context or None) -> (B, 2D)`` with these ``weights`` (W,).

        Computed in the weights' dtype; the result has that of ``x``.
        """
        if self.compiles and self._compiled is None:
            rows = self._skeleton.rows_in_cache if isinstance(self._skeleton, InPieces) else None
            self._compiled = CompiledNetwork(lambda w, *given: self._bound(w)(*given), rows)
        compiled = self._compiled
        evaluate = self._bound(weights) if compiled is None else functools.partial(compiled, weights)

        def network(x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
            dtype = weights.dtype
            return evaluate(x.to(dtype), c.to(dtype), None if context is None else context.to(dtype)).to(x.dtype)

        return network

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled graphs, which are neither copied nor pickled."""
        return {**self.__dict__, "_compiled": None}

    @property
    def module(self) -> nn.Module:
        """The skeleton, for a look at what it is made of; its own weights are not those in use."""
        return self._skeleton
