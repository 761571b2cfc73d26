# SPDX-License-Identifier: Apache-2.0
r"""Full-covariance Gaussians fitted three ways to fifteen posteriors, at equal numbers of gradient evaluations.

``python -m pyro_sm bench gaussian-guides``: ``Trace_ELBO``, ``FisherDivergence`` and Batch-and-Match, each from
``N(0, 0.1² I)`` in unconstrained space, which is the point of ``init_to_feasible`` and the default ``init_scale``
(Batch-and-Match as its guide method does: by way of the mode next to it, if that is better).
One line per posterior and way. Columns: worst error of a mean and of an sd in reference sds, over 10,000 draws of the
Gaussian through the constraints and deterministic sites; ELBO of the Gaussian (nats) and, where log Z is known, what
it lacks, ``log Z − ELBO = KL(q‖p)``; gradients of the log density spent on the fit; CPU seconds of the fit.

A gradient is the gradient of the log density at one latent. ``FisherDivergence``'s path gradient takes a score and a
Hessian-vector product at each particle, which count as two. Both SVI ways use 16 particles and Adam with a learning
rate that decays geometrically to 0.001, from 0.3 for ``Trace_ELBO`` and 0.02 for ``FisherDivergence``: the best of
0.02, 0.1 and 0.3 for each in a trial with one seed on most of these same posteriors, which favours the two SVI ways.

Further ways, to be asked for by ``--ways``: the Fisher divergence with a Sobolev term, in the identity metric, with
clipped gradients, with more particles, and after half of the evaluations went to Batch-and-Match.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import PyroLRScheduler
from torch import Tensor

from pyro_sm.bench.rows import machine, resumed
from pyro_sm.examples.posteriors import Posterior, posteriors
from pyro_sm.gaussians.batch_and_match import Gaussian, batch_and_match, start_at_mode
from pyro_sm.gaussians.gaussian import gaussian_log_prob
from pyro_sm.model.density import ModelDensity, OuterPlate
from pyro_sm.objectives import FisherDivergence
from pyro_sm.objectives.metrics import Identity, Metric

_DRAWS = 10_000
_CHUNK = 1_000  # the hidden Markov models take 3 kB per latent and time step
_BATCH = 32  # of Batch-and-Match
_INIT_SCALE = 0.1
_PLATES = 1  # the most that any of the models nests


class Problem(NamedTuple):
    """A posterior, its density, and the gradients of the log density that a way may spend."""

    posterior: Posterior
    density: ModelDensity
    evaluations: int


class Fit(NamedTuple):
    """A Gaussian in unconstrained space, and the gradients of the log density that it took."""

    gaussian: Gaussian
    gradients: int


def start(dim: int) -> Gaussian:
    """``N(0, 0.1² I)``, float64, where every way starts."""
    return Gaussian(torch.zeros(dim, dtype=torch.float64), _INIT_SCALE**2 * torch.eye(dim, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- by gradients


class Steps(NamedTuple):
    """Adam with a learning rate that falls geometrically from ``first`` to ``last``; gradients clipped by norm."""

    num_steps: int
    first: float = 0.02
    last: float = 0.001
    clip_norm: float | None = None


def guide_at(problem: Problem, gaussian: Gaussian) -> AutoMultivariateNormal:
    """Pyro's guide with the parameters of ``gaussian``."""
    posterior, density = problem.posterior, problem.density
    values = {name: value[0] for name, value in density.unpack(gaussian.loc[None]).items()}
    guide = AutoMultivariateNormal(posterior.model, init_loc_fn=init_to_value(values=values), init_scale=_INIT_SCALE)
    guide(*posterior.args)
    tril = torch.linalg.cholesky(gaussian.covariance)
    guide.loc.data = gaussian.loc.clone()
    guide.scale = tril.diagonal().clone()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    return guide


def fit_by_svi(problem: Problem, loss: Trace_ELBO | FisherDivergence, steps: Steps, begin: Gaussian) -> Gaussian:
    """``SVI(model, guide, optim, loss)`` from ``begin``.

    Raises:
        ValueError: a parameter of the guide is not finite at the end; or what Pyro raises on the way.
    """
    pyro.clear_param_store()
    guide = guide_at(problem, begin)
    decay = (steps.last / steps.first) ** (1 / max(steps.num_steps, 1))
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": steps.first}, "gamma": decay}
    clip = None if steps.clip_norm is None else {"clip_norm": steps.clip_norm}
    optim = PyroLRScheduler(torch.optim.lr_scheduler.ExponentialLR, schedule, clip)
    svi = SVI(problem.posterior.model, guide, optim, loss=loss)
    for _ in range(steps.num_steps):
        svi.step(*problem.posterior.args)
        optim.step()
    with torch.no_grad():
        tril = guide.scale[:, None] * guide.scale_tril
        loc = guide.loc.detach().clone()
    if not bool(torch.isfinite(tril).all() and torch.isfinite(loc).all()):
        raise ValueError("the parameters are not finite")
    return Gaussian(loc, tril @ tril.T)


def fit_by_elbo(problem: Problem, *, num_particles: int = 16, first: float = 0.3, last: float = 0.001) -> Fit:
    """``Trace_ELBO``, vectorised if the model allows; one gradient a particle."""
    num_steps = problem.evaluations // num_particles
    vectorised = isinstance(problem.density.batching, OuterPlate)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorised, max_plate_nesting=_PLATES)
    gaussian = fit_by_svi(problem, elbo, Steps(num_steps, first, last), start(problem.density.dim))
    return Fit(gaussian, num_steps * num_particles)


def fit_by_fisher(
    problem: Problem,
    *,
    num_particles: int = 16,
    metric: Metric | None = None,
    sobolev: float = 0.0,
    steps: Steps | None = None,
    begin: Gaussian | None = None,
) -> Fit:
    """``FisherDivergence``; two gradients a particle."""
    num_steps = problem.evaluations // (2 * num_particles)
    steps = (steps or Steps(num_steps))._replace(num_steps=num_steps)
    loss = FisherDivergence(num_particles, metric=metric, sobolev=sobolev)
    gaussian = fit_by_svi(problem, loss, steps, begin or start(problem.density.dim))
    return Fit(gaussian, 2 * num_steps * num_particles)


# --------------------------------------------------------------------------------------------- without gradients


def fit_by_batch_and_match(problem: Problem, *, search_mode: bool = True) -> Fit:
    """Batch-and-Match in batches of 32, one gradient a draw; by default after a search for the mode, also counted."""
    before = problem.density.evaluations.scores
    begin = start(problem.density.dim)
    if search_mode:
        begin = start_at_mode(problem.density, begin, batch_size=_BATCH)
    left = problem.evaluations - (problem.density.evaluations.scores - before)
    found = batch_and_match(problem.density, begin, num_batches=max(left // _BATCH, 1), batch_size=_BATCH)
    gaussian = Gaussian(found.gaussian.loc, found.gaussian.covariance)
    return Fit(gaussian, problem.density.evaluations.scores - before)


def fit_by_fisher_after_batch_and_match(problem: Problem) -> Fit:
    """Half of the evaluations for either, one after the other."""
    half = problem._replace(evaluations=problem.evaluations // 2)
    first = fit_by_batch_and_match(half)
    second = fit_by_fisher(half, begin=first.gaussian)
    return Fit(second.gaussian, first.gradients + second.gradients)


WAYS: dict[str, Callable[[Problem], Fit]] = {
    "elbo": fit_by_elbo,
    "fisher": fit_by_fisher,
    "batch-and-match": fit_by_batch_and_match,
    "fisher-sobolev": lambda problem: fit_by_fisher(problem, sobolev=1.0),
    "fisher-identity": lambda problem: fit_by_fisher(problem, metric=Identity()),
    "fisher-clipped": lambda problem: fit_by_fisher(problem, steps=Steps(0, clip_norm=10.0)),
    "fisher-128": lambda problem: fit_by_fisher(problem, num_particles=128),
    "batch-and-match-from-start": lambda problem: fit_by_batch_and_match(problem, search_mode=False),
    "fisher-after-bam": fit_by_fisher_after_batch_and_match,
}
_DEFAULT_WAYS = ("elbo", "fisher", "batch-and-match")


# ---------------------------------------------------------------------------------------------------- measuring


def judge(posterior: Posterior, density: ModelDensity, gaussian: Gaussian) -> dict[str, float]:
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
    worst = posterior.errors({name: torch.cat(values) for name, values in samples.items()})
    elbo = float((torch.cat(log_p) - gaussian_log_prob(z, gaussian.loc, tril)).mean())
    return {"mean error": worst.mean, "sd error": worst.sd, "ELBO": elbo}


@contextmanager
def in_float64() -> Iterator[None]:
    """Improper priors have no data to take their type from."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def measure(posterior: Posterior, way: str, seed: int, evaluations: int) -> dict[str, Any]:
    """Fit one posterior one way and compare with the reference; a fit that fails is a row that says why."""
    row: dict[str, Any] = {"posterior": posterior.name, "way": way, "seed": seed, "budget": evaluations}
    with in_float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pyro's, of losses that are not numbers: the row tells
        density = ModelDensity(posterior.model, posterior.args, dtype=torch.float64)
        row["D"] = density.dim
        pyro.set_rng_seed(seed)
        started = time.process_time()
        try:
            fit = WAYS[way](Problem(posterior, density, evaluations))
            row |= {"gradients": fit.gradients, "CPU s": time.process_time() - started}
            row |= judge(posterior, density, fit.gaussian)
        except Exception as error:
            row["CPU s"] = time.process_time() - started
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if "ELBO" in row and posterior.log_evidence is not None:
        row["log Z - ELBO"] = posterior.log_evidence - row["ELBO"]
    return row


# ------------------------------------------------------------------------------------------------------- tables

_SHOWN = ("mean error", "sd error", "log Z - ELBO")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2g}" if abs(value) >= 1e4 else f"{value:.1f}"


def _line(row: dict[str, Any]) -> str:
    head = f"{row['posterior']} ({row['D']}), {row['way']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: failed ({row['failed']}), {row['CPU s']:.0f} CPU s"
    shown = ", ".join(f"{key} {_number(row.get(key))}" for key in ("mean error", "sd error", "ELBO", "log Z - ELBO"))
    return f"{head}: {shown}, {row['gradients']:,} gradients, {row['CPU s']:.0f} CPU s"


def summary(rows: list[dict[str, Any]], way: str) -> dict[str, tuple[float, float]]:
    """Median and worst of each error over the rows of a way; a failed fit counts as infinitely wrong."""
    chosen = [row for row in rows if row["way"] == way]
    found = {}
    for key in _SHOWN:
        values = [row.get(key, math.inf) for row in chosen if key in row or "failed" in row]
        values = [math.inf if math.isnan(value) else value for value in values]
        if values:
            found[key] = (statistics.median(values), max(values))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with the median and the worst of each way below."""
    lines = [
        "| posterior (D) | way | mean error | sd error | ELBO | log Z − ELBO | gradients | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['posterior']} ({row['D']}) | {row['way']} "
        if "failed" in row:
            lines.append(f"{head}| failed: {row['failed']} | | | | | {row['CPU s']:.0f} |")
            continue
        cells = [_number(row.get(key)) for key in ("mean error", "sd error", "ELBO", "log Z - ELBO")]
        lines.append(f"{head}| {' | '.join(cells)} | {row['gradients']:,} | {row['CPU s']:.0f} |")
    for way in dict.fromkeys(row["way"] for row in rows):
        chosen = [row for row in rows if row["way"] == way]
        found = summary(rows, way)
        both = [f"{_number(found[key][0])}; {_number(found[key][1])}" if key in found else "–" for key in _SHOWN]
        failed = sum("failed" in row for row in chosen)
        note = f", {failed} of {len(chosen)} failed" if failed else ""
        seconds = sum(row["CPU s"] for row in chosen)
        head = f"| *median; worst{note}* | *{way}* |"
        lines.append(f"{head} {both[0]} | {both[1]} | | {both[2]} | | {seconds:.0f} in all |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench gaussian-guides``."""
    parser.add_argument("--posteriors", nargs="*", default=[], metavar="NAME", help="these only (part of a name)")
    parser.add_argument("--ways", nargs="*", default=list(_DEFAULT_WAYS), choices=sorted(WAYS), metavar="WAY")
    parser.add_argument("--evaluations", type=int, default=20_000, help="gradients per fit (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines; fits already in it are not repeated")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")


def selected(parts: list[str]) -> list[Posterior]:
    """Those whose names have one of the parts in them; all if there is none.

    Raises:
        ValueError: a part that is in no name.
    """
    known = posteriors()
    unknown = [part for part in parts if not any(part in name for name in known)]
    if unknown:
        raise ValueError(f"--posteriors: expected (parts of) {', '.join(known)}, found {' '.join(unknown)}")
    return [posterior for name, posterior in known.items() if not parts or any(part in name for part in parts)]


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    if options.evaluations < 1:
        raise ValueError(f"expected --evaluations >= 1, found {options.evaluations}")
    chosen = selected(options.posteriors)
    print(machine())
    keys = [
        {"posterior": posterior.name, "way": way, "seed": options.seed, "budget": options.evaluations}
        for posterior in chosen
        for way in options.ways
    ]
    known = {posterior.name: posterior for posterior in chosen}
    rows = []
    for row in resumed(
        keys, lambda key: measure(known[key["posterior"]], key["way"], key["seed"], key["budget"]), options.out
    ):
        rows.append(row)
        print(_line(row), flush=True)
    if options.markdown:
        print(f"\n{markdown(rows)}")
