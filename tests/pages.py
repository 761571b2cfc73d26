# SPDX-License-Identifier: Apache-2.0
"""Markdown pages and what can be run of them: blocks of code, in the order of the page, in one namespace."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pyro_sm

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language, without their indentation."""
    return [textwrap.dedent(code) for _, found, code in _BLOCK.findall(page.read_text()) if found == language]


def with_small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers of a page that names no budget train for one round."""
    stopping = pyro_sm.StoppingRule(max_evaluations=2048)
    small = partial(pyro_sm.DiffusionSampler, stopping=stopping, disable_progbar=True)
    monkeypatch.setattr(pyro_sm, "DiffusionSampler", small)


def run(page: Path, given: Mapping[str, Any]) -> None:
    """All blocks of Python of a page; ``given`` are the names that it takes for granted."""
    namespace = dict(given)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)
