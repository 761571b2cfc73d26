# SPDX-License-Identifier: Apache-2.0
r"""An empty figure without ``pyplot``, the look of its axes, and the colours that all plots of this package share.

Nothing is shown and no global state is touched. matplotlib is an optional extra, imported when a figure is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
"""Okabe and Ito's colours, told apart with any colour vision, and a grey for what is not data."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro_sm[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def tidy(ax: Axes) -> None:
    """Axes without a frame above and on the right, and with a faint grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
