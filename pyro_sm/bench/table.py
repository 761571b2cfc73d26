# SPDX-License-Identifier: Apache-2.0
r"""Markdown tables of rows: a line for all rows of one label, which differ by their seed.

A cell is the median over the rows of its line and, behind a semicolon, the worst; of a single row, its number. A row
that failed, or has NaN, counts as the worst there is: infinity, or 0 where larger is better. A figure that no row of
the line has is a dash. In brackets may stand a *floor*: the same figure of as many exact draws.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pyro_sm.bench.rows import Row, good

Format = Callable[[float], str]


def fixed(digits: int, *, signed: bool = False) -> Format:
    """So many digits behind the point."""

    def form(value: float) -> str:
        return f"{value:{'+' if signed else ''}.{digits}f}" if math.isfinite(value) else _infinite(value)

    return form


three_digits = fixed(3)


def short(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return _infinite(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.2e}"


def count(value: float) -> str:
    """A whole number with thousands set off."""
    return f"{value:,.0f}" if math.isfinite(value) else _infinite(value)


def _infinite(value: float) -> str:
    return "–∞" if value < 0 else "∞"


class Column(Protocol):
    """A column of a table."""

    @property
    def name(self) -> str:
        """Its heading."""
        ...

    def text(self, rows: Sequence[Row], best: float | None = None) -> str:
        """The cell of a line with these rows, of which one at least did not fail; bold if its median is ``best``."""
        ...


class Spread(NamedTuple):
    """``median`` and ``worst`` over the rows of a line, and the median ``floor``, None if there is none."""

    median: float
    worst: float
    floor: float | None = None


def _none(row: Row) -> float | None:
    return None


@dataclass(frozen=True)
class Figure:
    """A number by which rows are judged.

    Args:
        name: its heading.
        value: of a row that did not fail; None if the row has none.
        form: how it is written.
        floor: of such a row.
        larger_is_better: else smaller is.
        ranked: whether either is, at all; else the worst is the largest in size, of the rows that did not fail.
    """

    name: str
    value: Callable[[Row], float | None]
    form: Format = three_digits
    floor: Callable[[Row], float | None] = _none
    larger_is_better: bool = False
    ranked: bool = True

    def spread(self, rows: Sequence[Row]) -> Spread | None:
        """Median and worst; None if no row has the figure."""
        done = good(rows)
        known = [value for row in done if (value := self.value(row)) is not None]
        if not known:
            return None
        floors = [bound for row in done if (bound := self.floor(row)) is not None]
        floor = statistics.median(floors) if floors else None
        if not self.ranked:
            return Spread(statistics.median(known), max(known, key=abs), floor)
        lost = 0.0 if self.larger_is_better else math.inf
        known = [lost if math.isnan(value) else value for value in known] + [lost] * (len(rows) - len(done))
        return Spread(statistics.median(known), min(known) if self.larger_is_better else max(known), floor)

    def text(self, rows: Sequence[Row], best: float | None = None) -> str:
        """``median; worst (floor)``."""
        found = self.spread(rows)
        if found is None:
            return "–"
        text = self.form(found.median)
        text = f"**{text}**" if found.median == best else text
        text += f"; {self.form(found.worst)}" if len(rows) > 1 else ""
        return text if found.floor is None else f"{text} ({self.form(found.floor)})"


def figure(
    key: str, form: Format = three_digits, name: str | None = None, *, larger_is_better: bool = False
) -> Figure:
    """The entry ``key`` of a row, under its own name or another."""
    return Figure(name or key, lambda row: row.get(key), form, larger_is_better=larger_is_better)


@dataclass(frozen=True)
class Estimate:
    """A signed error with the standard error that goes with it: medians, and the largest error in size.

    Args:
        name: its heading.
        key: of the error.
        error_key: of the standard error.
    """

    name: str
    key: str
    error_key: str

    def text(self, rows: Sequence[Row], best: float | None = None) -> str:
        """``median; worst ± standard error``."""
        form = fixed(3, signed=True)
        held = [row for row in good(rows) if self.key in row]
        if not held:
            return "–"
        found = form(statistics.median(row[self.key] for row in held))
        if len(rows) > 1:
            found += f"; {form(max((row[self.key] for row in held), key=abs))}"
        return f"{found} ± {fixed(3)(statistics.median(row[self.error_key] for row in held))}"


class Part(NamedTuple):
    """One number of :class:`Costs`: its ``value`` in a row, None for none, and how it is written."""

    value: Callable[[Row], float | None]
    form: Format = count


@dataclass(frozen=True)
class Costs:
    """Numbers that are paid for, not judged: medians over the rows that did not fail, side by side.

    Args:
        name: its heading.
        parts: the numbers; one that no row has is left out.
        between: what stands between them.
    """

    name: str
    parts: tuple[Part, ...]
    between: str = " + "

    def text(self, rows: Sequence[Row], best: float | None = None) -> str:
        """Medians."""
        texts = []
        for part in self.parts:
            known = [value for row in good(rows) if (value := part.value(row)) is not None]
            texts += [part.form(statistics.median(known))] if known else []
        return self.between.join(texts) or "–"


def entry(key: str, form: Format = count) -> Part:
    """The entry ``key`` of a row."""
    return Part(lambda row: row.get(key), form)


@dataclass(frozen=True)
class Words:
    """Words, the same for all rows of a line or counted.

    Args:
        name: its heading.
        value: of a row; empty for none.
    """

    name: str
    value: Callable[[Row], str]

    def text(self, rows: Sequence[Row], best: float | None = None) -> str:
        """``trust``, or ``2 trust, 1 use with care``."""
        said = [word for row in good(rows) if (word := self.value(row))]
        counts = {word: said.count(word) for word in dict.fromkeys(said)}
        if len(counts) < 2:
            return said[0] if said else "–"
        return ", ".join(f"{number} {word}" for word, number in counts.items())


class Line(NamedTuple):
    """A line of a table: its ``label``, one cell or several, and its ``rows``, failed ones too."""

    label: tuple[str, ...]
    rows: Sequence[Row]


def lines(rows: Iterable[Row], label: Callable[[Row], tuple[str, ...]]) -> list[Line]:
    """Rows of one label are one line, in the order of the first of each."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(label(row), []).append(row)
    return [Line(key, held) for key, held in found.items()]


def shown(figures: Sequence[Figure], found: Sequence[Line]) -> list[Figure]:
    """The figures that any line has."""
    return [one for one in figures if any(one.spread(line.rows) is not None for line in found)]


def ranked(found: Sequence[Line], figures: Sequence[Figure]) -> list[Line]:
    """Best first, by the figures in turn; lines without a figure after those with it, failed ones last."""
    judges = [one for one in figures if one.ranked]

    def rank(line: Line) -> tuple[bool, list[float]]:
        order = []
        for one in judges:
            spread = one.spread(line.rows)
            order.append(math.inf if spread is None else (-1 if one.larger_is_better else 1) * spread.median)
        return not good(line.rows), order

    return sorted(found, key=rank)


def best_medians(found: Sequence[Line], figures: Sequence[Figure]) -> dict[str, float]:
    """The best median of every ranked figure, by its heading."""
    best = {}
    for one in figures:
        medians = [spread.median for line in found if (spread := one.spread(line.rows)) is not None]
        if one.ranked and medians:
            best[one.name] = max(medians) if one.larger_is_better else min(medians)
    return best


def _line(line: Line, columns: Sequence[Column], best: Mapping[str, float]) -> str:
    *heads, last = line.label
    failed = [row for row in line.rows if "failed" in row]
    if len(failed) == len(line.rows):
        said = failed[0]["failed"].replace("|", "/")
        seconds = f", {failed[0]['CPU s']:.0f} CPU s" if "CPU s" in failed[0] else ""
        cells = [f"failed: {said}{seconds}", *[""] * (len(columns) - 1)]
    else:
        last += f", {len(failed)} of {len(line.rows)} failed" if failed else ""
        cells = [column.text(line.rows, best.get(column.name)) for column in columns]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in (*heads, last, *cells)) + "|"


def markdown(
    heads: Sequence[str],
    found: Sequence[Line],
    columns: Sequence[Column],
    best: Mapping[str, float] | None = None,
) -> str:
    """A Markdown table.

    Args:
        heads: headings of the label's cells.
        found: the lines.
        columns: the other columns.
        best: medians to be set in bold, by heading.
    """
    head = [*heads, *(column.name for column in columns)]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*text, *(_line(line, columns, best or {}) for line in found)])


def summary(name: str, rows: Sequence[Row], figures: Sequence[Figure]) -> str:
    """All rows of one way in a sentence: median and worst of each figure, how many failed, and what they took."""
    parts = [f"{one.name} {one.text(rows)}" for one in figures if one.spread(rows) is not None]
    failed = len(rows) - len(good(rows))
    parts += [f"{failed} of {len(rows)} failed"] if failed else []
    seconds = sum(row["CPU s"] for row in rows)
    reading = " (median; worst)" if len(rows) > 1 else ""
    return f"{name}: {', '.join(parts)}, {seconds:,.0f} CPU s in all{reading}."


class Table(NamedTuple):
    """A table of the results: its ``title``, empty where the command has only one; its text; the ``rows`` in it."""

    title: str
    text: str
    rows: Sequence[Row]


def split(rows: Iterable[Row], setting: Callable[[Row], str], text: Callable[[Sequence[Row]], str]) -> list[Table]:
    """A table for each setting, which is its title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    return [Table(title, text(held), held) for title, held in found.items()]
