# SPDX-License-Identifier: Apache-2.0
r"""Tables and pictures of the results of ``bench targets``.

``python -m pyro_sm bench report RESULTS.jsonl [--figures DIR]``: one Markdown table per target.

With ``--figures``: draws over contours (targets in the plane), error against evaluations (where a method was run
with several budgets), effective share and evidence error against dimension (families), energies (particles).

Columns: the figures (see ``bench/judge.py``), then the error of ``log Z`` (nats), the effective share and k̂
of the pool, evaluations and CPU seconds of training and of drawing. A cell is the median over seeds and, behind the
semicolon, the worst; seeds that failed count as the worst there is. In brackets stands the floor: the same figure of
as many exact draws, which no sampler can be expected to beat (methods may end with different numbers of draws, and
then their floors differ). Rows are sorted by the first figure, best first, whoever's method it is, and the best
median of every column is bold. Below a table that has both stands the *break-even*: after how many usable draws a
trained sampler has cost less than a run of tempered SMC for every so many, ``T/(c − d/ESS)``: T its training, d a
draw of it, c what SMC pays for each particle (which counts as a draw, and flatters SMC).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyro_sm.bench.commands.targets import KEYS, draws_path, read_rows
from pyro_sm.bench.methods.catalogue import TRAINED
from pyro_sm.bench.methods.fit import Budget
from pyro_sm.bench.pictures import by_method, draw
from pyro_sm.bench.rows import Row, good
from pyro_sm.bench.table import (
    Column,
    Costs,
    Figure,
    Line,
    Part,
    Table,
    best_medians,
    figure,
    lines,
    ranked,
    short,
    shown,
)
from pyro_sm.bench.table import markdown as as_markdown


def _judged(key: str, *, larger_is_better: bool = False) -> Figure:
    return Figure(
        key,
        lambda row: row["figures"].get(key),
        short,
        lambda row: row["floor"].get(key),
        larger_is_better=larger_is_better,
    )


def _evidence_error(row: Row) -> float | None:
    return None if "log Z error" not in row else abs(row["log Z error"])


FIGURES = (
    _judged("mode TV"),
    _judged("v sd error"),
    _judged("minority error"),
    _judged("configuration error"),
    _judged("energy W2"),
    _judged("aligned W2"),
    _judged("virial error"),
    _judged("mean error"),
    _judged("modes", larger_is_better=True),
    _judged("W2"),
    Figure("abs. log Z error", _evidence_error, short),
    Figure("log Z error, signed", lambda row: row.get("log Z error"), short, ranked=False),
    Figure("log Z se", lambda row: row.get("log Z se"), short, ranked=False),
    figure("ESS", short, larger_is_better=True),
    figure("khat", short, "k̂"),
)
"""The figures, in the order in which the first one present sorts a table."""


@dataclass(frozen=True)
class Stages:
    """A cost of ``training`` and of ``drawing``."""

    name: str
    training: Costs
    drawing: Costs

    def text(self, rows: Sequence[Row], best: float | None = None) -> str:
        """``training + drawing``."""
        return f"{self.training.text(rows)} + {self.drawing.text(rows)}"


def _evaluations(stage: str) -> Costs:
    """Gradients behind the stroke where there are any."""
    gradients = Part(lambda row: row[stage]["gradient"] or None)
    return Costs(stage, (Part(lambda row: row[stage]["density"]), gradients), " / ")


def _seconds(stage: str) -> Costs:
    return Costs(stage, (Part(lambda row: row[stage]["seconds"], short),))


_COSTS = (
    Stages("evaluations: training + draws (density / gradient)", _evaluations("training"), _evaluations("drawing")),
    Stages("CPU s: training + draws", _seconds("training"), _seconds("drawing")),
)

# --------------------------------------------------------------------------------------------------- break-even


def break_even(trained: Row, tempered: Row, price: Callable[[dict[str, float]], float]) -> float:
    """Usable draws after which the ``trained`` sampler is the cheaper one; ``inf`` if it never is.

    Args:
        trained: a row with an effective share.
        tempered: a row of a method that pays for every set of draws anew.
        price: of a stage.
    """
    again = (price(tempered["training"]) + price(tempered["drawing"])) / tempered["samples"]
    once = price(trained["drawing"]) / (Budget(trained["evaluations"], trained["draws"]).pool * trained["ESS"])
    return price(trained["training"]) / (again - once) if again > once else math.inf


def _break_evens(found: Sequence[Line]) -> list[str]:
    """A sentence for each trained sampler, if SMC is in the table."""
    smc = [row for line in found for row in good(line.rows) if row["method"] == "smc"]
    prices: tuple[tuple[str, Callable[[dict[str, float]], float]], ...] = (
        ("evaluations", lambda stage: max(stage["density"], stage["gradient"])),
        ("CPU seconds", lambda stage: stage["seconds"]),
    )
    text = []
    for (label,), chosen in found:
        rows = [row for row in good(chosen) if "ESS" in row and row["method"] in TRAINED]
        if not smc or not rows:
            continue
        counts = []
        for name, price in prices:
            draws = statistics.median(break_even(row, smc[0], price) for row in rows)
            counts.append(f"{draws:,.0f} draws by {name}" if math.isfinite(draws) else f"never by {name}")
        text.append(f"{label} against smc breaks even: {', '.join(counts)}.")
    return text


# ------------------------------------------------------------------------------------------------------- tables


def title(rows: Sequence[Row]) -> str:
    """Of one target's table."""
    seeds = len({row["seed"] for row in rows})
    return f"{rows[0]['target']} (d = {rows[0]['dim']}), {seeds} seed{'s' if seeds > 1 else ''}"


def markdown(rows: Sequence[Row]) -> str:
    """One target's table; below it, where training pays off."""
    found = ranked(by_method(rows), FIGURES)
    held = shown(FIGURES, found)
    columns: list[Column] = [*held, *_COSTS]
    text = [as_markdown(("method (budget)",), found, columns, best_medians(found, held))]
    return "\n\n".join([*text, *_break_evens(found)])


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each target, in the order of the results; of rows with one key the last counts."""
    latest = {tuple(row[key] for key in KEYS): row for row in rows}
    of_targets = lines(latest.values(), lambda row: (row["target"],))
    return [Table(title(chosen), markdown(chosen), chosen) for _, chosen in of_targets]


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench report``."""
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="written by bench targets")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write pictures there")
    parser.add_argument("--references", type=Path, metavar="DIR", help="reference draws, as for bench targets")


def _printed(table: Table) -> str:
    seeds = len({row["seed"] for row in table.rows})
    reading = "Median; worst over seeds (as many exact draws)." if seeds > 1 else "In brackets: as many exact draws."
    machines = "; ".join(dict.fromkeys(row["machine"] for row in table.rows))
    # The table, then how to read it, then the break-evens.
    head, *below = table.text.split("\n\n")
    return "\n\n".join([f"### {table.title}", head, f"{reading} {machines}.", *below])


def run(options: argparse.Namespace) -> None:
    """Print the tables; write the pictures if asked to."""
    if not options.results.is_file():
        raise ValueError(f"there is no file '{options.results}'")
    rows = read_rows(options.results)
    if not rows:
        raise ValueError(f"'{options.results}' has no rows")
    made = tables(rows)
    print("\n\n".join(_printed(table) for table in made))
    if options.figures is None:
        return

    def load(row: Row) -> np.ndarray | None:
        path = draws_path(options.results, row)
        if not path.is_file():
            return None
        with np.load(path) as content:
            return content["samples"]

    latest = [row for table in made for row in table.rows]
    for path in draw(latest, FIGURES, load, options.figures, options.references):
        print(f"written: {path}")
