# SPDX-License-Identifier: Apache-2.0
"""The demo: two real posteriors with known answers, from model to verdict, with NetCDF and pictures to look at."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_sm.diagnostics import Verdict, plot_khat, plot_raw_vs_weighted, plot_training, summary_table
from pyro_sm.examples import eight_schools, galaxies
from pyro_sm.sampler import DiffusionSampler, StoppingRule


def stopping_within(budget: int | None) -> StoppingRule:
    """The default rule, with this budget if there is one."""
    return StoppingRule() if budget is None else StoppingRule(max_evaluations=budget)


def looked_elsewhere(verdict: Verdict) -> str:
    """What the probe behind a verdict took: a line for the foot of the report, which does not count it."""
    found = verdict.findings.probe
    if found is None:
        return "probe         none"
    spent = found.evaluations
    return f"probe         {spent.values} density and {spent.scores} gradient evaluations, on top of the cost above"


def _write(sampler: DiffusionSampler, folder: Path, name: str, variables: Sequence[str]) -> Any:
    """NetCDF and three pictures; returns the ArviZ object."""
    idata = sampler.to_arviz()
    written = [folder / f"{name}.nc"]
    idata.to_netcdf(written[0])
    for kind, figure in (
        ("training", plot_training(sampler.history)),
        ("pairs", plot_raw_vs_weighted(idata, list(variables))),
        ("khat", plot_khat(idata)),
    ):
        written.append(folder / f"{name}-{kind}.png")
        figure.savefig(written[-1], dpi=120)
    print("written:", ", ".join(str(path) for path in written), flush=True)
    return idata


def galaxy_demo(
    folder: Path, *, num_components: int, shared_variance: bool, seed: int, stopping: StoppingRule, check: bool = True
) -> None:
    """Train on the galaxy mixture; print summary, evidence against the literature, and the share per labelling."""
    kind = "one variance" if shared_variance else "a variance each"
    print(f"\n== Galaxy velocities: mixture of {num_components} normals, {kind} ==", flush=True)
    started = time.monotonic()
    model = galaxies.galaxy_mixture(num_components, shared_variance=shared_variance)
    sampler = DiffusionSampler(model, seed=seed, stopping=stopping)
    sampler.run(galaxies.velocities())
    seconds = time.monotonic() - started
    verdict = sampler.check() if check else None  # before the export, which records it
    mean = sampler.get_samples(4000)["mean"]
    idata = _write(sampler, folder, f"galaxies-{num_components}{'-shared' if shared_variance else ''}", ["mean"])
    print(summary_table(idata))
    print(sampler.report())
    if verdict is not None:
        print(looked_elsewhere(verdict))
    reference = galaxies.REFERENCE_LOG_EVIDENCE.get((num_components, shared_variance))
    if reference is not None:
        error = sampler.log_evidence - reference
        print(f"literature    log evidence {reference:.2f}: ours differs by {error:+.3f}")
    shares = galaxies.labelling_shares(mean)
    orders = list(itertools.permutations(range(num_components)))
    print(f"labellings    {len(orders)} modes of equal weight, {1 / len(orders):.3f} of the draws each; found:")
    print("              " + "  ".join(f"{''.join(map(str, o))}: {shares.get(o, 0.0):.3f}" for o in orders))
    print(f"time          {seconds:.0f} s, {torch.get_num_threads()} threads")


def eight_schools_demo(folder: Path, *, seed: int, stopping: StoppingRule, check: bool = True) -> None:
    """Train on eight schools (non-centred) and compare with the reference draws."""
    print("\n== Eight schools, non-centred ==", flush=True)
    started = time.monotonic()
    sampler = DiffusionSampler(eight_schools.noncentered, seed=seed, stopping=stopping)
    sampler.run(*eight_schools.data())
    seconds = time.monotonic() - started
    verdict = sampler.check() if check else None
    idata = _write(sampler, folder, "eight-schools", ["mu", "tau", "theta_raw"])
    print(summary_table(idata, ["mu", "tau", "theta"]))
    print(sampler.report())
    if verdict is not None:
        print(looked_elsewhere(verdict))
    worst = eight_schools.errors(sampler.get_samples(20_000))
    print(f"reference     worst error of a mean {worst.mean:.3f}, of an sd {worst.sd:.3f} (in reference sds)")
    exact = eight_schools.reference().log_evidence
    print(f"exact         log evidence {exact:.3f}: ours differs by {sampler.log_evidence - exact:+.3f}")
    print(f"time          {seconds:.0f} s, {torch.get_num_threads()} threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    parser.add_argument("--out", default="pyro_sm_demo", help="folder for NetCDF and pictures (default %(default)s)")
    parser.add_argument("--components", type=int, default=3, help="of the galaxy mixture (default %(default)s)")
    parser.add_argument("--shared-variance", action="store_true", help="one variance for all components")
    parser.add_argument("--only-galaxies", action="store_true", help="leave eight schools out")


def run(options: argparse.Namespace) -> None:
    """The galaxies, then eight schools."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    stopping = stopping_within(options.budget)
    galaxy_demo(
        folder,
        num_components=options.components,
        shared_variance=options.shared_variance,
        seed=options.seed,
        stopping=stopping,
        check=not options.no_check,
    )
    if not options.only_galaxies:
        eight_schools_demo(folder, seed=options.seed, stopping=stopping, check=not options.no_check)
