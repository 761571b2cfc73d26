# SPDX-License-Identifier: Apache-2.0
"""Pages of the site: their code compiles and runs, and the reference has every public name, once."""

from __future__ import annotations

import importlib
import re

import pytest
from pages import ROOT, blocks, run, with_small_budget

import pyro_sm

SITE = ROOT / "tutorials"
PAGES = sorted([*SITE.glob("guide/*.md"), *SITE.glob("howto/*.md")])
WITH_CODE = [page for page in PAGES if blocks(page, "python")]
DOCUMENTED = re.findall(
    r"^\.\. auto(?:class|function|data|exception):: ([\w.]+)$",
    "\n".join(page.read_text() for page in sorted(SITE.glob("api/*.md"))),
    re.MULTILINE,
)
PACKAGES = ["guides", "objectives", "diagnostics", "smc", "corrections", "targets", "ladder"]


def named(path):
    """The object of a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(named(module), name)


def test_there_are_pages():
    assert len([page for page in PAGES if page.parent.name == "howto"]) > 15
    assert len(WITH_CODE) > 15


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_compiles(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # one round is too few to be trusted, and some say so
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with_small_budget(monkeypatch)
    run(page, {"__name__": "__main__"})


@pytest.mark.parametrize("name", pyro_sm.__all__)
def test_public_name_has_its_place_in_the_reference(name):
    assert f"pyro_sm.{name}" in DOCUMENTED


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_of_packages_have_their_place(package):
    module = importlib.import_module(f"pyro_sm.{package}")
    ours = [f"pyro_sm.{name}" if name in pyro_sm.__all__ else f"pyro_sm.{package}.{name}" for name in module.__all__]
    assert [name for name in ours if name not in DOCUMENTED] == []


def test_the_reference_names_what_exists_once():
    assert len(set(DOCUMENTED)) == len(DOCUMENTED)
    things = [named(path) for path in DOCUMENTED]
    assert len({id(thing) for thing in things}) == len(things)
