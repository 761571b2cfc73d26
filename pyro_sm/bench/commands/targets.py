# SPDX-License-Identifier: Apache-2.0
r"""Targets with known answers, each method on each, every figure beside that of as many exact draws.

``python -m pyro_sm bench targets --targets gmm40 funnel --methods iwsm smc nuts --evaluations 100000 --out F.jsonl``:
one row per target, method and seed, appended to the file as it ends; ``bench report`` makes tables and pictures of
it. A row that is in the file is not run again; a method that fails leaves a row with its reason. What figures there
are: :mod:`pyro_sm.bench.judge`. All methods begin at the target's covering Gaussian and have the same budget; one
counts as spending the larger of its values and gradients. Baselines share network, kernels and covering component
with the package's default.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_sm.bench.judge import Truth, figures, floor, weight_figures
from pyro_sm.bench.methods.catalogue import METHODS
from pyro_sm.bench.methods.fit import Budget, Method
from pyro_sm.bench.problem import TARGETS, Particles, reference_draws, some
from pyro_sm.bench.rows import Row, add_out, expect_positive, read, reason, run_all

KEYS = ("target", "method", "seed", "evaluations", "draws")
"""What identifies a row."""
_STORED = 2000  # draws of a row that are kept for pictures: more dots would be a blot

Floors = dict[tuple[str, int], dict[str, float]]
"""By target and number of draws."""


class Judged(NamedTuple):
    """A row of the results, and the samples (n, d) that it is about; None if the method failed."""

    row: Row
    samples: Tensor | None


def measure(key: Row, truth: Truth, method: Method, floors: Floors) -> Judged:
    """Run a method and compare with the truth.

    Args:
        key: what identifies the row: target, method, seed, evaluations, draws.
        truth: of the target.
        method: the method.
        floors: those known so far; new ones are added.
    """
    started = time.process_time()
    row = {**key, "dim": truth.target.dim}
    try:
        fit = method.fit(truth.target, key["seed"], Budget(key["evaluations"], key["draws"]))
        x = fit.samples["x"].detach()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{int((~torch.isfinite(x)).any(1).sum())} of {len(x)} draws are not finite")
        place = (key["target"], len(x))
        if place not in floors:
            floors[place] = floor(truth, len(x))
        row |= {
            "samples": len(x),
            "figures": figures(truth, x),
            "floor": floors[place],
            **weight_figures(fit, truth.target.log_evidence),
            "training": fit.training.row(),
            "drawing": fit.drawing.row(),
            "note": fit.note,
        }
        return Judged(row, x)
    except Exception as error:
        return Judged({**row, "failed": reason(error), "CPU s": time.process_time() - started}, None)


# ---------------------------------------------------------------------------------------------------------- rows


def check_rows(rows: list[Row], path: Path) -> list[Row]:
    """The rows, if they are of this command.

    Raises:
        ValueError: one is not.
    """
    for number, row in enumerate(rows, 1):
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"line {number} of '{path}' is no row of bench targets: it lacks {', '.join(missing)}")
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if there is no file.

    Raises:
        ValueError: a line is not a row of these results.
    """
    return check_rows(read(path), path)


def draws_path(out: Path, row: Row) -> Path:
    """Where up to 2000 of a row's draws are kept, beside the results."""
    name = "--".join(str(row[key]) for key in KEYS)
    return out.with_name(f"{out.stem}-draws") / f"{name}.npz"


def _store_draws(out: Path, judged: Judged) -> None:
    """Before its row, so that a row that is in the file has them."""
    if judged.samples is not None:
        path = draws_path(out, judged.row)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, samples=some(judged.samples, _STORED).cpu().numpy())


def line(row: Row) -> str:
    """A row in words, floors in brackets."""
    head = f"{row['target']}, {row['method']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: failed: {row['failed']}"
    parts = []
    for key, value in row["figures"].items():
        bound = row["floor"].get(key, math.nan)
        parts.append(f"{key} {value:.3g}" + ("" if math.isnan(bound) else f" ({bound:.3g})"))
    parts += [f"{key} {row[key]:.3g}" for key in ("log Z error", "ESS", "khat") if key in row]
    spent = max(row["training"]["density"], row["training"]["gradient"])
    seconds = row["training"]["seconds"] + row["drawing"]["seconds"]
    return f"{head}: {', '.join(parts)}; {spent:,} evaluations, {seconds:.1f} CPU s; {row['note']}"


# -------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench targets``."""
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=100_000, help="of training (default %(default)s)")
    parser.add_argument("--draws", type=int, default=10_000, help="usable draws per fit (default %(default)s)")
    parser.add_argument("--particle-draws", type=int, default=2000, help="in distances (default %(default)s)")
    parser.add_argument(
        "--references",
        type=Path,
        metavar="DIR",
        help="with TARGET.npz: an array 'latents' (M, D), instead of the package's own",
    )
    add_out(parser, required=True)


def _check(options: argparse.Namespace) -> None:
    for name, wanted, known in (("targets", options.targets, TARGETS), ("methods", options.methods, METHODS)):
        unknown = [one for one in wanted if one not in known]
        if unknown:
            raise ValueError(f"--{name}: expected some of {', '.join(known)}, found {' '.join(unknown)}")
    expect_positive(options, ["evaluations", "draws", "particle_draws"])
    if not options.out.parent.is_dir():
        raise ValueError(f"there is no folder '{options.out.parent}' for --out")


def _notes(name: str, truth: Truth) -> None:
    if isinstance(truth.target, Particles) and truth.reference is None:
        print(f"{name}: no aligned W2 and no energy W2, for want of reference draws (--references)", flush=True)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    _check(options)
    read_rows(options.out)  # refuses a file of something else
    floors: Floors = {}
    truths: dict[str, Truth] = {}

    def keys() -> Iterator[Row]:
        for name in options.targets:
            target = TARGETS[name]()
            truths[name] = Truth(target, reference_draws(options.references, name, target), options.particle_draws)
            _notes(name, truths[name])
            for seed in options.seeds:
                for method in options.methods:
                    yield dict(zip(KEYS, (name, method, seed, options.evaluations, options.draws), strict=True))

    def measured(key: Row) -> Row:
        judged = measure(key, truths[key["target"]], METHODS[key["method"]], floors)
        _store_draws(options.out, judged)
        return judged.row

    total = len(options.targets) * len(options.seeds) * len(options.methods)
    run_all(keys(), total, measured, line, options.out)
