# SPDX-License-Identifier: Apache-2.0
r"""Full-covariance Gaussians fitted three ways to fifteen posteriors, at equal numbers of gradient evaluations.

``python -m pyro_sm bench gaussian-guides``: ``Trace_ELBO``, ``FisherDivergence`` and Batch-and-Match, as
:mod:`pyro_sm.bench.methods.gaussian` has them. Further ways, to be asked for by ``--ways``: the Fisher divergence
with a Sobolev term, in the identity metric, with clipped gradients, with more particles, and after half of the
evaluations went to Batch-and-Match.

Columns: worst error of a mean and of an sd in reference sds, over 10,000 draws of the Gaussian through the
constraints and deterministic sites; ELBO of the Gaussian (nats) and, where log Z is known, what it lacks,
``log Z − ELBO = KL(q‖p)``; gradients of the log density spent on the fit; CPU seconds of the fit.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from pyro_sm.bench.methods.gaussian import DEFAULT_WAYS, WAYS, Task
from pyro_sm.bench.problem import Problem, from_posterior, in_float64, selected
from pyro_sm.bench.rows import Row, add_markdown, add_out, expect_positive, reason, run_all
from pyro_sm.bench.table import Costs, Figure, Table, entry, figure, lines, split, summary
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.examples.posteriors import Posterior
from pyro_sm.gaussians.batch_and_match import Gaussian
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.model.density import ModelDensity

KEYS = ("posterior", "way", "seed", "budget")
"""What identifies a row."""
_DRAWS = 10_000  # which tell a moment to a hundredth of an sd
_CHUNK = 1_000  # the hidden Markov models take 3 kB per latent and time step


def judge(problem: Problem, density: ModelDensity, gaussian: Gaussian) -> dict[str, float]:
    """Errors of the Gaussian's moments through the constraints, and its ELBO in nats, by 10,000 draws."""
    tril = torch.linalg.cholesky(gaussian.covariance)
    noise = torch.randn(_DRAWS, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = gaussian.loc + noise @ tril.T
    samples: dict[str, list[Tensor]] = {}
    log_p = []
    with torch.no_grad():
        for chunk in z.split(_CHUNK):
            log_p.append(density.log_prob(chunk))
            for name, value in {**density.unpack(chunk), **density.deterministics(chunk)}.items():
                samples.setdefault(name, []).append(value)
    errors = problem.judged({name: torch.cat(values) for name, values in samples.items()})
    elbo = float((torch.cat(log_p) - gaussian_log_prob(z, gaussian.loc, tril)).mean())
    return {**errors, "ELBO": elbo}


def measure(posterior: Posterior, way: str, seed: int, evaluations: int) -> Row:
    """Fit one posterior one way and compare with the reference; a fit that fails is a row that says why."""
    row: Row = dict(zip(KEYS, (posterior.name, way, seed, evaluations), strict=True))
    problem = from_posterior(posterior)
    with in_float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pyro's, of losses that are not numbers: the row tells
        density = problem.density(torch.float64)
        row["D"] = density.dim
        pyro.set_rng_seed(seed)
        started = time.process_time()
        try:
            fit = WAYS[way](Task(problem, density, evaluations))
            row |= {"gradients": fit.gradients, "CPU s": time.process_time() - started}
            row |= judge(problem, density, fit.gaussian)
        except Exception as error:
            row |= {"CPU s": time.process_time() - started, "failed": reason(error)}
    if "ELBO" in row and posterior.log_evidence is not None:
        row["log Z - ELBO"] = posterior.log_evidence - row["ELBO"]
    return row


# ------------------------------------------------------------------------------------------------------- tables


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2g}" if abs(value) >= 1e4 else f"{value:.1f}"


JUDGED = (
    figure("mean error", _number),
    figure("sd error", _number),
    figure("log Z - ELBO", _number, "log Z − ELBO"),
)
"""What is summed up over posteriors. An evidence that is unknown is left out, unless the fit failed."""
_ELBO = Figure("ELBO", lambda row: row.get("ELBO"), _number, larger_is_better=True, ranked=False)
_COLUMNS = (
    JUDGED[0],
    JUDGED[1],
    _ELBO,
    JUDGED[2],
    Costs("gradients", (entry("gradients"),)),
    Costs("CPU s", (entry("CPU s"),)),
)


def line(row: Row) -> str:
    """A row in words."""
    head = f"{row['posterior']} ({row['D']}), {row['way']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: failed ({row['failed']}), {row['CPU s']:.0f} CPU s"
    figures = ", ".join(f"{one.name} {one.text([row])}" for one in _COLUMNS[:4])
    return f"{head}: {figures}, {row['gradients']:,} gradients, {row['CPU s']:.0f} CPU s"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with the median and the worst of each way below."""
    found = lines(rows, lambda row: (f"{row['posterior']} ({row['D']})", row["way"]))
    text = [as_markdown(("posterior (D)", "way"), found, _COLUMNS)]
    for (way,), chosen in lines(rows, lambda row: (row["way"],)):
        text += ["", summary(way, chosen, JUDGED)]
    return "\n".join(text)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each budget."""
    return split(rows, lambda row: f"{row['budget']:,} gradients", markdown)


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench gaussian-guides``."""
    parser.add_argument("--posteriors", nargs="*", default=[], metavar="NAME", help="these only (part of a name)")
    parser.add_argument("--ways", nargs="*", default=list(DEFAULT_WAYS), choices=sorted(WAYS), metavar="WAY")
    parser.add_argument("--evaluations", type=int, default=20_000, help="gradients per fit (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)
    add_markdown(parser)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    expect_positive(options, ["evaluations"])
    known = {posterior.name: posterior for posterior in selected(options.posteriors)}

    def measured(key: Row) -> Row:
        return measure(known[key["posterior"]], key["way"], key["seed"], key["budget"])

    keys = [
        dict(zip(KEYS, (name, way, options.seed, options.evaluations), strict=True))
        for name in known
        for way in options.ways
    ]
    rows = run_all(keys, len(keys), measured, line, options.out)
    if options.markdown:
        print(f"\n{markdown(rows)}")
