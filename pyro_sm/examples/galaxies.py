# SPDX-License-Identifier: Apache-2.0
r"""A finite normal mixture on the velocities of 82 galaxies: a real posterior with a mode per labelling.

``y_i ~ Σ_j q_j N(μ_j, s²_j)``, ``μ_j ~ N(20, 10²)``, ``s²_j ~ InverseGamma(3, 20)``, ``q ~ Dirichlet(1, …, 1)``;
y in thousands of km/s. Permuting the components leaves the posterior as it is: K! equal modes.

Log evidence, all labellings counted (average of the likelihood over 1e8 prior draws, Neal 1999): −226.80 for three
components, −226.84 for three with one variance, −239.76 for two with one variance.

Source: "Marginal Likelihood from the Gibbs Output" https://doi.org/10.1080/01621459.1995.10476635 ;
"Erroneous Results in 'Marginal Likelihood from the Gibbs Output'" (R. Neal, 1999); data: Roeder 1990
https://doi.org/10.1080/01621459.1990.10474918 .
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

REFERENCE_LOG_EVIDENCE = {(3, False): -226.80, (3, True): -226.84, (2, True): -239.76}
"""By (components, one variance for all); nats."""


def velocities() -> Tensor:
    """The data in thousands of km/s, (82,)."""
    text = resources.files("pyro_sm.examples").joinpath("data/galaxies.json").read_text()
    return torch.tensor(json.loads(text)["velocities"]) / 1000


def galaxy_mixture(num_components: int = 3, *, shared_variance: bool = False) -> Callable[[Tensor], None]:
    """The mixture as a Pyro model of the data, its labels summed out by ``MixtureSameFamily``.

    Raises:
        ValueError: fewer than two components.
    """
    if num_components < 2:
        raise ValueError(f"expected at least 2 components, found {num_components}")

    def model(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Dirichlet(torch.ones(num_components)))
        with pyro.plate("component", num_components):
            mean = pyro.sample("mean", dist.Normal(20.0, 10.0))
            if not shared_variance:
                variance = pyro.sample("variance", dist.InverseGamma(3.0, 20.0))
        if shared_variance:
            variance = pyro.sample("variance", dist.InverseGamma(3.0, 20.0)).unsqueeze(-1)
        components = dist.Normal(mean.unsqueeze(-2), variance.sqrt().unsqueeze(-2))
        mixture = dist.MixtureSameFamily(dist.Categorical(weight.unsqueeze(-2)), components)
        with pyro.plate("galaxy", len(y)):
            pyro.sample("velocity", mixture, obs=y)

    return model


def labelling_shares(mean: Tensor) -> dict[tuple[int, ...], float]:
    """Share of draws in each order of the component means; ``mean``: (N, K). The posterior gives each 1/K!."""
    orders, counts = torch.unique(mean.argsort(-1), dim=0, return_counts=True)
    return {tuple(o.tolist()): int(c) / mean.shape[0] for o, c in zip(orders, counts, strict=True)}
