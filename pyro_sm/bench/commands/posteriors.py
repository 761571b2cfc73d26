# SPDX-License-Identifier: Apache-2.0
r"""Fifteen real posteriors with reference draws: AutoDiffusion, NUTS, and Pyro's Gaussian and flow guides.

``python -m pyro_sm bench posteriors --out F.jsonl``: one row per posterior and way, appended as it ends; a row that
is in the file is not run again. Nothing is told about a posterior: the sampler starts where ``AutoDiffusion(model)``
does, the others at the origin of unconstrained space (Pyro's ``init_to_feasible``, which cannot do
improper priors; neither can ``AutoIAFNormal``, which insists on it).

Columns: worst error of a mean and of an sd in reference standard deviations (the reference's own Monte Carlo error is
in them), over 10,000 draws after the correction (importance resampling; NUTS: all it has); ``log Z`` less the exact
one, nats, where that is known; k̂ and effective share of the pool; the verdict of :meth:`DiffusionSampler.check
<pyro_sm.DiffusionSampler.check>`, whose probe is counted apart; evaluations of density and gradient; CPU seconds of
the fit, and of 10,000 usable draws after it. NUTS runs four chains, one after the other, each with a quarter of the
time that is allowed; what it has by then counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal

from pyro_sm.bench.judge import weight_figures
from pyro_sm.bench.methods.chains import TimedChains
from pyro_sm.bench.methods.fit import Budget, Fit
from pyro_sm.bench.methods.sampler import fit_by_sampler
from pyro_sm.bench.methods.svi import ElboWay, init_to_origin
from pyro_sm.bench.problem import Problem, from_posterior, in_float64, selected
from pyro_sm.bench.rows import Row, add_markdown, add_out, reason, run_all
from pyro_sm.bench.table import (
    Costs,
    Estimate,
    Table,
    Words,
    count,
    entry,
    figure,
    fixed,
    lines,
    split,
)
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.examples.posteriors import Posterior
from pyro_sm.weights import evidence

KEYS = ("posterior", "way", "seed", "budget")
"""What identifies a row."""
GOOD = 0.05
"""Reference sds within which a mean or an sd is called right: as many as 400 independent draws would be off by."""


class Limits(NamedTuple):
    """What a way may spend: ``evaluations`` of training, CPU ``seconds`` of NUTS."""

    evaluations: int
    seconds: float


def _normal(model: Callable[..., None]) -> AutoMultivariateNormal:
    return AutoMultivariateNormal(model, init_loc_fn=init_to_origin)


Way = Callable[[Problem, int, Budget], Fit]
WAYS: dict[str, Callable[[Limits], Way]] = {
    "sampler": lambda limits: fit_by_sampler,
    "nuts": lambda limits: TimedChains(limits.seconds),
    "auto-mvn": lambda limits: ElboWay(_normal),
    "auto-iaf": lambda limits: ElboWay(AutoIAFNormal),
}
"""The ways by the names of the command line."""


# ---------------------------------------------------------------------------------------------------- measuring


def measure(posterior: Posterior, way: str, seed: int, limits: Limits) -> Row:
    """Fit and compare with the reference; a fit that fails is a row that says why."""
    row: Row = dict(zip(KEYS, (posterior.name, way, seed, limits.evaluations), strict=True))
    started = time.process_time()
    problem = from_posterior(posterior)
    try:
        with in_float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of improper priors, which the models mean, and of weights
            fit = WAYS[way](limits)(problem, seed, Budget(limits.evaluations))
            row |= problem.judged(fit.samples)
    except Exception as error:
        return {**row, "failed": reason(error), "CPU s": time.process_time() - started}
    row |= {"density": fit.training.values, "gradient": fit.training.scores, "CPU s": fit.training.seconds}
    row |= {"drawing": fit.drawing.seconds, "probe": fit.probe, "verdict": fit.verdict, "note": fit.note}
    if fit.log_weight is not None:
        row["log Z"] = evidence(fit.log_weight).log_evidence
    return row | weight_figures(fit, problem.log_evidence)


# ------------------------------------------------------------------------------------------------------- tables

_ERRORS = (figure("mean error"), figure("sd error"))
_COLUMNS = (
    *_ERRORS,
    Estimate("log Z error ± se", "log Z error", "log Z se"),
    figure("khat", fixed(2), "k̂"),
    figure("ESS", fixed(2), larger_is_better=True),
    Words("verdict", lambda row: row["verdict"]),
    Costs("evaluations: density / gradient", (entry("density"), entry("gradient")), " / "),
    Costs("CPU s: fit + 10,000 draws", (entry("CPU s"), entry("drawing", fixed(1)))),
)


def line(row: Row) -> str:
    """A row in words."""
    head = f"{row['posterior']}, {row['way']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: failed ({row['failed']}), {row['CPU s']:.0f} CPU s"
    keys = ("mean error", "sd error", "log Z error", "khat", "ESS")
    figures = ", ".join(f"{key} {figure(key).text([row])}" for key in keys)
    spent = f"{row['density']:,} evaluations, {row['CPU s']:.0f} + {row['drawing']:.1f} CPU s"
    return f"{head}: {figures}; {row['verdict'] or 'no verdict'}; {spent}; {row['note']}"


def _worse_error(row: Row) -> float:
    return max(row["mean error"], row["sd error"])


def _summary(way: str, rows: Sequence[Row]) -> str:
    errors = [math.inf if "failed" in row else _worse_error(row) for row in rows]
    within = sum(error <= GOOD for error in errors)
    seconds = sum(row["CPU s"] + row.get("drawing", 0.0) for row in rows)
    middle = fixed(3)(statistics.median(errors))
    found = f"median of the worse error {middle}, {within} of {len(rows)} within {GOOD}"
    return f"{way}: {found}, {count(seconds)} CPU s in all."


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and a line for each way below it."""
    found = lines(rows, lambda row: (row["posterior"], row["way"]))
    text = [as_markdown(("posterior", "way"), found, _COLUMNS)]
    for (way,), chosen in lines(rows, lambda row: (row["way"],)):
        text += ["", _summary(way, chosen)]
    return "\n".join(text)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each budget."""
    return split(rows, lambda row: f"{row['budget']:,} evaluations", markdown)


# -------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench posteriors``."""
    parser.add_argument("--posteriors", nargs="*", default=[], metavar="NAME", help="these only (part of a name)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--evaluations", type=int, default=30_000, help="of training (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU time of NUTS per fit (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)
    add_markdown(parser)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    if options.evaluations < 1 or not options.seconds > 0:
        raise ValueError("expected --evaluations >= 1 and --seconds > 0")
    known = {posterior.name: posterior for posterior in selected(options.posteriors)}
    limits = Limits(options.evaluations, options.seconds)

    def measured(key: Row) -> Row:
        return measure(known[key["posterior"]], key["way"], key["seed"], limits)

    keys = [
        dict(zip(KEYS, (name, way, options.seed, options.evaluations), strict=True))
        for name in known
        for way in options.ways
    ]
    rows = run_all(keys, len(keys), measured, line, options.out)
    if options.markdown:
        print(f"\n{markdown(rows)}")
