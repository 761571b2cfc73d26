# SPDX-License-Identifier: Apache-2.0
"""Data sets leave rows that are kept, not repeated, tested and drawn; every way fits both models."""

import json
import math

import pytest
import torch
from pyro import poutine

from pyro_sm import ModelDensity
from pyro_sm.__main__ import main
from pyro_sm.bench.commands import calibration
from pyro_sm.bench.commands.calibration import MODELS, WAYS, measure
from pyro_sm.diagnostics.calibration.simulation import LOG_LIKELIHOOD, Fitted, simulate

QUANTITIES = {
    "eight-schools": ["mu", "tau", *(f"theta[{j}]" for j in range(8)), LOG_LIKELIHOOD],
    "logistic": [*(f"beta[{j}]" for j in range(5)), LOG_LIKELIHOOD],
}


@pytest.mark.parametrize(("name", "way"), [("logistic", "sampler"), ("eight-schools", "raw")])
def test_the_sampler_leaves_a_row_per_data_set(name, way):
    state = torch.get_rng_state()
    row = measure(name, way, 3, 0, 2048)
    assert "failed" not in row, row
    assert torch.equal(torch.get_rng_state(), state)
    assert list(row["ranks"]) == QUANTITIES[name]
    assert all(0 <= rank <= 99 for rank in row["ranks"].values())
    assert row["khat"] < 0.7
    assert 0 < row["ESS"] <= 1
    assert row["density"] == 2048
    assert row["all CPU s"] > row["CPU s"] > 0
    json.dumps(row)


def test_raw_draws_are_the_guides_own(monkeypatch):
    """And the sampler's are resampled; both are those of the one seed."""
    monkeypatch.setattr(calibration, "_SAMPLES", 500)
    problem = MODELS["logistic"]()
    simulated = simulate(problem.model, problem.args, index=1)
    raw, usable = (WAYS[way](1024)(simulated).samples["beta"] for way in ("raw", "sampler"))
    assert len(raw) == len(usable) == 500
    assert len(raw.unique(dim=0)) == 500 > len(usable.unique(dim=0))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_mean_field_guide_is_fitted_and_drawn_from(name):
    problem = MODELS[name]()
    simulated = simulate(problem.model, problem.args, index=1)
    samples, info = WAYS["auto-normal"](6400)(simulated)
    assert info["density"] == 6400
    density = ModelDensity(simulated.model, simulated.args)
    z = density.pack({site.name: samples[site.name] for site in density.sites})
    value = density.log_prob(z)
    assert float(value.std()) < 2 * math.sqrt(density.dim)
    assert float(value.mean()) > float(density.log_prob(density.prior_draws(4000)).mean()) + 1
    assert {site: samples[site].shape[1:] for site in problem.sites} == {
        site: simulated.truth[site].shape for site in problem.sites
    }
    if name == "eight-schools":
        expected = samples["mu"][:, None] + samples["tau"][:, None] * samples["theta_raw"]
        torch.testing.assert_close(samples["theta"], expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_models_are_batched_and_have_a_proper_prior(name):
    problem = MODELS[name]()
    density = ModelDensity(problem.model, problem.args)
    assert density.batching_method == "outer plate"
    assert density.has_prior
    assert {"eight-schools": 10, "logistic": 5}[name] == density.dim
    again = MODELS[name]()
    assert all(torch.equal(a, b) for a, b in zip(problem.args, again.args, strict=True))
    trace = poutine.trace(problem.model).get_trace(*problem.args)
    assert all(site in trace.nodes for site in problem.sites)


def test_a_fit_that_fails_is_a_row_that_says_why(monkeypatch):
    def fail(simulated):
        raise FloatingPointError("the training loss\nbecame nan")

    monkeypatch.setitem(WAYS, "sampler", lambda evaluations: fail)
    row = measure("logistic", "sampler", 0, 0, 10)
    assert row["failed"] == "FloatingPointError: the training loss became nan"
    assert calibration.line(row) == "logistic 0: failed (FloatingPointError: the training loss became nan)"


# ------------------------------------------------------------------------------------------------- the command


def prior_fit(evaluations):
    """Draws from the prior: as good as the posterior for each parameter."""

    def fit(simulated):
        with torch.random.fork_rng():
            torch.manual_seed(simulated.seed)
            return Fitted({"beta": 1.5 * torch.randn(99, 5)}, {"density": evaluations, "khat": 0.1, "ESS": 0.5})

    return fit


@pytest.fixture
def prior(monkeypatch):
    monkeypatch.setitem(WAYS, "sampler", prior_fit)
    calls = []
    measured = calibration.measure

    def counted(*args):
        calls.append(args[2])
        return measured(*args)

    monkeypatch.setattr(calibration, "measure", counted)
    return calls


def command(out, *more):
    return ["bench", "calibration", "--models", "logistic", "--out", str(out), *more]


def test_rows_are_kept_not_repeated_and_tested(tmp_path, capsys, prior):
    out, figure = tmp_path / "rows.jsonl", tmp_path / "ranks.png"
    assert main(command(out, "--datasets", "30")) == 0
    assert main(command(out, "--datasets", "40", "--figure", str(figure), "--markdown")) == 0
    assert prior == list(range(40))
    assert [json.loads(text)["dataset"] for text in out.read_text().splitlines()] == list(range(40))
    assert figure.stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "[40/40] logistic 39: k̂ 0.10, ESS 0.50, 8,000 evaluations" in said
    assert "smallest of 6: log likelihood, p = 0.000 after Bonferroni; 40 data sets" in said
    assert f"written: {figure}" in said
    assert main(command(out, "--datasets", "2", "--seed", "1")) == 0
    assert main(command(out, "--datasets", "2", "--evaluations", "7")) == 0
    assert prior[40:] == [0, 1, 0, 1]


def test_ctrl_c_loses_the_data_set_under_way_only(tmp_path, monkeypatch, prior):
    out = tmp_path / "rows.jsonl"
    counted = calibration.measure

    def interrupted(*args):
        if args[2] == 2:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "measure", interrupted)
        assert main(command(out, "--datasets", "4")) == 130
    assert len(out.read_text().splitlines()) == 2
    whole = out.read_text()
    out.write_text(whole + '{"model": "logi')  # a machine that went down in the middle of a line
    assert main(command(out, "--datasets", "4")) == 0
    assert out.read_text().startswith(whole)
    assert [json.loads(text)["dataset"] for text in out.read_text().splitlines()] == [0, 1, 2, 3]
    assert prior == [0, 1, 2, 3]


def test_models_take_turns(tmp_path, monkeypatch):
    order = []

    def fake(name, way, index, seed, evaluations):
        order.append((name, index))
        return {"model": name, "dataset": index, "failed": "ValueError: no", "all CPU s": 1.0}

    monkeypatch.setattr(calibration, "measure", fake)
    assert main(["bench", "calibration", "--datasets", "2", "--figure", str(tmp_path / "none.png")]) == 0
    assert order == [(name, index) for index in range(2) for name in MODELS]
    assert not (tmp_path / "none.png").exists()


ROWS = [
    {"model": "a", "dataset": i, "ranks": {"x": 10 * i, "y": 0}, "khat": khat, "ESS": 0.1 * i, "density": 1000,
     "all CPU s": 2.0}
    for i, khat in enumerate([0.1, 0.8, 0.7, math.nan, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0])
] + [{"model": "b", "dataset": 0, "failed": "ValueError: no", "all CPU s": 1.0}]  # fmt: skip
TABLE = """\
**a**: 0 of 10 fits failed; k̂ > 0.7 in 2 of 10, median ESS 0.45; \
median of a data set 1,000 evaluations, 2.0 CPU s.

| test quantity | p (ECDF) | p (χ²) | mean rank | spread |
|---|---|---|---|---|
| x | 0.672 | 1.000 | 0.455 | 1.01 |
| y | 0.000 | 0.002 | 0.000 | 1.71 |

Smallest of 2: y, p = 0.000 after Bonferroni.

**b**: 1 of 1 fits failed."""


def test_the_table_is_exact():
    assert calibration.markdown(ROWS) == TABLE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluations", "0"], "--evaluations >= 1 and --datasets >= 1, found 0 and 100"),
        (["--datasets", "0"], "found 8000 and 0"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    assert main(["bench", "calibration", *arguments]) == 1
    assert message in capsys.readouterr().err
