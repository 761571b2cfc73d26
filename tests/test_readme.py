# SPDX-License-Identifier: Apache-2.0
"""The README is short, its links lead somewhere, and all of its code runs, on a model of one mean and few rounds."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pages import ROOT, blocks, run, with_small_budget
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_sm
from pyro_sm.__main__ import main

README = ROOT / "README.md"
GENERATED = {"pyro_sm/bench/RESULTS.md"}
MODEL = """
import pyro
import pyro.distributions as dist


def model(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(data)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=data)
"""
DATA = [0.3, 1.2, -0.4, 2.0, 0.9]
SHELL = [line.partition(" && ") for block in blocks(README, "sh") for line in block.splitlines()]
COMMANDS = [part for before, _, after in SHELL for part in (before, after) if part]


def test_it_is_short():
    assert len(README.read_bytes()) <= 12_000


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    here = [link for link in links if "://" not in link]
    assert len(here) > 10
    assert [link for link in here if link not in GENERATED and not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_its_code_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with_small_budget(monkeypatch)
    given = {"pyro_sm": pyro_sm, "SVI": SVI, "Adam": Adam, "range": lambda n: range(min(n, 200))}
    given |= {"pyro": pyro, "dist": dist, "data": torch.tensor(DATA)}
    exec(MODEL, given)
    run(README, given)
    assert Path("run.ckpt").is_file()


def test_its_shell_is_shell():
    assert COMMANDS
    for command in COMMANDS:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=60)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m pyro_sm" in c])
def test_its_commands_exist(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command.split()[3], "--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out
    assert all(word in options for word in command.split()[4:] if word.startswith("--"))


def test_its_extras_exist():
    asked = {name for command in COMMANDS for name in re.findall(r"'\.\[(.*)\]'", command)}
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert asked
    for names in asked:
        assert all(re.search(rf"^{name} = ", extras, re.MULTILINE) for name in names.split(","))


@pytest.mark.slow
def test_its_sample_line_runs(monkeypatch, tmp_path, capsys):
    (line,) = [c for c in COMMANDS if "pyro_sm sample" in c]
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    Path("data.json").write_text(json.dumps({"data": DATA}))
    assert main([*line.split()[3:], "--budget", "2048"]) == 0
    assert "Verdict" in capsys.readouterr().out
    assert Path("posterior.nc").is_file()
