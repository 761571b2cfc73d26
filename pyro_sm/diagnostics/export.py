# SPDX-License-Identifier: Apache-2.0
r"""Results as ArviZ data: draws, weights, evidence, and where they come from.

ArviZ comes in two lines. Line 0.x knows ``arviz.InferenceData``; line 1.x knows ``xarray.DataTree`` and lives
in ``arviz_base``. The same groups are written in both:

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

import contextlib
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_sm._version import __version__
from pyro_sm.base import Draws, Evaluations, PyroSMWarning, RoundInfo
from pyro_sm.corrections import Correction, ImportanceResampling
from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.diagnostics.verdict.verdict import Trust, TrustWarning, Verdict
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng, prior_trace
from pyro_sm.weights import Evidence, effective_sample_size, evidence_with_tail, pareto_smooth

KHAT_THRESHOLD = 0.7
"""Above this Pareto shape, averages over the weighted draws cannot be trusted."""

_DEFAULT_CORRECTION = ImportanceResampling()
_CHUNK = 1000
_OWN_NAMES = ("lp", "log_q", "log_weight")  # of variables that are no sites, though a site may be called so
_UNITS = {"log_evidence": "nats", "log_evidence_se": "nats", "seconds": "s", "ess": "share of the draws"}


@dataclass(frozen=True)
class Provenance:
    """Where draws come from: what trained the guide, with which seed, at what cost."""

    objective: str
    seed: int | None
    density_evaluations: int
    gradient_evaluations: int


class _Names(NamedTuple):
    """Names of dimensions: of each variable, and the labels along each dimension."""

    dims: dict[str, list[str]]
    coords: dict[str, np.ndarray]


Groups = dict[str, dict[str, np.ndarray]]


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
        groups = _posterior_groups(density, draws, index, num_chains, log_likelihood, prior)
        if predictive and density.observed:
            groups["posterior_predictive"] = _into_chains(_predictive(density, draws.z[index]), num_chains)
        if prior and not density.improper:
            groups |= _prior_groups(density, num_samples, predictive)
        if density.observed:
            groups["observed_data"] = {name: _numpy(value) for name, value in density.observed.items()}
    if known_evidence is None:
        groups["guide"] = _raw_group(density, draws)
    else:
        del groups["sample_stats"]["log_q"]
    names = _dimension_names(density, groups)
    build = _inference_data if legacy else _data_tree
    return build(_netcdf_safe(groups), names, attributes, history)


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


def installed_arviz_is_legacy() -> bool:
    """Whether the installed ArviZ is of the 0.x line; the package ``arviz_base`` alone counts as 1.x.

    Raises:
        ImportError: there is no ArviZ.
    """
    for package, legacy in (("arviz", None), ("arviz-base", False)):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version.startswith("0.") if legacy is None else legacy
    raise ImportError("exporting results needs ArviZ: pip install arviz")


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


# ---------------------------------------------------------------------------------------------- contents


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _in_chunks(function: Callable[[Tensor], Mapping[str, Tensor]], z: Tensor) -> dict[str, np.ndarray]:
    """``function(z)`` by rows, a thousand at a time, so that only its results have to fit into memory."""
    results: dict[str, np.ndarray] = {}
    for start in range(0, z.shape[0], _CHUNK):
        part = z[start : start + _CHUNK]
        for name, value in function(part).items():
            rows = _numpy(value)
            if name not in results:
                results[name] = np.empty((z.shape[0], *rows.shape[1:]), rows.dtype)
            results[name][start : start + _CHUNK] = rows
    return results


def _into_chains(values: Mapping[str, np.ndarray], chains: int) -> dict[str, np.ndarray]:
    return {name: value.reshape(chains, -1, *value.shape[1:]) for name, value in values.items()}


def _predictive(density: ModelDensity, z: Tensor) -> dict[str, np.ndarray]:
    """The observed sites only: the deterministic ones belong to ``posterior``."""

    def draw(part: Tensor) -> dict[str, Tensor]:
        return {k: v for k, v in density.posterior_predictive(part).items() if k in density.observed}

    return _in_chunks(draw, z)


def _posterior_groups(
    density: ModelDensity, draws: Draws, index: Tensor, chains: int, log_likelihood: bool, log_prior: bool
) -> Groups:
    """``posterior``, ``sample_stats``, ``log_likelihood``, ``log_prior``; each distinct draw is computed once."""
    distinct, inverse = torch.unique(index, return_inverse=True)
    z = draws.z[distinct]
    positions = _numpy(inverse)

    def spread(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _into_chains({name: value[positions] for name, value in values.items()}, chains)

    groups = {"posterior": spread(_in_chunks(density.unpack, z))}
    if density.deterministic:
        groups["posterior"] |= spread(_in_chunks(density.deterministics, z))
    stats = {"lp": _numpy(draws.log_p[index]), "log_q": _numpy(draws.log_q[index])}
    groups["sample_stats"] = _into_chains(stats, chains)
    if log_likelihood and density.observed:
        with contextlib.suppress(NotImplementedError):  # discrete sites summed out: data not independent
            groups["log_likelihood"] = spread(_in_chunks(density.log_likelihood, z))
    if log_prior and density.has_prior:
        groups["log_prior"] = spread(_in_chunks(density.log_prior_terms, z))
    return groups


@torch.no_grad()
def _raw_group(density: ModelDensity, draws: Draws) -> dict[str, np.ndarray]:
    guide = _in_chunks(density.unpack, draws.z)
    guide = {f"{name}_site" if name in _OWN_NAMES else name: values for name, values in guide.items()}
    guide |= {"lp": _numpy(draws.log_p), "log_weight": _numpy(draws.log_weight)}
    return _into_chains(guide, 1)


def _prior_groups(density: ModelDensity, num_draws: int, predictive: bool) -> Groups:
    """``prior``, with deterministic sites, and ``prior_predictive``, of the same draws, in one chain."""
    z = density.prior_draws(num_draws)
    prior = _in_chunks(density.unpack, z)
    if density.deterministic:
        prior |= _in_chunks(density.deterministics, z)
    groups = {"prior": _into_chains(prior, 1)}
    if predictive and density.observed:
        try:
            groups["prior_predictive"] = _into_chains(_predictive(density, z), 1)
        except (ValueError, RuntimeError) as error:  # a wide prior overflows where the posterior never goes
            warnings.warn(
                f"no data can be drawn from the prior, so there is no group prior_predictive: {error}",
                PyroSMWarning,
                stacklevel=3,
            )
    return groups


def _attributes(draws: Draws, correction: Correction, provenance: Provenance, legacy: bool) -> dict[str, Any]:
    """Attributes of ``posterior``: strings, ints and floats only, so that NetCDF can store them."""
    package = "arviz" if legacy else "arviz-base"
    return {
        "inference_library": "pyro_sm",
        "inference_library_version": __version__,
        "torch_version": str(torch.__version__),
        "pyro_version": str(pyro.__version__),
        f"{package.replace('-', '_')}_version": importlib.metadata.version(package),
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


# ------------------------------------------------------------------------------------------------- names


def _dimension_names(density: ModelDensity, groups: Groups) -> _Names:
    """Plates give dimensions their names; the rest keep ArviZ's default, ``<variable>_dim_<i>``."""
    variables = {name for group in groups.values() for name in group}
    dims: dict[str, list[str]] = {}
    coords: dict[str, np.ndarray] = {}
    for name, shape, event_dim, plates in _site_layouts(density):
        names = [f"{name}_dim_{i}" for i in range(len(shape))]
        for plate, dim, size in plates:
            position = len(shape) - event_dim + dim
            if not (0 <= position < len(shape) and shape[position] == size):
                continue
            label = _free_name(plate, size, variables, coords)
            coords[label] = np.arange(size)
            names[position] = label
        dims[_safe(name)] = [_safe(label) for label in names]
    return _Names(dims, {_safe(label): values for label, values in coords.items()})


class _Layout(NamedTuple):
    """The shape of a site's value, and which of its batch dimensions (from the right) are plates."""

    name: str
    shape: tuple[int, ...]
    event_dim: int
    plates: tuple[tuple[str, int, int], ...]


def _site_layouts(density: ModelDensity) -> list[_Layout]:
    """Layouts of every latent, deterministic and observed site, from one run of the model."""
    with isolated_rng(0):
        trace, _ = prior_trace(density._traced)
    layouts = []
    for name, site in trace.nodes.items():
        shape = tuple(site["value"].shape) if isinstance(site["value"], Tensor) else ()
        # ``pyro.deterministic`` calls every dimension an event unless told otherwise.
        fn: Any = site["fn"]
        event_dim = fn.event_dim
        if name in density.deterministic and event_dim == len(shape):
            event_dim = 0
        frames = [(f.name, int(f.dim), int(f.size)) for f in site["cond_indep_stack"] if f.dim is not None]
        layouts.append(_Layout(name, shape, event_dim, tuple(frames)))
    return layouts


def _free_name(plate: str, size: int, variables: set[str], coords: Mapping[str, np.ndarray]) -> str:
    """A name no variable has, and no dimension of another size."""
    taken = variables | {"chain", "draw"}
    for label in (plate, f"{plate}_dim", f"{plate}_{size}", f"{plate}_dim_{size}"):
        if label not in taken and (label not in coords or len(coords[label]) == size):
            return label
    return f"{plate}_plate_{size}"


def _safe(name: str) -> str:
    """NetCDF reads ``/`` as a path; Pyro's scopes write it into names."""
    return name.replace("/", ".")


def _netcdf_safe(groups: Groups) -> Groups:
    return {group: {_safe(name): value for name, value in data.items()} for group, data in groups.items()}


# ----------------------------------------------------------------------------------- the two lines of ArviZ


def _training_dataset(history: Sequence[RoundInfo]) -> Any:
    import xarray

    columns = {field: np.array([getattr(info, field) for info in history]) for field in RoundInfo._fields}
    rounds = columns.pop("round")
    return xarray.Dataset(
        {
            name: ("round", values, {"units": _UNITS[name]} if name in _UNITS else {})
            for name, values in columns.items()
        },
        coords={"round": rounds},
    )


def _apart(groups: Groups) -> tuple[dict[str, Any], dict[str, Any]]:
    """Groups of sites' values only, and those that hold :data:`_OWN_NAMES` as well, or no event dimensions."""
    own = {group: values for group, values in groups.items() if group in ("sample_stats", "guide", "log_prior")}
    return {group: values for group, values in groups.items() if group not in own}, own


def _dims_of_sites(names: _Names, group: str, values: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Of a group's variables as far as they go: of a density those of the events are summed.

    Without those of sites that have one of :data:`_OWN_NAMES`, whose variables have no dimensions of their own.
    """
    if group == "log_prior":
        return {name: names.dims[name][: value.ndim - 2] for name, value in values.items() if name in names.dims}
    return {name: dims for name, dims in names.dims.items() if name not in _OWN_NAMES}


def _inference_data(groups: Groups, names: _Names, attributes: dict[str, Any], history: Sequence[RoundInfo]) -> Any:
    """Line 0.x."""
    import arviz

    sites, own = _apart(groups)
    data = arviz.from_dict(**sites, dims=names.dims, coords=names.coords, posterior_attrs=attributes)
    extra = {
        group: arviz.dict_to_dataset(values, dims=_dims_of_sites(names, group, values), coords=names.coords)
        for group, values in own.items()
    }
    data.add_groups(extra | ({"training": _training_dataset(history)} if history else {}))
    return data


def _data_tree(groups: Groups, names: _Names, attributes: dict[str, Any], history: Sequence[RoundInfo]) -> Any:
    """Line 1.x."""
    import arviz_base
    import xarray

    sites, own = _apart(groups)
    tree = arviz_base.from_dict(sites, dims=names.dims, coords=names.coords, attrs={"posterior": attributes})
    for group, values in own.items():
        dims = _dims_of_sites(names, group, values)
        tree[group] = arviz_base.from_dict({group: values}, dims=dims, coords=names.coords)[group]
    if history:
        tree["training"] = xarray.DataTree(_training_dataset(history))
    return tree
