# SPDX-License-Identifier: Apache-2.0
r"""Divergence ``tr ∂f/∂x`` of a vector field ``f: R^D -> R^D``, exactly or by random probes.

For a probe ``v`` with ``E[v vᵀ] = I``: ``E[vᵀ (∂f/∂x) v] = tr ∂f/∂x``. Rademacher probes have the least variance
and are exact where the Jacobian is diagonal. A *slice* is a probe of any such law: signs, normal, or uniform on the
sphere of radius ``√D``.

A divergence is called on a field (forward mode, nothing kept for later), or fed with the quadratic forms
``vᵀ (∂f/∂x) v`` of :func:`quadratic_forms` (reverse mode, differentiable again in whatever the field depends on).

Sources: "A Stochastic Estimator of the Trace of the Influence Matrix" https://doi.org/10.1080/03610919008812866 ;
"Sliced Score Matching: A Scalable Approach to Density and Score Estimation" https://arxiv.org/abs/1905.07088 .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]
Law = Callable[[int, Tensor], Tensor]
"""``(P, x) -> probes``: (P, B, D) for ``x`` (B, D), with ``E[v vᵀ] = I``."""


class Divergence(Protocol):
    """A way to get the divergence of a field along with its value."""

    def probes(self, x: Tensor) -> Tensor:
        """Directions (P, B, D) for a batch ``x`` (B, D); the random part of the estimate."""
        ...

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` (B, D) and the divergence (B,), by forward-mode products along ``probes``."""
        ...

    def combine(self, products: Tensor) -> Tensor:
        """The divergence (B,) from the quadratic forms (P, B) along the probes."""
        ...


def quadratic_forms(value: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool = True) -> Tensor:
    """``vᵀ (∂f/∂x) v`` (P, B) by reverse mode; zero where the value does not depend on ``x``.

    ``value``: (B, D) computed from ``x`` (B, D) row by row, with its graph; ``probes``: (P, B, D).
    """
    if not value.requires_grad:
        return x.new_zeros(probes.shape[:2])

    def along(v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            (value * v).sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        return x.new_zeros(x.shape[0]) if product is None else (product * v).sum(-1)

    return torch.stack([along(v) for v in probes])


def jacobian(value: Tensor, x: Tensor, *, create_graph: bool = True) -> Tensor:
    """``J[b, i, j] = ∂value[b, i] / ∂x[b, j]`` (B, E, D) by reverse mode.

    ``value``: (B, E) computed from ``x`` (B, D) row by row, with its graph.
    """
    rows = []
    for column in value.unbind(-1):
        (row,) = (
            torch.autograd.grad(column.sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True)
            if column.requires_grad
            else (None,)
        )
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, -2)


def rademacher(num_probes: int, x: Tensor) -> Tensor:
    """Independent signs, (P, B, D)."""
    return torch.randint(0, 2, (num_probes, *x.shape), device=x.device).to(x.dtype) * 2 - 1


def normal(num_probes: int, x: Tensor) -> Tensor:
    """Standard normal directions, (P, B, D)."""
    return torch.randn(num_probes, *x.shape, dtype=x.dtype, device=x.device)


def sphere(num_probes: int, x: Tensor) -> Tensor:
    """Uniform on the sphere of radius ``√D``, (P, B, D)."""
    v = normal(num_probes, x)
    return v * (math.sqrt(x.shape[-1]) / v.norm(dim=-1, keepdim=True))


def _products(field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``vᵀ (∂f/∂x) v`` for every probe: (B, D) and (P, B)."""

    def along(v: Tensor) -> tuple[Tensor, Tensor]:
        value, product = torch.func.jvp(field, (x,), (v,))[:2]
        return value, (product * v).sum(-1)

    values, products = torch.func.vmap(along, randomness="error")(probes)
    return values[0], products


@dataclass(frozen=True)
class Exact:
    """Sum over the D coordinate directions; D forward-mode products."""

    def probes(self, x: Tensor) -> Tensor:
        """The coordinate frame, (D, B, D)."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return eye[:, None, :].expand(-1, x.shape[0], -1)

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the exact divergence."""
        value, products = _products(field, x, probes)
        return value, self.combine(products)

    def combine(self, products: Tensor) -> Tensor:
        """The sum of the quadratic forms (P, B) along the coordinates: the divergence (B,) itself."""
        return products.sum(0)


@dataclass(frozen=True)
class Hutchinson:
    """Mean over ``num_probes`` Rademacher probes; unbiased.

    Raises:
        ValueError: ``num_probes`` is not positive.
    """

    num_probes: int = 1

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"expected num_probes >= 1, found {self.num_probes}")

    def probes(self, x: Tensor) -> Tensor:
        """Signs, (num_probes, B, D)."""
        return rademacher(self.num_probes, x)

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the estimated divergence."""
        value, products = _products(field, x, probes)
        return value, self.combine(products)

    def combine(self, products: Tensor) -> Tensor:
        """The mean of the quadratic forms (P, B): an unbiased estimate (B,) of the divergence."""
        return products.mean(0)


@dataclass(frozen=True)
class Sliced:
    """Mean over ``num_slices`` directions of any law with ``E[v vᵀ] = I``; unbiased.

    Args:
        num_slices: directions per row.
        law: :func:`rademacher` (then this is :class:`Hutchinson`), :func:`normal`, :func:`sphere`, or your own.

    Raises:
        ValueError: ``num_slices`` is not positive.
    """

    num_slices: int = 1
    law: Law = sphere

    def __post_init__(self) -> None:
        if self.num_slices < 1:
            raise ValueError(f"expected num_slices >= 1, found {self.num_slices}")

    def probes(self, x: Tensor) -> Tensor:
        """Directions, (num_slices, B, D)."""
        return self.law(self.num_slices, x)

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x)`` and the estimated divergence."""
        value, products = _products(field, x, probes)
        return value, self.combine(products)

    def combine(self, products: Tensor) -> Tensor:
        """The mean of the quadratic forms (P, B): an unbiased estimate (B,) of the divergence."""
        return products.mean(0)
