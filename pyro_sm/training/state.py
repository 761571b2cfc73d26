# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds of one training, and what must agree before it goes on: settings, sites, data.

The content is a nested ``dict`` of tensors, numbers, strings, lists and tuples (``training/checkpoint.py``), and
complete: a training that is restored from it goes on bit for bit as it would have.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from pyro_sm.base import CheckpointError, Draws, Evaluations, RoundInfo
from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching, TrainingState
from pyro_sm.objectives.importance_weighted.population import Particles
from pyro_sm.training.schedule import Schedule

_KEYS = (
    "settings", "sites", "seed", "guide", "optimiser", "rng", "rounds", "steps", "loss_sum", "seconds", "history",
    "evaluations", "schedule", "population", "seeding",
)  # fmt: skip
_COMPARED = 4  # saved draws whose density is computed anew: data that differ show in every one
# Of these densities: the rounding of another machine, in float32 and sums of thousands of terms, stays below; data
# that differ in one value by a hundredth of its noise do not.
_TOLERANCE = {"rtol": 1e-5, "atol": 1e-2}


def settings(
    guide: AutoDiffusion, objective: ImportanceWeightedScoreMatching, learning_rate: float
) -> dict[str, str]:
    """What must be equal for a resumed run to go on as it would have."""
    return {
        "levels": repr(guide.levels),
        "num_steps": repr(guide.num_steps),
        "architecture": repr(guide.architecture),
        "network dtype": str(guide.network_dtype),
        "heavy": repr(guide.heavy),
        "weighting": repr(objective.weighting),
        "covering": repr(objective.covering),
        "num_draws": repr(objective.num_draws),
        "steps_per_round": repr(objective.steps_per_round),
        "effective_share": repr(objective.effective_share),
        "buffer_rounds": repr(objective.buffer_rounds),
        "batch_size": repr(objective.batch_size),
        "population": repr(objective.population),
        "learning_rate": repr(learning_rate),
    }


def sites_of(density: ModelDensity) -> dict[str, list[int]]:
    """Names and unconstrained shapes of the latent sites."""
    return {site.name: list(site.unconstrained_shape) for site in density.sites}


def stored(state: TrainingState, density: ModelDensity, schedule: Schedule) -> dict[str, Any]:
    """The part of a checkpoint that the objective, the density's counts and the schedule make up."""
    rounds = [
        {"draws": list(r.draws), "weight": r.weight, "gamma": r.gamma, "num_guide": r.num_guide}
        for r in state.buffer.rounds
    ]
    return {
        "sites": sites_of(density),
        "rounds": rounds,
        "steps": state.steps,
        "loss_sum": state.loss_sum,
        "seconds": state.seconds,
        "population": None if state.population is None else list(state.population),
        "seeding": state.seeding,
        "history": [list(info) for info in state.history],
        "evaluations": list(astuple(density.evaluations)),
        "schedule": list(schedule),
    }


def check_settings(content: dict[str, Any], mine: dict[str, str], path: str) -> None:
    """Whether a file is a checkpoint of a sampler, made with these settings.

    Raises:
        CheckpointError: it is not.
    """
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise CheckpointError(f"'{path}' is not a checkpoint of a DiffusionSampler (missing: {', '.join(missing)})")
    theirs = content["settings"]
    different = [f"{k}: {theirs.get(k)} there, {v} here" for k, v in mine.items() if theirs.get(k) != v]
    if different:
        raise CheckpointError(f"'{path}' was made with other settings ({'; '.join(different)})")


def check_model(content: dict[str, Any], density: ModelDensity) -> None:
    """Whether a checkpoint is of this model on these data: the density of a few saved draws must come out the same.

    Raises:
        CheckpointError: other sites, or other densities.
    """
    sites = sites_of(density)
    if content["sites"] != sites:
        raise CheckpointError(f"the checkpoint belongs to a model with the sites {content['sites']}, not {sites}")
    rounds = _rounds(content, density)
    if not rounds:
        return
    z, then = rounds[-1].draws.z[:_COMPARED], rounds[-1].draws.log_p[:_COMPARED]
    now = density.log_prob(z)
    if not torch.allclose(now, then, equal_nan=True, **_TOLERANCE):
        raise CheckpointError(
            "the checkpoint was made with other data or another version of the model: log densities of its "
            f"draws were {[round(float(x), 3) for x in then]}, now {[round(float(x), 3) for x in now]}"
        )


def restored(content: dict[str, Any], density: ModelDensity) -> TrainingState:
    """The objective's state out of a checkpoint, with the density's dtype and device."""
    to: dict[str, Any] = {"dtype": density.dtype, "device": density.device}
    population = content["population"]
    return TrainingState(
        Buffer(_rounds(content, density)),
        content["steps"],
        content["loss_sum"],
        tuple(RoundInfo(*info) for info in content["history"]),
        content["seconds"],
        None if population is None else Particles(*(x.to(**to) for x in population)),
        content["seeding"],
    )


def restored_evaluations(content: dict[str, Any]) -> Evaluations:
    """The counts out of a checkpoint."""
    return Evaluations(*content["evaluations"])


def _rounds(content: dict[str, Any], density: ModelDensity) -> tuple[Round, ...]:
    to: dict[str, Any] = {"dtype": density.dtype, "device": density.device}
    return tuple(
        Round(_draws_on(r["draws"], to), r["weight"].to(**to), r["gamma"], r["num_guide"]) for r in content["rounds"]
    )


def _draws_on(values: list[Tensor | None], to: dict[str, Any]) -> Draws:
    """Draws out of a checkpoint, with the dtype and device of ``to``; the score may be missing."""
    z, log_p, log_weight, *score = (None if x is None else x.to(**to) for x in values)
    if z is None or log_p is None or log_weight is None:
        raise CheckpointError("expected latents, densities and weights of every round in the checkpoint, found None")
    return Draws(z, log_p, log_weight, *score)
