# SPDX-License-Identifier: Apache-2.0
"""Compiled graphs by what they were made for: each is made once; that one cannot be made is said once, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from pyro_sm.base import PyroSMWarning

F = TypeVar("F")


@contextmanager
def _left_alone() -> Iterator[None]:
    """The compiler speaks of its own parts, and turns the argument checks of torch's distributions off for good."""
    validate = torch.distributions.Distribution._validate_args
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validate)


class CompiledGraphs(Generic[F]):
    """A cache of compiled functions. Copies and pickles start with an empty one.

    Args:
        what: is compiled, in words for the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.given_up = False
        self._cache: dict[Hashable, F] = {}

    def __len__(self) -> int:
        return len(self._cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def find(self, key: Hashable, make: Callable[[], F]) -> F | None:
        """The graph for ``key``, made if there is none; None if one could not be, which is warned about once."""
        if key not in self._cache and not self.given_up:
            try:
                with _left_alone():
                    self._cache[key] = make()
            except Exception as error:
                self.given_up = True
                lines = str(error).strip().splitlines() or [""]
                warnings.warn(
                    f"{self.what} could not be compiled and is used as it is: {type(error).__name__}: "
                    f"{lines[0][:200]}",
                    PyroSMWarning,
                    stacklevel=4,
                )
        return None if self.given_up else self._cache[key]
