# SPDX-License-Identifier: Apache-2.0
"""``bench gaussian-guides``: it measures what its table says, keeps what it has, and a failure is a row."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pyro_sm import ModelDensity
from pyro_sm.__main__ import main
from pyro_sm.bench.commands import gaussian_guides
from pyro_sm.bench.methods import gaussian as ways
from pyro_sm.bench.problem import from_posterior
from pyro_sm.bench.table import summary
from pyro_sm.examples.posteriors import posteriors
from pyro_sm.gaussians.batch_and_match import Gaussian

NAME = "eight_schools-eight_schools_noncentered"


@pytest.fixture
def problem(float64: None) -> ways.Task:
    posterior = posteriors()[NAME]
    return ways.Task(from_posterior(posterior), ModelDensity(posterior.model, posterior.args), 640)


def gaussian(dim: int) -> Gaussian:
    tril = torch.randn(dim, dim).tril(-1) / dim + torch.diag(torch.rand(dim) + 0.5)
    return Gaussian(torch.randn(dim), tril @ tril.T)


def test_the_guide_is_the_gaussian(problem: ways.Task) -> None:
    wanted = gaussian(problem.density.dim)
    found = ways.guide_at(problem, wanted).get_posterior()
    torch.testing.assert_close(found.loc.detach(), wanted.loc)
    torch.testing.assert_close(found.covariance_matrix.detach(), wanted.covariance)


def test_every_way_starts_where_it_says(problem: ways.Task) -> None:
    """Without a step, every way that has steps returns its start."""
    idle = problem._replace(evaluations=0)
    begin = ways.start(problem.density.dim)
    for way in ("elbo", "fisher", "fisher-sobolev", "fisher-identity", "fisher-clipped"):
        fit = ways.WAYS[way](idle)
        torch.testing.assert_close(fit.gaussian.loc, begin.loc)
        torch.testing.assert_close(fit.gaussian.covariance, begin.covariance)
        assert fit.gradients == 0


@pytest.mark.parametrize("way", ways.WAYS)
def test_no_way_spends_more_gradients_than_it_may(problem: ways.Task, way: str) -> None:
    fit = ways.WAYS[way](problem)
    assert 320 <= fit.gradients <= 640
    assert bool(torch.isfinite(fit.gaussian.covariance).all())


def test_the_divergence_is_charged_two_gradients_a_particle(problem: ways.Task) -> None:
    before = problem.density.evaluations.scores
    loss = ways.FisherDivergence(8)
    begin = ways.start(problem.density.dim)
    ways.fit_by_svi(problem, loss, ways.Geometric(0.02), 5, begin)
    assert loss.evaluations.scores == 5 * 8
    assert ways.fit_by_fisher(problem, num_particles=8).gradients == 2 * 8 * (640 // 16)
    assert problem.density.evaluations.scores == before
    fit = ways.fit_by_batch_and_match(problem, search_mode=False)
    assert problem.density.evaluations.scores - before == fit.gradients == 640
    searched = ways.fit_by_batch_and_match(problem)
    assert problem.density.evaluations.scores - before == 640 + searched.gradients
    assert 640 - 32 < searched.gradients <= 640


def test_learning_rate_falls_from_first_to_last(problem: ways.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *args: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    loss = ways.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    ways.fit_by_svi(problem, loss, ways.Geometric(0.1), 10, ways.start(problem.density.dim))
    rates = [seen[3 * i] for i in range(10)]  # one optimiser for each of loc, scale and scale_tril
    assert rates == pytest.approx([0.1 * 0.01 ** (i / 10) for i in range(10)])


def test_judge_of_a_gaussian_posterior_is_exact(float64: None) -> None:
    """Mesquite's coefficients given σ are Gaussian: its own moments, in the place of the guide, score well."""
    posterior = posteriors()["mesquite-logmesquite"]
    x, y = posterior.args
    mean = torch.tensor([moments.mean for moments in posterior.reference.values()])
    log_sigma_sd = posterior.reference["sigma"].sd / posterior.reference["sigma"].mean
    coefficients = torch.linalg.solve(x.T @ x, x.T @ y)
    torch.testing.assert_close(coefficients, mean[:7], rtol=1e-6, atol=1e-6)
    covariance = torch.zeros(8, 8)
    # E σ² over E σ: the coefficients' own covariance, unconditional
    ratio = posterior.reference["beta[1]"].sd ** 2 / torch.linalg.inv(x.T @ x)[0, 0]
    covariance[:7, :7] = torch.linalg.inv(x.T @ x) * ratio
    covariance[7, 7] = log_sigma_sd**2
    loc = torch.cat([coefficients, mean[7:].log() - covariance[7, 7:] / 2])
    density = ModelDensity(posterior.model, posterior.args)
    row = gaussian_guides.judge(from_posterior(posterior), density, Gaussian(loc, covariance))
    assert row["mean error"] < 0.05
    assert row["sd error"] < 0.05
    assert posterior.log_evidence is not None
    assert 0 < posterior.log_evidence - row["ELBO"] < 0.3
    loc[:7] += covariance.diagonal()[:7].sqrt()
    covariance[:7, :7] *= 4
    shifted = gaussian_guides.judge(from_posterior(posterior), density, Gaussian(loc, covariance))
    assert shifted["mean error"] == pytest.approx(1, abs=0.08)
    assert shifted["sd error"] == pytest.approx(1, abs=0.05)
    assert shifted["ELBO"] < row["ELBO"] - 1


def test_rows_are_written_as_they_come_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    command = ["bench", "gaussian-guides", "--posteriors", "gp_regr", "mesquite", "--evaluations", "320"]
    command += ["--out", str(out)]
    assert main([*command, "--ways", "batch-and-match"]) == 0
    first = capsys.readouterr().out
    assert "gp_pois_regr-gp_regr (3), batch-and-match, seed 0: mean error" in first
    assert main([*command, "--ways", "batch-and-match", "elbo", "--markdown"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["posterior"].split("-")[0], row["way"]) for row in rows] == [
        ("gp_pois_regr", "batch-and-match"),
        ("mesquite", "batch-and-match"),
        ("gp_pois_regr", "elbo"),
        ("mesquite", "elbo"),
    ]
    assert all(320 - 32 < row["gradients"] <= 320 for row in rows)
    assert rows[1]["log Z - ELBO"] == pytest.approx(-20.5262 - rows[1]["ELBO"], abs=1e-3)
    table = capsys.readouterr().out
    assert "| mesquite-logmesquite (8) | elbo |" in table
    assert "\nelbo: mean error " in table
    assert table.rstrip().endswith("CPU s in all (median; worst).")
    assert torch.get_default_dtype() == torch.float32


def test_a_fit_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: ways.Task) -> ways.GaussianFit:
        raise ValueError("the scale is\nnot a number")

    monkeypatch.setitem(ways.WAYS, "elbo", broken)
    posterior = posteriors()["gp_pois_regr-gp_regr"]
    row = gaussian_guides.measure(posterior, "elbo", 0, 100)
    assert row["failed"] == "ValueError: the scale is not a number"
    assert "failed: ValueError: the scale is not a number" in gaussian_guides.markdown([row])
    assert gaussian_guides.JUDGED[0].spread([row, {"mean error": 1.0}]) == (math.inf, math.inf, None)
    assert "1 of 1 failed" in gaussian_guides.markdown([row])


def test_summary_is_the_median_and_the_worst_and_leaves_unknown_evidences_out() -> None:
    rows = [
        {"way": "elbo", "mean error": 3.0, "sd error": 0.5, "log Z - ELBO": 0.1},
        {"way": "elbo", "mean error": 1.0, "sd error": 0.1},
        {"way": "elbo", "mean error": 2.0, "sd error": math.nan},
        {"way": "fisher", "mean error": 99.0, "sd error": 99.0},
    ]
    chosen = [row for row in rows if row["way"] == "elbo"]
    found = {figure.name: figure.spread(chosen) for figure in gaussian_guides.JUDGED}
    expected = {"mean error": (2.0, 3.0), "sd error": (0.5, math.inf), "log Z − ELBO": (0.1, 0.1)}
    assert found == {name: (*both, None) for name, both in expected.items()}
    said = summary("elbo", [row | {"CPU s": 2.0} for row in chosen], gaussian_guides.JUDGED)
    assert said == (
        "elbo: mean error 2.000; 3.000, sd error 0.500; ∞, log Z − ELBO 0.100; 0.100, 6 CPU s in all (median; worst)."
    )


def test_parameters_that_are_not_numbers_fail(problem: ways.Task) -> None:
    loss = ways.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    begin = ways.start(problem.density.dim)
    with pytest.raises(ValueError, match=r"not finite|Expected parameter"):
        ways.fit_by_svi(problem, loss, ways.Geometric(math.inf), 3, begin)


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--posteriors", "nine_schools"], "nine_schools"), (["--evaluations", "0"], "expected --evaluations >= 1")],
)
def test_mistakes_are_one_line(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gaussian-guides", *option]) == 1
    assert message in capsys.readouterr().err
