# SPDX-License-Identifier: Apache-2.0
"""The verdict on trained guides: findings about weights, training, replicas, and of the probe about all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pyro import poutine

from pyro_sm.base import Draws, Evaluations
from pyro_sm.corrections.importance import Correction
from pyro_sm.corrections.metropolis import IndependentMetropolis
from pyro_sm.diagnostics.verdict.check import (
    chain_findings,
    look_elsewhere,
    pool_findings,
    probe_findings,
    probe_progress,
    stein_findings,
    training_findings,
)
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult, start_for
from pyro_sm.diagnostics.verdict.verdict import Findings, Thresholds
from pyro_sm.diffusion.covering import default_covering, process_log_weight
from pyro_sm.model.trace import isolated_rng
from pyro_sm.training.trainer import Trainer

_SEED = 15_485_863  # the probe's generator is not that of training or of the draws
_DRAWS_PER_CHAIN = 1000  # that R̂ compares: it resolves .01 with a few hundred independent draws of each


class ProbeRun(NamedTuple):
    """What a probe with these settings has found: any guide on the same model and data can use it."""

    settings: Probe
    result: ProbeResult


def findings_of(
    trainers: Sequence[Trainer],
    pool: Draws,
    correction: Correction,
    generator: torch.Generator,
    *,
    metropolis: IndependentMetropolis | None,
) -> Findings:
    """What the pool, the training and the replicas show, with no further look at the density.

    Args:
        trainers: one per replica.
        pool: their draws, one after the other.
        correction: how draws are chosen for R̂, from each replica's part by itself.
        generator: of the choice.
        metropolis: whose acceptance is to be judged, or None.
    """
    found = training_findings(pool_findings(pool.log_weight), pool.log_weight, trainers[0].history)
    if metropolis is not None:
        accepted = metropolis.walk(pool.log_weight, generator).acceptance
        found = replace(found, acceptance=float(accepted.mean()))
    if len(trainers) > 1:
        index = correction.apply(pool, _DRAWS_PER_CHAIN * len(trainers), generator)
        found = chain_findings(found, [pool.z[index].unflatten(0, (len(trainers), _DRAWS_PER_CHAIN))])
    return found


def findings_of_a_look(
    found: Findings,
    trainers: Sequence[Trainer],
    pool: Draws,
    *,
    probe: Probe | ProbeResult | None,
    known: ProbeRun | None,
    stein_draws: int,
    thresholds: Thresholds | None,
    seed: int,
    disable_progbar: bool,
) -> tuple[Findings, ProbeRun | None]:
    """``found`` with what the Stein test and a probe add: what each replica would say of the probe's particles.

    Args:
        found: so far.
        trainers: one per replica.
        pool: their draws.
        probe: how to look elsewhere; what an earlier look has found; or None not to look.
        known: the last probe, which is not run again with the same settings.
        stein_draws: of the kernel Stein test, 0 for none.
        thresholds: where the lines are drawn.
        seed: of the sampler.
        disable_progbar: no progress bar.

    Returns:
        The findings, and the probe that was run or known.
    """
    density = trainers[0].density_counted_apart(Evaluations())
    with isolated_rng(seed + _SEED):
        found = stein_findings(found, density, pool.z, pool.log_weight, stein_draws)
        if probe is None:
            return found, known
        with torch.no_grad(), poutine.block():
            processes = [trainer.bound.diffusion() for trainer in trainers]
            if isinstance(probe, Probe):
                if known is None or known.settings != probe:
                    with probe_progress(disable_progbar) as report:
                        start = start_for(density, processes[0].covering_gaussian)
                        result = look_elsewhere(probe, density, start, pool.log_weight, thresholds, report)
                    known = ProbeRun(probe, result)
                probe = known.result
            covering = trainers[0].objective.covering or default_covering(density)
            weights = [process_log_weight(p, density, covering, probe.z, probe.log_p) for p in processes]
        return probe_findings(found, pool.log_weight, probe, weights), known
