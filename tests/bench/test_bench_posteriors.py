# SPDX-License-Identifier: Apache-2.0
"""Every way leaves a row on a small posterior; rows are kept, not repeated, and reported exactly."""

import json

import pytest
import torch

from pyro_sm.__main__ import main
from pyro_sm.bench.commands import posteriors
from pyro_sm.bench.commands.posteriors import Limits, measure
from pyro_sm.bench.methods import chains
from pyro_sm.examples.posteriors import posteriors as catalogue

SMALL = "gp_pois_regr-gp_regr"


@pytest.mark.parametrize("way", ["sampler", "auto-mvn", "auto-iaf"])
def test_every_weighted_way_comes_near(way):
    row = measure(catalogue()[SMALL], way, 0, Limits(4096, 10.0))
    assert "failed" not in row, row
    assert max(row["mean error"], row["sd error"]) < 0.3
    assert abs(row["log Z error"]) < 6 * row["log Z se"] + 0.05
    assert row["density"] >= 2048
    assert row["gradient"] >= 2048
    assert (row["probe"] > 1000) == (way == "sampler")
    assert bool(row["verdict"]) == (way == "sampler")
    assert torch.get_default_dtype() == torch.float32


def test_chains_are_cut_off_by_time_and_what_they_have_counts(monkeypatch):
    posterior = catalogue()[SMALL]
    now = [0.0]

    def clock():
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(posteriors.time, "process_time", clock)
    monkeypatch.setattr(chains, "_WARMUP", 20)
    # A look at the clock per evaluation: 500 of them per chain.
    row = measure(posterior, "nuts", 0, Limits(1, 20.0))
    assert "failed" not in row, row
    assert "0 complete" in row["note"]
    assert 4 * 450 < row["gradient"] <= 4 * 501
    assert row["mean error"] < 1
    assert "log Z" not in row
    early = measure(posterior, "nuts", 0, Limits(1, 0.4))
    assert "no chain ended its warm-up" in early["failed"]


ROWS = [
    {"posterior": "a", "way": "sampler", "mean error": 0.01, "sd error": 0.02, "log Z error": 0.003,
     "log Z se": 0.004, "khat": 0.2, "ESS": 0.9, "verdict": "trust", "density": 1000, "gradient": 900,
     "CPU s": 3.0, "drawing": 0.5},
    {"posterior": "a", "way": "nuts", "mean error": 0.06, "sd error": 0.02, "verdict": "", "density": 10,
     "gradient": 10, "CPU s": 7.0, "drawing": 2.0},
    {"posterior": "b", "way": "nuts", "failed": "ValueError: a | b", "CPU s": 1.0},
]  # fmt: skip
TABLE = """\
| posterior | way | mean error | sd error | log Z error ± se | k̂ | ESS | verdict \
| evaluations: density / gradient | CPU s: fit + 10,000 draws |
|---|---|---|---|---|---|---|---|---|---|
| a | sampler | 0.010 | 0.020 | +0.003 ± 0.004 | 0.20 | 0.90 | trust | 1,000 / 900 | 3 + 0.5 |
| a | nuts | 0.060 | 0.020 | – | – | – | – | 10 / 10 | 7 + 2.0 |
| b | nuts | failed: ValueError: a / b, 1 CPU s | | | | | | | |

sampler: median of the worse error 0.020, 1 of 1 within 0.05, 4 CPU s in all.

nuts: median of the worse error ∞, 0 of 2 within 0.05, 10 CPU s in all."""


def test_the_table_is_exact():
    assert posteriors.markdown(ROWS) == TABLE


def test_rows_are_kept_and_not_repeated(tmp_path, capsys, monkeypatch):
    calls = []

    def fake(posterior, way, seed, limits):
        calls.append((posterior.name, way))
        return {**ROWS[0], "posterior": posterior.name, "way": way, "seed": seed, "budget": limits.evaluations,
                "note": ""}  # fmt: skip

    monkeypatch.setattr(posteriors, "measure", fake)
    out = tmp_path / "rows.jsonl"
    command = ["bench", "posteriors", "--posteriors", "gp_regr", "--ways", "sampler", "nuts", "--out", str(out)]
    assert main(command) == 0
    assert main([*command, "--markdown"]) == 0
    assert calls == [(SMALL, "sampler"), (SMALL, "nuts")]
    assert len([json.loads(text) for text in out.read_text().splitlines()]) == 2
    assert f"| {SMALL} | nuts | 0.010 |" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--posteriors", "nowhere"], "expected (parts of) arK"),
        (["--evaluations", "0"], "--evaluations >= 1"),
        (["--seconds", "0"], "--seconds > 0"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    assert main(["bench", "posteriors", *arguments]) == 1
    assert message in capsys.readouterr().err
