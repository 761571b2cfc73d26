# SPDX-License-Identifier: Apache-2.0
"""Rows of results, one per fit, kept in a file of JSON lines as they end: what is in it is not run again."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyro_sm._version import __version__

Row = dict[str, Any]


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
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
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


def _whole_lines(path: Path) -> tuple[str, bool]:
    """The text up to the last line break, and whether there is more: a row cut off by a machine that went down."""
    whole, _, rest = path.read_text().rpartition("\n")
    return whole, bool(rest)


def read(path: Path | None) -> list[Row]:
    """Rows of the file, without a last one that was cut off; none if there is no file."""
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in _whole_lines(path)[0].splitlines()]


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
