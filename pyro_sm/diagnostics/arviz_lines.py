# SPDX-License-Identifier: Apache-2.0
r"""The two lines of ArviZ: the same groups as ``InferenceData`` (0.x) or as ``DataTree`` (1.x).

Line 0.x knows ``arviz.InferenceData``; line 1.x knows ``xarray.DataTree`` and lives in ``arviz_base``. All that
differs between them is here. Both are heavy, and are imported when a result is built.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_sm.base import RoundInfo
from pyro_sm.diagnostics.export_groups import Groups
from pyro_sm.diagnostics.export_names import Names

_UNITS = {"log_evidence": "nats", "log_evidence_se": "nats", "seconds": "s", "ess": "share of the draws"}


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


def arviz_version(legacy: bool) -> tuple[str, str]:
    """The attribute that records the version of this line of ArviZ, and the version installed.

    Raises:
        ImportError: it is not installed.
    """
    package = "arviz" if legacy else "arviz-base"
    return f"{package.replace('-', '_')}_version", importlib.metadata.version(package)


def arviz_data(
    groups: Groups, names: Names, attributes: dict[str, Any], history: Sequence[RoundInfo], *, legacy: bool
) -> Any:
    """The groups as ``InferenceData`` if ``legacy``, else as ``DataTree``.

    Args:
        groups: values (chain, draw, ...) by group and variable.
        names: of their dimensions.
        attributes: of ``posterior``: strings, ints and floats.
        history: rounds of training, the group ``training``.
        legacy: which line.

    Raises:
        ImportError: this line of ArviZ is not installed.
    """
    build = _inference_data if legacy else _data_tree
    return build(groups, names, attributes, history)


def _training_dataset(history: Sequence[RoundInfo]) -> Any:
    """The group ``training``: a column per field of the rounds, with its unit."""
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
    """Groups of sites' values only, and those that hold other variables as well, or no event dimensions."""
    own = {group: values for group, values in groups.items() if group in ("sample_stats", "guide", "log_prior")}
    return {group: values for group, values in groups.items() if group not in own}, own


def _inference_data(groups: Groups, names: Names, attributes: dict[str, Any], history: Sequence[RoundInfo]) -> Any:
    """Line 0.x."""
    import arviz

    sites, own = _apart(groups)
    data = arviz.from_dict(**sites, dims=names.dims, coords=names.coords, posterior_attrs=attributes)
    extra = {
        group: arviz.dict_to_dataset(values, dims=names.of_sites(group, values), coords=names.coords)
        for group, values in own.items()
    }
    data.add_groups(extra | ({"training": _training_dataset(history)} if history else {}))
    return data


def _data_tree(groups: Groups, names: Names, attributes: dict[str, Any], history: Sequence[RoundInfo]) -> Any:
    """Line 1.x."""
    import arviz_base
    import xarray

    sites, own = _apart(groups)
    tree = arviz_base.from_dict(sites, dims=names.dims, coords=names.coords, attrs={"posterior": attributes})
    for group, values in own.items():
        dims = names.of_sites(group, values)
        tree[group] = arviz_base.from_dict({group: values}, dims=dims, coords=names.coords)[group]
    if history:
        tree["training"] = xarray.DataTree(_training_dataset(history))
    return tree
