# SPDX-License-Identifier: Apache-2.0
"""The findings on trained guides: of weights, training and replicas, and of the probe about all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.base import Draws, Evaluations
from pyro_sm.corrections.metropolis import IndependentMetropolis
from pyro_sm.diagnostics.verdict.chains import measure_chains
from pyro_sm.diagnostics.verdict.check import look_elsewhere, probe_progress
from pyro_sm.diagnostics.verdict.findings import Findings
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult, start_for
from pyro_sm.diagnostics.verdict.probe_findings import measure_probe
from pyro_sm.diagnostics.verdict.stein import measure_stein
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.training import measure_training
from pyro_sm.diagnostics.verdict.weights import measure_weights
from pyro_sm.diffusion.covering import default_covering, process_log_weight
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng
from pyro_sm.training.trainer import Trainer

_SEED = 15_485_863  # added to the seed: the probe's numbers are not those of training or of the draws


class ProbeRun(NamedTuple):
    """What a probe with these settings has found: any guide on the same model and data can use it."""

    settings: Probe
    result: ProbeResult


class Look(NamedTuple):
    """How to look at trained guides.

    ``probe``: how to look elsewhere; what an earlier look has found; or None not to look. ``stein_draws``: of the
    kernel Stein test, 0 for none. ``thresholds``: where the lines are drawn, which decide on a second look.
    """

    probe: Probe | ProbeResult | None
    stein_draws: int
    thresholds: Thresholds | None


def acceptance(correction: object, log_weight: Tensor, generator: torch.Generator) -> float | None:
    """The mean acceptance of independent Metropolis on log weights (N,); None for other corrections."""
    if not isinstance(correction, IndependentMetropolis):
        return None
    return float(correction.walk(log_weight, generator).acceptance.mean())


def examined(
    trainers: Sequence[Trainer],
    pool: Draws,
    look: Look,
    known: ProbeRun | None,
    *,
    chains: Sequence[Tensor],
    accepted: float | None,
    seed: int,
    disable_progbar: bool,
) -> tuple[Findings, ProbeRun | None]:
    """What is found, and the probe that was run or known.

    Args:
        trainers: one per replica.
        pool: their weighted draws, one replica after the other.
        look: how to look.
        known: the last probe, which is not run again with the same settings.
        chains: draws of each replica (C, S, ...), for R̂; none for one replica.
        accepted: of independent Metropolis, or None.
        seed: of the sampler.
        disable_progbar: no progress bar.
    """
    log_weight = pool.log_weight
    weights, training = measure_weights(log_weight), measure_training(log_weight, trainers[0].history)
    density, found = trainers[0].density_counted_apart(Evaluations()), None
    with isolated_rng(seed + _SEED):
        stein = measure_stein(density, pool.z, log_weight, look.stein_draws)
        if look.probe is not None:
            result = look.probe
            if isinstance(result, Probe):
                if known is None or known.settings != result:
                    known = ProbeRun(result, _looked(result, trainers, density, log_weight, look, disable_progbar))
                result = known.result
            found = measure_probe(log_weight, result, _said_of(result, trainers, density))
    return Findings(weights, training, measure_chains(chains, accepted), stein, found), known


@torch.no_grad()
def _looked(
    probe: Probe,
    trainers: Sequence[Trainer],
    density: ModelDensity,
    log_weight: Tensor,
    look: Look,
    disable_progbar: bool,
) -> ProbeResult:
    with poutine.block(), probe_progress(disable_progbar) as report:
        start = start_for(density, trainers[0].bound.diffusion().covering_gaussian)
        return look_elsewhere(probe, density, start, log_weight, look.thresholds, report)


@torch.no_grad()
def _said_of(result: ProbeResult, trainers: Sequence[Trainer], density: ModelDensity) -> list[Tensor]:
    """The log weights (M,) that each replica would give to the probe's particles."""
    covering = trainers[0].objective.covering or default_covering(density)
    with poutine.block():
        processes = [trainer.bound.diffusion() for trainer in trainers]
        return [process_log_weight(p, density, covering, result.z, result.log_p) for p in processes]
