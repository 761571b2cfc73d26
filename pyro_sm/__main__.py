# SPDX-License-Identifier: Apache-2.0
"""The command line: ``demo``, ``sample FILE.py:MODEL``, ``bench``. Errors are one line and exit status 1."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pyro_sm
from pyro_sm.base import CheckpointError
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
from pyro_sm.cli.demo import eight_schools_demo, galaxy_demo, looked_elsewhere
from pyro_sm.guides import BatchAndMatchBase, LaplaceBase, PriorBase
from pyro_sm.guides.bases import Base
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.training.checkpoint import read_checkpoint

_BASES: dict[str, type] = {"prior": PriorBase, "laplace": LaplaceBase, "batch-and-match": BatchAndMatchBase}
_DATA_HELP = """JSON object: one entry per argument of the model. Lists become tensors, of integers if every number
in them is written without a decimal point (write 15.0 for a real quantity), else of the model's float type; single
numbers and strings are passed as they are."""


class UsageError(Exception):
    """A mistake on the command line; the message says what was expected and what was found."""


def load_model(spec: str) -> Callable[..., Any]:
    """The object MODEL of the file in ``FILE.py:MODEL``.

    Raises:
        UsageError: the file or the name does not exist, or the file cannot be imported.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise UsageError(f"expected FILE.py:MODEL, found '{spec}'")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"importing '{path}' failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        found = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == path.stem]
        raise UsageError(f"'{path}' has no model '{name}' (it defines: {', '.join(found) or 'nothing callable'})")
    return getattr(module, name)


def _as_data(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, list):
        return value
    tensor = torch.tensor(value)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def load_data(file: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for the model, from a JSON object.

    Raises:
        UsageError: the file does not exist, is not JSON, is not an object, or holds a ragged list.
    """
    if file is None:
        return {}
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no data file '{path}'")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"expected a JSON object in '{path}' (one entry per argument), found a {type(content).__name__}"
        )
    data = {}
    for key, value in content.items():
        try:
            data[key] = _as_data(value, dtype)
        except (ValueError, TypeError) as error:
            raise UsageError(f"'{key}' in '{path}' is not a rectangular list of numbers: {error}") from error
    return data


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


def _stopping(budget: int | None) -> StoppingRule:
    return StoppingRule() if budget is None else StoppingRule(max_evaluations=budget)


def run_sample(options: argparse.Namespace) -> None:
    """``sample``: train on a user's model and write the draws."""
    out = Path(options.out)
    if out.suffix != ".nc":
        raise UsageError(f"expected --out to end in .nc, found '{out}'")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder '{out.parent}' for --out")
    if options.num_samples < 1:
        raise UsageError(f"expected --num-samples >= 1, found {options.num_samples}")
    dtype = getattr(torch, options.dtype)
    torch.set_default_dtype(dtype)
    model, data = load_model(options.model), load_data(options.data, dtype)
    checkpoint, resume = _checkpoint_for(out, options.resume)
    base: Base = _BASES[options.base]()
    sampler = DiffusionSampler(
        model, base=base, seed=options.seed, stopping=_stopping(options.budget), checkpoint=checkpoint
    )
    if resume:
        sampler.load(checkpoint)
    try:
        sampler.run(**data)
    except KeyboardInterrupt:
        if not sampler.history:
            raise
        print(f"\ninterrupted after {len(sampler.history)} rounds; add --resume to go on from '{checkpoint}'")
        raise
    verdict = None
    if not options.no_check:
        try:
            verdict = sampler.check()  # before the export, which records it
        except KeyboardInterrupt:
            print("\ninterrupted while looking elsewhere; add --resume --no-check for the draws without a verdict")
            raise
    idata = sampler.to_arviz(options.num_samples)
    idata.to_netcdf(out)
    print(pyro_sm.diagnostics.summary_table(idata))
    print(sampler.report())
    if verdict is not None:
        print(looked_elsewhere(verdict))
    print(f"written: {out} ({options.num_samples} draws), {checkpoint} (to draw or train more)")


def run_demo(options: argparse.Namespace) -> None:
    """``demo``: the galaxies, then eight schools."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    stopping = _stopping(options.budget)
    galaxy_demo(
        folder,
        num_components=options.components,
        shared_variance=options.shared_variance,
        seed=options.seed,
        stopping=stopping,
        check=not options.no_check,
    )
    if not options.only_galaxies:
        eight_schools_demo(folder, seed=options.seed, stopping=stopping, check=not options.no_check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyro_sm", description=pyro_sm.__doc__)
    parser.add_argument("--version", action="version", version=f"pyro_sm {pyro_sm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument(
        "--threads", type=int, default=1, help="of torch (default 1: two on a busy machine can be slower than one)"
    )
    common.add_argument("--budget", type=int, help="density evaluations to spend on training (default 100000)")
    common.add_argument(
        "--no-check", action="store_true", help="no verdict: do not look for what the sampler may have missed"
    )

    demo = commands.add_parser("demo", parents=[common], help="two real posteriors with known answers")
    demo.add_argument("--out", default="pyro_sm_demo", help="folder for NetCDF and pictures (default %(default)s)")
    demo.add_argument("--components", type=int, default=3, help="of the galaxy mixture (default %(default)s)")
    demo.add_argument("--shared-variance", action="store_true", help="one variance for all components")
    demo.add_argument("--only-galaxies", action="store_true", help="leave eight schools out")
    demo.set_defaults(run=run_demo)

    sample = commands.add_parser("sample", parents=[common], help="sample the posterior of a model of yours")
    sample.add_argument("model", metavar="FILE.py:MODEL")
    sample.add_argument("--data", metavar="FILE.json", help=_DATA_HELP)
    sample.add_argument("--out", metavar="FILE.nc", required=True, help="draws, weights and diagnostics, for ArviZ")
    sample.add_argument("--num-samples", type=int, default=4000)
    sample.add_argument(
        "--base", choices=sorted(_BASES), default="prior", help="where to start (default %(default)s)"
    )
    sample.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    sample.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out")
    sample.set_defaults(run=run_sample)

    bench = commands.add_parser("bench", help="the tables of the README")
    tables = bench.add_subparsers(dest="table", required=True)
    modules = {
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
    for name, module in modules.items():
        table = tables.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        table.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(table)
        table.set_defaults(run=module.run)
    return parser


def _one_line(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    ours = issubclass(category, pyro_sm.PyroSMWarning)
    print(f"{'warning' if ours else category.__name__}: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, 1 for an error, 130 for Ctrl-C)."""
    options = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _one_line
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(getattr(options, "threads", threads))
            options.run(options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if options.debug:
                traceback.print_exc()
            else:
                reason = " ".join(str(error).split()) or type(error).__name__
                kind = (
                    ""
                    if isinstance(error, (UsageError, ValueError, CheckpointError))
                    else f"{type(error).__name__}: "
                )
                print(f"error: {kind}{reason} (--debug shows the traceback)", file=sys.stderr)
            return 1
        finally:
            torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
