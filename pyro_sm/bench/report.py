# SPDX-License-Identifier: Apache-2.0
r"""Tables and pictures of the results of ``bench targets``.

``python -m pyro_sm bench report RESULTS.jsonl [--figures DIR]``: one Markdown table per target. A cell is the median
over seeds and, behind the semicolon, the worst; seeds that failed count as the worst there is. In brackets stands the
floor: the same figure of as many exact draws, which no sampler can be expected to beat (methods may end with
different numbers of draws, and then their floors differ). Rows are sorted by the first figure, best first, whoever's
method it is, and the best median of every column is bold.

Below a table that has both stands the *break-even*: after how many usable draws a trained sampler has cost less than
a run of tempered SMC for every so many, ``T/(c − d/ESS)``: T its training, d a draw of it, c what SMC pays for each
particle (which counts as a draw, and flatters SMC).

With ``--figures``: draws over contours (targets in the plane), error against evaluations (where a method was run
with several budgets), effective share and evidence error against dimension (families), energies (particles).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_sm.bench.target_methods import Budget
from pyro_sm.bench.targets import KEYS, TARGETS, Particles, draws_path, read_rows, reference_draws
from pyro_sm.diagnostics.plots.benchmark import (
    plot_against_dimension,
    plot_energies,
    plot_error_against_evaluations,
    plot_samples_over_contours,
)
from pyro_sm.targets import HasDraws, Target

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table.

    ``name``: its heading. ``value``: of a row that did not fail; None if the row has none. ``floor``: of such a row.
    ``larger_is_better``: else smaller is. ``ranked``: whether either is, at all.
    """

    name: str
    value: Callable[[Row], float | None]
    floor: Callable[[Row], float | None]
    larger_is_better: bool = False
    ranked: bool = True


def _none(row: Row) -> float | None:
    return None


def _figure(key: str, *, larger_is_better: bool = False) -> Column:
    return Column(key, lambda row: row["figures"].get(key), lambda row: row["floor"].get(key), larger_is_better)


def _evidence_error(row: Row) -> float | None:
    return None if "log Z error" not in row else abs(row["log Z error"])


COLUMNS = (
    _figure("mode TV"),
    _figure("v sd error"),
    _figure("minority error"),
    _figure("configuration error"),
    _figure("energy W2"),
    _figure("aligned W2"),
    _figure("virial error"),
    _figure("mean error"),
    _figure("modes", larger_is_better=True),
    _figure("W2"),
    Column("abs. log Z error", _evidence_error, _none),
    Column("log Z error, signed", lambda row: row.get("log Z error"), _none, ranked=False),
    Column("log Z se", lambda row: row.get("log Z se"), _none, ranked=False),
    Column("ESS", lambda row: row.get("ESS"), _none, larger_is_better=True),
    Column("k̂", lambda row: row.get("khat"), _none),
)
"""The figures, in the order in which the first one present sorts a table."""


TRAINED = ("iwsm", "iwsm-compiled", "iwsm-moves", "iwsm-marginal")
"""Methods that leave a sampler behind whose weights are worth the name."""


class Cell(NamedTuple):
    """``median`` and ``worst`` over seeds, and the median ``floor``, None if there is none."""

    median: float
    worst: float
    floor: float | None = None


class Line(NamedTuple):
    """One line of a table: a ``method`` with one budget, its ``rows`` (failed ones too), and its cells by column."""

    method: str
    evaluations: int
    rows: list[Row]
    cells: dict[str, Cell]


def _good(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "failed" not in row]


def cell(column: Column, rows: list[Row]) -> Cell | None:
    """Median and worst over the rows of one line; None if no row has the figure.

    A row that failed, or has NaN, counts as the worst there is: infinity, or 0 where larger is better. Where nothing
    is better the worst is the largest in size, of the rows that did not fail.
    """
    values = [column.value(row) for row in _good(rows)]
    known = [value for value in values if value is not None]
    if not known:
        return None
    floors = [bound for row in _good(rows) if (bound := column.floor(row)) is not None]
    bound = statistics.median(floors) if floors else None
    if not column.ranked:
        return Cell(statistics.median(known), max(known, key=abs))
    lost = 0.0 if column.larger_is_better else math.inf
    known = [lost if math.isnan(value) else value for value in known] + [lost] * (len(rows) - len(_good(rows)))
    worst = min(known) if column.larger_is_better else max(known)
    return Cell(statistics.median(known), worst, bound)


def lines(rows: list[Row]) -> list[Line]:
    """The lines of one target's table, best first; methods that always failed are last."""
    found = []
    for method, evaluations in dict.fromkeys((row["method"], row["evaluations"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["evaluations"]) == (method, evaluations)]
        cells = {column.name: cell(column, chosen) for column in COLUMNS}
        found.append(Line(method, evaluations, chosen, {key: one for key, one in cells.items() if one is not None}))
    shown = [column for column in columns(found) if column.ranked]

    def rank(one: Line) -> tuple[bool, list[float]]:
        order = [
            (-1 if column.larger_is_better else 1) * one.cells[column.name].median
            if column.name in one.cells
            else math.inf
            for column in shown
        ]
        return not _good(one.rows), order

    return sorted(found, key=rank)


def columns(found: list[Line]) -> list[Column]:
    """The columns that any line has."""
    return [column for column in COLUMNS if any(column.name in one.cells for one in found)]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–∞" if value < 0 else "∞"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.2e}"


def _median(values: list[float]) -> str:
    return _number(statistics.median(values)) if values else "–"


def _count(rows: list[Row], stage: str) -> str:
    """Median evaluations, gradients behind the stroke where there are any."""
    density = statistics.median(row[stage]["density"] for row in rows)
    gradient = statistics.median(row[stage]["gradient"] for row in rows)
    return f"{density:,.0f}" + (f" / {gradient:,.0f}" if gradient else "")


def _line(one: Line, shown: list[Column], best: dict[str, float]) -> str:
    good = _good(one.rows)
    failed = len(one.rows) - len(good)
    name = f"{one.method} ({one.evaluations:,})"
    if not good:
        return f"| {name} | failed: {one.rows[0]['failed'].replace('|', '/')} |" + " |" * (len(shown) + 1)
    if failed:
        name += f", {failed} of {len(one.rows)} failed"
    cells = []
    for column in shown:
        held = one.cells.get(column.name)
        if held is None:
            cells.append("–")
            continue
        text = _number(held.median)
        text = f"**{text}**" if held.median == best.get(column.name) else text
        text += f"; {_number(held.worst)}" if len(one.rows) > 1 else ""
        cells.append(text if held.floor is None else f"{text} ({_number(held.floor)})")
    seconds = [_median([row[stage]["seconds"] for row in good]) for stage in ("training", "drawing")]
    cost = f"{_count(good, 'training')} + {_count(good, 'drawing')} | {seconds[0]} + {seconds[1]}"
    return f"| {name} | {' | '.join(cells)} | {cost} |"


def break_even(trained: Row, tempered: Row, spent: Callable[[dict[str, float]], float]) -> float:
    """Usable draws after which the ``trained`` sampler is the cheaper one; ``inf`` if it never is.

    Args:
        trained: a row with an effective share.
        tempered: a row of a method that pays for every set of draws anew.
        spent: the price of a stage.
    """
    again = (spent(tempered["training"]) + spent(tempered["drawing"])) / tempered["samples"]
    once = spent(trained["drawing"]) / (Budget(trained["evaluations"], trained["draws"]).pool * trained["ESS"])
    return spent(trained["training"]) / (again - once) if again > once else math.inf


def _break_evens(found: list[Line]) -> list[str]:
    """A sentence for each trained sampler, if SMC is in the table."""
    smc = [row for one in found if one.method == "smc" for row in _good(one.rows)]
    text = []
    for one in found:
        rows = [row for row in _good(one.rows) if "ESS" in row and one.method in TRAINED]
        if not smc or not rows:
            continue
        prices: tuple[tuple[str, Callable[[dict[str, float]], float]], ...] = (
            ("evaluations", lambda stage: max(stage["density"], stage["gradient"])),
            ("CPU seconds", lambda stage: stage["seconds"]),
        )
        counts = []
        for name, spent in prices:
            draws = statistics.median(break_even(row, smc[0], spent) for row in rows)
            counts.append(f"{draws:,.0f} draws by {name}" if math.isfinite(draws) else f"never by {name}")
        text.append(f"{one.method} ({one.evaluations:,}) against smc breaks even: {', '.join(counts)}.")
    return text


def table(target: str, rows: list[Row]) -> str:
    """The Markdown table of one target; below it what brackets mean, the machines, and where training pays off."""
    found = lines(rows)
    shown = columns(found)
    best = {
        column.name: (max if column.larger_is_better else min)(
            one.cells[column.name].median for one in found if column.name in one.cells
        )
        for column in shown
        if column.ranked
    }
    seeds = len({row["seed"] for row in rows})
    heads = ["method (budget)", *(column.name for column in shown)]
    heads += ["evaluations: training + draws (density / gradient)", "CPU s: training + draws"]
    text = [
        f"### {target} (d = {rows[0]['dim']}), {seeds} seed{'s' if seeds > 1 else ''}",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(_line(one, shown, best) for one in found),
    ]
    reading = "Median; worst over seeds (as many exact draws)." if seeds > 1 else "In brackets: as many exact draws."
    text += ["", f"{reading} {'; '.join(dict.fromkeys(row['machine'] for row in rows))}."]
    text += [part for sentence in _break_evens(found) for part in ("", sentence)]
    return "\n".join(text)


def markdown(rows: list[Row]) -> str:
    """All tables, targets in the order of the results."""
    names = dict.fromkeys(row["target"] for row in rows)
    return "\n\n".join(table(name, [row for row in rows if row["target"] == name]) for name in names)


# ------------------------------------------------------------------------------------------------------ pictures


def _draws(results: Path, rows: list[Row]) -> dict[str, np.ndarray]:
    """Draws by method and budget: of the first seed, and of the largest budget, that has any."""
    found: dict[str, np.ndarray] = {}
    seen = set()
    for row in sorted(_good(rows), key=lambda row: (row["seed"], -row["evaluations"])):
        path = draws_path(results, row)
        if row["method"] not in seen and path.is_file():
            seen.add(row["method"])
            with np.load(path) as content:
                found[f"{row['method']} ({row['evaluations']:,})"] = content["samples"]
    return found


def _exact(target: Target) -> dict[str, np.ndarray]:
    if not isinstance(target, HasDraws):
        return {}
    return {"exact draws": target.sample(2000, torch.Generator().manual_seed(0)).numpy()}


def _density(target: Target) -> Callable[[np.ndarray], np.ndarray]:
    def log_prob(points: np.ndarray) -> np.ndarray:
        return target.log_prob(torch.as_tensor(points, dtype=target.start.loc.dtype)).numpy()

    return log_prob


def _family(name: str) -> str:
    """``many-well`` of ``many-well-32``; the name itself if it does not end in a number."""
    head, _, tail = name.rpartition("-")
    return head if tail.isdigit() else name


def _by_dimension(rows: list[Row], column: Column) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(row["target"] for row in rows):
        for one in lines([row for row in rows if row["target"] == name]):
            if column.name in one.cells:
                label = f"{one.method} ({one.evaluations:,})"
                found.setdefault(label, []).append((one.rows[0]["dim"], one.cells[column.name].median))
    return {label: sorted(points) for label, points in found.items()}


def _budget_picture(name: str, rows: list[Row]) -> Any:
    found = lines(rows)
    shown = columns(found)
    if not shown:
        return None
    first = shown[0]
    series: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        good = _good(one.rows)
        if first.name in one.cells and good:
            spent = statistics.median(max(row["training"]["density"], row["training"]["gradient"]) for row in good)
            series.setdefault(one.method, []).append((spent, one.cells[first.name].median))
    bounds = [bound for row in _good(rows) if (bound := first.floor(row)) is not None]
    bound = statistics.median(bounds) if bounds else None
    series = {label: sorted(points) for label, points in series.items()}
    return plot_error_against_evaluations(series, floor=bound, title=name, ylabel=first.name)


def draw(results: Path, rows: list[Row], folder: Path, references: Path | None = None) -> list[Path]:
    """Write the pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {}
    for name in dict.fromkeys(row["target"] for row in rows):
        chosen = [row for row in rows if row["target"] == name]
        made[f"{name}-evaluations"] = _budget_picture(name, chosen)
        draws = _draws(results, chosen)
        target = TARGETS[name]() if name in TARGETS else None
        if target is None or not draws:
            continue
        if target.dim == 2:
            panels = _exact(target) | draws
            made[f"{name}-samples"] = plot_samples_over_contours(panels, _density(target), title=name)
        if isinstance(target, Particles):
            reference = reference_draws(references, name, target)
            known = {} if reference is None else {"reference draws": reference[:10_000].numpy()}
            energies = {method: -_density(target)(x) for method, x in (known | draws).items()}
            made[f"{name}-energies"] = plot_energies(energies, title=name)
    for family in dict.fromkeys(_family(row["target"]) for row in rows):
        chosen = [row for row in rows if _family(row["target"]) == family]
        if len({row["dim"] for row in chosen}) > 1:
            by_name = {column.name: _by_dimension(chosen, column) for column in COLUMNS}
            made[f"{family}-dimension"] = plot_against_dimension(
                by_name["ESS"], by_name["abs. log Z error"], title=family
            )
    paths = []
    for name, figure in made.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench report``."""
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="written by bench targets")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write pictures there")
    parser.add_argument("--references", type=Path, metavar="DIR", help="reference draws, as for bench targets")


def run(options: argparse.Namespace) -> None:
    """Print the tables; write the pictures if asked to."""
    if not options.results.is_file():
        raise ValueError(f"there is no file '{options.results}'")
    rows = read_rows(options.results)
    if not rows:
        raise ValueError(f"'{options.results}' has no rows")
    latest = {tuple(row[key] for key in KEYS): row for row in rows}
    print(markdown(list(latest.values())))
    if options.figures is not None:
        for path in draw(options.results, list(latest.values()), options.figures, options.references):
            print(f"written: {path}")
