# SPDX-License-Identifier: Apache-2.0
r"""Can it be trusted? Measure what ``verdict.py`` judges: of weighted draws, of a guide, of an ArviZ object.

* ``log Ẑ`` of two random halves of the pool must agree within their errors: where they do not, the error itself
  rests on a few draws.
* ``log Ẑ`` of the last rounds of training, ``log (1/3) Σ_r Ẑ_r`` with the error ``√(Σ_r (Ẑ_r se_r)²) / Σ_r Ẑ_r``,
  must agree with the pool's: a guide that still finds mass is not finished. The first round, of the untrained guide,
  is none of them.
* R̂ is the largest split-R̂ of any scalar, and the effective number of draws the smallest.
* What only a look elsewhere can tell is in ``probe.py``.

An export of this package carries the numbers as attributes ``check_…`` of its posterior, so that a verdict can be had
from the file alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_sm.base import Density, RoundInfo
from pyro_sm.diagnostics.goodness_of_fit import stein_p_value
from pyro_sm.diagnostics.guide_draws import draw_from_guide, guide_log_weight
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult, effective_particles, start_for, unknown_share
from pyro_sm.diagnostics.verdict.verdict import Findings, Thresholds, Verdict, judge
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng
from pyro_sm.smc.mixing import effective_draws, split_rhat
from pyro_sm.smc.mixture_start import moments
from pyro_sm.smc.path import Start
from pyro_sm.weights import effective_sample_size, evidence, pareto_smooth, resample

DEFAULT_PROBE = Probe()
_LAST_ROUNDS = 3


def pool_findings(log_weight: Tensor) -> Findings:
    """k̂, the effective number of draws and the evidence of halves, of log weights (N,), nats."""
    generator = torch.Generator(device=log_weight.device).manual_seed(0)  # which halves does not matter
    order = torch.randperm(len(log_weight), generator=generator, device=log_weight.device)
    one, other = (evidence(log_weight[half]) for half in order.tensor_split(2))
    return Findings(
        num_draws=len(log_weight),
        khat=float(pareto_smooth(log_weight).khat),
        ess=effective_sample_size(log_weight),
        halves_gap=one.log_evidence - other.log_evidence,
        halves_se=math.hypot(one.log_evidence_se, other.log_evidence_se),
    )


def training_findings(findings: Findings, log_weight: Tensor, history: Sequence[RoundInfo]) -> Findings:
    """``findings`` with the evidence of the last rounds against that of the pool (N,), and their damping.

    The first round is the untrained guide's, and says nothing of how training ended.
    """
    if not history:
        return findings
    findings = replace(findings, gamma=history[-1].gamma)
    last = history[1:][-_LAST_ROUNDS:]
    if not last:
        return findings
    log_z = torch.tensor([info.log_evidence for info in last], dtype=torch.float64)
    se = torch.tensor([info.log_evidence_se for info in last], dtype=torch.float64)
    share = torch.softmax(log_z, 0)
    pool = evidence(log_weight)
    rounds = float(torch.logsumexp(log_z, 0)) - math.log(len(last))
    error = float((share * se).square().sum().sqrt())
    return replace(
        findings,
        rounds_gap=pool.log_evidence - rounds,
        rounds_se=math.hypot(error, pool.log_evidence_se),
    )


def chain_findings(findings: Findings, chains: Sequence[Tensor], *, with_ess: bool = False) -> Findings:
    """``findings`` with the largest R̂ of independent chains, each of the tensors (C, S, ...), C > 1.

    ``with_ess``: and the smallest effective number of draws, which is that of Markov chains, without weights.
    """
    usable = [x.double().reshape(*x.shape[:2], -1) for x in chains if x.shape[1] >= 8 and x[0, 0].numel()]
    if not usable:
        return findings
    flat = torch.cat(usable, -1)
    count = flat.shape[0]
    ess = effective_draws(flat)
    if with_ess and bool(torch.isfinite(ess).any()):
        findings = replace(findings, ess=float(ess[torch.isfinite(ess)].min()))
    rhat = split_rhat(flat)
    varies = flat.amax((0, 1)) > flat.amin((0, 1))  # a constant has no R̂; chains stuck at different places have inf
    if count > 1 and bool(varies.any()):
        found = float(torch.nan_to_num(rhat[varies], nan=math.inf, posinf=math.inf).max())
        return replace(findings, rhat=found, num_chains=count)
    return replace(findings, num_chains=count)


def probe_findings(findings: Findings, pool: Tensor, probed: ProbeResult, log_weights: Sequence[Tensor]) -> Findings:
    """``findings`` with what the probe found.

    Args:
        findings: so far.
        pool: log weights (N,) of the guide's draws, nats; those of equally long replicas one after the other.
        probed: the particles.
        log_weights: the log weights (M,) that the guide, or each replica, gives them; empty if they are not known.
            The worst counts.
    """
    findings = replace(
        findings,
        probe_failure=probed.failure,
        probe_density_evaluations=probed.evaluations.values,
        probe_gradient_evaluations=probed.evaluations.scores,
        probe_not_a_number=probed.evaluations.not_a_number,
    )
    if probed.failure:
        return findings
    guide = evidence(pool)
    findings = replace(
        findings,
        probe_particles=effective_particles(probed),
        probe_gap=probed.log_evidence - guide.log_evidence,
        probe_gap_se=math.hypot(probed.log_evidence_se, guide.log_evidence_se),
    )
    if not log_weights:
        return findings
    parts = pool.tensor_split(len(log_weights))
    worst = max(unknown_share(part, probed, own) for part, own in zip(parts, log_weights, strict=True))
    return replace(findings, unknown=worst.share, unknown_se=worst.se)


def stein_findings(
    findings: Findings, density: ModelDensity, z: Tensor, log_weight: Tensor, num_draws: int
) -> Findings:
    """``findings`` with the p-value of the kernel Stein test, where ``num_draws`` > 0.

    It tests resampled draws, each once: as many as the weights are good for, an eighth of the effective number, up to
    ``num_draws``; none if that leaves fewer than fifty.
    """
    count = min(num_draws, int(effective_sample_size(log_weight) / 8))
    if count < min(num_draws, 50) or num_draws == 0:
        return findings
    chosen = resample(log_weight, count).unique()
    return replace(findings, stein_p=stein_p_value(density, z[chosen]))


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
        num_draws: of the guide; each costs one density evaluation.
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
        findings = pool_findings(pool.log_weight)
        findings = stein_findings(findings, density, pool.z, pool.log_weight, stein_draws)
        if isinstance(probe, Probe):
            with probe_progress(disable_progbar) as report:
                # In units of the guide's own draws, for lack of anything better, where there is no prior.
                start = start_for(density, lambda: moments(pool.z))
                probe = look_elsewhere(probe, density, start, pool.log_weight, thresholds, report)
        if probe is not None:
            own = None if probe.failure else guide_log_weight(guide, density, probe.z, probe.log_p, args, kwargs)
            findings = probe_findings(findings, pool.log_weight, probe, [] if own is None else [own])
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
        findings = pool_findings(torch.as_tensor(idata.guide["log_weight"].values.copy()).flatten())
    replicas = int(attributes.get("num_replicas", 1))
    if findings.rhat is None and (not ours or replicas > 1):
        chains = [
            torch.as_tensor(array.transpose("chain", "draw", ...).values.copy())
            for array in posterior.data_vars.values()
            if {"chain", "draw"} <= set(array.dims) and array.dtype.kind in "iuf"
        ]
        findings = chain_findings(findings, chains, with_ess=not ours)
    return judge(findings, thresholds)
