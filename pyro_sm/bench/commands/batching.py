# SPDX-License-Identifier: Apache-2.0
r"""Batched density: what evaluating B latents at once is worth, on five models.

``python -m pyro_sm bench batching``; with ``--compile`` also ``ModelDensity(compile=True)``.

Columns: the way of batching that ``ModelDensity`` chose, and CPU milliseconds of value and score per latent: one by
one, and B at once, with the ratio of the two. Times are the smallest of several repetitions, of this process on one
thread; all routes are timed in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from pyro_sm.bench.batching_models import PROBLEMS
from pyro_sm.bench.rows import Row, add_out, run_all
from pyro_sm.bench.table import Figure, Table, Words, figure, lines, short, split
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.bench.timing import REPEATS, fastest, one_thread
from pyro_sm.model.density import ModelDensity, OneByOne

KEYS = ("model", "batch", "repeats", "compile")
"""What identifies a row."""
_SINGLE = 16  # latents that the loop is timed on: each takes as long as the next


def measure(name: str, batch: int, *, single: int = _SINGLE, repeats: int = REPEATS, compile: bool = False) -> Row:
    """Time one problem.

    Args:
        name: of ``PROBLEMS``.
        batch: latents at once.
        single: latents the loop is timed on.
        repeats: repetitions, of which the fastest counts.
        compile: whether to time that route as well.
    """
    model, args = PROBLEMS[name]()
    density = ModelDensity(model, args)
    loop = ModelDensity(model, args, batching=OneByOne())
    z = density.prior_draws(batch)
    row: Row = dict(zip(KEYS, (name, batch, repeats, compile), strict=True))
    row |= {"D": density.dim, "way": density.batching_method}
    row["batched"] = 1e3 * fastest(lambda: density.log_prob_and_score(z), repeats) / batch
    row["one by one"] = 1e3 * fastest(lambda: loop.log_prob_and_score(z[:single]), repeats) / single
    if compile:
        graph = ModelDensity(model, args, compile=True)
        row["compiled"] = 1e3 * fastest(lambda: graph.log_prob_and_score(z), repeats) / batch
    return row


def ratio(row: Row, key: str = "batched") -> float | None:
    """How many times faster a latent is in the batch; None where it was not timed."""
    return row["one by one"] / row[key] if key in row else None


def _whole(value: float) -> str:
    return f"{value:.0f}"


_COLUMNS = (
    Words("way chosen", lambda row: row["way"]),
    figure("one by one", short),
    figure("batched", short),
    Figure("ratio", ratio, _whole, larger_is_better=True),
    figure("compiled", short),
    Figure("ratio, compiled", lambda row: ratio(row, "compiled"), _whole, larger_is_better=True),
)


def line(row: Row) -> str:
    """A row in words."""
    compiled = f", compiled {row['compiled']:.3g}" if "compiled" in row else ""
    times = f"{row['one by one']:.3g} ms one by one, {row['batched']:.3g} batched{compiled}"
    return f"{row['model']} ({row['D']}), {row['way']}: {times}"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    found = lines(rows, lambda row: (f"{row['model']} ({row['D']})",))
    return as_markdown(("model (D)",), found, _COLUMNS)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each batch size."""
    return split(rows, lambda row: f"B = {row['batch']:,}, fastest of {row['repeats']}", markdown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench batching``."""
    parser.add_argument("--batch", type=int, default=1024, help="latents per batch (default 1024)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repetitions, of which the fastest counts")
    parser.add_argument("--compile", action="store_true", help="also time compile=True (a minute or two)")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    """Time all models, then print the table."""

    def measured(key: Row) -> Row:
        torch.manual_seed(0)  # for each: a row does not depend on which were in the file
        return measure(key["model"], key["batch"], repeats=key["repeats"], compile=key["compile"])

    keys = [{"model": name, **{key: getattr(options, key) for key in KEYS[1:]}} for name in PROBLEMS]
    with one_thread():
        rows = run_all(keys, len(keys), measured, line, options.out)
    print(f"\n{markdown(rows)}")
