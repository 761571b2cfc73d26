# SPDX-License-Identifier: Apache-2.0
"""A model, its data and what is known of its posterior, as one value.

A *scalar* is a one-dimensional quantity of the posterior under its name in the posterior database: ``sigma`` is the
site of that name, ``beta[2]`` the second entry of the site ``beta``.

Source: "posteriordb: Testing, Benchmarking and Developing Bayesian Inference Algorithms"
https://arxiv.org/abs/2407.04967 .
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sm.examples.errors import Errors, worst_errors


class Moments(NamedTuple):
    """Mean and standard deviation of a scalar, each with its Monte Carlo standard error (zero where exact)."""

    mean: float
    sd: float
    mean_se: float
    sd_se: float


@dataclass(frozen=True)
class Posterior:
    """A posterior with a known answer.

    Args:
        name: as in the posterior database.
        model: an ordinary Pyro model.
        args: its data, float64; ``ModelDensity(model, args)`` is the density.
        reference: by scalar.
        log_evidence: nats, exact where known, with half-priors normalised and improper flat priors of density one.
        remark: what is peculiar about it.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    reference: Mapping[str, Moments]
    log_evidence: float | None
    remark: str

    def scalars(self, samples: Mapping[str, Tensor]) -> Tensor:
        """The reference's scalars (N, K), float64, from draws by site, sample dimension first.

        Raises:
            ValueError: a site is missing.
        """
        columns = []
        for scalar in self.reference:
            site, _, index = scalar.partition("[")
            if site not in samples:
                raise ValueError(f"expected draws of the site '{site}' of {self.name}, found {', '.join(samples)}")
            values = samples[site]
            columns.append((values[:, int(index[:-1]) - 1] if index else values).reshape(-1).double())
        return torch.stack(columns, 1)

    def errors(self, samples: Mapping[str, Tensor]) -> Errors:
        """Compare draws by site, latent and deterministic ones, sample dimension first, with the reference.

        Raises:
            ValueError: a site is missing.
        """
        moments = torch.tensor(list(self.reference.values()), dtype=torch.float64)
        return worst_errors(self.scalars(samples), moments[:, 0], moments[:, 1])


class Content(NamedTuple):
    """What a data file holds: numbers by their names in the posterior database, and the answer."""

    data: Mapping[str, Tensor]
    reference: Mapping[str, Moments]
    log_evidence: float | None


def read(name: str) -> Content:
    """The shipped data file of a posterior, as float64 tensors."""
    file = resources.files("pyro_sm.examples").joinpath("data", "posteriordb", f"{name}.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    data = {key: torch.tensor(value, dtype=torch.float64) for key, value in content["data"].items()}
    reference = {scalar: Moments(**moments) for scalar, moments in content["reference"].items()}
    return Content(data, reference, content["log_evidence"])
