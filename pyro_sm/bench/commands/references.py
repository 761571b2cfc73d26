# SPDX-License-Identifier: Apache-2.0
r"""Reference draws of the particle targets by long parallel tempering, with what speaks for and against them.

``python -m pyro_sm bench references --targets dw4 lj13 --out FOLDER`` writes ``NAME.npz`` (``latents`` (N, D),
float32) and ``NAME.json``. Printed and written: split-R̂ and effective draws of the energy and of ``Σ|x_i − x̄|²``
(the latents themselves have symmetries that no chain needs to visit), the mean energy in kT, the virial
``E[z · ∇E]``, which is D for a right energy and right draws, swap rates, and density evaluations.

Particles have no names and no orientation: every kept draw is permuted and turned at random, which leaves its law as
it is and makes the set symmetric.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pyro_sm
from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.nn.mean_free import MeanFree
from pyro_sm.smc import HamiltonianMove, ParallelTempering, Power, TemperedChains
from pyro_sm.smc.mixing import effective_draws, split_rhat
from pyro_sm.targets import DoubleWellParticles, LennardJones

Particles = DoubleWellParticles | LennardJones


class Reference(NamedTuple):
    """A target, and the run that is long enough for it."""

    make: Callable[..., Particles]
    sampler: ParallelTempering


REFERENCES = {
    "dw4": Reference(DoubleWellParticles, ParallelTempering(40, 5, 1000, 50, 400, HamiltonianMove(5), Power(0.2))),
    "lj13": Reference(LennardJones, ParallelTempering(40, 8, 1000, 50, 160, HamiltonianMove(10), Power(0.3))),
    "lj55": Reference(
        lambda dtype: LennardJones(55, dtype=dtype),
        ParallelTempering(8, 12, 2000, 250, 20, HamiltonianMove(20), Power(0.6)),
    ),
}


def symmetrised(z: Tensor, particles: MeanFree) -> Tensor:
    """Latents ``z`` (N, D) with the particles of each draw permuted, turned and mirrored at random."""
    x = particles.to_positions(z).unflatten(-1, (particles.num_bodies, particles.space_dim))
    order = torch.rand(x.shape[:2], device=z.device).argsort(1)
    x = x.gather(1, order[..., None].expand_as(x))
    q, r = torch.linalg.qr(torch.randn(len(z), particles.space_dim, particles.space_dim, dtype=z.dtype).to(z.device))
    # With the signs of the diagonal of r put back, q is uniform on the orthogonal matrices.
    turn = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return particles.to_latents((x @ turn).flatten(1))


def _with_error(values: Tensor) -> dict[str, float]:
    """Mean and sd of chains (C, S), the standard error of the mean by its effective draws, and split-R̂."""
    ess = float(effective_draws(values))
    sd = float(values.std())
    return {
        "mean": float(values.mean()),
        "se": sd / math.sqrt(ess),
        "sd": sd,
        "effective_draws": ess,
        "split_rhat": float(split_rhat(values)),
    }


def measure(chains: TemperedChains, target: Particles) -> dict[str, Any]:
    """What the chains say about themselves, of all draws."""
    return {
        "energy": _with_error(-chains.log_p),
        "squared_radius": _with_error(chains.z.square().sum(-1)),
        "virial": {**_with_error(-(chains.z * chains.score).sum(-1)), "expected": target.dim},
        "ladder": [rung._asdict() for rung in chains.ladder],
        "density_evaluations": chains.density_evaluations,
    }


def make_reference(name: str, sampler: ParallelTempering, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Draws (N, D), float64, in random order, and their provenance; draws from torch's global generator."""
    torch.manual_seed(seed)
    target = REFERENCES[name].make(dtype=torch.float64)
    density = FunctionDensity(target.log_prob, target.dim, dtype=torch.float64)
    start = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
    began = time.process_time()
    chains = sampler.run(density, start)
    provenance = {
        "target": target.name,
        "method": "parallel tempering with Hamiltonian moves; draws permuted, turned and mirrored at random",
        "command": f"python -m pyro_sm bench references --targets {name} --seed {seed} --out FOLDER",
        "settings": {
            "chains": sampler.num_chains,
            "temperatures": sampler.num_temperatures,
            "warm-up sweeps": sampler.num_warmup,
            "sweeps per chain": sampler.num_draws * sampler.thin,
            "sweeps per draw": sampler.thin,
            "draws per chain": sampler.num_draws,
            "leapfrog steps": sampler.move.num_leapfrog,
            "hottest beta": sampler.path.hottest,
        },
        "cpu_seconds": round(time.process_time() - began, 1),
        "pyro_sm": pyro_sm.__version__,
        "torch": torch.__version__,
        **measure(chains, target),
    }
    flat = chains.z.flatten(0, 1)
    return symmetrised(flat[torch.randperm(len(flat))], target.particles), provenance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--targets", nargs="+", choices=sorted(REFERENCES), default=["dw4", "lj13"])
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-draws", type=int, help="per chain, instead of the target's own number")
    parser.add_argument("--num-warmup", type=int, help="sweeps, instead of the target's own number")
    parser.add_argument("--thin", type=int, help="sweeps per draw, instead of the target's own number")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")


def _shown(name: str, found: dict[str, Any], count: int) -> str:
    parts = [f"{name}: {count} draws"]
    for quantity in ("energy", "squared_radius", "virial"):
        value = found[quantity]
        parts.append(f"{quantity} {value['mean']:.3f} ± {value['se']:.3f} (R̂ {value['split_rhat']:.4f})")
    rates = [rung["swap_rate"] for rung in found["ladder"][:-1]]
    parts.append(f"swap rates {min(rates):.2f} to {max(rates):.2f}")
    parts.append(f"{found['density_evaluations']:,} evaluations, {found['cpu_seconds']:.0f} s")
    return "; ".join(parts)


def run(options: argparse.Namespace) -> None:
    """Make, measure and write."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.targets:
        asked = {key: getattr(options, key) for key in ("num_draws", "num_warmup", "thin")}
        sampler = replace(
            REFERENCES[name].sampler, **{key: value for key, value in asked.items() if value is not None}
        )
        draws, provenance = make_reference(name, sampler, options.seed)
        np.savez_compressed(folder / f"{name}.npz", latents=draws.float().numpy())
        (folder / f"{name}.json").write_text(json.dumps(provenance, indent=1) + "\n")
        print(_shown(name, provenance, len(draws)))
