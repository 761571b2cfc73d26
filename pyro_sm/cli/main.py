# SPDX-License-Identifier: Apache-2.0
"""Run a command: mistakes are one line and exit status 1, warnings one line each."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pyro_sm.base import CheckpointError, PyroSMWarning
from pyro_sm.cli.data import UsageError
from pyro_sm.cli.parser import parser


def _one_line(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    ours = issubclass(category, PyroSMWarning)
    print(f"{'warning' if ours else category.__name__}: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, 1 for an error, 130 for Ctrl-C)."""
    options = parser().parse_args(argv)
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
