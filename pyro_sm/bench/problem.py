# SPDX-License-Identifier: Apache-2.0
r"""What is fitted: a model with its data, where a fit may start, and what is known of the answer.

Benchmark targets (:mod:`pyro_sm.targets`) know more, such as exact draws, and go by their own names:
:data:`TARGETS`. As a problem a target is the model ``factor_model(target.log_prob, target.dim)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sm.examples.errors import Errors
from pyro_sm.examples.improper import factor_model
from pyro_sm.examples.posteriors import Posterior, posteriors
from pyro_sm.guides import GivenBase
from pyro_sm.guides.bases import Base
from pyro_sm.model.density import ModelDensity
from pyro_sm.nn.egnn import EGNN
from pyro_sm.nn.mlp import Architecture
from pyro_sm.targets import (
    DoubleWellParticles,
    Funnel,
    GaussianMixture,
    GaussianShells,
    LennardJones,
    ManyWell,
    PhiFour,
    Rings,
    SensorNetwork,
    Target,
    UnequalModes,
)

_CHUNK = 1000  # latents at once: the hidden Markov models take 3 kB per latent and time step

Samples = Mapping[str, Tensor]
"""Equally weighted draws by site, sample dimension first."""


@dataclass(frozen=True)
class Problem:
    """A posterior to be fitted.

    Args:
        model: an ordinary Pyro model.
        args: its data.
        base: where a diffusion starts; None for the guide's own default.
        architecture: of its network; None for the guide's own default.
        log_evidence: nats, exact or of the literature; None if unknown.
        errors: of draws, by name; None if nothing is known to compare them with.
        sites: whose components are looked at; empty for all.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    base: Base | None = None
    architecture: Architecture | None = None
    log_evidence: float | None = None
    errors: Callable[[Samples], dict[str, float]] | None = None
    sites: tuple[str, ...] = ()

    def density(self, dtype: torch.dtype | None = None) -> ModelDensity:
        """Of the model and its data."""
        return ModelDensity(self.model, self.args, dtype=dtype)

    def judged(self, samples: Samples) -> dict[str, float]:
        """The errors of draws; none where nothing is known."""
        return {} if self.errors is None else self.errors(samples)


def by_site(density: ModelDensity, z: Tensor) -> dict[str, Tensor]:
    """Latents (N, D) as values of latent and deterministic sites."""
    with torch.no_grad():
        parts = [{**density.unpack(chunk), **density.deterministics(chunk)} for chunk in z.split(_CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def in_float64() -> Iterator[None]:
    """Improper priors have no data to take their type from."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


# ---------------------------------------------------------------------------------------------------- posteriors


def named(worst: Errors) -> dict[str, float]:
    """As rows have them."""
    return {"mean error": worst.mean, "sd error": worst.sd}


def from_posterior(posterior: Posterior) -> Problem:
    """With the worst error of a mean and of an sd, in reference sds."""
    return Problem(
        posterior.model,
        posterior.args,
        log_evidence=posterior.log_evidence,
        errors=lambda samples: named(posterior.errors(samples)),
    )


def selected(parts: Sequence[str]) -> list[Posterior]:
    """Those whose names have one of the parts in them; all if there is none.

    Raises:
        ValueError: a part that is in no name.
    """
    known = posteriors()
    unknown = [part for part in parts if not any(part in name for name in known)]
    if unknown:
        raise ValueError(f"--posteriors: expected (parts of) {', '.join(known)}, found {' '.join(unknown)}")
    return [posterior for name, posterior in known.items() if not parts or any(part in name for part in parts)]


# ------------------------------------------------------------------------------------------------------- targets

Particles = DoubleWellParticles | LennardJones

TARGETS: dict[str, Callable[[], Target]] = {
    "gmm40": GaussianMixture,
    "gmm80": lambda: GaussianMixture(80),
    "gmm120": lambda: GaussianMixture(120),
    "gmm40-10d": lambda: GaussianMixture(40, dim=10, scale=1.0),
    "gmm40-50d": lambda: GaussianMixture(40, dim=50, scale=1.0),
    "many-well-2": lambda: ManyWell(2),
    "many-well-8": lambda: ManyWell(8),
    "many-well-16": lambda: ManyWell(16),
    "many-well-32": lambda: ManyWell(32),
    "many-well-64": lambda: ManyWell(64),
    "many-well-128": lambda: ManyWell(128),
    "many-well-200": lambda: ManyWell(200),
    "unequal-8": UnequalModes,
    "funnel": Funnel,
    "rings": Rings,
    "shells-2": GaussianShells,
    "shells-5": lambda: GaussianShells(5),
    "shells-10": lambda: GaussianShells(10),
    "phi4-32": PhiFour,
    "sensor": SensorNetwork,
    "dw4": DoubleWellParticles,
    "lj13": LennardJones,
    "lj55": lambda: LennardJones(55),
}
"""The targets by the names of the command line."""


def from_target(target: Target) -> Problem:
    """From the target's own start; for particles with the network that has their symmetry."""
    network = None
    if isinstance(target, Particles):
        network = EGNN(target.particles.num_bodies, target.particles.space_dim)
    return Problem(
        factor_model(target.log_prob, target.dim),
        base=GivenBase(*target.start),
        architecture=network,
        log_evidence=target.log_evidence,
    )


def some(x: Tensor, num_draws: int) -> Tensor:
    """A random choice, always the same: draws may be in the order of their chains."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:num_draws].to(x.device)]


def reference_draws(folder: Path | None, name: str, target: Target) -> Tensor | None:
    """``latents`` (M, D) of ``NAME.npz``, or else those shipped with the package; None if there are neither.

    In random order, so that any slice is as good as another.

    Raises:
        ValueError: the array is not there, or of another shape.
    """
    if folder is None or not (folder / f"{name}.npz").is_file():
        try:
            return target.reference_draws() if isinstance(target, Particles) else None
        except ValueError:  # none of this size are shipped
            return None
    with np.load(folder / f"{name}.npz") as content:
        if "latents" not in content:
            raise ValueError(f"expected the array 'latents' in '{folder / name}.npz', found {', '.join(content)}")
        latents = torch.as_tensor(content["latents"]).to(target.start.loc)
    if latents.ndim != 2 or latents.shape[1] != target.dim:
        raise ValueError(f"expected latents of shape (M, {target.dim}), found {tuple(latents.shape)}")
    return some(latents, len(latents))
