# SPDX-License-Identifier: Apache-2.0
"""Rows of results, one per fit, kept in a file of JSON lines as they end: what is in it is not run again."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_sm._version import __version__

Row = dict[str, Any]
PROVENANCE = ("date", "revision", "machine", "command")
"""What every row records of its making."""
_REASON = 160  # characters: the first sentence of nearly every error, and still a cell of a table
_GIT_SECONDS = 10  # a checkout on a slow disk answers in one; more, and the version has to do


def machine() -> str:
    """Cores, threads and torch of this machine."""
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    )


def revision() -> str:
    """The commit of this checkout, with a ``+`` if files differ from it; the version where there is no checkout."""
    folder = Path(__file__).parent
    try:
        found = [
            subprocess.run(
                ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
            ).stdout
            for words in (("rev-parse", "--short=9", "HEAD"), ("status", "--porcelain", "--", "."))
        ]
    except (OSError, subprocess.SubprocessError):
        return __version__
    return found[0].strip() + ("+" if found[1].strip() else "")


def provenance() -> Row:
    """What every row records of its making: ``date``, ``revision``, ``machine``, and the ``command`` line."""
    words = ["python", "-m", "pyro_sm", *sys.argv[1:]]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "revision": revision(), "machine": machine(), "command": shlex.join(words)}


def reason(error: Exception) -> str:
    """An error as the entry ``failed`` of a row: its kind, and the beginning of its message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_REASON]}"


def good(rows: Iterable[Row]) -> list[Row]:
    """Those that did not fail."""
    return [row for row in rows if "failed" not in row]


def _whole_lines(path: Path) -> tuple[str, bool]:
    """The text up to the last line break, and whether there is more: a row cut off by a machine that went down."""
    whole, _, rest = path.read_text().rpartition("\n")
    return whole, bool(rest)


def read(path: Path | None) -> list[Row]:
    """Rows of the file, without a last one that was cut off; none if there is no file.

    Raises:
        ValueError: a line is not JSON.
    """
    if path is None or not path.is_file():
        return []
    try:
        return [json.loads(line) for line in _whole_lines(path)[0].splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"a line of '{path}' is not JSON: {error}") from error


def resumed(keys: Iterable[Row], measure: Callable[[Row], Row], out: Path | None) -> Iterator[Row]:
    """The row of every key in turn: from the file, or measured, and then added to it.

    A row that was cut off is taken out first, and measured again.

    Args:
        keys: what tells a row from others; a row that has all of its key's entries is the one.
        measure: makes the row of a key; :func:`provenance` is added to it.
        out: the file; None for none.

    Raises:
        ValueError: there is no folder for the file; before anything is measured.
    """
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"there is no folder '{out.parent}' for --out")
    done = read(out)
    if out is not None and out.is_file():
        whole, cut_off = _whole_lines(out)
        if cut_off:
            out.write_text(f"{whole}\n" if whole else "")
    for key in keys:
        held = [row for row in done if key.items() <= row.items()]
        row = held[0] if held else measure(key) | provenance()
        if out is not None and not held:
            with out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        yield row


def run_all(
    keys: Iterable[Row],
    total: int,
    measure: Callable[[Row], Row],
    line: Callable[[Row], str],
    out: Path | None,
) -> list[Row]:
    """The rows of all keys, as :func:`resumed` has them; prints the machine, and a line as each row ends.

    Args:
        keys: what tells a row from others.
        total: how many there are.
        measure: makes the row of a key.
        line: a row in words.
        out: the file; None for none.
    """
    print(machine())
    rows: list[Row] = []
    for row in resumed(keys, measure, out):
        rows.append(row)
        print(f"[{len(rows)}/{total}] {line(row)}", flush=True)
    return rows


def add_out(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The option ``--out``."""
    parser.add_argument(
        "--out", type=Path, required=required, metavar="FILE.jsonl", help="rows already in it are not measured again"
    )


def add_markdown(parser: argparse.ArgumentParser) -> None:
    """The option ``--markdown``."""
    parser.add_argument("--markdown", action="store_true", help="print the table at the end")


def expect_positive(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse options below one.

    Raises:
        ValueError: one is, with its name.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} >= 1, found {getattr(options, name)}")
