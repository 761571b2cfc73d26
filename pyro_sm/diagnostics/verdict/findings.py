# SPDX-License-Identifier: Apache-2.0
"""All that was found of a result, by group; and how it is written to a file, as flat attributes ``check_…``.

The groups are in files of their own, each with its mathematics and its judgement. The names of the attributes are a
file format: an export of an earlier version must read as before, so add names, and never change one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_sm.base import Evaluations
from pyro_sm.diagnostics.verdict.chains import ChainFindings
from pyro_sm.diagnostics.verdict.difference import EvidenceDifference
from pyro_sm.diagnostics.verdict.probe_findings import ProbeFindings, Unknown
from pyro_sm.diagnostics.verdict.stein import SteinFindings
from pyro_sm.diagnostics.verdict.training import TrainingFindings
from pyro_sm.diagnostics.verdict.weights import WeightFindings

_ATTRIBUTES = {
    "check_num_draws": "weights.num_draws",
    "check_khat": "weights.khat",
    "check_ess": "weights.ess",
    "check_halves_gap": "weights.halves.gap",
    "check_halves_se": "weights.halves.se",
    "check_rounds_gap": "training.drift.gap",
    "check_rounds_se": "training.drift.se",
    "check_gamma": "training.gamma",
    "check_num_chains": "chains.num_chains",
    "check_rhat": "chains.rhat",
    "check_acceptance": "chains.acceptance",
    "check_stein_p": "stein.p_value",
    "check_probe_failure": "probe.failure",
    "check_probe_particles": "probe.particles",
    "check_unknown": "probe.unknown.share",
    "check_unknown_se": "probe.unknown.se",
    "check_probe_gap": "probe.gap.gap",
    "check_probe_gap_se": "probe.gap.se",
    "check_probe_density_evaluations": "probe.evaluations.values",
    "check_probe_gradient_evaluations": "probe.evaluations.scores",
    "check_probe_not_a_number": "probe.evaluations.not_a_number",
}
"""What every attribute of a file holds, in the order in which they are written."""

_KINDS: dict[str, Callable[..., Any]] = {
    "weights.halves": EvidenceDifference,
    "training.drift": EvidenceDifference,
    "probe.unknown": Unknown,
    "probe.gap": EvidenceDifference,
    "probe.evaluations": Evaluations,
    "weights": WeightFindings,
    "training": TrainingFindings,
    "chains": ChainFindings,
    "stein": SteinFindings,
    "probe": ProbeFindings,
}
"""What the values are put together to, parts before the wholes they belong to."""


@dataclass(frozen=True)
class Findings:
    """What was measured, by group; None where nothing was looked at.

    Args:
        weights: of the pool of draws; of draws without weights their effective number alone.
        training: how it ended.
        chains: whether replicas or Markov chains agree, and move.
        stein: the kernel Stein test of the draws.
        probe: what was found elsewhere.
    """

    weights: WeightFindings | None = None
    training: TrainingFindings | None = None
    chains: ChainFindings | None = None
    stein: SteinFindings | None = None
    probe: ProbeFindings | None = None

    def attributes(self) -> dict[str, str | int | float]:
        """As attributes of a file, ``check_…``; what was not measured is left out."""
        values = {name: _at(self, path) for name, path in _ATTRIBUTES.items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Findings:
        """Read back from the attributes of a file; others than those written here are passed over."""
        known: dict[str, Any] = {
            path: _plain(attributes[name]) for name, path in _ATTRIBUTES.items() if name in attributes
        }
        for whole, kind in _KINDS.items():
            parts = {path: path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == whole}
            if parts:
                known[whole] = kind(**{field: known.pop(path) for path, field in parts.items()})
        return cls(**known)


def _at(findings: Findings, path: str) -> Any:
    """The value that ``path`` leads to; None as soon as a group or a part of it is None."""
    value: Any = findings
    for step in path.split("."):
        value = None if value is None else getattr(value, step)
    return value


def _plain(value: Any) -> str | int | float:
    """A file gives NumPy's numbers."""
    return value if isinstance(value, str) else value.item() if hasattr(value, "item") else value
