# SPDX-License-Identifier: Apache-2.0
r"""Hundreds of latents: centred group effects, as in the radon data, with an evidence that is known.

``python -m pyro_sm bench many-latents``; the model and its evidence: :mod:`pyro_sm.bench.group_effects`.

Columns: latents and way: ``base`` are the weights of :class:`~pyro_sm.BatchAndMatchBase` as it is; ``sampler`` is
``DiffusionSampler`` from it. Error of log Z (nats) with its own standard error; effective share and k̂ of 10,000
draws; evaluations before them; CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from pyro_sm.base import Draws
from pyro_sm.bench.group_effects import Effects, group_effects, log_evidence
from pyro_sm.bench.judge import weight_figures
from pyro_sm.bench.methods.fit import Cost, Fit
from pyro_sm.bench.methods.sampler import sampler_within
from pyro_sm.bench.rows import Row, add_markdown, add_out, reason, run_all
from pyro_sm.bench.table import Costs, Estimate, Table, entry, figure, fixed, lines, split
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.guides import BatchAndMatchBase
from pyro_sm.model.density import ModelDensity

_POOL = 10_000  # draws weighed: an evidence to a hundredth of a nat at an effective share of a half
KEYS = ("groups", "way", "seed", "budget")
"""What identifies a row."""
WAYS = ("base", "sampler")


def _by_base(effects: Effects, seed: int) -> tuple[Draws, int, int]:
    torch.manual_seed(seed)
    density = ModelDensity(effects.model, ())
    law = BatchAndMatchBase().fit(density)
    spent = density.evaluations.values
    z = law.loc + torch.randn(_POOL, density.dim) @ law.scale_tril.T
    log_p = density.log_prob(z)
    return Draws(z, log_p, log_p - gaussian_log_prob(z, *law)), spent, 0


def _by_sampler(effects: Effects, seed: int, evaluations: int) -> tuple[Draws, int, int]:
    sampler = sampler_within(effects.model, seed, evaluations, base=BatchAndMatchBase())
    sampler.run()
    return sampler.draws(_POOL), sampler.objective.evaluations.values, len(sampler.history)


def measure(num_groups: int, way: str, seed: int, evaluations: int) -> Row:
    """A row: errors and weights of 10,000 draws; ``evaluations`` are those before them. Or why there is none."""
    effects = group_effects(num_groups)
    row = {**dict(zip(KEYS, (num_groups, way, seed, evaluations), strict=True)), "latents": num_groups + 3}
    started = time.process_time()
    try:
        draws, spent, rounds = _by_base(effects, seed) if way == "base" else _by_sampler(effects, seed, evaluations)
    except (ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:
        return {**row, "failed": reason(error), "CPU s": time.process_time() - started}
    fit = Fit({}, Cost(spent, 0, 0.0), Cost(_POOL, 0, 0.0), draws.log_weight)
    return {
        **row,
        **weight_figures(fit, log_evidence(effects.y)),
        "evaluations": spent,
        "rounds": rounds,
        "CPU s": time.process_time() - started,
    }


_COLUMNS = (
    Estimate("log Z error ± se", "log Z error", "log Z se"),
    figure("ESS", fixed(2), larger_is_better=True),
    figure("khat", fixed(2), "k̂"),
    Costs("evaluations", (entry("evaluations"),)),
    Costs("CPU s", (entry("CPU s"),)),
)


def line(row: Row) -> str:
    """A row in words."""
    if "failed" in row:
        return f"{row['latents']} latents, {row['way']}, seed {row['seed']}: {row['failed']}"
    return (
        f"{row['latents']} latents, {row['way']}, seed {row['seed']}: log Z error {row['log Z error']:+.3f} ± "
        f"{row['log Z se']:.3f}, ESS {row['ESS']:.3f}, khat {row['khat']:.2f}; {row['evaluations']:,} evaluations, "
        f"{row['rounds']} rounds, {row['CPU s']:.0f} CPU s"
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    found = lines(rows, lambda row: (f"{row['latents']}: {row['way']}",))
    return as_markdown(("latents: way",), found, _COLUMNS)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each budget."""
    return split(rows, lambda row: f"at most {row['budget']:,} evaluations", markdown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench many-latents``."""
    parser.add_argument("--groups", type=int, nargs="+", default=[87, 297])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=60_000, help="of base and training (default %(default)s)")
    add_out(parser)
    add_markdown(parser)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    if min([*options.groups, options.evaluations]) < 1:
        raise ValueError("expected positive --groups and --evaluations")

    def measured(key: Row) -> Row:
        return measure(key["groups"], key["way"], key["seed"], key["budget"])

    keys = [
        dict(zip(KEYS, (groups, way, seed, options.evaluations), strict=True))
        for groups in options.groups
        for seed in options.seeds
        for way in options.ways
    ]
    rows = run_all(keys, len(keys), measured, line, options.out)
    if options.markdown:
        print(f"\n{markdown(rows)}")
