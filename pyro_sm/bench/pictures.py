# SPDX-License-Identifier: Apache-2.0
"""Pictures of the results of ``bench targets``: draws, error against cost and dimension, energies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_sm.bench.problem import TARGETS, Particles, reference_draws
from pyro_sm.bench.rows import Row, good
from pyro_sm.bench.table import Figure, Line, lines, ranked, shown
from pyro_sm.diagnostics.plots.benchmark import (
    plot_against_dimension,
    plot_energies,
    plot_error_against_evaluations,
    plot_samples_over_contours,
)
from pyro_sm.targets import HasDraws, Target

_EXACT = 2000  # draws of the target: as many as are kept of a method
_REFERENCES = 10_000  # draws in a histogram of energies: a bin in sixty has a hundred and more
_DPI = 130

Series = dict[str, list[tuple[float, float]]]


def by_method(rows: Sequence[Row]) -> list[Line]:
    """A line for each method and budget."""
    return lines(rows, lambda row: (f"{row['method']} ({row['evaluations']:,})",))


def spent(row: Row) -> float:
    """Evaluations of training: the larger of values and gradients."""
    return max(row["training"]["density"], row["training"]["gradient"])


def first_draws(rows: Sequence[Row], load: Callable[[Row], np.ndarray | None]) -> dict[str, np.ndarray]:
    """Draws by method and budget: of the first seed, and of the largest budget, that has any."""
    found: dict[str, np.ndarray] = {}
    seen = set()
    for row in sorted(good(rows), key=lambda row: (row["seed"], -row["evaluations"])):
        if row["method"] in seen:
            continue
        draws = load(row)
        if draws is not None:
            seen.add(row["method"])
            found[f"{row['method']} ({row['evaluations']:,})"] = draws
    return found


def _exact(target: Target) -> dict[str, np.ndarray]:
    if not isinstance(target, HasDraws):
        return {}
    return {"exact draws": target.sample(_EXACT, torch.Generator().manual_seed(0)).numpy()}


def _density(target: Target) -> Callable[[np.ndarray], np.ndarray]:
    def log_prob(points: np.ndarray) -> np.ndarray:
        return target.log_prob(torch.as_tensor(points, dtype=target.start.loc.dtype)).numpy()

    return log_prob


def _family(name: str) -> str:
    """``many-well`` of ``many-well-32``; the name itself if it does not end in a number."""
    head, _, tail = name.rpartition("-")
    return head if tail.isdigit() else name


def _by_dimension(rows: Sequence[Row], figure: Figure, figures: Sequence[Figure]) -> Series:
    found: Series = {}
    for _, of_target in lines(rows, lambda row: (row["target"],)):
        for (label,), chosen in ranked(by_method(of_target), figures):
            spread = figure.spread(chosen)
            if spread is not None:
                found.setdefault(label, []).append((chosen[0]["dim"], spread.median))
    return {label: sorted(points) for label, points in found.items()}


def _budget_picture(name: str, rows: Sequence[Row], figures: Sequence[Figure]) -> Any:
    found = ranked(by_method(rows), figures)
    held = shown(figures, found)
    if not held:
        return None
    first = held[0]
    series: Series = {}
    for _, chosen in found:
        spread = first.spread(chosen)
        if spread is not None:
            evaluations = statistics.median(spent(row) for row in good(chosen))
            series.setdefault(chosen[0]["method"], []).append((evaluations, spread.median))
    overall = first.spread(rows)
    series = {label: sorted(points) for label, points in series.items()}
    floor = None if overall is None else overall.floor
    return plot_error_against_evaluations(series, floor=floor, title=name, ylabel=first.name)


def _of_draws(name: str, draws: Mapping[str, np.ndarray], references: Path | None) -> dict[str, Any]:
    """Pictures of one target's draws."""
    made: dict[str, Any] = {}
    if name not in TARGETS or not draws:
        return made
    target = TARGETS[name]()
    if target.dim == 2:
        panels = _exact(target) | dict(draws)
        made[f"{name}-samples"] = plot_samples_over_contours(panels, _density(target), title=name)
    if isinstance(target, Particles):
        reference = reference_draws(references, name, target)
        known = {} if reference is None else {"reference draws": reference[:_REFERENCES].numpy()}
        energies = {method: -_density(target)(x) for method, x in (known | dict(draws)).items()}
        made[f"{name}-energies"] = plot_energies(energies, title=name)
    return made


def draw(
    rows: Sequence[Row],
    figures: Sequence[Figure],
    load: Callable[[Row], np.ndarray | None],
    folder: Path,
    references: Path | None = None,
) -> list[Path]:
    """Write the pictures; returns their paths.

    Args:
        rows: of any targets.
        figures: the first one present is the error; ``ESS`` and ``abs. log Z error`` must be among them.
        load: the draws (N, d) of a row, None if there are none.
        folder: where to; made if it is not there.
        references: a folder of reference draws, as for ``bench targets``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {}
    for (name,), chosen in lines(rows, lambda row: (row["target"],)):
        made[f"{name}-evaluations"] = _budget_picture(name, chosen, figures)
        made |= _of_draws(name, first_draws(chosen, load), references)
    by_name = {one.name: one for one in figures}
    for (family,), chosen in lines(rows, lambda row: (_family(row["target"]),)):
        if len({row["dim"] for row in chosen}) > 1:
            share, error = (_by_dimension(chosen, by_name[key], figures) for key in ("ESS", "abs. log Z error"))
            made[f"{family}-dimension"] = plot_against_dimension(share, error, title=family)
    paths = []
    for name, picture in made.items():
        if picture is not None:
            paths.append(folder / f"{name}.png")
            picture.savefig(paths[-1], dpi=_DPI)
    return paths
