# SPDX-License-Identifier: Apache-2.0
"""ArviZ's summary table of an export, in either ArviZ line."""

from __future__ import annotations

from typing import Any


def summary_table(idata: Any, var_names: list[str] | None = None) -> Any:
    """Mean, standard deviation and interval of every variable, as a ``pandas.DataFrame``.

    The MCMC columns are left out: resampled draws are exchangeable, so that R̂ and ESS would only restate that.
    Whether the weights can be trusted stands in the attributes of ``idata.posterior``.
    """
    import arviz  # heavy, and not needed to train

    return arviz.summary(idata, var_names=var_names, kind="stats")
