# SPDX-License-Identifier: Apache-2.0
"""The bench of many latents: its evidence by a second route, and its rows."""

import json
import math

import pytest
import torch
from torch.distributions import HalfNormal, MultivariateNormal

from pyro_sm import ModelDensity
from pyro_sm.__main__ import main
from pyro_sm.bench.group_effects import group_effects, log_evidence


@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_evidence_by_draws_of_the_scales(num_groups):
    """The law of all rows given the scales, as one normal law; a mean without its prior would show."""
    y = group_effects(num_groups).y.double()
    group = torch.arange(num_groups).repeat_interleave(8)
    same = (group[:, None] == group).double()
    torch.manual_seed(0)
    spread, noise = HalfNormal(1.0).sample((40_000,)).double(), HalfNormal(2.0).sample((40_000,)).double()

    def estimate(mean_variance):
        eye = torch.eye(len(group)).double()
        covariance = (
            spread[:, None, None].square() * same + noise[:, None, None].square() * eye + mean_variance + 1e-9 * eye
        )
        log_p = MultivariateNormal(torch.zeros(len(group)).double(), covariance).log_prob(y.flatten())
        weight = torch.exp(log_p - log_p.max())
        error = float(weight.std() / weight.mean()) / 200
        return float(torch.logsumexp(log_p, 0)) - math.log(40_000), error

    found = log_evidence(y)
    expected, error = estimate(25.0)
    assert error < 0.03
    assert abs(found - expected) < 5 * error
    assert abs(found - estimate(1.0)[0]) > 10 * error


def test_the_model_is_that_of_the_formula():
    effects = group_effects(4)
    density = ModelDensity(effects.model, ())
    assert density.dim == 7
    assert density.has_prior
    assert torch.equal(group_effects(4).y, effects.y)


def test_rows_are_kept_and_printed(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["bench", "many-latents", "--groups", "80", "--ways", "base", "--out", str(out), "--markdown"]
    assert main(command) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["latents"] == 83
    assert abs(row["log Z error"]) < 5 * row["log Z se"]
    assert row["ESS"] > 0.1
    assert main(command) == 0  # from the file
    assert len(out.read_text().splitlines()) == 1
    printed = capsys.readouterr().out
    assert printed.count("[1/1] 83 latents, base, seed 0") == 2
    assert "| 83: base | " in printed


def test_the_sampler_goes_on_from_the_base(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ["bench", "many-latents", "--groups", "30", "--ways", "sampler", "--out", str(out)]
    assert main([*command, "--evaluations", "12000"]) == 0
    row = json.loads(out.read_text())
    assert row["rounds"] >= 1
    assert row["evaluations"] <= 12_000
    assert row["ESS"] > 0.1


def test_nothing_is_refused(capsys):
    assert main(["bench", "many-latents", "--groups", "0"]) == 1
    assert "positive --groups" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pyro_sm.bench.commands.many_latents.measure", lambda *key: pytest.fail("measured"))
    assert main(["bench", "many-latents", "--groups", "9", "--out", str(tmp_path / "no" / "x.jsonl")]) == 1
    assert "there is no folder" in capsys.readouterr().err
