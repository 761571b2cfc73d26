# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, and that every mistake is one line and a non-zero exit."""

from __future__ import annotations

import json
from pathlib import Path

import arviz as az
import pytest
import torch

import pyro_sm
from pyro_sm import DiffusionSampler
from pyro_sm.__main__ import main

MODEL = """
import pyro, pyro.distributions as dist

def model(y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)

def broken(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu * float("nan"), 1.0).to_event(0), obs=y.sum())

def wrong_shape(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "data.json").write_text(json.dumps({"y": [1.0, 2.5]}))
    return tmp_path


def sample(files: Path, *options: str, name: str = "model", data: str | None = "data.json") -> int:
    given = [] if data is None else ["--data", str(files / data)]
    out = [] if "--out" in options else ["--out", str(files / "out.nc")]
    return main(["sample", f"{files / 'model.py'}:{name}", *given, *out, *options])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr; there is no traceback before it."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: "), text
    return last


def test_sample_writes_corrected_draws_and_says_what_they_are_worth(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(files, "--budget", "6144", "--num-samples", "2000") == 0
    idata = az.from_netcdf(files / "out.nc")
    mu = idata.posterior["mu"].values
    precision = 1 / 4 + 2
    assert mu.size == 2000
    assert abs(mu.mean() - 3.5 / precision) < 5 * (precision * 1000) ** -0.5
    exact = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2) + 4.0).log_prob(
        torch.tensor([1.0, 2.5])
    )
    assert (
        abs(idata.posterior.attrs["log_evidence"] - float(exact))
        < 5 * idata.posterior.attrs["log_evidence_se"] + 1e-3
    )
    printed = capsys.readouterr().out
    assert "log evidence" in printed
    verdict = pyro_sm.check(idata)
    assert str(verdict) in printed
    assert idata.posterior.attrs["verdict"] == verdict.level.words == "trust"
    spent = verdict.findings.probe.evaluations
    assert spent.values > 2048
    assert f"{spent.values} density and {spent.scores} gradient evaluations, on top" in printed
    assert idata.posterior.attrs["density_evaluations"] == 6144 + 16_000  # training and draws: the probe is apart


def test_no_check_spares_the_look_elsewhere(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionSampler, "check", lambda sampler: pytest.fail("looked elsewhere"))
    assert sample(files, "--budget", "4096", "--num-samples", "500", "--no-check") == 0
    assert "Verdict" not in capsys.readouterr().out
    assert "verdict" not in az.from_netcdf(files / "out.nc").posterior.attrs


def test_an_interrupted_check_loses_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(sampler: DiffusionSampler) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionSampler, "check", interrupted)
        assert sample(files, "--budget", "4096", "--num-samples", "500") == 130
    assert "--resume --no-check" in capsys.readouterr().out
    assert not (files / "out.nc").exists()
    assert sample(files, "--budget", "4096", "--num-samples", "500", "--resume", "--no-check") == 0
    assert (files / "out.nc").exists()


def test_a_finished_run_is_not_taken_for_an_unfinished_one_and_can_be_resumed(files: Path) -> None:
    assert sample(files, "--budget", "4096", "--num-samples", "500") == 0
    assert sample(files, "--budget", "4096", "--num-samples", "500") == 0
    assert sample(files, "--budget", "4096", "--num-samples", "500", "--resume") == 0


@pytest.mark.parametrize(
    ("spec", "data", "words"),
    [
        ("nowhere.py:model", "data.json", "there is no file"),
        ("model.py", "data.json", "expected FILE.py:MODEL"),
        ("model.py:absent", "data.json", "has no model 'absent' (it defines: model, broken, wrong_shape)"),
        ("bad.py:model", "data.json", "importing"),
        ("model.py:model", "absent.json", "there is no data file"),
        ("model.py:model", "model.py", "is not JSON"),
        ("model.py:model", "list.json", "expected a JSON object"),
        ("model.py:model", "ragged.json", "'y'"),
        ("model.py:model", "unknown.json", "unknown"),
        ("model.py:model", None, "y"),
        ("model.py:broken", "data.json", "NaN"),
        ("model.py:wrong_shape", "data.json", "hape mismatch inside plate"),
    ],
)
def test_mistakes_are_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], spec: str, data: str | None, words: str
) -> None:
    (files / "bad.py").write_text("import nonexistent_module")
    (files / "list.json").write_text("[1, 2]")
    (files / "ragged.json").write_text('{"y": [[1], [1, 2]]}')
    (files / "unknown.json").write_text('{"y": [1.0], "unknown": 3}')
    given = [] if data is None else ["--data", str(files / data)]
    status = main(["sample", str(files / spec), *given, "--out", str(files / "out.nc"), "--budget", "4096"])
    assert status == 1
    assert words in error_of(capsys)
    assert not (files / "out.nc").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x.txt"], ".nc"),
        (["--out", "nowhere/x.nc"], "there is no folder"),
        (["--num-samples", "0"], "--num-samples"),
        (["--budget", "0"], "max_evaluations"),
        (["--resume"], "no checkpoint"),
    ],
)
def test_bad_options_are_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert sample(files, *options) == 1
    assert words in error_of(capsys)


def test_a_damaged_checkpoint_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "out.ckpt").write_bytes(b"not a checkpoint")
    assert sample(files, "--resume") == 1
    assert "damaged" in error_of(capsys)


def test_debug_shows_the_traceback(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(files, "--debug", name="absent") == 1
    assert "Traceback" in capsys.readouterr().err


def test_bench_names_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "known-answers", "--only", "nothing"]) == 1
    assert "eight-schools-centered:svi" in error_of(capsys)


@pytest.mark.filterwarnings("ignore:do not trust these draws")
def test_demo_runs_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a budget far too small for right answers: what is checked is that everything is written and said."""
    assert main(["demo", "--out", str(tmp_path / "demo"), "--budget", "4096"]) == 0
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    for problem in ("galaxies-3", "eight-schools"):
        assert {f"{problem}.nc", f"{problem}-training.png", f"{problem}-pairs.png", f"{problem}-khat.png"} <= names
    printed = capsys.readouterr().out
    for words in ("literature", "labellings", "reference", "exact", "threads"):
        assert words in printed
    assert printed.count("\nVerdict: ") == printed.count("\nprobe  ") == 2
    assert "\nVerdict: do not trust\n" in printed.split("== Eight schools")[0]  # which the tiny budget is enough for
