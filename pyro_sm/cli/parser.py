# SPDX-License-Identifier: Apache-2.0
"""The commands by name, each from a module with ``add_arguments`` and ``run``.

All are imported for any of them: the benches take a thirtieth of what ``import pyro_sm`` takes.
"""

from __future__ import annotations

import argparse
from types import ModuleType

import pyro_sm
from pyro_sm.bench.commands import (
    assurance,
    batching,
    calibration,
    cost,
    gaussian_guides,
    known_answers,
    many_latents,
    posteriors,
    references,
    report,
    results,
    targets,
)
from pyro_sm.cli import demo, sample

BENCHES: dict[str, ModuleType] = {
    "batching": batching,
    "cost": cost,
    "known-answers": known_answers,
    "gaussian-guides": gaussian_guides,
    "posteriors": posteriors,
    "many-latents": many_latents,
    "calibration": calibration,
    "assurance": assurance,
    "targets": targets,
    "report": report,
    "results": results,
    "references": references,
}
"""By the names of ``bench``; the first line of a module's docstring is its help."""


def _debug() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parent


def _of_runs() -> argparse.ArgumentParser:
    """Options of whatever trains a sampler."""
    parent = argparse.ArgumentParser(add_help=False, parents=[_debug()])
    parent.add_argument("--seed", type=int, default=0)
    parent.add_argument(
        "--threads", type=int, default=1, help="of torch (default 1: two on a busy machine can be slower than one)"
    )
    parent.add_argument("--budget", type=int, help="density evaluations to spend on training (default 100000)")
    parent.add_argument(
        "--no-check", action="store_true", help="no verdict: do not look for what the sampler may have missed"
    )
    return parent


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; the options it gives have ``run``, the function to call with them."""
    whole = argparse.ArgumentParser(prog="python -m pyro_sm", description=pyro_sm.__doc__)
    whole.add_argument("--version", action="version", version=f"pyro_sm {pyro_sm.__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    for name, module, words in (
        ("demo", demo, "two real posteriors with known answers"),
        ("sample", sample, "sample the posterior of a model of yours"),
    ):
        command = commands.add_parser(name, parents=[_of_runs()], help=words)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    bench = commands.add_parser("bench", help="the tables of results")
    tables = bench.add_subparsers(dest="table", required=True)
    for name, module in BENCHES.items():
        table = tables.add_parser(name, parents=[_debug()], help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(table)
        table.set_defaults(run=module.run)
    return whole
