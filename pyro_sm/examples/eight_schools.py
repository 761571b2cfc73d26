# SPDX-License-Identifier: Apache-2.0
r"""Eight schools, in both parametrisations, with reference draws' moments and the exact log evidence.

``y_j ~ N(θ_j, σ_j)``, ``θ_j ~ N(μ, τ)`` (or ``θ = μ + τ θ̃``, ``θ̃ ~ N(0,1)``), ``μ ~ N(0, 5)``, ``τ ~ C⁺(5)``.

Source: "Estimation in Parallel Randomized Experiments" https://doi.org/10.3102/10769986006004377 ; reference from
the posterior database https://github.com/stan-dev/posteriordb (BSD-3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sm.examples.errors import Errors, worst_errors


class Reference(NamedTuple):
    """``mean`` and ``sd``: (10,) of θ_1..θ_8, μ, τ, from 10,000 reference draws. ``log_evidence``: exact, nats."""

    mean: Tensor
    sd: Tensor
    log_evidence: float


def _content() -> dict[str, Any]:
    return json.loads(resources.files("pyro_sm.examples").joinpath("data/eight_schools.json").read_text())


def data() -> tuple[Tensor, Tensor]:
    """Effects ``y`` (8,) and their standard errors (8,)."""
    content = _content()["data"]
    return torch.tensor(content["y"], dtype=torch.float32), torch.tensor(content["sigma"], dtype=torch.float32)


def reference() -> Reference:
    """Means and standard deviations of theta, mu and tau by reference draws, and the exact log evidence in nats."""
    content = _content()
    names = [*(f"theta[{j}]" for j in range(1, 9)), "mu", "tau"]
    rows = [content["reference"][name] for name in names]
    return Reference(
        torch.tensor([row["mean"] for row in rows]),
        torch.tensor([row["sd"] for row in rows]),
        content["exact"]["logZ_proper_halfcauchy"],
    )


class Exact(NamedTuple):
    """``mean`` and ``sd`` by name (``theta[1]``, …, ``mu``, ``tau``) and ``log_evidence``, nats: by quadrature."""

    mean: Mapping[str, float]
    sd: Mapping[str, float]
    log_evidence: float


def exact() -> Exact:
    """The answer without Monte Carlo error: θ integrated analytically, a grid over (μ, log τ)."""
    content = _content()["exact"]
    return Exact(content["mean"], content["sd"], content["logZ_proper_halfcauchy"])


def centered(y: Tensor, sigma: Tensor) -> None:
    """``θ`` as a latent site: a funnel in (θ, τ)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, sigma), obs=y)


def noncentered(y: Tensor, sigma: Tensor) -> None:
    """``θ̃`` as a latent site, ``θ`` deterministic."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        raw = pyro.sample("theta_raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("effect", dist.Normal(theta, sigma), obs=y)


def errors(samples: Mapping[str, Tensor]) -> Errors:
    """Compare draws (with sites theta, mu, tau; sample dimension first) with the reference."""
    truth = reference()
    draws = torch.cat([samples["theta"], samples["mu"][:, None], samples["tau"][:, None]], 1).double()
    return worst_errors(draws, truth.mean, truth.sd)
