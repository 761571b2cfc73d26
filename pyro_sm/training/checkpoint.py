# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written so that a kill at any moment leaves the old file or the new one, read without running code.

A checkpoint is a nested ``dict`` of tensors, numbers, strings, lists and tuples, nothing else, so that
``torch.load(..., weights_only=True)`` reads it: a file from a stranger cannot execute anything.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from pyro_sm.base import CheckpointError

FORMAT = 2


def write_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` atomically: to a neighbour, flushed to disk, then renamed over ``path``.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            torch.save({"format": FORMAT, **content}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"cannot write the checkpoint '{target}': {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of another format.
    """
    target = Path(path)
    if not target.is_file():
        raise CheckpointError(f"there is no checkpoint at '{target}'")
    try:
        with zipfile.ZipFile(target) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        content = torch.load(target, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = (str(error).splitlines() or [""])[0][:120]
        raise CheckpointError(
            f"the checkpoint '{target}' is damaged or not a checkpoint ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"'{target}' is not a pyro_sm checkpoint of format {FORMAT} (found {found})")
    return content
