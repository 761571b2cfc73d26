# SPDX-License-Identifier: Apache-2.0
r"""Which of several models do the data speak for? Comparison by evidence, with the errors of the estimates.

Model ``i`` of ``M`` has the prior probability ``π_i`` and the estimated log evidence ``ℓ_i`` with standard error
``s_i``, both in nats; the errors are independent. With ``b`` the model of largest ``ℓ``,

* log Bayes factor of i over j: ``ℓ_i − ℓ_j``, with the error ``√(s_i² + s_j²)``, nats;
* posterior probability ``p_i = π_i e^{ℓ_i} / Σ_j π_j e^{ℓ_j}``. As ``∂p_i/∂ℓ_j = p_i (δ_ij − p_j)``, its error is
  ``p_i √((1 − p_i)² s_i² + Σ_{j≠i} p_j² s_j²)`` to first order in s (the delta method).

The errors are those of computing. What the evidence says depends on the priors of the parameters besides, and no
error shows that. Nor does it say that the best of the models is a good one; for that, see posterior predictive checks
and ``arviz.loo``.

Source: "Bayes Factors" https://doi.org/10.1080/01621459.1995.10476572 .
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pyro_sm.base import check_type
from pyro_sm.diagnostics.verdict.thresholds import KHAT_THRESHOLD
from pyro_sm.diagnostics.verdict.trust import Trust, TrustWarning
from pyro_sm.weights import Evidence

LARGE_ERROR = 0.25
"""Nats. Where two models have it, the first-order error of a small probability is too small by a tenth already."""

_SAME_DATA = 1e-6
"""Of the largest value: data that went through float32, with its seven digits, are the same data."""

_ERRORS_APART = 2.0
"""Standard errors of a log Bayes factor, within which the errors leave open which model is best: about 95 %."""


class LogBayesFactor(NamedTuple):
    """``log (Z_i / Z_j)`` and its standard error, nats."""

    value: float
    se: float


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Args:
        name: of the model.
        log_evidence: nats.
        se: its standard error, nats.
        log_bayes_factor: of the best model over this one: 0 for the best, else positive, nats.
        dse: its standard error, 0 for the best, nats.
        prior: probability before the data.
        probability: after the data.
        probability_se: its standard error.
        warning: why the evidence cannot be trusted, or empty.
    """

    name: str
    log_evidence: float
    se: float
    log_bayes_factor: float
    dse: float
    prior: float
    probability: float
    probability_se: float
    warning: str


@dataclass(frozen=True)
class EvidenceComparison:
    """``models``, the one of largest evidence first. ``print`` shows a table, :meth:`to_dataframe` gives one."""

    models: tuple[ComparedModel, ...]

    def __getitem__(self, name: str) -> ComparedModel:
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"expected one of {', '.join(model.name for model in self.models)}, found {name!r}")

    def log_bayes_factor(self, one: str, other: str) -> LogBayesFactor:
        """``log (Z_one / Z_other)``, nats: positive if the data speak for ``one``.

        Raises:
            KeyError: there is no model of that name.
        """
        if one == other:
            self[one]
            return LogBayesFactor(0.0, 0.0)
        a, b = self[one], self[other]
        return LogBayesFactor(a.log_evidence - b.log_evidence, math.hypot(a.se, b.se))

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a row per model, laid out like that of ``arviz.compare``."""
        import pandas

        columns = ("log_evidence", "se", "log_bayes_factor", "dse", "prior", "probability", "probability_se")
        rows = {name: [getattr(model, name) for model in self.models] for name in columns}
        flags = {"warning": [bool(model.warning) for model in self.models]}
        index = [model.name for model in self.models]
        return pandas.DataFrame({"rank": range(len(index)), **rows, **flags}, index=index)

    def __str__(self) -> str:
        width = max(5, *(len(model.name) for model in self.models))
        lines = [
            f"{'':{width}}  {'log evidence, nats':>22}  {'log Bayes factor of best':>24}  {'probability':>17}",
        ]
        for model in self.models:
            factor = f"{model.log_bayes_factor:.3f} ± {model.dse:.3f}" if model is not self.models[0] else "best"
            lines.append(
                f"{model.name:{width}}  {f'{model.log_evidence:.3f} ± {model.se:.3f}':>22}  {factor:>24}  "
                f"{_probability(model.probability, model.probability_se):>17}"
            )
        first, second = self.models[:2]
        if second.log_bayes_factor < _ERRORS_APART * second.dse:
            lines.append(f"The errors leave open whether {first.name} or {second.name} is best.")
        lines += [f"Do not trust {model.name}: {model.warning}." for model in self.models if model.warning]
        return "\n".join(lines)


def compare_evidence(models: Mapping[str, Any], *, prior: Mapping[str, float] | None = None) -> EvidenceComparison:
    """Compare models of the same data by their evidence.

    Args:
        models: by name, at least two: a :class:`~pyro_sm.DiffusionSampler` that has been run; an export of this
            package, or one read from a file; or any ``(log evidence, standard error)`` in nats, such as that of
            tempered SMC. What is not recorded cannot be checked: of a bare pair neither data nor priors nor weights
            are known, and ``pyro.factor`` may stand for a prior that is not normalised.
        prior: probability of every model before the data, up to a common factor; equal by default.

    Raises:
        ValueError: fewer than two models, an evidence that is not a finite number, an improper prior (the evidence is
            then known up to a constant only), different data, or prior probabilities that do not fit the models.
        TypeError: something else than the above is to be compared.

    Warns:
        TrustWarning: an evidence cannot be trusted: k̂ is above 0.7, the verdict recorded says not to trust the draws,
            or its error is so large that those of the probabilities are too small.
    """
    fits = isinstance(models, Mapping)
    check_type("models", models, fits, 'a dictionary by name, such as {"one": sampler, "other": sampler}')
    if len(models) < 2:
        raise ValueError(f"expected at least two models to compare, found {len(models)}")
    entries = {name: _read(name, model) for name, model in models.items()}
    _same_data({name: entry.data for name, entry in entries.items()})
    for name, entry in entries.items():
        if entry.warning:
            warnings.warn(f"do not trust the evidence of {name!r}: {entry.warning}", TrustWarning, stacklevel=2)
    names = sorted(entries, key=lambda name: -entries[name].evidence.log_evidence)
    log_z = np.array([entries[name].evidence.log_evidence for name in names])
    se = np.array([entries[name].evidence.log_evidence_se for name in names])
    before = _prior_probabilities(names, prior)
    after, error = posterior_probabilities(log_z, se, before)
    compared = [
        ComparedModel(
            name,
            float(log_z[i]),
            float(se[i]),
            float(log_z[0] - log_z[i]),
            math.hypot(se[0], se[i]) if i else 0.0,
            float(before[i]),
            float(after[i]),
            float(error[i]),
            entries[name].warning,
        )
        for i, name in enumerate(names)
    ]
    return EvidenceComparison(tuple(compared))


def posterior_probabilities(log_z: np.ndarray, se: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior probabilities (M,) of models and their standard errors (M,); see the head of this file.

    ``log_z``, ``se`` (M,): nats; ``prior`` (M,): probabilities, zero allowed.
    """
    possible = prior > 0
    ahead = np.where(possible, log_z - log_z[possible].max(), -np.inf)  # at most 0, so that nothing overflows
    weight = prior * np.exp(ahead)
    p = weight / weight.sum()
    jacobian = p[:, None] * (np.eye(len(p)) - p[None, :])
    return p, np.sqrt((jacobian**2 * se[None, :] ** 2).sum(1))


# ------------------------------------------------------------------------------------ what is to be compared


class _Entry(NamedTuple):
    """What is known of a model: its evidence, what speaks against it, and its data, if they were recorded."""

    evidence: Evidence
    warning: str
    data: tuple[np.ndarray, ...]


def _read(name: str, model: Any) -> _Entry:
    if isinstance(model, tuple):
        if len(model) != 2:
            raise TypeError(f"expected (log evidence, standard error) of {name!r}, found {len(model)} values")
        evidence = _finite(name, *model)
        return _Entry(evidence, _warning(evidence, None, ""), ())
    if hasattr(model, "to_arviz"):  # a sampler; its warning is said once, with the name of the model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrustWarning)
            model = model.to_arviz(predictive=False, log_likelihood=False, prior=False)
    posterior = getattr(model, "posterior", None)
    if posterior is None or not hasattr(posterior, "attrs"):
        raise TypeError(
            f"expected a DiffusionSampler, an ArviZ object or (log evidence, standard error) as {name!r}, found "
            f"{type(model).__name__}"
        )
    known = posterior.attrs
    if "log_evidence" not in known or "log_evidence_se" not in known:
        raise ValueError(
            f"expected the evidence of {name!r} in the attributes of its posterior, found none: MCMC does not "
            "estimate it. A guide trained on its draws does (DrawsScoreMatching)"
        )
    if known.get("improper_prior"):
        raise ValueError(
            f"the prior of {known['improper_prior']} in {name!r} is improper, so that its evidence is known up to an "
            "arbitrary constant and says nothing beside another's: give proper priors, or compare by arviz.compare"
        )
    evidence = _finite(name, known["log_evidence"], known["log_evidence_se"])
    observed = getattr(model, "observed_data", None)
    data = () if observed is None else tuple(np.asarray(values.values) for values in observed.data_vars.values())
    return _Entry(evidence, _warning(evidence, known.get("pareto_khat"), str(known.get("verdict", ""))), data)


def _finite(name: str, log_evidence: Any, se: Any) -> Evidence:
    found = Evidence(float(log_evidence), float(se))
    if not (
        math.isfinite(found.log_evidence) and math.isfinite(found.log_evidence_se) and found.log_evidence_se >= 0
    ):
        raise ValueError(
            f"expected a finite log evidence and error of {name!r}, found {found.log_evidence} ± "
            f"{found.log_evidence_se}"
        )
    return found


def _warning(evidence: Evidence, khat: Any, verdict: str) -> str:
    """Why not to trust it, or empty; ``khat`` is None where it is not known."""
    if khat is not None and not float(khat) <= KHAT_THRESHOLD:
        return (
            f"Pareto k̂ is {float(khat):.2f}, above {KHAT_THRESHOLD}, so that neither the evidence nor its error is "
            "reliable"
        )
    if verdict == Trust.DISTRUST.words:
        return f"the verdict on its draws is '{verdict}'"
    if evidence.log_evidence_se > LARGE_ERROR:
        return (
            f"its error of {evidence.log_evidence_se:.2f} nats is above {LARGE_ERROR}, so that the errors of "
            "probabilities are too small"
        )
    return ""


def _same_data(data: Mapping[str, tuple[np.ndarray, ...]]) -> None:
    """Names of sites may differ from model to model; what was observed may not. Unrecorded data are passed over."""
    known = {name: arrays for name, arrays in data.items() if arrays}
    first = next(iter(known), "")
    for name, arrays in known.items():
        left = list(known[first])
        for array in arrays:
            same = [i for i, other in enumerate(left) if _equal(array, other)]
            if not same:
                break
            del left[same[0]]
        else:
            if not left:
                continue
        raise ValueError(
            f"expected models of the same data, found that {name!r} and {first!r} have different ones "
            f"(shapes {_shapes(arrays)} and {_shapes(known[first])}). Data on another scale need the Jacobian of the "
            "change in the model"
        )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    scale = float(np.abs(other[np.isfinite(other)]).max(initial=0))
    return bool(np.allclose(one, other, rtol=0, atol=_SAME_DATA * scale, equal_nan=True))


def _shapes(arrays: tuple[np.ndarray, ...]) -> str:
    return ", ".join(str(array.shape) for array in arrays)


def _prior_probabilities(names: list[str], prior: Mapping[str, float] | None) -> np.ndarray:
    if prior is None:
        return np.full(len(names), 1 / len(names))
    if set(prior) != set(names):
        raise ValueError(f"expected prior probabilities of {', '.join(names)}, found those of {', '.join(prior)}")
    values = np.array([float(prior[name]) for name in names])
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(f"expected prior probabilities that are not negative and not all zero, found {dict(prior)}")
    return values / values.sum()


def _probability(value: float, error: float) -> str:
    """Enough digits to see both the value and its error."""
    digits = 3 if not 0 < min(value, error) < 1e-3 else 6
    return f"{value:.{digits}f} ± {error:.{digits}f}"
