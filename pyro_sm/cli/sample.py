# SPDX-License-Identifier: Apache-2.0
"""``sample``: the posterior of a user's model, to a file, with its verdict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from pyro_sm.base import CheckpointError
from pyro_sm.cli.data import UsageError, load_data, load_model
from pyro_sm.cli.demo import looked_elsewhere, stopping_within
from pyro_sm.diagnostics import Verdict, summary_table
from pyro_sm.guides import BatchAndMatchBase, LaplaceBase, PriorBase
from pyro_sm.guides.bases import Base
from pyro_sm.sampler import DiffusionSampler
from pyro_sm.training.checkpoint import read_checkpoint

BASES: dict[str, type] = {"prior": PriorBase, "laplace": LaplaceBase, "batch-and-match": BatchAndMatchBase}
"""Where a guide may start, by the names of the command line."""
_DATA_HELP = """JSON object: one entry per argument of the model. Lists become tensors, of integers if every number
in them is written without a decimal point (write 15.0 for a real quantity), else of the model's float type; single
numbers and strings are passed as they are."""


def _checkpoint_for(out: Path, resume: bool) -> tuple[Path, bool]:
    """Where the run's state goes, and whether to start from what is there."""
    path = out.with_suffix(".ckpt")
    if resume:
        if not path.is_file():
            raise UsageError(f"there is no checkpoint '{path}' to resume from")
        return path, True
    if path.is_file():
        try:
            unfinished = not read_checkpoint(path)["schedule"][-1]
        except CheckpointError:
            unfinished = False
        if unfinished:
            raise UsageError(f"'{path}' holds an unfinished run: add --resume to go on with it, or delete the file")
    return path, False


def _check_out(out: Path) -> None:
    if out.suffix != ".nc":
        raise UsageError(f"expected --out to end in .nc, found '{out}'")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder '{out.parent}' for --out")


def _trained(sampler: DiffusionSampler, data: dict[str, Any], checkpoint: Path) -> None:
    try:
        sampler.run(**data)
    except KeyboardInterrupt:
        if sampler.history:
            rounds = len(sampler.history)
            print(f"\ninterrupted after {rounds} rounds; add --resume to go on from '{checkpoint}'")
        raise


def _checked(sampler: DiffusionSampler) -> Verdict:
    try:
        return sampler.check()
    except KeyboardInterrupt:
        print("\ninterrupted while looking elsewhere; add --resume --no-check for the draws without a verdict")
        raise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``sample``."""
    parser.add_argument("model", metavar="FILE.py:MODEL")
    parser.add_argument("--data", metavar="FILE.json", help=_DATA_HELP)
    parser.add_argument("--out", metavar="FILE.nc", required=True, help="draws, weights and diagnostics, for ArviZ")
    parser.add_argument("--num-samples", type=int, default=4000)
    parser.add_argument("--base", choices=sorted(BASES), default="prior", help="where to start (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out")


def run(options: argparse.Namespace) -> None:
    """Train on a user's model and write the draws."""
    out = Path(options.out)
    _check_out(out)
    if options.num_samples < 1:
        raise UsageError(f"expected --num-samples >= 1, found {options.num_samples}")
    dtype = getattr(torch, options.dtype)
    torch.set_default_dtype(dtype)
    model, data = load_model(options.model), load_data(options.data, dtype)
    checkpoint, resume = _checkpoint_for(out, options.resume)
    base: Base = BASES[options.base]()
    sampler = DiffusionSampler(
        model, base=base, seed=options.seed, stopping=stopping_within(options.budget), checkpoint=checkpoint
    )
    if resume:
        sampler.load(checkpoint)
    _trained(sampler, data, checkpoint)
    verdict = None if options.no_check else _checked(sampler)  # before the export, which records it
    idata = sampler.to_arviz(options.num_samples)
    idata.to_netcdf(out)
    print(summary_table(idata))
    print(sampler.report())
    if verdict is not None:
        print(looked_elsewhere(verdict))
    print(f"written: {out} ({options.num_samples} draws), {checkpoint} (to draw or train more)")
