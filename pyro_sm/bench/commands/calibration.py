# SPDX-License-Identifier: Apache-2.0
r"""Simulation-based calibration: ranks of parameters drawn from the prior, over many small fits.

``python -m pyro_sm bench calibration --models eight-schools logistic --datasets 100 --evaluations 8000 --out F.jsonl
--figure F.png``: for each data set drawn from the model, a fit with everything at its default but the budget, and the
rank of the truth among 99 of its draws. One row per data set, appended as it ends; a row that is in the file is not
run again, and Ctrl-C loses the data set under way. Ways: ``sampler``, usable draws (importance resampling); ``raw``,
the same guide's draws without their weights; ``auto-normal``, Pyro's mean-field guide with ``Trace_ELBO``, which is
too narrow. See ``diagnostics/calibration/`` for what is tested.

Columns: per test quantity, the exact p-value of the ECDF of its ranks and that of χ², their mean (of right ones 0.5)
and their spread (of right ones 1); below, the smallest p-value times the number of test quantities. Above, what the
weights of the fits were like, and evaluations and CPU seconds of a data set: of training, of 4000 draws after it, of
ranking.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_sm.bench.methods.sampler import sampler_within
from pyro_sm.bench.methods.svi import NUM_PARTICLES, ClippedDecay, train
from pyro_sm.bench.problem import Problem
from pyro_sm.bench.rows import Row, add_out, good, reason, run_all
from pyro_sm.bench.table import Table, split
from pyro_sm.corrections import ImportanceResampling, NoCorrection
from pyro_sm.diagnostics.calibration.simulation import (
    Calibration,
    Fit,
    Fitted,
    Replication,
    Simulated,
    simulation_based_calibration,
)
from pyro_sm.diagnostics.export import KHAT_THRESHOLD
from pyro_sm.diagnostics.plots.calibration import plot_calibration
from pyro_sm.examples import eight_schools

KEYS = ("model", "way", "seed", "budget", "draws", "dataset")
"""What identifies a row."""
_RANKED = 99  # so that ranks have a hundred values
_SAMPLES = 4000  # to take them from, thinned: resampled draws repeat, and those of a Markov chain are alike
_NORMAL_DECAY = ClippedDecay(0.03, 0.02)  # 500 steps have to do, and the last of them must not wander

# ----------------------------------------------------------------------------------------------------- models


def eight_schools_problem() -> Problem:
    """Eight schools, non-centred, ``μ ~ N(0, 10)``, ``τ ~ N⁺(10)``, with the standard errors of the real data."""

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfNormal(10.0))
        with pyro.plate("school", 8):
            raw = pyro.sample("theta_raw", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * raw)
            pyro.sample("effect", dist.Normal(theta, sigma), obs=y)

    return Problem(model, eight_schools.data(), sites=("mu", "tau", "theta"))


def logistic_problem() -> Problem:
    """Logistic regression: 60 rows, an intercept and four correlated columns, ``β ~ N(0, 1.5)``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    x[:, 1] += x[:, 0]
    design = torch.cat([torch.ones(60, 1), x], 1)

    def model(design: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 1.5).to_event(1))
        with pyro.plate("row", 60):
            pyro.sample("y", dist.Bernoulli(logits=(design * beta).sum(-1)), obs=y)

    return Problem(model, (design, torch.zeros(60)), sites=("beta",))


MODELS: dict[str, Callable[[], Problem]] = {"eight-schools": eight_schools_problem, "logistic": logistic_problem}
"""By the names of the command line."""

# ------------------------------------------------------------------------------------------------------- ways


def fit_by_sampler(evaluations: int, *, raw: bool = False) -> Fit:
    """``DiffusionSampler``, at its defaults but for the budget; ``raw``: the guide's draws without their weights."""

    def fit(simulated: Simulated) -> Fitted:
        started = time.process_time()
        sampler = sampler_within(simulated.model, simulated.seed, evaluations)
        sampler.run(*simulated.args, **simulated.kwargs)
        trained = time.process_time()
        samples = sampler.get_samples(_SAMPLES, correction=NoCorrection() if raw else ImportanceResampling())
        info = {"khat": sampler.khat, "ESS": sampler.ess, "density": sampler.objective.evaluations.values}
        sampler.guide.release()
        return Fitted(samples, {**info, "CPU s": trained - started, "drawing": time.process_time() - trained})

    return fit


def fit_by_normal(evaluations: int) -> Fit:
    """Pyro's mean-field ``AutoNormal`` with ``Trace_ELBO``, 16 particles a step, and its draws as they are."""

    def fit(simulated: Simulated) -> Fitted:
        started = time.process_time()
        args, kwargs = simulated.args, simulated.kwargs
        with torch.random.fork_rng():
            torch.manual_seed(simulated.seed)
            pyro.clear_param_store()
            guide = AutoNormal(simulated.model)
            steps = max(evaluations // NUM_PARTICLES, 1)
            loss = Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)
            train(simulated.model, args, guide, loss, _NORMAL_DECAY, steps)
            trained = time.process_time()
            with torch.no_grad(), pyro.plate("draws", _SAMPLES, dim=-2):
                samples = guide(*args, **kwargs)
                values = pyro.poutine.trace(pyro.poutine.condition(simulated.model, data=samples))
                sites: dict[str, Any] = values.get_trace(*args, **kwargs).nodes
        draws = {
            name: sites[name]["value"].reshape(_SAMPLES, *truth.shape) for name, truth in simulated.truth.items()
        }
        spent = {"CPU s": trained - started, "drawing": time.process_time() - trained}
        return Fitted(draws, {"density": steps * NUM_PARTICLES, **spent})

    return fit


WAYS: dict[str, Callable[[int], Fit]] = {
    "sampler": fit_by_sampler,
    "raw": lambda evaluations: fit_by_sampler(evaluations, raw=True),
    "auto-normal": fit_by_normal,
}
"""From a budget of evaluations to a fit, by the names of the command line."""

# -------------------------------------------------------------------------------------------------------- rows


def measure(name: str, way: str, index: int, seed: int, evaluations: int) -> Row:
    """A data set as a row; a fit that fails is a row that says why."""
    row: Row = dict(zip(KEYS, (name, way, seed, evaluations, _RANKED, index), strict=True))
    problem, started = MODELS[name](), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of weights: the row has their k̂
            (one,) = simulation_based_calibration(
                problem.model, WAYS[way](evaluations), problem.args,
                datasets=[index], num_draws=_RANKED, sites=problem.sites, seed=seed,
            )  # fmt: skip
    except Exception as error:
        return {**row, "failed": reason(error), "all CPU s": time.process_time() - started}
    return {**row, "ranks": one.ranks, **one.info, "all CPU s": time.process_time() - started}


def line(row: Row) -> str:
    """A row in words."""
    head = f"{row['model']} {row['dataset']}"
    if "failed" in row:
        return f"{head}: failed ({row['failed']})"
    weights = f"k̂ {row['khat']:.2f}, ESS {row['ESS']:.2f}, " if "khat" in row else ""
    return f"{head}: {weights}{row['density']:,} evaluations, {row['all CPU s']:.1f} CPU s"


# ------------------------------------------------------------------------------------------------------- tables


def calibration_of(rows: Sequence[Row]) -> Calibration | None:
    """Of the rows that have ranks; None if there are none."""
    ranked = [Replication(row["dataset"], row["ranks"], {}) for row in good(rows)]
    return Calibration.of(ranked, _RANKED) if ranked else None


def weights_line(rows: Sequence[Row]) -> str:
    """What the weights of the fits were like, what the fits took, and how many failed."""
    done = good(rows)
    parts = [f"{len(rows) - len(done)} of {len(rows)} fits failed"]
    if done and "khat" in done[0]:
        # A weight's tail that could not be fitted is NaN, and not known to be good.
        heavy = sum(not row["khat"] <= KHAT_THRESHOLD for row in done)
        share = statistics.median(row["ESS"] for row in done)
        parts.append(f"k̂ > {KHAT_THRESHOLD} in {heavy} of {len(done)}, median ESS {share:.2f}")
    if done:
        seconds, density = (statistics.median(row[key] for row in done) for key in ("all CPU s", "density"))
        parts.append(f"median of a data set {density:,.0f} evaluations, {seconds:.1f} CPU s")
    return "; ".join(parts)


def _of_one_model(rows: Sequence[Row]) -> str:
    """A table of its test quantities, a line above it and a line below."""
    calibration = calibration_of(rows)
    text = [f"{weights_line(rows)}."]
    if calibration is None:
        return text[0]
    text += ["", "| test quantity | p (ECDF) | p (χ²) | mean rank | spread |", "|---|---|---|---|---|"]
    for quantity, test in calibration.tests().items():
        mean, spread = calibration.shape(quantity)
        text.append(f"| {quantity} | {test.p_value:.3f} | {test.chi_square:.3f} | {mean:.3f} | {spread:.2f} |")
    worst, corrected = calibration.smallest()
    text += ["", f"Smallest of {len(calibration.ranks)}: {worst}, p = {corrected:.3f} after Bonferroni."]
    return "\n".join(text)


def markdown(rows: Sequence[Row]) -> str:
    """Per model, a table of its test quantities and a line below it."""
    of_models = split(rows, lambda row: row["model"], _of_one_model)
    return "\n\n".join(f"**{table.title}**: {table.text}" for table in of_models)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each model, way, seed and budget."""

    def setting(row: Row) -> str:
        return f"{row['model']}, {row['way']}, {row['budget']:,} evaluations, seed {row['seed']}"

    return split(rows, setting, _of_one_model)


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench calibration``."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--way", default="sampler", choices=list(WAYS), help="what is fitted (default %(default)s)")
    parser.add_argument("--datasets", type=int, default=100, help="per model (default %(default)s)")
    parser.add_argument("--evaluations", type=int, default=8000, help="of training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="picture of the ranks")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README at the end")
    add_out(parser)


def _print_tests(rows: Sequence[Row], models: Sequence[str]) -> dict[str, Calibration]:
    found: dict[str, Calibration] = {}
    for name in models:
        chosen = [row for row in rows if row["model"] == name]
        calibration = calibration_of(chosen)
        print(f"\n{name}: {weights_line(chosen)}")
        if calibration is not None:
            print(calibration)
            found[name] = calibration
    return found


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each data set ends, then the tests."""
    if options.evaluations < 1 or options.datasets < 1:
        raise ValueError(
            f"expected --evaluations >= 1 and --datasets >= 1, found {options.evaluations} and {options.datasets}"
        )

    def measured(key: Row) -> Row:
        return measure(key["model"], key["way"], key["dataset"], key["seed"], key["budget"])

    # The models in turn, so that a run that is stopped has something to say on each.
    wanted = [
        dict(zip(KEYS, (name, options.way, options.seed, options.evaluations, _RANKED, index), strict=True))
        for index in range(options.datasets)
        for name in options.models
    ]
    rows = run_all(wanted, len(wanted), measured, line, options.out)
    found = _print_tests(rows, options.models)
    if options.markdown:
        print(f"\n{markdown(rows)}")
    if options.figure is not None and found:
        plot_calibration(found).savefig(options.figure, dpi=110)
        print(f"written: {options.figure}")
