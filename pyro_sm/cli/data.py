# SPDX-License-Identifier: Apache-2.0
"""What a user hands over: a model in a Python file, data in a JSON file, and what is said if they are not that."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
