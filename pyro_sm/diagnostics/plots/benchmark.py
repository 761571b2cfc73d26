# SPDX-License-Identifier: Apache-2.0
r"""Pictures of a comparison of samplers: draws over contours, error against cost and dimension, energies.

They take plain arrays and numbers. Like all plots of this package they need matplotlib, return a ``Figure``, and
touch no global state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_sm.diagnostics.plots.figure import BLUE, GREY, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision, with a marker each for when there are more methods.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
    "#882255",
    "#666666",
)
_MARKERS = "osD^vP*X<>"
_PER_ROW = 4
_GRID = 160  # points a side of the contours, one for every pixel or two of a panel
_DEPTH = 8.0  # nats below the highest point of the density that the contours reach

Points = Sequence[tuple[float, float]]


def plot_samples_over_contours(
    panels: Mapping[str, np.ndarray], log_prob: Callable[[np.ndarray], np.ndarray], *, title: str = ""
) -> Figure:
    """Draws in the plane, a panel each, over contours of the target's log density.

    Args:
        panels: draws (N, 2) by name. The first panel, such as exact draws, sets the frame.
        log_prob: points (M, 2) to log densities (M,), nats, unnormalised.
        title: above all.

    Raises:
        ValueError: no panels, or draws that are not in the plane.
        ImportError: matplotlib is missing.
    """
    if not panels:
        raise ValueError("expected draws of at least one method, found none")
    for name, x in panels.items():
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"expected draws (N, 2), found {x.shape} for {name}")
    count = len(panels)
    columns = min(count, _PER_ROW)
    rows = -(-count // columns)
    figure = new_figure(2.6 * columns + 0.2, 2.8 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    first = next(iter(panels.values()))
    low, high = np.quantile(first, 0.001, axis=0), np.quantile(first, 0.999, axis=0)
    margin = 0.12 * (high - low) + 1e-9
    low, high = low - margin, high + margin
    x, y = (np.linspace(low[i], high[i], _GRID) for i in (0, 1))
    grid = np.stack(np.meshgrid(x, y), -1)
    height = log_prob(grid.reshape(-1, 2)).reshape(_GRID, _GRID)
    levels = float(np.nanmax(height)) - np.linspace(_DEPTH, 0.5, 6)
    for ax, (name, draws) in zip(axes, panels.items(), strict=False):
        ax.contour(x, y, height, levels=levels, colors=GREY, linewidths=0.5, linestyles="solid")
        ax.plot(draws[:, 0], draws[:, 1], ".", color=BLUE, markersize=2.2, alpha=0.4, markeredgewidth=0)
        outside = float(((draws < low) | (draws > high)).any(1).mean())
        note = f", {100 * outside:.1f} % outside" if outside > 0.005 else ""
        ax.set_title(f"{name}{note}", loc="left", fontsize="small")
        ax.set_xlim(low[0], high[0])
        ax.set_ylim(low[1], high[1])
        ax.tick_params(labelsize="x-small")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[count:]:
        ax.set_visible(False)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def _draw_series(ax: Axes, series: Mapping[str, Points]) -> None:
    for i, (name, points) in enumerate(series.items()):
        x, y = np.array(points, dtype=float).T
        y = np.where(np.isfinite(y), y, np.nan)
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        ax.plot(x, y, linewidth=1.3, markersize=5, label=name, color=colour, marker=marker)


def plot_error_against_evaluations(
    series: Mapping[str, Points], *, floor: float | None = None, title: str = "", ylabel: str = "error"
) -> Figure:
    """Error against evaluations of the density, both logarithmic, a line per method; the floor is dotted.

    Args:
        series: (evaluations, error) by method.
        floor: the error of as many exact draws.
        title: of the picture.
        ylabel: what the error is.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(6.6, 4.0)
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    ax = figure.add_subplot()
    _draw_series(ax, series)
    if floor is not None and floor > 0:
        ax.axhline(floor, color=GREY, linestyle=":", label="exact draws")
    ax.set_xscale("log")
    values = [y for points in series.values() for _, y in points if np.isfinite(y)]
    if values and min(values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    # Budgets rarely span a decade: powers of ten alone would leave one label, and all minor ones run into each other.
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("evaluations spent on training")
    ax.set_ylabel(ylabel)
    ax.set_title(title, loc="left", fontweight="bold")
    ax.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(ax)
    return figure


def plot_against_dimension(
    effective_share: Mapping[str, Points], evidence_error: Mapping[str, Points], *, title: str = ""
) -> Figure:
    """Effective share and ``|error of log Z|`` against the dimension, a line per method.

    Args:
        effective_share: (dimension, share) by method.
        evidence_error: (dimension, nats) by method.
        title: of the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys([*evidence_error, *effective_share]))
    both = [*effective_share.values(), *evidence_error.values()]
    dimensions = sorted({d for points in both for d, _ in points})
    for ax, series, label in (
        (left, effective_share, "effective share of the draws"),
        (right, evidence_error, "error of log Z (nats, absolute)"),
    ):
        # Every method keeps its colour in both panels, whether or not it is in both.
        _draw_series(ax, {name: series.get(name, [(np.nan, np.nan)]) for name in names})
        ax.set_xscale("log", base=2)
        ax.set_xticks(dimensions, labels=[f"{d:g}" for d in dimensions])
        ax.minorticks_off()
        ax.set_yscale("log")
        ax.set_xlabel("dimension")
        ax.set_ylabel(label)
        tidy(ax)
    right.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontweight="bold")
    return figure


def plot_energies(energies: Mapping[str, np.ndarray], *, title: str = "") -> Figure:
    """Histograms of energies, outlines on one axis; what lies beyond the range shown is named in the legend.

    Args:
        energies: (N,) in kT by name.
        title: of the picture.

    Raises:
        ValueError: nothing to show.
        ImportError: matplotlib is missing.
    """
    finite = {name: e[np.isfinite(e)] for name, e in energies.items()}
    if not any(len(e) for e in finite.values()):
        raise ValueError("expected finite energies of at least one method, found none")
    figure = new_figure(6.6, 4.0)
    ax = figure.add_subplot()
    low = min(float(np.quantile(e, 0.001)) for e in finite.values() if len(e))
    # The best sampler sets the range: energies of bad ones can be of any size.
    typical = min((float(np.quantile(e, 0.5)), float(np.quantile(e, 0.99))) for e in finite.values() if len(e))
    high = typical[1] + 0.7 * (typical[1] - low)
    bins = np.linspace(low, high, 61)
    for i, (name, e) in enumerate(energies.items()):
        beyond = float(np.mean(~(e <= high)))
        label = name if beyond < 0.005 else f"{name} ({100 * beyond:.0f} % beyond)"
        share = np.histogram(e[np.isfinite(e)], bins)[0] / (len(e) * (bins[1] - bins[0]))
        ax.stairs(share, bins, color=_COLOURS[i % len(_COLOURS)], linewidth=1.4, label=label)
    ax.set_xlabel("energy (kT)")
    ax.set_ylabel("density")
    ax.set_title(title, loc="left", fontweight="bold")
    ax.legend(fontsize="small", frameon=False)
    tidy(ax)
    return figure
