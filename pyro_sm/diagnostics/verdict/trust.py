# SPDX-License-Identifier: Apache-2.0
"""Three grades, and a reason for one: the vocabulary in which every group of findings is judged.

What is said here is printed and recorded in files (``Trust.words``): change no word without the readers of both.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from pyro_sm.base import PyroSMWarning


class TrustWarning(PyroSMWarning):
    """A result is handed out that should not be trusted; the message says why, and what to do."""


class Trust(enum.IntEnum):
    """How far a result can be trusted; the larger, the worse."""

    TRUST = 0
    CARE = 1
    DISTRUST = 2

    @property
    def words(self) -> str:
        """The grade as it is printed and recorded: "trust", "use with care", "do not trust"."""
        return ("trust", "use with care", "do not trust")[self]


class Reason(NamedTuple):
    """What was found, what to do about it (empty where nothing is to be done), and what it does to the verdict."""

    finding: str
    advice: str
    level: Trust


TRAIN_LONGER = "train longer (a larger budget in StoppingRule), use a wider base, or reparametrise the model"
"""The advice where a guide does not fit well enough, whichever group has found it."""
