# SPDX-License-Identifier: Apache-2.0
r"""All tables of results, made from the rows that are kept beside the package.

``python -m pyro_sm bench results`` writes ``bench/RESULTS.md`` from ``bench/results/*.jsonl``; with ``--check`` it
writes nothing, and fails if the file is not what the rows give. A file of rows is named after the command that made
them, ``posteriors.jsonl``, or begins with it, ``posteriors-seeds.jsonl``; all files of one command are one section.
A table says which commands made its rows, when, at which revision and on which machine, as the rows have it; a row
that does not say so is refused. What its columns mean is said by the head of the command's file, from "Columns" on.

Further tables: a function from rows to tables, and an entry in :data:`SECTIONS`.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from pyro_sm.bench import judge
from pyro_sm.bench.commands import (
    assurance,
    batching,
    calibration,
    cost,
    gaussian_guides,
    known_answers,
    many_latents,
    posteriors,
    report,
    targets,
)
from pyro_sm.bench.rows import PROVENANCE, Row, read
from pyro_sm.bench.table import Table

_BENCH = Path(__file__).parents[1]
_HEAD = """\
# Results

Written by `python -m pyro_sm bench results` from `pyro_sm/bench/results/*.jsonl`: do not edit. A cell is the median
over the seeds of its line and, behind a semicolon, the worst; of a single seed, its number. A fit that failed counts
as the worst there is."""


class Section(NamedTuple):
    """The tables of one command.

    ``name``: of the command, and of its files. ``explained``: the text whose first line is the heading, and which
    says from "Columns" on what they are. ``keys``: the entries of a row that no other may have all the same.
    ``tables``: of its rows.
    """

    name: str
    explained: str
    keys: tuple[str, ...]
    tables: Callable[[Sequence[Row]], list[Table]]


def _section(name: str, module: ModuleType) -> Section:
    return Section(name, module.__doc__ or "", module.KEYS, module.tables)


# Rows of `bench targets`, tables of `bench report`, and the figures in them.
_OF_TARGETS = "\n".join([targets.__doc__ or "", report.__doc__ or "", (judge.__doc__ or "").partition("\n\n")[2]])
SECTIONS = (
    _section("posteriors", posteriors),
    _section("gaussian-guides", gaussian_guides),
    _section("known-answers", known_answers),
    _section("many-latents", many_latents),
    Section("targets", _OF_TARGETS, targets.KEYS, report.tables),
    _section("assurance", assurance),
    _section("calibration", calibration),
    _section("cost", cost),
    _section("batching", batching),
)
"""In the order of the page."""


# ----------------------------------------------------------------------------------------------------- reading


def _section_of(path: Path, sections: Sequence[Section]) -> Section:
    # The longest name first, should one begin with another.
    for section in sorted(sections, key=lambda section: len(section.name), reverse=True):
        if path.stem == section.name or path.stem.startswith(f"{section.name}-"):
            return section
    known = ", ".join(section.name for section in sections)
    raise ValueError(f"'{path.name}' is of no command with tables: expected one of {known}, or NAME-more")


def read_folder(folder: Path, sections: Sequence[Section] = SECTIONS) -> dict[str, list[Row]]:
    """The rows of every section that has any, by its name.

    Raises:
        ValueError: a file is of no section, a row does not say how it was made, or one is there twice.
    """
    found: dict[str, list[Row]] = {}
    seen: dict[tuple[object, ...], str] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stem):
        section = _section_of(path, sections)
        rows = read(path)
        for number, row in enumerate(rows, 1):
            place = f"line {number} of '{path.name}'"
            missing = [key for key in (*PROVENANCE, *section.keys) if row.get(key, "") == ""]
            if missing:
                raise ValueError(f"{place} lacks {', '.join(missing)}: a row says how it was made, and of what it is")
            key = (section.name, *(row[name] for name in section.keys))
            if key in seen:
                raise ValueError(f"{place} is of the same run as {seen[key]}: keep one of them")
            seen[key] = place
        found.setdefault(section.name, []).extend(rows)
    return found


# ----------------------------------------------------------------------------------------------------- writing


def _plain(text: str) -> str:
    """Roles and literals of a docstring as Markdown."""
    text = re.sub(r":\w+:`([^`<]+?)\s*<[^`>]+>`", r"`\1`", text)
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].removeprefix('pyro_sm.')}`", text)
    return text.replace("``", "`")


def columns_of(explained: str) -> str:
    """What the columns mean: from the paragraph that begins with "Columns" to the end.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"^Columns: .*", explained, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("expected a paragraph that begins with 'Columns: '")
    return _plain(found[0].strip())


def command_without_out(command: str) -> str:
    """The command line, without where its rows went."""
    words = shlex.split(command)
    kept = [
        word
        for i, word in enumerate(words)
        if word != "--out" and not word.startswith("--out=") and (i == 0 or words[i - 1] != "--out")
    ]
    return shlex.join(kept)


def made_by(rows: Iterable[Row]) -> str:
    """Commands, with dates, revision and machine: each combination once."""
    dates: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        place = (command_without_out(row["command"]), row["revision"], row["machine"])
        dates.setdefault(place, set()).add(row["date"])
    return "\n".join(
        f"* `{command}`: {', '.join(sorted(days))}; revision {revision}; {machine}"
        for (command, revision, machine), days in dates.items()
    )


def _rendered(section: Section, rows: Sequence[Row]) -> str:
    heading = _plain(section.explained.strip().splitlines()[0]).rstrip(".")
    text = [f"## {heading}", columns_of(section.explained)]
    for table in section.tables(rows):
        text += [f"### {table.title}"] if table.title else []
        text += [made_by(table.rows), table.text]
    return "\n\n".join(text)


def page(rows: dict[str, list[Row]], sections: Sequence[Section] = SECTIONS) -> str:
    """The whole page, of the rows by section."""
    held = [_rendered(section, rows[section.name]) for section in sections if rows.get(section.name)]
    return "\n\n".join([_HEAD, *(held or ["There are no rows yet."])]) + "\n"


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench results``."""
    rows = _BENCH / "results"
    parser.add_argument("--rows", type=Path, default=rows, metavar="DIR", help="the rows (default: ours)")
    parser.add_argument(
        "--to", type=Path, default=_BENCH / "RESULTS.md", metavar="FILE.md", help="the page (default: ours)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another")


def run(options: argparse.Namespace) -> None:
    """Write the page, or compare it."""
    if not options.rows.is_dir():
        raise ValueError(f"there is no folder '{options.rows}'")
    found = page(read_folder(options.rows))
    if not options.check:
        options.to.write_text(found)
        print(f"written: {options.to}")
    elif not options.to.is_file() or options.to.read_text() != found:
        raise ValueError(f"'{options.to}' is not what the rows give: run `python -m pyro_sm bench results`")
