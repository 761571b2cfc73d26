# SPDX-License-Identifier: Apache-2.0
r"""What a model says of latents beside their density: its prior, data it would make, how likely it finds its own.

A read-out runs the model with some of its sites given and reads others off its trace, by name: for one latent, or for
a whole batch in one of the ways of ``batching.py``. The check of those ways covers the density only. A read-out that
is a function of the latents is therefore compared with the loop, at three points, before a faster way is believed;
one that draws random numbers cannot be compared, and trusts what holds for the density where the structure lets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from pyro_sm.density import without_nan
from pyro_sm.model.batching import Batching, OneByOne, OuterPlate, Read, Values, VMap, fit_shape, tolerance
from pyro_sm.model.structure import Structure, finite
from pyro_sm.model.trace import Recorder, TracedModel, no_validation, nodes, prior_trace, site_log_prob


@dataclass(frozen=True)
class ReadOuts:
    """Read-outs of a model whose latents ``z`` (B, D) are known to fit.

    Args:
        traced: the model with its data.
        structure: of its sites.
        batching: the way in use for the density.
        probe: three points (3, D) at which the density is finite.
        dtype: of latents.
    """

    traced: TracedModel
    structure: Structure
    batching: Batching
    probe: Tensor
    dtype: torch.dtype

    def prior_draws(self, num_draws: int) -> Tensor:
        """Latents (N, D) from the prior."""
        sites = self.structure.sites

        def read(values: Values, size: int | None) -> dict[str, Tensor]:
            trace, _ = prior_trace(self.traced, size)
            return {site.name: nodes(trace)[site.name]["value"] for site in sites}

        shapes = {site.name: site.shape for site in sites}
        with torch.no_grad():
            z = self.structure.pack(self._random(read, {}, num_draws, shapes), self.dtype)
        return finite(z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log density (B,) of :meth:`prior_draws`, nats."""
        self._require_proper()
        names = [site.name for site in self.structure.sites]

        def read(values: Values, size: int | None) -> dict[str, Tensor]:
            sites = nodes(self.traced.condition(values, size))
            with no_validation():
                terms = [sites[name]["fn"].log_prob(values[name]) for name in names]
            if size is None:
                if any(term.numel() > values[name].numel() for name, term in zip(names, terms, strict=True)):
                    raise NotImplementedError("the prior of a continuous latent depends on a discrete one")
                return {"log_prior": torch.stack([term.sum() for term in terms]).sum()}
            return {"log_prior": torch.stack([term.reshape(size, -1).sum(-1) for term in terms]).sum(0)}

        value = self._checked(read, z, {"log_prior": Size([])})["log_prior"].to(self.dtype)
        log_det = self.structure.constrain(z)[1]
        return without_nan(value if log_det is None else value + log_det)

    def log_prior_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Log prior density (B, *shape) of each latent site in its own space, nats."""
        names = [site.name for site in self.structure.sites]

        def read(values: Values, size: int | None) -> dict[str, Tensor]:
            sites = nodes(self.traced.condition(values, size))
            with no_validation():
                return {name: sites[name]["fn"].log_prob(values[name]) for name in names}

        one = {name: value[0] for name, value in self._unpack(self.probe).items()}
        with torch.no_grad():
            shapes = {name: term.shape for name, term in read(one, None).items()}
            return self._checked(read, z, shapes)

    def posterior_predictive(self, z: Tensor) -> dict[str, Tensor]:
        """Fresh draws of observed sites and values of deterministic ones, (B, *shape) each."""
        observed, deterministic = self.structure.observed, self.structure.deterministic
        redraw = frozenset(observed)
        shapes = {name: value.shape for name, value in observed.items()} | deterministic

        def read(values: Values, size: int | None) -> dict[str, Tensor]:
            recorder = Recorder(values, self.traced.params, draw=True, redraw=redraw)
            trace = self.traced.run(recorder, size)
            return {name: nodes(trace)[name]["value"] for name in shapes}

        with torch.no_grad():
            # the density says nothing about deterministic sites, so an outer plate is not verified for them
            return self._random(read, self._unpack(z), z.shape[0], shapes, trusted=not deterministic)

    def deterministics(self, z: Tensor) -> dict[str, Tensor]:
        """Values (B, *shape) of deterministic sites."""
        shapes = self.structure.deterministic

        def read(values: Values, size: int | None) -> dict[str, Tensor]:
            # drawn, not enumerated: a deterministic site gets one value per latent
            trace = self.traced.run(Recorder(values, self.traced.params, draw=True), size)
            return {name: nodes(trace)[name]["value"] for name in shapes}

        with torch.no_grad():
            if self.structure.enumerated:
                return self._random(read, self._unpack(z), z.shape[0], shapes)
            return self._checked(read, z, shapes)

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Pointwise log likelihood (B, *shape) of observed sites, nats, masked but not scaled."""
        if self.structure.enumerated:
            raise NotImplementedError(
                f"pointwise log likelihood with the discrete latent site {self.structure.enumerated[0]!r}: the "
                "data are not independent given the continuous latents"
            )
        shapes = self.structure.log_prob_shapes

        def read(values: Values, size: int | None) -> dict[str, Tensor]:
            sites = nodes(self.traced.condition(values, size))
            with no_validation():
                return {name: site_log_prob(name, sites[name], scaled=False) for name in shapes}

        with torch.no_grad():
            return self._checked(read, z, shapes)

    def _require_proper(self) -> None:
        if self.structure.improper:
            raise NotImplementedError(f"the prior of the latent site {self.structure.improper[0]!r} is improper")

    def _unpack(self, z: Tensor) -> dict[str, Tensor]:
        return self.structure.constrain(z)[0]

    def _collect(
        self, batching: Batching, read: Read, values: Values, size: int, shapes: Mapping[str, Size]
    ) -> dict[str, Tensor]:
        found = batching.collect(self.traced, read, values, size)
        return {name: fit_shape(name, found[name], size, shape) for name, shape in shapes.items()}

    def _random(
        self, read: Read, values: Values, size: int, shapes: Mapping[str, Size], *, trusted: bool = True
    ) -> dict[str, Tensor]:
        """What is verified for the density holds for draws, unless discrete latents were enumerated there."""
        if not shapes or size == 0:
            return {name: torch.empty(size, *shape) for name, shape in shapes.items()}
        ways: list[Batching] = [VMap()] if not isinstance(self.batching, OneByOne) else []
        if trusted and isinstance(self.batching, OuterPlate) and not self.structure.enumerated and size > 1:
            ways.insert(0, self.batching)
        for way in ways:
            try:
                return self._collect(way, read, values, size, shapes)
            except Exception:  # the loop below gives the same draws, and a better message if it fails as well
                continue
        return self._collect(OneByOne(), read, values, size, shapes)

    def _checked(self, read: Read, z: Tensor, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
        """The check of the density does not cover read-outs: compare with the loop at three known points."""
        if not shapes or z.shape[0] == 0:
            return {name: z.new_empty(z.shape[0], *shape) for name, shape in shapes.items()}
        few, values = self._unpack(self.probe), self._unpack(z)
        expected = self._collect(OneByOne(), read, few, len(self.probe), shapes)
        ways: list[Batching] = [OuterPlate()] if isinstance(self.batching, OuterPlate) and len(z) > 1 else []
        if not isinstance(self.batching, OneByOne):
            ways.append(VMap())
        rtol = tolerance(self.dtype)
        for way in ways:
            try:
                found = self._collect(way, read, few, len(self.probe), shapes)
                if all(
                    torch.allclose(found[name], expected[name], rtol=rtol, atol=rtol, equal_nan=True)
                    for name in shapes
                ):
                    return self._collect(way, read, values, len(z), shapes)
            except Exception:  # the loop below gives the same values, and a better message if it fails too
                continue
        return self._collect(OneByOne(), read, values, len(z), shapes)
