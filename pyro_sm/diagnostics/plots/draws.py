# SPDX-License-Identifier: Apache-2.0
r"""Three pictures that say whether to trust a run: training, raw against weighted draws, tail of the weights.

matplotlib is an optional extra and is imported when a plot is made. Every function returns a ``Figure`` made
without ``pyplot``: nothing is shown, no global state is touched; save it with ``figure.savefig(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_sm.base import RoundInfo
from pyro_sm.diagnostics.plots.figure import BLUE, GREEN, GREY, ORANGE, RED, new_figure, tidy
from pyro_sm.diagnostics.verdict.thresholds import KHAT_THRESHOLD
from pyro_sm.weights import effective_sample_size, pareto_smooth, upper_tail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_POINTS = 2000  # of a panel: more make a blot, and a large file
_MAX_VARIABLES = 6  # fifteen panels of pairs: the most that can be read on a page


def _group(idata: Any, name: str) -> Any:
    """One group as an ``xarray.Dataset``, from either line of ArviZ.

    Raises:
        ValueError: the group is not there.
    """
    groups = idata.groups() if callable(idata.groups) else [path.strip("/") for path in idata.groups]
    if name not in groups:
        raise ValueError(f"expected results with the group {name!r}, found only {', '.join(filter(None, groups))}")
    group = idata[name]
    return group.to_dataset() if hasattr(group, "to_dataset") else group


# ----------------------------------------------------------------------------------------------- training


def _history_columns(history: Any) -> dict[str, np.ndarray]:
    if isinstance(history, Sequence) and all(isinstance(info, RoundInfo) for info in history):
        columns = {name: np.array([getattr(info, name) for info in history]) for name in RoundInfo._fields}
    else:
        dataset = _group(history, "training")
        columns = {name: np.asarray(dataset[name].values) for name in RoundInfo._fields}
    if not columns["round"].size:
        raise ValueError("expected at least one round of training, found none")
    return columns


def plot_training(history: Any, ax: Sequence[Axes] | None = None) -> Figure:
    """Damping γ, effective share with k̂, and ``log Z`` ± one standard error, against density evaluations.

    Args:
        history: the rounds (a sequence of :class:`~pyro_sm.base.RoundInfo`), or exported results with a
            ``training`` group.
        ax: three axes to draw into; a new figure if ``None``.

    Raises:
        ValueError: there is no round, or ``ax`` does not hold three axes.
        ImportError: matplotlib is missing.
    """
    columns = _history_columns(history)
    axes: Sequence[Axes]
    if ax is None:
        figure = new_figure(7.0, 6.6)
        axes = list(figure.subplots(3, 1, sharex=True))
    else:
        axes = list(ax)
        if len(axes) != 3:
            raise ValueError(f"expected three axes, found {len(axes)}")
        figure = axes[0].figure  # type: ignore[assignment]
    x = columns["density_evaluations"]
    axes[0].plot(x, columns["gamma"], "-o", color=BLUE, markersize=4)
    axes[0].axhline(1, color=GREY, linestyle=":", linewidth=1)
    axes[0].set_ylim(0, 1.08)
    axes[0].set_ylabel("damping γ\n(1: the posterior itself)")
    _draw_trust(axes[1], x, columns["ess"], columns["khat"])
    _draw_evidence(axes[2], x, columns["log_evidence"], columns["log_evidence_se"])
    axes[2].set_xlabel("evaluations of the model's density")
    axes[2].xaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_title("Training", loc="left", fontweight="bold")
    for panel in axes:
        tidy(panel)
    figure.align_ylabels(axes)
    return figure


def _draw_trust(ax: Axes, x: np.ndarray, ess: np.ndarray, khat: np.ndarray) -> None:
    """Effective share on a log scale; rounds whose weights cannot be trusted are open and red."""
    good = khat <= KHAT_THRESHOLD
    ess = np.where(ess > 0, ess, np.nan)
    ax.plot(x, ess, color=BLUE, zorder=1)
    ax.scatter(x[good], ess[good], s=22, color=BLUE, zorder=2, label=f"k̂ ≤ {KHAT_THRESHOLD}: trusted")
    if not good.all():
        ax.scatter(
            x[~good], ess[~good], s=26, zorder=2, facecolor="white", edgecolor=RED, linewidth=1.4,
            label=f"k̂ > {KHAT_THRESHOLD}: not to be trusted",
        )  # fmt: skip
    ax.set_yscale("log")
    low = np.nanmin(ess) if np.isfinite(ess).any() else 1e-3
    ax.set_ylim(min(low / 1.6, 0.5), 1.3)
    ax.set_ylabel("effective sample size\n(share of the draws)")
    _legend_above(ax)


def _draw_evidence(ax: Axes, x: np.ndarray, value: np.ndarray, error: np.ndarray) -> None:
    """The first rounds can be hundreds of nats off: the axis shows the second half of the rounds in full."""
    ok = np.isfinite(value)
    error = np.where(np.isfinite(error), error, 0.0)
    last = float(value[ok][-1]) if ok.any() else math.nan
    ax.fill_between(x[ok], (value - error)[ok], (value + error)[ok], color=GREEN, alpha=0.25, linewidth=0)
    ax.plot(
        x[ok],
        value[ok],
        "-o",
        color=GREEN,
        markersize=4,
        label=f"estimate ± standard error (last: {last:.2f})",
    )
    ax.set_ylabel("log evidence\n(nats)")
    late = ok & (np.arange(len(x)) >= len(x) // 2)
    if late.sum() >= 2:
        low, high = float((value - error)[late].min()), float((value + error)[late].max())
        margin = max(0.6 * (high - low), 0.05)
        ax.set_ylim(low - margin, high + margin)
        below, above = ok & (value < low - margin), ok & (value > high + margin)
        for outside, edge, marker in ((below, low - margin, "v"), (above, high + margin, "^")):
            if outside.any():
                line = ax.plot(x[outside], np.full(outside.sum(), edge), marker, label="off the scale")[0]
                line.set(color=GREEN, markerfacecolor="white", markersize=7, clip_on=False)
    _legend_above(ax)


def _legend_above(ax: Axes) -> None:
    """Where it cannot cover a point."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize="small", frameon=False, borderaxespad=0.1)


# ------------------------------------------------------------------------------------- raw against weighted


def _scalars(dataset: Any, names: Sequence[str] | None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """``(label, variable, index)`` of the scalar components of the variables."""
    for name in names if names is not None else [n for n in dataset.data_vars if n not in ("lp", "log_weight")]:
        if name not in dataset.data_vars:
            raise ValueError(f"expected variables among {', '.join(map(str, dataset.data_vars))}, found {name!r}")
        array = dataset[name].transpose("chain", "draw", ...)
        dims = array.dims[2:]
        for index in np.ndindex(*array.shape[2:]):
            labels = [str(array[dim].values[i]) for dim, i in zip(dims, index, strict=True)]
            yield (f"{name}[{', '.join(labels)}]" if labels else str(name)), str(name), index


def _column(dataset: Any, name: str, index: tuple[int, ...]) -> np.ndarray:
    values = dataset[name].transpose("chain", "draw", ...).values
    return values.reshape(-1, *values.shape[2:])[(slice(None), *index)].astype(float)


def _thin(values: np.ndarray) -> np.ndarray:
    """At most two thousand, evenly spread: more points only make a blot."""
    return values[:: max(1, math.ceil(len(values) / _MAX_POINTS))]


def plot_raw_vs_weighted(
    idata: Any, var_names: Sequence[str] | None = None, *, max_variables: int = _MAX_VARIABLES
) -> Figure:
    """Corner plot of the guide's raw draws against the draws of ``posterior``.

    Where the two agree the guide is right already; where they differ, the weights did the work; where only
    one of them has draws, look at k̂.

    Args:
        idata: exported results, with the groups ``guide`` and ``posterior``.
        var_names: sites to show; all latent sites by default.
        max_variables: scalar components to show at most, in order.

    Raises:
        ValueError: a group or a variable is not there.
        ImportError: matplotlib is missing.
    """
    raw, weighted = _group(idata, "guide"), _group(idata, "posterior")
    shown = [s for s, _ in zip(_scalars(raw, var_names), range(max_variables), strict=False)]
    size = len(shown)
    side = max(1.7 * size, 3.6)
    figure = new_figure(side + 0.6, side + 0.9)
    grid = np.atleast_2d(figure.subplots(size, size, sharex="col", squeeze=False))
    columns = [(_column(raw, name, i), _column(weighted, name, i)) for _, name, i in shown]
    limits = [_limits(*pair) for pair in columns]
    for row in range(size):
        for col in range(size):
            ax = grid[row, col]
            if col > row:
                ax.set_visible(False)
                continue
            ax.set_xlim(*limits[col])
            if row == col:
                _draw_marginal(ax, *columns[row], limits[row])
            else:
                for values, colour in ((0, ORANGE), (1, BLUE)):
                    x, y = _thin(columns[col][values]), _thin(columns[row][values])
                    ax.plot(
                        x,
                        y,
                        ".",
                        color=colour,
                        markersize=2.5,
                        alpha=0.35,
                        markeredgewidth=0,
                        rasterized=True,
                    )
                ax.set_ylim(*limits[row])
                tidy(ax)
            _label(ax, row, col, size, [label for label, _, _ in shown])
    _corner_legend(figure, weighted)
    return figure


def _limits(raw: np.ndarray, weighted: np.ndarray) -> tuple[float, float]:
    """The central 99 % of the weighted and 90 % of the raw draws.

    Heavy tails must not squeeze everything else into one pixel, and a tenth of the raw draws may come from a wide
    component that looks far outside the posterior.
    """
    raw, weighted = raw[np.isfinite(raw)], weighted[np.isfinite(weighted)]
    low = min(float(np.quantile(raw, 0.05)), float(np.quantile(weighted, 0.005)))
    high = max(float(np.quantile(raw, 0.95)), float(np.quantile(weighted, 0.995)))
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _draw_marginal(ax: Axes, raw: np.ndarray, weighted: np.ndarray, limits: tuple[float, float]) -> None:
    bins = np.linspace(*limits, 41)
    width = bins[1] - bins[0]
    for values, colour, filled in ((raw, ORANGE, True), (weighted, BLUE, False)):
        density = np.histogram(values, bins)[0] / (len(values) * width)
        ax.stairs(
            density,
            bins,
            color=colour,
            fill=filled,
            alpha=0.35 if filled else 1.0,
            linewidth=0 if filled else 1.4,
        )
    ax.set_yticks([])
    ax.spines[["top", "right", "left"]].set_visible(False)


def _label(ax: Axes, row: int, col: int, size: int, labels: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.tick_params(labelsize="x-small")
    ax.xaxis.set_major_locator(MaxNLocator(3))
    if row == size - 1:
        ax.set_xlabel(labels[col], fontsize="small")
    else:
        ax.tick_params(labelbottom=False)
    if row != col:
        ax.yaxis.set_major_locator(MaxNLocator(3))
        if col == 0:
            ax.set_ylabel(labels[row], fontsize="small")
        else:
            ax.tick_params(labelleft=False)


def _corner_legend(figure: Figure, weighted: Any) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=ORANGE, alpha=0.5, label="guide, raw draws"),
        Patch(facecolor=BLUE, alpha=0.8, label="posterior, weighted draws"),
    ]
    khat, share = weighted.attrs.get("pareto_khat", math.nan), weighted.attrs.get("importance_ess", math.nan)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=2, frameon=False,
        title=f"k̂ = {khat:.2f}, effective sample size {100 * share:.2g} % of the raw draws",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- k-hat


def plot_khat(idata: Any, ax: Axes | None = None) -> Figure:
    """The largest importance weights: how often a weight is exceeded, and the Pareto law fitted to that.

    On these axes (both logarithmic) a tail of shape k is a line of slope ``−1/k`` in the end. A tail that
    falls slower than the dashed line (k = 0.7) has weights too large to average over.

    Args:
        idata: exported results, with the group ``guide``.
        ax: where to draw; a new figure if ``None``.

    Raises:
        ValueError: the group is not there, or k̂ cannot be estimated from its weights.
        ImportError: matplotlib is missing.
    """
    log_w = torch.as_tensor(np.array(_group(idata, "guide")["log_weight"].values).reshape(-1))
    khat = pareto_smooth(log_w).khat
    if not math.isfinite(khat):
        raise ValueError(f"expected weights with a tail to fit, found a Pareto k̂ of {khat}")
    figure = new_figure(6.4, 4.6) if ax is None else ax.figure
    ax = figure.add_subplot() if ax is None else ax  # type: ignore[union-attr]
    n = log_w.shape[0]
    # weights in units of their mean, by size; the i-th largest is reached or exceeded by a share i/N
    log_mean = float(torch.logsumexp(log_w.double(), 0)) - math.log(n)
    w = np.sort(np.exp(log_w.double().numpy() - log_mean))[::-1]
    share = np.arange(1, n + 1) / n
    tail = upper_tail(log_w)
    m = tail.position.shape[0]
    cut = tail.cut * math.exp(tail.log_scale - log_mean)
    shown = slice(0, min(n, 12 * m))
    ax.plot(w[shown], share[shown], ".", color=GREY, markersize=3, label="weights")
    ax.plot(w[:m], share[:m], ".", color=BLUE, markersize=5, label=f"largest {m}: the tail")
    x = np.geomspace(cut * 1.0001, w[0] * 3, 200)
    for k, colour, style, label in (
        (khat, RED if khat > KHAT_THRESHOLD else GREEN, "-", f"Pareto fit, k̂ = {khat:.2f}"),
        (KHAT_THRESHOLD, "black", "--", f"limit, k = {KHAT_THRESHOLD}"),
    ):
        # same median exceedance for both, so that the lines differ by their shape alone
        scale = float(np.median(w[:m]) - cut) * k / math.expm1(k * math.log(2))
        inside = np.maximum(1 + k * (x - cut) / scale, 0.0)
        survival = m / n * np.where(inside > 0, inside, np.nan) ** (-1 / k)
        ax.plot(x, survival, style, color=colour, label=label)
    ax.axvline(cut, color=GREY, linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(0.4 / n, 1.5 * share[shown][-1])
    ax.set_xlim(max(w[shown][-1], cut / 10), w[0] * 3)
    ax.set_xlabel("importance weight (in units of the mean weight)")
    ax.set_ylabel("share of draws with a larger weight")
    verdict = (
        f"below {KHAT_THRESHOLD}: the weights can be trusted"
        if khat <= KHAT_THRESHOLD
        else f"above {KHAT_THRESHOLD}: the weights cannot be trusted"
    )
    ax.set_title(f"Pareto k̂ = {khat:.2f}, {verdict}", loc="left", fontsize="medium", fontweight="bold")
    ess = effective_sample_size(log_w) / n
    ax.legend(
        title=f"effective sample size {100 * ess:.2g} % of {n:,} draws", fontsize="small", title_fontsize="small"
    )
    tidy(ax)
    return figure  # type: ignore[return-value]
