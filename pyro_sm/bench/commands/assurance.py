# SPDX-License-Identifier: Apache-2.0
r"""False assurance: how often a wrong answer is trusted. Six problems with known answers, each broken in ten ways.

``python -m pyro_sm bench assurance --out F.jsonl``: one row per problem and break, appended as it ends; a row that is
in the file is not run again. Breaks other than a cut budget go without a population, which would mend them.

Columns: worst error of a mean and of an sd, in reference standard deviations, and the total variation of the shares
of the modes, over 10,000 draws after importance resampling; k̂; whether the answer is right, and the verdict. A run is
*wrong* if a mean or an sd is off by more than 0.2, or the shares by more than 0.1. *False assurance* is a wrong run
whose verdict (:meth:`DiffusionSampler.check <pyro_sm.DiffusionSampler.check>`, at its default) is "trust"; *false
alarm* a right one that is "do not trust". The unbroken runs are there for the second.
"""

from __future__ import annotations

import argparse
import math
import re
import time
import warnings
from collections.abc import Sequence

import pyro

from pyro_sm.bench.broken import BREAKS, Break, Broken, cases
from pyro_sm.bench.problem import by_site, in_float64
from pyro_sm.bench.rows import Row, add_markdown, add_out, expect_positive, good, reason, run_all
from pyro_sm.bench.table import Figure, Table, Words, figure, fixed, lines, split
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.diagnostics.verdict.verdict import Trust
from pyro_sm.diffusion.covering import WideCovering
from pyro_sm.guides import AutoDiffusion
from pyro_sm.nn.mlp import MLP
from pyro_sm.objectives import ImportanceWeightedScoreMatching
from pyro_sm.sampler import DiffusionSampler, StoppingRule

KEYS = ("problem", "break", "seed", "budget")
"""What identifies a row."""
_DRAWS = 10_000  # whose own error of a mean is a hundredth, far below what is called wrong
WRONG_MOMENT = 0.2
"""Reference standard deviations that a mean or an sd of a right answer may be off by: what a reader would see."""
WRONG_SHARES = 0.1
"""Total variation that its shares of the modes may be off by: less than the lightest mode would leave out unseen."""


def is_wrong(errors: dict[str, float]) -> bool:
    """Whether a run with these errors is a wrong answer; NaN in a moment is, in the shares (no modes) it is not."""
    return not max(errors["mean error"], errors["sd error"]) <= WRONG_MOMENT or errors["shares error"] > WRONG_SHARES


def _sampler(broken: Broken, how: Break, seed: int, evaluations: int) -> DiffusionSampler:
    model = broken.problem.model
    base = None if how.base is None else how.base(broken)
    guide = AutoDiffusion(model, base=base, num_steps=how.num_steps, architecture=MLP(width=how.width))
    covering = None if how.wide_share is None else WideCovering(share=how.wide_share)
    objective = (
        ImportanceWeightedScoreMatching(covering=covering)
        if how.population
        else ImportanceWeightedScoreMatching(covering=covering, population=None)
    )
    return DiffusionSampler(
        model,
        guide=guide,
        objective=objective,
        stopping=StoppingRule(max_evaluations=max(int(how.budget * evaluations), 1)),
        learning_rate=how.learning_rate,
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
            broken = cases()[key["problem"]]()
            sampler = _sampler(broken, BREAKS[key["break"]], key["seed"], key["budget"])
            sampler.run(*broken.problem.args)
            verdict = sampler.check()
            samples = sampler.get_samples(_DRAWS)
            density = broken.problem.density()
            if density.deterministic:
                z = density.pack({site.name: samples[site.name] for site in density.sites})
                samples = by_site(density, z) | samples
            errors = broken.problem.judged(samples)
            row |= {"khat": sampler.khat, "ESS": sampler.ess, "log Z": sampler.log_evidence}
    except Exception as error:
        return {**row, "failed": reason(error), "CPU s": time.process_time() - started}
    return row | {
        **errors,
        "wrong": is_wrong(errors),
        "verdict": verdict.level.words,
        "reason": verdict.reasons[0].finding,
        "CPU s": time.process_time() - started,
    }


# ------------------------------------------------------------------------------------------------------- tables


def is_false_assurance(row: Row) -> bool:
    """A wrong answer that is trusted."""
    return bool(row.get("wrong")) and row.get("verdict") == Trust.TRUST.words


def _counted(title: str, rows: Sequence[Row]) -> str:
    done = good(rows)
    wrong, right = [row for row in done if row["wrong"]], [row for row in done if not row["wrong"]]
    parts = [f"{title}: {len(rows)} runs, {len(rows) - len(done)} refused"]
    for name, group in (("wrong", wrong), ("right", right)):
        counts = [f"{sum(row['verdict'] == level.words for row in group)} {level.words}" for level in Trust]
        parts.append(f"{len(group)} {name} ({', '.join(counts)})")
    return "; ".join(parts)


def summary(rows: Sequence[Row]) -> str:
    """Verdicts on right and on wrong answers, of the broken runs and of the others, in words."""
    text = [
        _counted("broken", [row for row in rows if row["break"] != "none"]),
        _counted("as it comes", [row for row in rows if row["break"] == "none"]),
    ]
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


def _shares(row: Row) -> float | None:
    return None if math.isnan(row["shares error"]) else row["shares error"]


def _verdict(row: Row) -> str:
    return f"**{row['verdict']}**" if is_false_assurance(row) else row["verdict"]


_COLUMNS = (
    figure("mean error", fixed(2)),
    figure("sd error", fixed(2)),
    Figure("shares", _shares, fixed(2)),
    Words("answer", lambda row: "wrong" if row["wrong"] else "right"),
    figure("khat", fixed(2), "k̂"),
    Words("verdict", _verdict),
)


def markdown(rows: Sequence[Row]) -> str:
    """Case by case, as a Markdown table, and the summary below it."""
    found = lines(rows, lambda row: (row["problem"], row["break"]))
    said = re.sub(r"^(\s*)", r"\1* ", summary(rows), flags=re.MULTILINE)
    return f"{as_markdown(('problem', 'break'), found, _COLUMNS)}\n\n{said}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each budget."""
    return split(rows, lambda row: f"{row['budget']:,} evaluations", markdown)


# -------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench assurance``."""
    parser.add_argument("--problems", nargs="+", default=list(cases()), choices=list(cases()), metavar="NAME")
    parser.add_argument("--breaks", nargs="+", default=list(BREAKS), choices=list(BREAKS), metavar="BREAK")
    parser.add_argument("--evaluations", type=int, default=12_000, help="of training (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    add_out(parser)
    add_markdown(parser)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends, then the summary."""
    expect_positive(options, ["evaluations"])
    # The problems in turn, so that a run that is stopped has something to say on each.
    keys = [
        dict(zip(KEYS, (name, how, seed, options.evaluations), strict=True))
        for seed in options.seeds
        for how in options.breaks
        for name in options.problems
    ]
    rows = run_all(keys, len(keys), measure, line, options.out)
    print(f"\n{markdown(rows) if options.markdown else summary(rows)}")
