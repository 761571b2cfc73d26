# SPDX-License-Identifier: Apache-2.0
"""Every tutorial runs from top to bottom as a script, and draws its pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "tutorials"
TUTORIALS = sorted(SITE.glob("[0-9]*.py"))


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "PYRO_SM_FIGURES": str(tmp_path), "PYTHONPATH": str(path.parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_a_notebook(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 3


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_pictures_of_a_tutorial_are_shown(path: Path) -> None:
    drawn = re.findall(r"FIGURES / \"([\w-]+\.png)\", dpi", path.read_text())
    shown = re.findall(r"^# !\[.+\]\(images/([\w-]+\.png)\)$", path.read_text(), re.MULTILINE)
    assert drawn == shown
    assert all((SITE / "images" / name).is_file() for name in shown)
