# SPDX-License-Identifier: Apache-2.0
r"""Can it be trusted? The verdict on a guide, and on an ArviZ object: measure, then judge.

Each group of findings is measured where it is judged (``weights.py``, ``training.py``, ``chains.py``, ``stein.py``,
``probe_findings.py``); here it is decided what is looked at, and whether the probe looks a second time. A sampler
does the same for its replicas.

An export of this package carries the numbers as attributes ``check_…`` of its posterior, so that a verdict can be had
from the file alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_sm.base import Density
from pyro_sm.diagnostics.guide_draws import draw_from_guide, guide_log_weight
from pyro_sm.diagnostics.verdict.chains import markov_ess, measure_chains
from pyro_sm.diagnostics.verdict.findings import Findings
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult, start_for
from pyro_sm.diagnostics.verdict.probe_findings import effective_particles, measure_probe
from pyro_sm.diagnostics.verdict.stein import measure_stein
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.verdict import Verdict, judge
from pyro_sm.diagnostics.verdict.weights import WeightFindings, measure_weights
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng
from pyro_sm.smc.mixture_start import moments
from pyro_sm.smc.path import Start
from pyro_sm.weights import evidence, pareto_smooth

DEFAULT_PROBE = Probe()
"""How :func:`check_guide` and samplers look elsewhere if nothing is said."""


def look_elsewhere(
    probe: Probe,
    density: Density,
    start: Start,
    log_weight: Tensor,
    thresholds: Thresholds | None = None,
    progress: Callable[[float], None] | None = None,
) -> ProbeResult:
    """What the probe finds; once more, with more of everything, where that is too little to judge by.

    Too few lines of descent, or less evidence than the guide's weights have, which are right on average: in both
    cases the probe has missed something, and not, as far as one can see, the guide. Where the weights are no good
    anyway there is nothing to be saved by a second look.

    Args:
        probe: how to look.
        density: the posterior.
        start: where to begin.
        log_weight: of the guide's pool (N,), nats.
        thresholds: what is too little.
        progress: told of every β reached.
    """
    limits, guide = thresholds or Thresholds(), evidence(log_weight)
    found = probe.run(density, start, progress=progress)
    usable = pareto_smooth(log_weight).khat <= limits.khat
    while usable and probe.num_repeats > 0 and not found.failure:
        error = math.hypot(found.log_evidence_se, guide.log_evidence_se)
        missing = guide.log_evidence - found.log_evidence > limits.drift + limits.deviations * error
        if effective_particles(found) >= limits.min_particles and not missing:
            break
        probe = probe.stronger
        again = probe.run(density, start, progress=progress)
        total = found.evaluations + again.evaluations
        found = (found if again.failure else again)._replace(evaluations=total)
    return found


@contextmanager
def probe_progress(disable: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar for the probe, told of every β."""
    with tqdm(
        total=1.0, desc="looking elsewhere", disable=disable, bar_format="{desc}: {bar} {elapsed}", leave=False
    ) as bar:

        def report(beta: float) -> None:
            bar.set_description_str(
                f"looking elsewhere, β={beta:.2g}" if beta > 0 else "looking elsewhere, for modes"
            )
            bar.update(max(beta - bar.n, 0.0))

        yield report


def check_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    probe: Probe | ProbeResult | None = DEFAULT_PROBE,
    num_draws: int = 16_000,
    stein_draws: int = 0,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    disable_progbar: bool = False,
    **kwargs: Any,
) -> Verdict:
    """Whether a trained guide, this package's, Pyro's or one written by hand, can be trusted on a model.

    Args:
        model: the Pyro model.
        guide: its guide; its draws must have a log density.
        *args: what the model is called with.
        probe: how to look elsewhere; what an earlier look has found, to spare its cost; or None not to look.
        num_draws: of the guide; each costs one density evaluation. Sixteen thousand bear a k̂ of .76, beyond what is
            trusted, and an effective share of 2.5 % leaves the 400 that are wanted.
        stein_draws: of the kernel Stein test, 0 for none; each costs a gradient evaluation.
        seed: of all randomness; the global generators are put back afterwards.
        thresholds: where the lines are drawn.
        disable_progbar: no progress bar.
        **kwargs: what the model is called with, by name.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches.
        TypeError: the guide's draws have no known log density.
        ValueError: no weight is finite.
    """
    density = ModelDensity(model, args, kwargs)
    with isolated_rng(seed):
        pool = draw_from_guide(guide, density, num_draws, args, kwargs)
        weights = measure_weights(pool.log_weight)
        findings = Findings(weights, stein=measure_stein(density, pool.z, pool.log_weight, stein_draws))
        if isinstance(probe, Probe):
            with probe_progress(disable_progbar) as report:
                # In units of the guide's own draws, for lack of anything better, where there is no prior.
                start = start_for(density, lambda: moments(pool.z))
                probe = look_elsewhere(probe, density, start, pool.log_weight, thresholds, report)
        if probe is not None:
            own = None if probe.failure else guide_log_weight(guide, density, probe.z, probe.log_p, args, kwargs)
            found = measure_probe(pool.log_weight, probe, [] if own is None else [own])
            findings = replace(findings, probe=found)
    return judge(findings, thresholds)


def check(idata: Any, thresholds: Thresholds | None = None) -> Verdict:
    """The verdict on an ``InferenceData`` or ``DataTree``.

    It may be of this package, as it was exported or read from a file, or anything else with a ``posterior``, whose
    chains are then taken for those of MCMC.

    Nothing is drawn or evaluated: what was not measured before the export is named as not checked.

    Raises:
        TypeError: there is no ``posterior``.
    """
    posterior = getattr(idata, "posterior", None)
    if posterior is None or not hasattr(posterior, "data_vars"):
        raise TypeError(f"expected an ArviZ object with a posterior, found {type(idata).__name__}")
    attributes: Mapping[str, Any] = posterior.attrs
    ours = attributes.get("inference_library") == "pyro_sm"
    findings = Findings.from_attributes(attributes)
    if ours and findings == Findings() and hasattr(idata, "guide"):
        findings = Findings(measure_weights(torch.as_tensor(idata.guide["log_weight"].values.copy()).flatten()))
    replicas = int(attributes.get("num_replicas", 1))
    if (findings.chains is None or findings.chains.rhat is None) and (not ours or replicas > 1):
        chains = [
            torch.as_tensor(array.transpose("chain", "draw", ...).values.copy())
            for array in posterior.data_vars.values()
            if {"chain", "draw"} <= set(array.dims) and array.dtype.kind in "iuf"
        ]
        acceptance = None if findings.chains is None else findings.chains.acceptance
        findings = replace(findings, chains=measure_chains(chains, acceptance))
        ess = None if ours else markov_ess(chains)
        if ess is not None:
            findings = replace(findings, weights=replace(findings.weights or WeightFindings(), ess=ess))
    return judge(findings, thresholds)
