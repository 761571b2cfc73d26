# SPDX-License-Identifier: Apache-2.0
r"""Posteriors with known answers: evidence, moments and mode shares against the truth.

``python -m pyro_sm bench known-answers``: one row per problem, way and seed. Ways: ``sampler``, ``DiffusionSampler``
with its defaults and a budget; ``svi``, the two-line swap in Pyro's own loop, plain Adam, 1000 steps;
``svi-marginal``, the paper's form, 4000 steps (evaluations are not what it saves); ``nuts``, Pyro's, four chains.

Columns: error of log Z (nats) and its own standard error; k̂ and effective share of the final draws; modes found, with
the worst error of a mode's share or the total variation of all shares (of as many exact draws); the worst error of a
mean and of an sd in reference standard deviations; density evaluations of training and of draws (of NUTS: with
gradients); CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyro_sm.base import Draws
from pyro_sm.bench.judge import modes_found, weight_figures
from pyro_sm.bench.methods.chains import fit_by_chains
from pyro_sm.bench.methods.fit import Cost, Fit, begin
from pyro_sm.bench.methods.sampler import sampler_within
from pyro_sm.bench.methods.svi import Constant, Cosine, Schedule, train
from pyro_sm.bench.problem import Problem, Samples, by_site, named
from pyro_sm.bench.rows import PROVENANCE, Row, add_markdown, add_out, run_all
from pyro_sm.bench.table import Costs, Estimate, Part, Table, Words, entry, figure, fixed, lines
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.corrections import ImportanceResampling
from pyro_sm.diagnostics import draw_from_guide
from pyro_sm.examples import eight_schools, galaxies
from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives import ImportanceWeightedScoreMatching, MarginalWeights
from pyro_sm.targets.gaussian_mixture import GaussianMixture

KEYS = ("problem", "way", "seed")
"""What identifies a row."""
_POOL = 40_000  # weighted draws, half of which are resampled: shares of 24 labellings to a third of a percent
_SCALE = 25.0  # of the base for GMM-40, whose prior is improper: the user must say where to look

# ----------------------------------------------------------------------------------------------------- problems


def _eight_schools_errors(samples: Samples) -> dict[str, float]:
    return named(eight_schools.errors(samples))


def _galaxy_errors(samples: Samples) -> dict[str, float]:
    shares = galaxies.labelling_shares(samples["mean"])
    modes = math.factorial(len(list(samples["mean"][0])))
    worst = max(abs(share - 1 / modes) for share in shares.values())
    return {"modes": len(shares), "worst share error": max(worst, 0.0 if len(shares) == modes else 1 / modes)}


def _gmm_errors(samples: Samples) -> dict[str, float]:
    target = GaussianMixture()
    x = samples["x"]
    floor = target.mode_total_variation(target.sample(x.shape[0], torch.Generator().manual_seed(2)))
    found = modes_found(target.mode_shares(x), target.mode_weights())
    return {"modes": found, "mode TV": target.mode_total_variation(x), "mode TV floor": floor}


def problems() -> dict[str, Problem]:
    """The problems by name."""
    schools, exact = eight_schools.data(), eight_schools.reference().log_evidence
    gmm = factor_model(GaussianMixture().log_prob, 2)
    found = {
        f"galaxies-{k}{'-shared' if shared else ''}": Problem(
            galaxies.galaxy_mixture(k, shared_variance=shared),
            (galaxies.velocities(),),
            log_evidence=reference,
            errors=_galaxy_errors,
        )
        for (k, shared), reference in galaxies.REFERENCE_LOG_EVIDENCE.items()
    }
    for name, model in (("centered", eight_schools.centered), ("noncentered", eight_schools.noncentered)):
        found[f"eight-schools-{name}"] = Problem(model, schools, log_evidence=exact, errors=_eight_schools_errors)
    found["gmm40"] = Problem(gmm, base=GivenBase(0.0, _SCALE), log_evidence=0.0, errors=_gmm_errors)
    return found


# --------------------------------------------------------------------------------------------------------- ways


def _weighted_fit(draws: Draws, density: ModelDensity, training_evaluations: int) -> Fit:
    """Resample the pool and name the sites."""
    count = draws.z.shape[0]
    samples = by_site(density, draws.z[ImportanceResampling().apply(draws, count // 2)])
    return Fit(samples, Cost(training_evaluations, 0, 0.0), Cost(count, 0, 0.0), draws.log_weight)


def fit_by_sampler(problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """``DiffusionSampler(model).run(data)`` with its defaults and a budget."""
    begin(seed)  # for the resampling: the sampler has a generator of its own
    sampler = sampler_within(problem.model, seed, budget, base=problem.base, bar=bar)
    sampler.run(*problem.args)
    training = sampler.history[-1].density_evaluations
    return _weighted_fit(sampler.draws(_POOL), problem.density(), training)


def _fit_by_svi(
    problem: Problem, seed: int, objective: ImportanceWeightedScoreMatching, schedule: Schedule, num_steps: int
) -> Fit:
    begin(seed)
    guide = AutoDiffusion(problem.model, base=problem.base)
    train(problem.model, problem.args, guide, objective, schedule, num_steps)
    density = problem.density()
    training = objective.history[-1].density_evaluations
    return _weighted_fit(draw_from_guide(guide, density, _POOL, problem.args), density, training)


def fit_by_svi(problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """The two-line swap, word for word as the README has it: plain Adam, 1000 steps, everything at its default."""
    return _fit_by_svi(problem, seed, ImportanceWeightedScoreMatching(), Constant(1e-3), 1000)


def fit_by_marginal_weights(problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """The paper's form, by SVI with a cosine schedule over 4000 steps; evaluations are not what it saves."""
    objective = ImportanceWeightedScoreMatching(weighting=MarginalWeights(num_inner=16), batch_size=256)
    return _fit_by_svi(problem, seed, objective, Cosine(2e-3, None), 4000)


WAYS: dict[str, Callable[[Problem, int, int, bool], Fit]] = {
    "sampler": fit_by_sampler,
    "svi": fit_by_svi,
    "svi-marginal": fit_by_marginal_weights,
    "nuts": lambda problem, seed, budget, bar: fit_by_chains(problem, seed, bar),
}
_DEFAULT_RUNS = (
    ("galaxies-3", "sampler"),
    ("galaxies-3-shared", "sampler"),
    ("galaxies-2-shared", "sampler"),
    ("eight-schools-centered", "sampler"),
    ("eight-schools-noncentered", "sampler"),
    ("eight-schools-centered", "svi"),
    ("eight-schools-noncentered", "svi"),
    ("gmm40", "sampler"),
    ("gmm40", "svi-marginal"),
    ("galaxies-3", "nuts"),
    ("eight-schools-noncentered", "nuts"),
)


def measure(name: str, way: str, seed: int, budget: int, bar: bool = False) -> Row:
    """Fit one problem one way and compare with the truth."""
    started = time.process_time()
    problem = problems()[name]
    fit = WAYS[way](problem, seed, budget, bar)
    return {
        **dict(zip(KEYS, (name, way, seed), strict=True)),
        **weight_figures(fit, problem.log_evidence),
        **problem.judged(fit.samples),
        "training evaluations": fit.training.values,
        "all evaluations": fit.training.values + fit.drawing.values,
        "CPU s": time.process_time() - started,
    }


# ------------------------------------------------------------------------------------------------------- tables


def line(row: Row) -> str:
    """A row in words."""

    def show(value: Any) -> str:
        return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

    left_out = (*KEYS, *PROVENANCE)
    found = (f"{key} {show(value)}" for key, value in row.items() if key not in left_out)
    return ", ".join([*(show(row[key]) for key in KEYS), *found])


def _modes(row: Row) -> str:
    if "worst share error" in row:
        return f"{row['modes']}; {row['worst share error']:.3f}"
    if "mode TV" in row:
        return f"{row['modes']}; TV {row['mode TV']:.3f} (exact draws {row['mode TV floor']:.3f})"
    return ""


_COLUMNS = (
    Estimate("log Z error ± se", "log Z error", "log Z se"),
    figure("khat", fixed(2), "k̂"),
    figure("ESS", fixed(2), larger_is_better=True),
    Words("modes; worst share error", _modes),
    figure("mean error"),
    figure("sd error"),
    Costs(
        "evaluations: training + draws",
        (entry("training evaluations"), Part(lambda row: row["all evaluations"] - row["training evaluations"])),
    ),
    Costs("CPU s", (entry("CPU s"),)),
)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    found = lines(rows, lambda row: (f"{row['problem']}: {row['way']}",))
    return as_markdown(("problem: way",), found, _COLUMNS)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One."""
    return [Table("", markdown(rows), rows)]


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench known-answers``."""
    parser.add_argument("--only", nargs="*", default=[], metavar="PROBLEM[:WAY]", help="these runs only")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--budget", type=int, default=100_000, help="density evaluations for training (sampler)")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    add_out(parser)
    add_markdown(parser)


def _selected(only: Sequence[str]) -> list[tuple[str, str]]:
    chosen = [run for run in _DEFAULT_RUNS if not only or run[0] in only or ":".join(run) in only]
    if not chosen:
        names = ", ".join(":".join(run) for run in _DEFAULT_RUNS)
        raise ValueError(f"--only names no run: expected some of {names}, found {' '.join(only)}")
    return chosen


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""

    def measured(key: Row) -> Row:
        return measure(key["problem"], key["way"], key["seed"], options.budget, options.progress)

    runs = _selected(options.only)
    keys = [dict(zip(KEYS, (name, way, seed), strict=True)) for name, way in runs for seed in options.seeds]
    rows = run_all(keys, len(keys), measured, line, options.out)
    if options.markdown:
        print(f"\n{markdown(rows)}")
