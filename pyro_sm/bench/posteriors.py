# SPDX-License-Identifier: Apache-2.0
r"""Fifteen real posteriors with reference draws: AutoDiffusion, NUTS, and Pyro's Gaussian and flow guides.

``python -m pyro_sm bench posteriors --out F.jsonl``: one row per posterior and way, appended as it ends; a row that
is in the file is not run again. Nothing is told about a posterior: the sampler starts where ``AutoDiffusion(model)``
does, the others at the origin of unconstrained space (Pyro's ``init_to_feasible``, which cannot do
improper priors; neither can ``AutoIAFNormal``, which insists on it).

Columns: worst error of a mean and of an sd in reference standard deviations (the reference's own Monte Carlo error is
in them), over 10,000 draws after the correction (importance resampling; NUTS: all it has); ``log Z`` less the exact
one, nats, where that is known; k̂ and effective share of the pool; evaluations of density and gradient; CPU seconds of
the fit, and of 10,000 usable draws after it; the verdict of :meth:`DiffusionSampler.check
<pyro_sm.DiffusionSampler.check>`, whose probe is counted apart. NUTS runs four chains, one after the other, each with
a quarter of the time that is allowed; what it has by then counts.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal
from pyro.optim import PyroLRScheduler
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.bench.gaussian_guides import in_float64, selected
from pyro_sm.bench.rows import machine, resumed
from pyro_sm.corrections import ImportanceResampling
from pyro_sm.diagnostics import draw_from_guide
from pyro_sm.examples.posteriors import Posterior
from pyro_sm.model.density import ModelDensity, OuterPlate
from pyro_sm.model.transforms import bijection_onto
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth

_DRAWS = 10_000
_POOL = 4 * _DRAWS
_PARTICLES = 16
_WARMUP = 500
_PLATES = 1  # the most that any of the models nests


class Limits(NamedTuple):
    """What a way may spend: ``evaluations`` of training, CPU ``seconds`` of NUTS."""

    evaluations: int
    seconds: float


class Fit(NamedTuple):
    """What a way leaves.

    ``samples``: by site, latent and deterministic, (n, ...). ``draws``: the weighted pool, None if there is none.
    ``density`` and ``gradient``: evaluations, ``probe`` those of the verdict. ``training`` and ``drawing``: CPU
    seconds. ``verdict``: in a word. ``note``: what else there is to say.
    """

    samples: dict[str, Tensor]
    draws: Draws | None
    density: int
    gradient: int
    training: float
    drawing: float
    probe: int = 0
    verdict: str = ""
    note: str = ""


def init_to_origin(site: Any = None) -> Any:
    """The constrained image of the origin; as ``init_to_feasible``, without a draw of the prior."""
    if site is None:
        return init_to_origin
    transform = bijection_onto(site["fn"].support)
    return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


def _unpacked(density: ModelDensity, z: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        parts = [{**density.unpack(chunk), **density.deterministics(chunk)} for chunk in z.split(1000)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fit_by_sampler(posterior: Posterior, seed: int, limits: Limits) -> Fit:
    """``DiffusionSampler(model).run(data)``, everything at its default but the budget."""
    started = time.process_time()
    stopping = StoppingRule(max_evaluations=limits.evaluations)
    sampler = DiffusionSampler(posterior.model, seed=seed, stopping=stopping, disable_progbar=True)
    sampler.run(*posterior.args)
    training = time.process_time() - started
    spent = sampler.objective.evaluations
    density, gradient = spent.values, spent.scores
    draws = sampler.draws(_POOL)
    usable = int(effective_sample_size(draws.log_weight))
    drawing = (time.process_time() - started - training) * min(1.0, _DRAWS / max(usable, 1))
    z = draws.z[ImportanceResampling().apply(draws, _DRAWS, torch.Generator().manual_seed(seed))]
    verdict = sampler.check()
    probed = sampler.probe_result
    return Fit(
        _unpacked(ModelDensity(posterior.model, posterior.args, dtype=torch.float64), z),
        draws,
        density,
        gradient,
        training,
        drawing,
        0 if probed is None else probed.evaluations.values,
        verdict.level.words,
        f"{len(sampler.history)} rounds",
    )


class _TimeIsUpError(Exception):
    """Thrown out of a chain."""


def fit_by_nuts(posterior: Posterior, seed: int, limits: Limits) -> Fit:
    """Four chains of 500 steps of warm-up and 1000 draws, or what the time allows.

    Raises:
        ValueError: the time was up before any chain had a draw.
    """
    calls, started = 0, time.process_time()
    chains: list[dict[str, Tensor]] = []
    complete = 0
    for chain in range(4):
        deadline = time.process_time() + limits.seconds / 4
        held: list[dict[str, Tensor]] = []

        def counted(*args: Tensor, until: float = deadline) -> None:
            nonlocal calls
            if time.process_time() > until:
                raise _TimeIsUpError
            calls += 1
            posterior.model(*args)

        def keep(
            kernel: Any, params: dict[str, Tensor], stage: str, step: int, kept: list[dict[str, Tensor]] = held
        ) -> None:
            if stage.startswith("Sample"):
                kept.append({name: value.detach().clone() for name, value in params.items()})

        pyro.clear_param_store()
        pyro.set_rng_seed(4 * seed + chain)
        mcmc = MCMC(
            NUTS(counted, max_plate_nesting=_PLATES, init_strategy=init_to_origin),
            num_samples=1000, warmup_steps=_WARMUP, hook_fn=keep, disable_progbar=True,
        )  # fmt: skip
        with contextlib.suppress(_TimeIsUpError):
            mcmc.run(*posterior.args)
            complete += 1
        if held:
            chains.append({name: torch.stack([one[name] for one in held]) for name in held[0]})
    if not chains:
        raise ValueError(f"no chain ended its warm-up within {limits.seconds / 4:.0f} CPU seconds")
    density = ModelDensity(posterior.model, posterior.args, dtype=torch.float64)
    # The hook has unconstrained values, in the order of Pyro's sites.
    z = torch.cat(
        [
            torch.cat([chain[site.name].reshape(len(chain[site.name]), -1) for site in density.sites], 1)
            for chain in chains
        ]
    )
    spent = time.process_time() - started
    note = f"{len(z)} draws of {len(chains)} chains, {complete} complete"
    return Fit(_unpacked(density, z), None, calls, calls, spent, spent * _DRAWS / len(z), note=note)


def _fit_by_elbo(make_guide: Callable[..., Any], posterior: Posterior, seed: int, limits: Limits) -> Fit:
    """``Trace_ELBO``, 16 particles, Adam from 0.02 falling by a cosine; then weighted like the sampler's draws."""
    started = time.process_time()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    density = ModelDensity(posterior.model, posterior.args, dtype=torch.float64)
    guide = make_guide(posterior.model)
    num_steps = limits.evaluations // _PARTICLES
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "T_max": num_steps}
    optim = PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, schedule, {"clip_norm": 10.0})
    vectorised = isinstance(density.batching, OuterPlate)
    loss = Trace_ELBO(num_particles=_PARTICLES, vectorize_particles=vectorised, max_plate_nesting=_PLATES)
    svi = SVI(posterior.model, guide, optim, loss=loss)
    for _ in range(num_steps):
        svi.step(*posterior.args)
        optim.step()
    training = time.process_time() - started
    draws = draw_from_guide(guide, density, _POOL, posterior.args)
    drawing = time.process_time() - started - training
    z = draws.z[ImportanceResampling().apply(draws, _DRAWS, torch.Generator().manual_seed(seed))]
    gradients = num_steps * _PARTICLES
    return Fit(_unpacked(density, z), draws, gradients, gradients, training, drawing)


def _normal(model: Callable[..., None]) -> AutoMultivariateNormal:
    return AutoMultivariateNormal(model, init_loc_fn=init_to_origin)


Way = Callable[[Posterior, int, Limits], Fit]
WAYS: dict[str, Way] = {
    "sampler": fit_by_sampler,
    "nuts": fit_by_nuts,
    "auto-mvn": lambda posterior, seed, limits: _fit_by_elbo(_normal, posterior, seed, limits),
    "auto-iaf": lambda posterior, seed, limits: _fit_by_elbo(AutoIAFNormal, posterior, seed, limits),
}
"""The ways by the names of the command line."""


# ---------------------------------------------------------------------------------------------------- measuring


def measure(posterior: Posterior, way: str, seed: int, limits: Limits) -> dict[str, Any]:
    """Fit and compare with the reference; a fit that fails is a row that says why."""
    row: dict[str, Any] = {"posterior": posterior.name, "way": way, "seed": seed, "budget": limits.evaluations}
    started = time.process_time()
    try:
        with in_float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of improper priors, which the models mean, and of weights
            fit = WAYS[way](posterior, seed, limits)
            worst = posterior.errors(fit.samples)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return {**row, "failed": reason, "CPU s": time.process_time() - started}
    row |= {"mean error": worst.mean, "sd error": worst.sd, "density": fit.density, "gradient": fit.gradient}
    row |= {"CPU s": fit.training, "drawing": fit.drawing, "probe": fit.probe, "verdict": fit.verdict}
    row |= {"note": fit.note, "machine": machine()}
    if fit.draws is not None:
        estimate = evidence(fit.draws.log_weight)
        row["log Z"], row["log Z se"] = estimate.log_evidence, estimate.log_evidence_se
        row["khat"] = pareto_smooth(fit.draws.log_weight).khat
        row["ESS"] = effective_sample_size(fit.draws.log_weight) / len(fit.draws.z)
        if posterior.log_evidence is not None:
            row["log Z error"] = estimate.log_evidence - posterior.log_evidence
    return row


def _number(row: dict[str, Any], key: str, form: str = ".3f") -> str:
    value = row.get(key)
    return "–" if value is None else "∞" if not math.isfinite(value) else f"{value:{form}}"


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    head = f"{row['posterior']}, {row['way']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: failed ({row['failed']}), {row['CPU s']:.0f} CPU s"
    parts = [f"{key} {_number(row, key)}" for key in ("mean error", "sd error", "log Z error", "khat", "ESS")]
    spent = f"{row['density']:,} evaluations, {row['CPU s']:.0f} + {row['drawing']:.1f} CPU s"
    return f"{head}: {', '.join(parts)}; {row['verdict'] or 'no verdict'}; {spent}; {row['note']}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, and a line for each way below it."""
    text = [
        "| posterior | way | mean error | sd error | log Z error ± se | k̂ | ESS | verdict "
        "| evaluations: density / gradient | CPU s: fit + 10,000 draws |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['posterior']} | {row['way']} "
        if "failed" in row:
            text.append(f"{head}| failed: {row['failed'].replace('|', '/')} | | | | | | | {row['CPU s']:.0f} |")
            continue
        log_z = f"{row['log Z error']:+.3f} ± {row['log Z se']:.3f}" if "log Z error" in row else "–"
        figures = [_number(row, key) for key in ("mean error", "sd error")]
        weights = [_number(row, key, ".2f") for key in ("khat", "ESS")]
        cost = f"{row['density']:,} / {row['gradient']:,} | {row['CPU s']:.0f} + {row['drawing']:.1f}"
        text.append(f"{head}| {' | '.join([*figures, log_z, *weights])} | {row['verdict'] or '–'} | {cost} |")
    for way in dict.fromkeys(row["way"] for row in rows):
        chosen = [row for row in rows if row["way"] == way]
        errors = [max(row.get("mean error", math.inf), row.get("sd error", math.inf)) for row in chosen]
        within = sum(error <= 0.05 for error in errors)
        seconds = sum(row["CPU s"] + row.get("drawing", 0.0) for row in chosen)
        middle = statistics.median(errors)
        summary = f"median of the worse error {middle:.3f}, {within} of {len(chosen)} within 0.05"
        text += ["", f"{way}: {summary}, {seconds:,.0f} CPU s in all."]
    return "\n".join(text)


# -------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench posteriors``."""
    parser.add_argument("--posteriors", nargs="*", default=[], metavar="NAME", help="these only (part of a name)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--evaluations", type=int, default=30_000, help="of training (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU time of NUTS per fit (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="fits already in it are not repeated")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    if options.evaluations < 1 or not options.seconds > 0:
        raise ValueError("expected --evaluations >= 1 and --seconds > 0")
    wanted = [(posterior, way) for posterior in selected(options.posteriors) for way in options.ways]
    print(machine())
    limits = Limits(options.evaluations, options.seconds)
    known = {posterior.name: posterior for posterior, _ in wanted}
    keys = [
        {"posterior": posterior.name, "way": way, "seed": options.seed, "budget": options.evaluations}
        for posterior, way in wanted
    ]
    rows = []
    for row in resumed(
        keys, lambda key: measure(known[key["posterior"]], key["way"], key["seed"], limits), options.out
    ):
        rows.append(row)
        print(f"[{len(rows)}/{len(wanted)}] {line(row)}", flush=True)
    if options.markdown:
        print(f"\n{markdown(rows)}")
