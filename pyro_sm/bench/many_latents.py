# SPDX-License-Identifier: Apache-2.0
r"""Hundreds of latents: centred group effects, as in the radon data, with an evidence that is known.

``μ ~ N(0, 5²)``, ``σ_a ~ N⁺(0, 1)``, ``σ_y ~ N⁺(0, 2²)``; for J groups ``a_j ~ N(μ, σ_a²)``, and eight rows of each,
``y_{jk} ~ N(a_j, σ_y²)``: ``J + 3`` latents, centred. Effects and mean can be integrated by hand: with the means of
groups ``ȳ``,

    ``p(y | σ_a, σ_y) = N(ȳ; 0, (σ_a² + σ_y²/8) I + 25 11ᵀ) Π_j (2π σ_y²)^{−7/2} 8^{−½} exp(−SS_j/2σ_y²)``,

and the two scales on a grid.

``base`` are the weights of :class:`~pyro_sm.BatchAndMatchBase` as it is; ``sampler`` is ``DiffusionSampler`` from it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.bench.rows import Row, machine, resumed
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.guides import BatchAndMatchBase
from pyro_sm.model.density import ModelDensity
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth

_ROWS = 8
_POOL = 10_000
_GRID = 801
_NEGLIGIBLE = 45.0  # nats below the highest
WAYS = ("base", "sampler")


class Effects(NamedTuple):
    """``y`` (J, 8), and the ``model`` of it."""

    y: Tensor
    model: Callable[[], None]


def group_effects(num_groups: int) -> Effects:
    """Data drawn once and for all: ``μ = 1.2``, ``σ_a = .35``, ``σ_y = .75``."""
    generator = torch.Generator().manual_seed(0)
    effect = 1.2 + 0.35 * torch.randn(num_groups, 1, generator=generator)
    y = effect + 0.75 * torch.randn(num_groups, _ROWS, generator=generator)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(2.0))
        with pyro.plate("groups", num_groups, dim=-2):
            effects = pyro.sample("effects", dist.Normal(mean, spread))
            with pyro.plate("rows", _ROWS, dim=-1):
                pyro.sample("y", dist.Normal(effects, noise), obs=y)

    return Effects(y, model)


def _log_joint(y: Tensor, log_spread: Tensor, log_noise: Tensor) -> Tensor:
    """``log p(y, log σ_a, log σ_y)`` over a grid, (A, B), float64."""
    count, rows = y.shape
    y = y.double()
    means = y.mean(1)
    within = (y - means[:, None]).square().sum()
    noise, spread = torch.exp(log_noise)[None], torch.exp(log_spread)[:, None]
    own = spread.square() + noise.square() / rows  # variance of a group's mean
    between = (means - means.mean()).square().sum()
    total = own + 25 * count
    log_means = -0.5 * (
        count * math.log(2 * math.pi)
        + (count - 1) * own.log()
        + total.log()
        + between / own
        + count * means.mean().square() / total
    )
    log_rows = -0.5 * count * ((rows - 1) * torch.log(2 * math.pi * noise.square()) + math.log(rows))
    prior = dist.HalfNormal(1.0).log_prob(spread) + dist.HalfNormal(2.0).log_prob(noise)
    jacobian = log_spread[:, None] + log_noise[None]
    return log_means + log_rows - 0.5 * within / noise.square() + prior + jacobian


def log_evidence(y: Tensor) -> float:
    """By the trapezoidal rule, on a grid that is drawn anew around what a coarse one finds."""
    low, high = torch.tensor([-8.0, -8.0]).double(), torch.tensor([3.0, 3.0]).double()
    found = 0.0
    for _ in range(3):
        axes = [
            torch.linspace(float(a), float(b), _GRID, dtype=torch.float64) for a, b in zip(low, high, strict=True)
        ]
        log_p = _log_joint(y, *axes)
        cell = sum(math.log(float(axis[1] - axis[0])) for axis in axes)
        found = float(torch.logsumexp(log_p.flatten(), 0)) + cell
        inside = (log_p > log_p.max() - _NEGLIGIBLE).nonzero()
        first, last = (inside.min(0).values - 1).clamp(min=0), (inside.max(0).values + 1).clamp(max=_GRID - 1)
        low = torch.stack([axis[i] for axis, i in zip(axes, first, strict=True)])
        high = torch.stack([axis[i] for axis, i in zip(axes, last, strict=True)])
    return found


def _by_base(effects: Effects, seed: int) -> tuple[Draws, int, int]:
    torch.manual_seed(seed)
    density = ModelDensity(effects.model, ())
    law = BatchAndMatchBase().fit(density)
    spent = density.evaluations.values
    z = law.loc + torch.randn(_POOL, density.dim) @ law.scale_tril.T
    log_p = density.log_prob(z)
    return Draws(z, log_p, log_p - gaussian_log_prob(z, *law)), spent, 0


def _by_sampler(effects: Effects, seed: int, evaluations: int) -> tuple[Draws, int, int]:
    stopping = StoppingRule(max_evaluations=evaluations)
    sampler = DiffusionSampler(
        effects.model, base=BatchAndMatchBase(), stopping=stopping, seed=seed, disable_progbar=True
    )
    sampler.run()
    return sampler.draws(_POOL), sampler.objective.evaluations.values, len(sampler.history)


def measure(num_groups: int, way: str, seed: int, evaluations: int) -> Row:
    """A row: errors and weights of 10,000 draws; ``evaluations`` are those before them."""
    effects = group_effects(num_groups)
    started = time.process_time()
    draws, spent, rounds = _by_base(effects, seed) if way == "base" else _by_sampler(effects, seed, evaluations)
    estimate = evidence(draws.log_weight)
    return {
        "groups": num_groups,
        "way": way,
        "seed": seed,
        "budget": evaluations,
        "latents": num_groups + 3,
        "log Z error": estimate.log_evidence - log_evidence(effects.y),
        "log Z se": estimate.log_evidence_se,
        "khat": pareto_smooth(draws.log_weight).khat,
        "ESS": effective_sample_size(draws.log_weight) / len(draws.log_weight),
        "evaluations": spent,
        "rounds": rounds,
        "CPU s": time.process_time() - started,
        "machine": machine(),
    }


def line(row: Row) -> str:
    """A row in words."""
    return (
        f"{row['latents']} latents, {row['way']}, seed {row['seed']}: log Z error {row['log Z error']:+.3f} ± "
        f"{row['log Z se']:.3f}, ESS {row['ESS']:.3f}, khat {row['khat']:.2f}; {row['evaluations']:,} evaluations, "
        f"{row['rounds']} rounds, {row['CPU s']:.0f} CPU s"
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    head = "| latents: way (seed) | log Z error ± se | ESS | k̂ | evaluations | CPU s |\n|---|---|---|---|---|---|"
    body = [
        f"| {row['latents']}: {row['way']} ({row['seed']}) | {row['log Z error']:+.3f} ± {row['log Z se']:.3f} | "
        f"{row['ESS']:.2f} | {row['khat']:.2f} | {row['evaluations']:,} | {row['CPU s']:.0f} |"
        for row in rows
    ]
    return "\n".join([head, *body])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench many-latents``."""
    parser.add_argument("--groups", type=int, nargs="+", default=[87, 297])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=60_000, help="of base and training (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="rows already in it are not repeated")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    if min([*options.groups, options.evaluations]) < 1:
        raise ValueError("expected positive --groups and --evaluations")
    print(machine())
    keys = [
        {"groups": groups, "way": way, "seed": seed, "budget": options.evaluations}
        for groups in options.groups
        for seed in options.seeds
        for way in options.ways
    ]
    rows = []
    for row in resumed(keys, lambda key: measure(key["groups"], key["way"], key["seed"], key["budget"]), options.out):
        rows.append(row)
        print(f"[{len(rows)}/{len(keys)}] {line(row)}", flush=True)
    if options.markdown:
        print(f"\n{markdown(rows)}")
