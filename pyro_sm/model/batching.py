# SPDX-License-Identifier: Apache-2.0
r"""Three ways to evaluate a model at a batch of latents, and how one is chosen.

* :class:`OuterPlate` runs the model once inside a plate of size B. Fastest; right only if every line of the
  model broadcasts over a dimension on the left, and silently wrong otherwise (``theta.sum()``).
* :class:`VMap` runs it once under ``torch.func.vmap``: each line sees one latent, so the result is right
  whenever it can be computed at all.
* :class:`OneByOne` is a loop: always right, a hundred to three thousand times slower.

:func:`choose_batching` takes the first of the three whose values *and scores* agree with the loop on two
small batches of different sizes.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Size, Tensor

from pyro_sm.base import ModelRefusedError
from pyro_sm.density import value_and_score
from pyro_sm.model.trace import TracedModel, describe_error, no_validation, nodes, site_log_prob

_TRIES = 128  # prior draws among which points with a finite density are looked for
_POINTS = 8  # that a way of batching is compared at: any structure that it gets wrong shows at nearly every one

Values = Mapping[str, Tensor]
Read = Callable[[Values, int | None], dict[str, Tensor]]
"""``(values, size) -> tensors by name``: reads something off one run of the model; ``size`` as in a plate."""


def _row(values: Values, index: int) -> dict[str, Tensor]:
    return {name: value[index] for name, value in values.items()}


class Batching(ABC):
    """A way to evaluate a model at B latents. ``values`` are by site name, (B, *shape)."""

    name: ClassVar[str]

    @abstractmethod
    def log_joint(self, traced: TracedModel, values: Values, size: int) -> Tensor:
        """``log p(values, data)``, (B,)."""

    @abstractmethod
    def collect(self, traced: TracedModel, read: Read, values: Values, size: int) -> dict[str, Tensor]:
        """``read`` for every latent, stacked on the left; dimensions of size one may be too many."""


@dataclass(frozen=True)
class OuterPlate(Batching):
    """One run inside an outermost plate of size B. Given explicitly it is trusted, not verified."""

    name: ClassVar[str] = "outer plate"

    def _aligned(self, traced: TracedModel, values: Values) -> dict[str, Tensor]:
        """Put the batch at dimension ``-1 - nesting`` of every value, left of all dimensions of the model."""
        aligned = {}
        for name, value in values.items():
            missing = traced.nesting - (value.dim() - 1 - traced.event_dims[name])
            shape = (value.shape[0], *(1,) * missing, *value.shape[1:])
            aligned[name] = value.reshape(shape) if missing else value
        return aligned

    def log_joint(self, traced: TracedModel, values: Values, size: int) -> Tensor:
        """``log p(values, data)`` (B,) by one run inside a plate of size B."""
        if size == 1:  # packed tensors drop dimensions of size one, the batch among them
            return traced.log_joint(_row(values, 0)).reshape(1)
        return traced.log_joint(self._aligned(traced, values), size)

    def collect(self, traced: TracedModel, read: Read, values: Values, size: int) -> dict[str, Tensor]:
        """``read`` by one run, with the batch on the left of every value."""
        return read(self._aligned(traced, values), size)


@contextmanager
def _without_performance_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@dataclass(frozen=True)
class VMap(Batching):
    """One run under ``torch.func.vmap``."""

    name: ClassVar[str] = "vmap"

    def log_joint(self, traced: TracedModel, values: Values, size: int) -> Tensor:
        """``log p(values, data)`` (B,) by one run under ``vmap``."""
        with _without_performance_warnings():
            return torch.func.vmap(traced.log_joint, randomness="same")(dict(values))

    def collect(self, traced: TracedModel, read: Read, values: Values, size: int) -> dict[str, Tensor]:
        """``read`` by one run under ``vmap``. Random draws differ from latent to latent."""

        def one(_: Tensor, row: dict[str, Tensor]) -> dict[str, Tensor]:
            return read(row, None)

        with _without_performance_warnings():
            return torch.func.vmap(one, randomness="different")(torch.empty(size), dict(values))


@dataclass(frozen=True)
class OneByOne(Batching):
    """A loop over the latents."""

    name: ClassVar[str] = "one by one"

    def log_joint(self, traced: TracedModel, values: Values, size: int) -> Tensor:
        """``log p(values, data)`` (B,) by B runs."""
        return torch.stack([traced.log_joint(_row(values, i)) for i in range(size)])

    def collect(self, traced: TracedModel, read: Read, values: Values, size: int) -> dict[str, Tensor]:
        """``read`` of B runs, stacked on the left."""
        rows = [read(_row(values, i), None) for i in range(size)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fit_shape(name: str, value: Tensor, size: int, shape: Size) -> Tensor:
    """Bring a collected tensor to (B, *shape): drop extra dimensions of size one, expand what is constant.

    Raises:
        ValueError: it has neither one value per latent nor one for all.
    """
    if value.numel() == size * shape.numel():
        return value.reshape(size, *shape)
    if value.numel() == shape.numel():
        return value.reshape(1, *shape).expand(size, *shape)
    raise ValueError(f"{name!r} has shape {tuple(value.shape)} instead of {(size, *shape)}")


class Reference(NamedTuple):
    """Points where the answer is known from the loop. ``z``: (n, D), ``value``: (n,), ``score``: (n, D)."""

    z: Tensor
    value: Tensor
    score: Tensor


def reference_points(
    first: Tensor, draw: Callable[[int], Tensor], scored: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Reference:
    """Eight points with a finite density and score, from the prior and around the origin, the tamest first.

    ``first``: (n, D) prior draws at hand; ``draw`` makes more; ``scored`` is the loop.

    Raises:
        ModelRefusedError: no finite point among 128 prior draws and as many points around the origin.
    """
    found: list[Tensor] = []
    tried = not_a_number = 0
    points = first
    while tried < _TRIES and sum(len(rows) for rows in found) < _POINTS:
        if tried:
            points = draw(min(16, _TRIES - tried))
        around = torch.randn(points.shape, dtype=torch.float64).to(points)
        for z, from_prior in ((points, True), (around, False)):
            value, score = scored(z)
            good = torch.isfinite(value) & torch.isfinite(score).all(1)
            not_a_number += int(value.isnan().sum()) if from_prior else 0
            found.append(torch.cat([z, value[:, None], score], 1)[good])
        tried += len(points)
    table = torch.cat(found)
    dim = first.shape[1]
    if not len(table):
        raise ModelRefusedError(
            f"the log density is finite, with a finite score, at none of {tried} draws from the prior "
            f"({not_a_number} NaN, {tried - not_a_number} infinite or without a score), nor at {tried} "
            "points around the origin of unconstrained space: check the likelihood, and whether the data lie in the "
            "support of every observed site"
        )
    table = table[table[:, dim + 1 :].abs().amax(1).argsort()[:_POINTS]]
    return Reference(table[:, :dim], table[:, dim], table[:, dim + 1 :])


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference above which two routes disagree: 1e-3, or 1e-6 in double precision."""
    return 1e-6 if dtype == torch.float64 else 1e-3


def _differs(found: Tensor, expected: Tensor, rtol: float) -> bool:
    """Rows are compared relative to their own largest entry."""
    scale = expected.abs().reshape(len(expected), -1).amax(1).clamp(min=1.0)
    error = (found - expected).abs().reshape(len(expected), -1).amax(1)
    return not bool((error <= rtol * scale).all())  # NaN differs


def verification_batches(reference: Reference) -> list[Reference]:
    """Two batches of sizes 3 and 5, repeating points if there are fewer than 8."""
    index = torch.arange(8) % len(reference.z)
    return [Reference(*(x[index[part]] for x in reference)) for part in (slice(0, 3), slice(3, 8))]


def why_not(
    value_by: Callable[[Tensor, Batching], Tensor],
    reference: Reference,
    batching: Batching,
    blame: Callable[[Tensor], str],
) -> str | None:
    """``None`` if ``value_by(z, batching)`` agrees with the reference in value and score, else the reason."""
    rtol = tolerance(reference.z.dtype)
    for batch in verification_batches(reference):
        try:
            value, score = value_and_score(lambda z: value_by(z, batching), batch.z)
        except Exception as error:
            return f"{batching.name} failed {describe_error(error)}"
        if _differs(value, batch.value, rtol):
            words = blame(batch.z) if isinstance(batching, OuterPlate) else ""
            return f"{batching.name} gives a wrong log density{words}"
        if _differs(score, batch.score, rtol):
            return f"{batching.name} gives a wrong score"
    return None


def choose_batching(
    value: Callable[[Tensor, Batching], Tensor], reference: Reference, blame: Callable[[Tensor], str]
) -> tuple[Batching, tuple[str, ...]]:
    """The first way whose ``value(z, way)`` agrees with the reference, and why those before it do not.

    ``blame(z)`` names the first site at which the outer plate goes wrong.
    """
    reasons: list[str] = []
    ways: tuple[Batching, ...] = (OuterPlate(), VMap())
    for way in ways:
        reason = why_not(value, reference, way, blame)
        if reason is None:
            return way, tuple(reasons)
        reasons.append(reason)
    return OneByOne(), tuple(reasons)


def first_disagreement(traced: TracedModel, values: Values, size: int) -> str:
    """Words naming the first site whose density differs inside an outer plate; empty if unknown."""
    if traced.enumerated:
        return ""
    with torch.no_grad(), no_validation():
        batched = traced.condition(OuterPlate()._aligned(traced, values), size)
        single = [traced.condition(_row(values, i)) for i in range(size)]
        for name, site in nodes(batched).items():
            found = site_log_prob(name, site).reshape(size, -1).sum(1)
            expected = torch.stack([site_log_prob(name, nodes(trace)[name]).sum() for trace in single])
            if _differs(found, expected.to(found.dtype), tolerance(found.dtype)):
                return (
                    f", first at site {name!r}: a line before it mixes the latents of a batch (a .sum() or "
                    ".mean() without dim, an index or a matrix product that does not broadcast on the left)"
                )
    return ""
