# SPDX-License-Identifier: Apache-2.0
r"""Results as ArviZ data: draws, weights, evidence, and where they come from.

Here are the public functions, the attributes and the warning. What is in the groups is computed in
``export_groups.py``, what dimensions are called is found in ``export_names.py``, and the two lines of ArviZ differ in
``arviz_lines.py`` alone. Names of groups, variables and attributes are a file format that others read.

The same groups are written in both lines:

================================  ==========================================================================
``posterior``                     corrected draws by site (chain, draw, *shape), and deterministic sites
``sample_stats``                  ``lp`` = ``log p̃``, ``log_q``, nats, of the same draws; without weights no ``log_q``
``log_likelihood``                pointwise, nats; left out where the model cannot give it (enumerated sites)
``posterior_predictive``          observed sites drawn anew
``log_prior``                     log density of each latent site's prior at the posterior's draws, nats, for
                                  ``psense``; left out where a prior is improper
``prior``                         draws of the prior, and deterministic sites; left out where the prior is improper
``prior_predictive``              observed sites drawn from them; left out, too, where they cannot be (said so)
``observed_data``                 the data
``guide``                         the raw draws (chain=1) with ``lp`` and ``log_weight``: what k̂ is about; left out
                                  where draws have no weights
``training``                      one entry per round of training
================================  ==========================================================================

Attributes of ``posterior`` say whether to trust it (``pareto_khat``, ``importance_ess`` as a share of the raw
draws, ``log_evidence`` and ``log_evidence_se`` in nats) and how it came about. ``improper_prior`` names latent sites
whose prior is improper, where there are any: the evidence is then known up to a constant only. Draws without weights,
such as the particles of tempered SMC, have no k̂ and no ``importance_ess``; their evidence is given with them.

Variables of ``log_likelihood`` and ``observed_data`` have the names of their sites, as ``arviz.from_pyro`` gives
them, so that ``arviz.compare`` takes a fit of ours and one of Pyro's NUTS together. (``from_pyro`` counts
deterministic sites as data: of a model with such sites, ``var_name`` must say which variable is meant.)

Of one guide the draws are independent, then resampled; they are dealt to ``num_chains`` chains in random order
because ArviZ's functions want chains. So R̂ is 1 by construction, and ArviZ's ``ess_bulk`` counts repeated draws as if
they were new: ``importance_ess`` times ``num_raw_draws`` is the number to believe. Of several replicas
(``num_replicas``) every chain is one, and R̂ compares them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sm._version import __version__
from pyro_sm.base import Draws, Evaluations, RoundInfo
from pyro_sm.corrections import Correction, ImportanceResampling
from pyro_sm.diagnostics.arviz_lines import arviz_data, arviz_version, installed_arviz_is_legacy
from pyro_sm.diagnostics.export_groups import (
    into_chains,
    posterior_groups,
    predictive_draws,
    prior_groups,
    raw_group,
    to_numpy,
)
from pyro_sm.diagnostics.export_names import dimension_names, netcdf_safe
from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.diagnostics.verdict.thresholds import KHAT_THRESHOLD
from pyro_sm.diagnostics.verdict.trust import Trust, TrustWarning
from pyro_sm.diagnostics.verdict.verdict import Verdict
from pyro_sm.model.density import ModelDensity
from pyro_sm.weights import Evidence, effective_sample_size, evidence_with_tail, pareto_smooth

_DEFAULT_CORRECTION = ImportanceResampling()


@dataclass(frozen=True)
class Provenance:
    """Where draws come from: recorded with them, and never read back to compute anything.

    Args:
        objective: name of what trained the guide.
        seed: of the training; None if it is not known.
        density_evaluations: values of ``log p̃`` that training took.
        gradient_evaluations: its scores.
    """

    objective: str
    seed: int | None
    density_evaluations: int
    gradient_evaluations: int


def draws_to_arviz(
    density: ModelDensity,
    draws: Draws,
    *,
    provenance: Provenance,
    num_samples: int = 4000,
    num_chains: int = 4,
    correction: Correction = _DEFAULT_CORRECTION,
    history: Sequence[RoundInfo] = (),
    verdict: Verdict | None = None,
    num_replicas: int = 1,
    known_evidence: Evidence | None = None,
    predictive: bool = True,
    log_likelihood: bool = True,
    prior: bool = True,
    legacy: bool | None = None,
) -> Any:
    """The groups described at the head of this file, as ``InferenceData`` or ``DataTree``.

    Args:
        density: the model with its data; it unpacks latents and computes what depends on them.
        draws: the pool of raw draws, (N, D); the weights are judged and the samples chosen from it.
        provenance: recorded as attributes.
        num_samples: draws in ``posterior``, over all chains.
        num_chains: how many chains they are dealt to; divides ``num_samples``.
        correction: how draws are chosen from the pool.
        history: rounds of training.
        verdict: recorded with all its findings; ``check`` of the export then comes to it again.
        num_replicas: how many guides the draws come from; if more than one, the pool holds as many draws of each, one
            after the other, and the correction keeps that order, so that chains are replicas.
        known_evidence: of draws that have no weights to tell it: all count alike, whatever ``draws.log_weight`` is.
        predictive: whether to draw ``posterior_predictive``.
        log_likelihood: whether to compute ``log_likelihood`` (``num_samples`` × size of the data numbers).
        prior: whether to draw ``prior`` and, with ``predictive``, ``prior_predictive``; and to compute ``log_prior``.
        legacy: ``True`` for ``InferenceData``, ``False`` for ``DataTree``, ``None`` for what the installed
            ArviZ uses.

    Raises:
        ValueError: ``num_chains`` does not divide ``num_samples``, or the draws cannot be corrected.
        ImportError: the line of ArviZ asked for is not installed.

    Warns:
        TrustWarning: k̂ is above 0.7, so the weights cannot be trusted, or the verdict says not to trust them.
        PyroSMWarning: data cannot be drawn from the prior.
    """
    if num_chains < 1 or num_samples % num_chains:
        raise ValueError(f"expected num_chains to divide num_samples={num_samples}, found {num_chains}")
    legacy = installed_arviz_is_legacy() if legacy is None else legacy
    index = correction.apply(draws, num_samples)
    attributes = _attributes(draws, correction, provenance, legacy)
    attributes |= _weight_attributes(draws.log_weight) if known_evidence is None else known_evidence._asdict()
    _warn_if_untrusted(attributes.get("pareto_khat"), attributes.get("importance_ess"), verdict)
    attributes |= {"num_replicas": num_replicas} if num_replicas > 1 else {}
    attributes |= {"improper_prior": ", ".join(density.improper)} if density.improper else {}
    if verdict is not None:
        attributes |= {"verdict": verdict.level.words, **verdict.findings.attributes()}
    with torch.no_grad():
        groups = posterior_groups(density, draws, index, num_chains, log_likelihood, prior)
        if predictive and density.observed:
            groups["posterior_predictive"] = into_chains(predictive_draws(density, draws.z[index]), num_chains)
        if prior and not density.improper:
            groups |= prior_groups(density, num_samples, predictive)
        if density.observed:
            groups["observed_data"] = {name: to_numpy(value) for name, value in density.observed.items()}
    if known_evidence is None:
        groups["guide"] = raw_group(density, draws)
    else:
        del groups["sample_stats"]["log_q"]
    names = dimension_names(density, groups)
    return arviz_data(netcdf_safe(groups), names, attributes, history, legacy=legacy)


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    pool: int | None = None,
    correction: Correction = _DEFAULT_CORRECTION,
    objective: object = None,
    seed: int | None = None,
    verdict: Verdict | None = None,
    **kwargs: Any,
) -> Any:
    """A trained guide as ArviZ data: :func:`draws_to_arviz` on a pool of fresh draws.

    Works for this package's guides, for Pyro's autoguides and for guides written by hand, as long as their
    draws have a known log density. Draws come from torch's global generator.

    Args:
        model: the Pyro model.
        guide: its guide, trained.
        *args: what the model is called with.
        num_samples: draws in ``posterior``.
        pool: raw draws to choose them from; four times ``num_samples`` by default.
        correction: how they are chosen.
        objective: what trained the guide: its name, or the object itself. If it counted its evaluations
            (``objective.evaluations``), these are recorded, else those of this export.
        seed: recorded, not used.
        verdict: of ``check_guide``, recorded.
        **kwargs: what the model is called with, by name.

    Raises:
        TypeError: the guide's draws have no known log density; the message says what is missing.
        ValueError: the draws cannot be corrected (see the correction).

    Warns:
        TrustWarning: k̂ is above 0.7, so the weights cannot be trusted, or the verdict says not to trust them.
    """
    density = ModelDensity(model, args, kwargs)
    draws = draw_from_guide(guide, density, 4 * num_samples if pool is None else pool, args, kwargs)
    counted = getattr(objective, "evaluations", None)
    spent = counted if isinstance(counted, Evaluations) else density.evaluations
    if objective is None:
        objective = "not recorded"
    provenance = Provenance(
        objective if isinstance(objective, str) else type(objective).__name__,
        seed,
        spent.values,
        spent.scores,
    )
    chains = next(c for c in (4, 2, 1) if num_samples % c == 0 and num_samples >= c * c)
    return draws_to_arviz(
        density,
        draws,
        num_samples=num_samples,
        num_chains=chains,
        correction=correction,
        provenance=provenance,
        verdict=verdict,
    )


def _attributes(draws: Draws, correction: Correction, provenance: Provenance, legacy: bool) -> dict[str, Any]:
    """Attributes of ``posterior``: strings, ints and floats only, so that NetCDF can store them."""
    name, version = arviz_version(legacy)
    return {
        "inference_library": "pyro_sm",
        "inference_library_version": __version__,
        "torch_version": str(torch.__version__),
        "pyro_version": str(pyro.__version__),
        name: version,
        "num_raw_draws": len(draws.z),
        "correction": correction.name,
        "objective": provenance.objective,
        "seed": "not recorded" if provenance.seed is None else int(provenance.seed),
        "density_evaluations": int(provenance.density_evaluations),
        "gradient_evaluations": int(provenance.gradient_evaluations),
    }


def _weight_attributes(log_w: Tensor) -> dict[str, float]:
    khat, share = float(pareto_smooth(log_w).khat), effective_sample_size(log_w) / log_w.shape[0]
    return {"pareto_khat": khat, "importance_ess": share, **evidence_with_tail(log_w)._asdict()}


def _warn_if_untrusted(khat: float | None, share: float | None, verdict: Verdict | None) -> None:
    if verdict is not None and verdict.level is Trust.DISTRUST:
        warnings.warn(f"do not trust these draws: {verdict.reasons[0].finding}", TrustWarning, stacklevel=3)
        return
    if khat is None:
        return
    if math.isinf(khat) and khat > 0:
        what = "Pareto k̂ could not be estimated: too few draws have a weight."
    elif khat > KHAT_THRESHOLD:
        what = f"Pareto k̂ is {khat:.2f}, above {KHAT_THRESHOLD}: a few draws carry most of the weight."
    else:
        return
    warnings.warn(
        f"{what} The guide misses part of the posterior (effective sample size: {share:.2%} of the raw "
        "draws), so do not trust averages, intervals, or the evidence and its error. Train longer, use a "
        "more flexible or wider guide, or reparametrise the model; more draws of this guide hardly help.",
        TrustWarning,
        stacklevel=3,
    )
