# SPDX-License-Identifier: Apache-2.0
r"""The picture of a calibration: ``ECDF − uniform`` of the ranks, a panel per test quantity, in a simultaneous band.

A curve above zero: ranks too small, the draws too high. An S that begins upwards: the truth is in the tails too
often, the posteriors are too narrow; one that begins downwards: too wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyro_sm.diagnostics.calibration.rank_uniformity import Band, Uniformity, ecdf_difference, simultaneous_band
from pyro_sm.diagnostics.calibration.simulation import Calibration
from pyro_sm.diagnostics.plots.figure import BLUE, GREY, RED, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PER_ROW = 6  # panels, as many as a page is wide


def plot_calibration(calibrations: Mapping[str, Calibration], *, level: float = 0.95) -> Figure:
    """Small multiples, a block per calibration; what leaves its band, anywhere, is red.

    Args:
        calibrations: by title.
        level: of each panel's band, which holds for all its points at once; not for all panels at once.

    Raises:
        ValueError: no calibrations, or ``level`` outside (0, 1).
        ImportError: matplotlib is missing.
    """
    if not calibrations:
        raise ValueError("expected at least one calibration, found none")
    rows = [-(-len(one.ranks) // _PER_ROW) for one in calibrations.values()]
    columns = min(_PER_ROW, max(len(one.ranks) for one in calibrations.values()))
    figure = new_figure(1.75 * columns + 0.7, 1.6 * sum(rows) + 0.6 * len(rows))
    blocks = figure.subfigures(len(rows), 1, height_ratios=[n + 0.3 for n in rows], squeeze=False)[:, 0]
    for block, count, (title, one) in zip(blocks, rows, calibrations.items(), strict=True):
        axes = block.subplots(count, columns, squeeze=False, sharex=True, sharey=True).ravel()
        num_ranks = len(next(iter(one.ranks.values())))
        band, tests = simultaneous_band(num_ranks, one.num_draws, level), one.tests()
        for ax, (name, ranks) in zip(axes, one.ranks.items(), strict=False):
            _draw(ax, name, ecdf_difference(ranks, one.num_draws), band, tests[name], level)
        for unused in axes[len(one.ranks) :]:
            unused.set_visible(False)
        for position in range(len(one.ranks)):
            axes[position].tick_params(labelbottom=position + columns >= len(one.ranks))
        block.suptitle(
            f"{title}: {num_ranks} data sets, band of {100 * level:g} % for all points of a panel at once",
            x=0.01, ha="left", fontsize="medium", fontweight="bold",
        )  # fmt: skip
        block.supylabel("ECDF − uniform", fontsize="small")
    blocks[-1].supxlabel("rank of the truth among the posterior draws, as a share", fontsize="small")
    return figure


def _draw(ax: Axes, name: str, difference: np.ndarray, band: Band, test: Uniformity, level: float) -> None:
    colour = RED if test.p_value <= 1 - level else BLUE
    at = np.concatenate([[0.0], band.at, [1.0]])
    lower, upper, curve = (np.concatenate([[0.0], y, [0.0]]) for y in (band.lower, band.upper, difference))
    ax.fill_between(at, lower, upper, color=GREY, alpha=0.2, linewidth=0)
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    ax.plot(at, curve, color=colour, linewidth=1.4)
    ax.set_title(f"{name}, p = {test.p_value:.2g}", loc="left", fontsize="small", color=colour)
    ax.set_xticks([0, 0.5, 1], labels=["0", "½", "1"])
    ax.tick_params(labelsize="x-small")
    tidy(ax)
