# SPDX-License-Identifier: Apache-2.0
"""The benchmark commands measure what their tables say, and an interrupted run is not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyro_sm.__main__ import main
from pyro_sm.bench.commands import batching, cost, known_answers


def test_batching_measures_a_problem() -> None:
    row = batching.measure("eight schools", 64, single=2, repeats=1)
    assert row["D"] == 10
    assert row["way"] == "outer plate"
    # 64 latents at once against one: a weaker claim than the table's, for any machine
    assert row["one by one"] / row["batched"] == batching.ratio(row) > 5
    assert "| eight schools (10) | outer plate |" in batching.markdown([row])


def test_batching_prints_every_problem_and_gives_the_threads_back(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["bench", "batching", "--batch", "8", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 thread" in printed
    assert all(name in printed for name in batching.PROBLEMS)
    assert torch.get_num_threads() == threads


def test_times_are_rows_that_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "batching.jsonl"
    command = ["bench", "batching", "--batch", "8", "--repeats", "1", "--out", str(out)]
    assert main(command) == 0
    printed, before = capsys.readouterr().out, out.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["model"] for row in rows] == list(batching.PROBLEMS)
    assert all("1 threads" in row["machine"] and row["batch"] == 8 for row in rows)
    assert main(command) == 0
    assert (capsys.readouterr().out, out.read_text()) == (printed, before)


def test_cost_measures_a_problem() -> None:
    row = cost.measure("eight schools", 256, repeats=3, num_steps=4)
    assert row["D"] == 10
    assert 0 < row["density"] < row["draw"]  # four network passes against a dozen multiplications
    assert row["weighted"] > 0.5e-6 * 256 * row["draw"]  # draws are most of it
    assert min(row["score"], row["point"]) > 0
    longer = cost.measure("eight schools", 256, repeats=3, num_steps=24)
    assert longer["draw"] > 2 * row["draw"]


def test_cost_of_a_compiled_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    graphs: list[torch.nn.Module] = []

    def compile(graph: torch.nn.Module, dynamic: bool) -> torch.nn.Module:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", compile)
    row = cost.measure("GMM-40", 512, repeats=2, num_steps=4, compile=True)
    # What a training step and a draw need is what was compiled before they were timed.
    assert len(graphs) == 2
    assert min(row[key] for key in ("compiled draw", "compiled point", "compiling")) > 0
    assert "compiling" not in cost.measure("GMM-40", 512, repeats=1, num_steps=4)
    known = {"draw": 6.0, "point": 3.0, "compiled draw": 4.0, "compiled point": 2.5, "compiling": 9.6}
    printed = cost.markdown([row | known])
    assert printed.splitlines()[0].endswith("| times faster compiled: draws, training | compiling, s |")
    assert printed.splitlines()[-1].endswith("| 1.50, 1.20 | 10 |")
    assert all(line.count("|") == 9 for line in printed.splitlines())


def test_cost_prints_every_problem_and_gives_threads_and_dtype_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads(), torch.get_default_dtype()
    command = ["bench", "cost", "--draws", "16", "--kernels", "2", "--repeats", "1", "--dtype", "float64"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "float64, 1 thread" in printed
    assert all(name in printed for name in cost.PROBLEMS)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before


def test_known_answers_are_written_as_they_come_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_answers, "_POOL", 8_000)
    out = tmp_path / "results.json"
    command = ["bench", "known-answers", "--only", "eight-schools-noncentered:sampler", "--out", str(out)]
    assert main([*command, "--budget", "4096"]) == 0
    first = capsys.readouterr().out
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["training evaluations"] == 4096
    assert abs(row["log Z error"]) < 0.1
    assert row["mean error"] < 0.3
    assert row["all evaluations"] == 12_096
    assert main([*command, "--budget", "4096"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--budget", "4096", "--markdown"]) == 0
    assert "| eight-schools-noncentered: sampler | " in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 1


def test_every_default_run_is_defined() -> None:
    problems = known_answers.problems()
    for problem, way in known_answers._DEFAULT_RUNS:
        assert problem in problems
        assert way in known_answers.WAYS


@pytest.mark.parametrize("name", ["galaxies-3", "gmm40"])
def test_scores_of_exact_draws_are_at_their_floor(name: str) -> None:
    if name == "gmm40":
        target = known_answers.GaussianMixture()
        score = known_answers.problems()[name].judged({"x": target.sample(20_000)})
        assert score["modes"] == 40
        assert score["mode TV"] < 0.03
        one_lost = target.sample(20_000)
        one_lost = one_lost[(one_lost - target.means[0]).norm(dim=1) > 6]
        assert known_answers.problems()[name].judged({"x": one_lost})["mode TV"] > 0.02
    else:
        mean = torch.rand(6000, 3)
        score = known_answers.problems()[name].judged({"mean": mean})
        assert score["modes"] == 6
        assert score["worst share error"] < 0.03
        assert known_answers.problems()[name].judged({"mean": mean.sort(1).values})["worst share error"] > 0.8
