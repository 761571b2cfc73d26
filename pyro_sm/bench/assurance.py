# SPDX-License-Identifier: Apache-2.0
r"""False assurance: how often a wrong answer is trusted. Six problems with known answers, each broken in ten ways.

``python -m pyro_sm bench assurance --out F.jsonl``: one row per problem and break, appended as it ends; a row that is
in the file is not run again. A run is *wrong* if, of 10,000 draws after importance resampling, a mean or an sd is off
by more than 0.2 reference standard deviations, or the shares of the modes by more than 0.1 in total variation. *False
assurance* is a wrong run whose verdict (:meth:`DiffusionSampler.check <pyro_sm.DiffusionSampler.check>`, at its
default) is "trust"; *false alarm* a right one that is "do not trust". The unbroken runs are there for the second.

Breaks other than a cut budget go without a population, which would mend them.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_sm.bench.gaussian_guides import in_float64
from pyro_sm.bench.rows import Row, machine, resumed
from pyro_sm.diagnostics.verdict.verdict import Trust
from pyro_sm.diffusion.covering import WideCovering
from pyro_sm.examples.errors import Errors, worst_errors
from pyro_sm.examples.improper import factor_model
from pyro_sm.examples.posteriors import Posterior, posteriors
from pyro_sm.gaussians.gaussian import LocScale
from pyro_sm.guides import AutoDiffusion, GivenBase, LaplaceBase, PriorBase
from pyro_sm.guides.bases import Base
from pyro_sm.model.density import ModelDensity
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives import ImportanceWeightedScoreMatching
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.targets import Funnel, GaussianMixture, HasDraws, HasModes, UnequalModes

_DRAWS = 10_000
_EXACT = 200_000
WRONG_MOMENT = 0.2
"""Reference standard deviations that a mean or an sd of a right answer may be off by."""
WRONG_SHARES = 0.1
"""Total variation that its shares of the modes may be off by."""


class Judged(NamedTuple):
    """Worst ``mean`` and ``sd`` error in reference sds, and the total variation of the ``shares`` (NaN: no modes)."""

    mean: float
    sd: float
    shares: float

    @property
    def wrong(self) -> bool:
        """Whether it is a wrong answer."""
        return not max(self.mean, self.sd) <= WRONG_MOMENT or self.shares > WRONG_SHARES


@dataclass(frozen=True)
class Problem:
    """A posterior with a known answer.

    Args:
        model: an ordinary Pyro model.
        args: its data.
        base: that covers it.
        corner: a base on one of its modes, or on one flank of its only one.
        judge: of draws by site.
    """

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    base: Base
    corner: Base
    judge: Callable[[Mapping[str, Tensor]], Judged]


@dataclass(frozen=True)
class Moved:
    """A base made worse: its location shifted by ``shift`` of its scales, its scale multiplied by ``factor``."""

    base: Base
    shift: float = 0.0
    factor: float = 1.0

    def fit(self, density: ModelDensity) -> LocScale:
        """The base, moved."""
        loc, tril = self.base.fit(density)
        return LocScale(loc + self.shift * tril.diagonal(), self.factor * tril)


def _target(target: HasDraws, corner: tuple[Tensor, float], columns: slice = slice(None)) -> Problem:
    """A target; moments are judged in ``columns``."""
    exact = target.sample(_EXACT, torch.Generator().manual_seed(1)).double()[:, columns]
    mean, sd = exact.mean(0), exact.std(0)

    def judge(samples: Mapping[str, Tensor]) -> Judged:
        x = samples["x"]
        errors = worst_errors(x.double()[:, columns], mean, sd)
        shares = math.nan
        if isinstance(target, HasModes):
            shares = 0.5 * float((target.mode_shares(x) - target.mode_weights()).abs().sum())
        return Judged(*errors, shares)

    model = factor_model(target.log_prob, target.dim)
    return Problem(model, (), GivenBase(*target.start), GivenBase(*corner), judge)


def _posterior(posterior: Posterior) -> Problem:
    def judge(samples: Mapping[str, Tensor]) -> Judged:
        errors: Errors = posterior.errors(samples)
        return Judged(*errors, math.nan)

    return Problem(posterior.model, posterior.args, PriorBase(), Moved(LaplaceBase(), -1.0, 0.2), judge)


def _on_one_mode(target: UnequalModes) -> Tensor:
    half = target.dim // 2
    return torch.cat([torch.full((half,), target.place), torch.zeros(target.dim - half)])


def problems() -> dict[str, Callable[[], Problem]]:
    """By name."""
    known = posteriors()

    def from_catalogue(name: str) -> Callable[[], Problem]:
        return lambda: _posterior(known[name])

    def mixture() -> Problem:
        target = GaussianMixture(40)
        return _target(target, (target.means[0], 1.0))

    def unequal() -> Problem:
        target = UnequalModes(8)
        return _target(target, (_on_one_mode(target), 1.0))

    def funnel() -> Problem:
        return _target(Funnel(10), (torch.zeros(10), 1.0), slice(0, 1))

    return {
        "gmm40": mixture,
        "unequal-8": unequal,
        "funnel": funnel,
        "eight_schools_centered": from_catalogue("eight_schools-eight_schools_centered"),
        "kidscore_momiq": from_catalogue("kidiq-kidscore_momiq"),
        "low_dim_gauss_mix": from_catalogue("low_dim_gauss_mix-low_dim_gauss_mix"),
    }


@dataclass(frozen=True)
class Break:
    """How a run is broken.

    Args:
        base: from the problem, None for the guide's own default.
        budget: share of the evaluations.
        num_steps: reverse kernels.
        width: of the network.
        learning_rate: of training.
        wide_share: of the covering component, None for the default one.
        population: whether there may be one.
    """

    base: Callable[[Problem], Base] | None = None
    budget: float = 1.0
    num_steps: int = 48
    width: int = 128
    learning_rate: float = 2e-3
    wide_share: float | None = None
    population: bool = False


BREAKS: dict[str, Break] = {
    "none": Break(population=True),
    "a tenth of the budget": Break(budget=0.1, population=True),
    "a tenth of the budget, no population": Break(lambda p: p.base, budget=0.1),
    "base shifted by 10 sd": Break(lambda p: Moved(p.base, shift=10.0)),
    "base on one mode or flank": Break(lambda p: p.corner),
    "the same, hardly any wide draws": Break(lambda p: p.corner, wide_share=0.005),
    "base 20 times too narrow": Break(lambda p: Moved(p.base, factor=0.05)),
    "base 30 times too wide": Break(lambda p: Moved(p.base, factor=30.0)),
    "three kernels": Break(lambda p: p.base, num_steps=3),
    "network of width 2": Break(lambda p: p.base, width=2),
    "learning rate of 0.3": Break(lambda p: p.base, learning_rate=0.3),
}
"""By name; "none" leaves the sampler as it comes."""


# ---------------------------------------------------------------------------------------------------- measuring


def _sampler(problem: Problem, broken: Break, seed: int, evaluations: int) -> DiffusionSampler:
    base = None if broken.base is None else broken.base(problem)
    guide = AutoDiffusion(problem.model, base=base, num_steps=broken.num_steps, architecture=MLP(width=broken.width))
    covering = None if broken.wide_share is None else WideCovering(share=broken.wide_share)
    objective = (
        ImportanceWeightedScoreMatching(covering=covering)
        if broken.population
        else ImportanceWeightedScoreMatching(covering=covering, population=None)
    )
    return DiffusionSampler(
        problem.model,
        guide=guide,
        objective=objective,
        stopping=StoppingRule(max_evaluations=max(int(broken.budget * evaluations), 1)),
        learning_rate=broken.learning_rate,
        seed=seed,
        disable_progbar=True,
    )


def measure(key: Row) -> Row:
    """A run as a row; one that fails says why, which is no assurance."""
    row, started = dict(key), time.process_time()
    pyro.clear_param_store()
    try:
        with in_float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of improper priors and of weights: the verdict is asked
            problem = problems()[key["problem"]]()
            sampler = _sampler(problem, BREAKS[key["break"]], key["seed"], key["budget"])
            sampler.run(*problem.args)
            verdict = sampler.check()
            judged = problem.judge(_samples(sampler, problem))
            row |= {"khat": sampler.khat, "ESS": sampler.ess, "log Z": sampler.log_evidence}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return {**row, "failed": reason, "CPU s": time.process_time() - started}
    return row | {
        "mean error": judged.mean,
        "sd error": judged.sd,
        "shares error": judged.shares,
        "wrong": judged.wrong,
        "verdict": verdict.level.words,
        "reason": verdict.reasons[0].finding,
        "CPU s": time.process_time() - started,
        "machine": machine(),
    }


def _samples(sampler: DiffusionSampler, problem: Problem) -> dict[str, Tensor]:
    """Corrected draws by site, latent and deterministic."""
    samples = sampler.get_samples(_DRAWS)
    density = ModelDensity(problem.model, problem.args)
    if not density.deterministic:
        return samples
    with torch.no_grad():
        z = density.pack({site.name: samples[site.name] for site in density.sites})
        parts = [density.deterministics(chunk) for chunk in z.split(1000)]
    return samples | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ----------------------------------------------------------------------------------------------------- reporting


def is_false_assurance(row: Row) -> bool:
    """A wrong answer that is trusted."""
    return bool(row.get("wrong")) and row.get("verdict") == Trust.TRUST.words


def summary(rows: Sequence[Row]) -> str:
    """Verdicts on right and on wrong answers, of the broken runs and of the others, in words."""
    text = []
    for title, chosen in (
        ("broken", [row for row in rows if row["break"] != "none"]),
        ("as it comes", [row for row in rows if row["break"] == "none"]),
    ):
        failed = sum("failed" in row for row in chosen)
        done = [row for row in chosen if "failed" not in row]
        wrong, right = [row for row in done if row["wrong"]], [row for row in done if not row["wrong"]]
        parts = [f"{title}: {len(chosen)} runs, {failed} refused"]
        for name, group in (("wrong", wrong), ("right", right)):
            counts = [f"{sum(row['verdict'] == level.words for row in group)} {level.words}" for level in Trust]
            parts.append(f"{len(group)} {name} ({', '.join(counts)})")
        text.append("; ".join(parts))
    false = [row for row in rows if is_false_assurance(row)]
    wrong_runs = sum(bool(row.get("wrong")) for row in rows)
    text.append(f"false assurance: {len(false)} of {wrong_runs} wrong answers")
    text += [f"  {row['problem']}, {row['break']}, seed {row['seed']}" for row in false]
    return "\n".join(text)


def line(row: Row) -> str:
    """A row in words."""
    head = f"{row['problem']}, {row['break']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: refused ({row['failed']}), {row['CPU s']:.0f} CPU s"
    shares = "" if math.isnan(row["shares error"]) else f", shares {row['shares error']:.3f}"
    errors = f"mean error {row['mean error']:.3f}, sd error {row['sd error']:.3f}{shares}"
    flag = "FALSE ASSURANCE, " if is_false_assurance(row) else ""
    right = "wrong" if row["wrong"] else "right"
    return f"{head}: {flag}{right} ({errors}), {row['verdict']} (k̂ {row['khat']:.2f}), {row['CPU s']:.0f} CPU s"


def markdown(rows: Sequence[Row]) -> str:
    """Case by case, as a Markdown table, and the summary below it."""
    text = [
        "| problem | break | mean error | sd error | shares | answer | k̂ | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['problem']} | {row['break']} "
        if "failed" in row:
            text.append(f"{head}| | | | refused: {row['failed'].replace('|', '/')} | | |")
            continue
        shares = "–" if math.isnan(row["shares error"]) else f"{row['shares error']:.2f}"
        answer = "wrong" if row["wrong"] else "right"
        verdict = f"**{row['verdict']}**" if is_false_assurance(row) else row["verdict"]
        figures = f"{row['mean error']:.2f} | {row['sd error']:.2f} | {shares} | {answer} | {row['khat']:.2f}"
        text.append(f"{head}| {figures} | {verdict} |")
    return "\n".join([*text, "", summary(rows)])


# -------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench assurance``."""
    parser.add_argument("--problems", nargs="+", default=list(problems()), choices=list(problems()), metavar="NAME")
    parser.add_argument("--breaks", nargs="+", default=list(BREAKS), choices=list(BREAKS), metavar="BREAK")
    parser.add_argument("--evaluations", type=int, default=12_000, help="of training (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="runs already in it are not repeated")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends, then the summary."""
    if options.evaluations < 1:
        raise ValueError(f"expected --evaluations >= 1, found {options.evaluations}")
    # The problems in turn, so that a run that is stopped has something to say on each.
    keys: list[dict[str, Any]] = [
        {"problem": name, "break": broken, "seed": seed, "budget": options.evaluations}
        for seed in options.seeds
        for broken in options.breaks
        for name in options.problems
    ]
    print(machine())
    rows = []
    for row in resumed(keys, measure, options.out):
        rows.append(row)
        print(f"[{len(rows)}/{len(keys)}] {line(row)}", flush=True)
    print(f"\n{markdown(rows) if options.markdown else summary(rows)}")
