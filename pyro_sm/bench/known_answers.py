# SPDX-License-Identifier: Apache-2.0
"""Posteriors with known answers: evidence, moments and mode shares against the truth.

``python -m pyro_sm bench known-answers``: one line per problem, way and seed. Columns: error of log Z (nats) and its
own standard error, k̂ and effective share of the final draws, the worst error of a mean and of an sd in reference
standard deviations (eight schools) or the mode-weight error (mixtures), density evaluations spent on training and in
all (for NUTS: with gradients), CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.bench.rows import machine, resumed
from pyro_sm.corrections import ImportanceResampling
from pyro_sm.diagnostics import draw_from_guide
from pyro_sm.examples import eight_schools, galaxies
from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives import ImportanceWeightedScoreMatching, MarginalWeights
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.targets.gaussian_mixture import GaussianMixture
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth

_POOL = 40_000


class Fit(NamedTuple):
    """What a way of fitting leaves behind: log weights (None: it has none), usable samples by site, and its cost."""

    log_weight: Tensor | None
    samples: dict[str, Tensor]
    training_evaluations: int
    all_evaluations: int


class Problem(NamedTuple):
    """A model with its data, the exact or literature log evidence, and how to score draws in words and figures."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    log_evidence: float
    score: Callable[[dict[str, Tensor]], dict[str, float]]


def _eight_schools_score(samples: dict[str, Tensor]) -> dict[str, float]:
    worst = eight_schools.errors(samples)
    return {"mean error": worst.mean, "sd error": worst.sd}


def _galaxy_score(samples: dict[str, Tensor]) -> dict[str, float]:
    shares = galaxies.labelling_shares(samples["mean"])
    count = len(list(samples["mean"][0]))
    modes = 1
    for k in range(2, count + 1):
        modes *= k
    worst = max(abs(share - 1 / modes) for share in shares.values())
    return {"modes": len(shares), "worst share error": max(worst, 0.0 if len(shares) == modes else 1 / modes)}


def _gmm_score(samples: dict[str, Tensor]) -> dict[str, float]:
    target = GaussianMixture()
    x = samples["x"]
    floor = target.mode_total_variation(target.sample(x.shape[0], torch.Generator().manual_seed(2)))
    found = int((target.mode_shares(x) > 0.1 / target.num_modes).sum())
    return {"modes": found, "mode TV": target.mode_total_variation(x), "mode TV floor": floor}


def problems() -> dict[str, Problem]:
    """The problems by name."""
    schools, exact = eight_schools.data(), eight_schools.reference().log_evidence
    gmm = factor_model(GaussianMixture().log_prob, 2)
    found = {
        f"galaxies-{k}{'-shared' if shared else ''}": Problem(
            galaxies.galaxy_mixture(k, shared_variance=shared), (galaxies.velocities(),), reference, _galaxy_score
        )
        for (k, shared), reference in galaxies.REFERENCE_LOG_EVIDENCE.items()
    }
    found["eight-schools-centered"] = Problem(eight_schools.centered, schools, exact, _eight_schools_score)
    found["eight-schools-noncentered"] = Problem(eight_schools.noncentered, schools, exact, _eight_schools_score)
    found["gmm40"] = Problem(gmm, (), 0.0, _gmm_score)
    return found


def _base_for(name: str) -> GivenBase | None:
    """GMM-40's prior is improper: the user must say where to look."""
    return GivenBase(0.0, 25.0) if name == "gmm40" else None


def _fit(draws: Draws, density: ModelDensity, training_evaluations: int) -> Fit:
    """Resample the pool and name the sites."""
    count = draws.z.shape[0]
    z = draws.z[ImportanceResampling().apply(draws, count // 2)]
    samples = {**density.unpack(z), **density.deterministics(z)}
    return Fit(draws.log_weight, samples, training_evaluations, training_evaluations + count)


def fit_by_sampler(name: str, problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """``DiffusionSampler(model).run(data)`` with its defaults and a budget."""
    sampler = DiffusionSampler(
        problem.model,
        base=_base_for(name),
        seed=seed,
        stopping=StoppingRule(max_evaluations=budget),
        disable_progbar=not bar,
    )
    sampler.run(*problem.args)
    training = sampler.history[-1].density_evaluations
    return _fit(sampler.draws(_POOL), ModelDensity(problem.model, problem.args), training)


def _after_svi(guide: AutoDiffusion, problem: Problem, objective: ImportanceWeightedScoreMatching) -> Fit:
    density = ModelDensity(problem.model, problem.args)
    training = objective.history[-1].density_evaluations
    return _fit(draw_from_guide(guide, density, _POOL, problem.args), density, training)


def fit_by_svi(name: str, problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """The two-line swap, word for word as the README has it: plain Adam, 1000 steps, everything at its default."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoDiffusion(problem.model, base=_base_for(name))
    loss = ImportanceWeightedScoreMatching()
    adam = PyroOptim(torch.optim.Adam, {"lr": 1e-3})  # pyro.optim.Adam, by a name that type checkers see
    svi = SVI(problem.model, guide, adam, loss)
    for _ in range(1000):
        svi.step(*problem.args)
    return _after_svi(guide, problem, loss)


def fit_by_marginal_weights(name: str, problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """The paper's form, by SVI with a cosine schedule over 4000 steps; evaluations are not what it saves."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoDiffusion(problem.model, base=_base_for(name))
    objective = ImportanceWeightedScoreMatching(weighting=MarginalWeights(num_inner=16), batch_size=256)
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": 4000}
    optim = PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, schedule)
    svi = SVI(problem.model, guide, optim, loss=objective)
    for _ in range(4000):
        svi.step(*problem.args)
        optim.step()
    return _after_svi(guide, problem, objective)


def fit_by_nuts(name: str, problem: Problem, seed: int, budget: int, bar: bool) -> Fit:
    """NUTS as a Pyro user runs it: four chains, one after the other, 500 steps of warm-up and 1000 draws each."""
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return problem.model(*args)

    chains = []
    for chain in range(4):
        pyro.clear_param_store()
        pyro.set_rng_seed(4 * seed + chain)
        mcmc = MCMC(NUTS(counted), num_samples=1000, warmup_steps=500, disable_progbar=not bar)
        mcmc.run(*problem.args)
        chains.append(mcmc.get_samples())
    samples = {site: torch.cat([chain[site] for chain in chains]) for site in chains[0]}
    density = ModelDensity(problem.model, problem.args)
    return Fit(None, {**samples, **density.deterministics(density.pack(samples))}, calls, calls)


WAYS: dict[str, Callable[[str, Problem, int, int, bool], Fit]] = {
    "sampler": fit_by_sampler,
    "svi": fit_by_svi,
    "svi-marginal": fit_by_marginal_weights,
    "nuts": fit_by_nuts,
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


def measure(name: str, way: str, seed: int, budget: int, bar: bool = False) -> dict[str, Any]:
    """Fit one problem one way and compare with the truth."""
    started = time.process_time()
    problem = problems()[name]
    fit = WAYS[way](name, problem, seed, budget, bar)
    weights = {}
    if fit.log_weight is not None:
        estimate = evidence(fit.log_weight)
        weights = {
            "log Z error": estimate.log_evidence - problem.log_evidence,
            "log Z se": estimate.log_evidence_se,
            "khat": pareto_smooth(fit.log_weight).khat,
            "ESS": effective_sample_size(fit.log_weight) / fit.log_weight.shape[0],
        }
    return {
        "problem": name,
        "way": way,
        "seed": seed,
        **weights,
        **problem.score(fit.samples),
        "training evaluations": fit.training_evaluations,
        "all evaluations": fit.all_evaluations,
        "CPU s": time.process_time() - started,
    }


def _line(row: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {show(value)}" if i > 2 else show(value) for i, (key, value) in enumerate(row.items()))


def _modes(row: dict[str, Any]) -> str:
    if "worst share error" in row:
        return f"{row['modes']}; {row['worst share error']:.3f}"
    if "mode TV" in row:
        return f"{row['modes']}; TV {row['mode TV']:.3f} (exact draws {row['mode TV floor']:.3f})"
    return "–"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| problem: way | log Z error ± se | k̂ | ESS | modes; worst share error | worst mean / sd error "
        "| evaluations: training + draws | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        weights = "– | – | –"
        if "khat" in row:
            weights = f"{row['log Z error']:+.3f} ± {row['log Z se']:.3f} | {row['khat']:.2f} | {row['ESS']:.2f}"
        errors = f"{row['mean error']:.3f} / {row['sd error']:.3f}" if "mean error" in row else "–"
        training = row["training evaluations"]
        cost = f"{training:,} + {row['all evaluations'] - training:,}"
        name = f"{row['problem']}: {row['way']}"
        lines.append(f"| {name} | {weights} | {_modes(row)} | {errors} | {cost} | {row['CPU s']:.0f} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench known-answers``."""
    parser.add_argument("--only", nargs="*", default=[], metavar="PROBLEM[:WAY]", help="these runs only")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--budget", type=int, default=100_000, help="density evaluations for training (sampler)")
    parser.add_argument("--out", type=Path, help="JSON lines; runs already in it are not repeated")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README at the end")
    parser.add_argument("--progress", action="store_true", help="show progress bars")


def _selected(only: list[str]) -> list[tuple[str, str]]:
    chosen = [run for run in _DEFAULT_RUNS if not only or run[0] in only or ":".join(run) in only]
    if not chosen:
        names = ", ".join(":".join(run) for run in _DEFAULT_RUNS)
        raise ValueError(f"--only names no run: expected some of {names}, found {' '.join(only)}")
    return chosen


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    runs = _selected(options.only)
    print(machine())
    keys = [{"problem": name, "way": way, "seed": seed} for name, way in runs for seed in options.seeds]
    rows = []
    for row in resumed(
        keys,
        lambda key: measure(key["problem"], key["way"], key["seed"], options.budget, options.progress),
        options.out,
    ):
        rows.append(row)
        print(_line(row), flush=True)
    if options.markdown:
        print(f"\n{markdown(rows)}")
