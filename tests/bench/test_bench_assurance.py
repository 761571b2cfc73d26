# SPDX-License-Identifier: Apache-2.0
"""What counts as wrong, what as false assurance, and how a run is broken."""

import math

import pytest
import torch

from pyro_sm.bench.broken import BREAKS, Moved, cases
from pyro_sm.bench.commands import assurance
from pyro_sm.diagnostics.verdict.verdict import Trust
from pyro_sm.guides import GivenBase
from pyro_sm.targets import Funnel, GaussianMixture, UnequalModes


@pytest.mark.parametrize(
    ("mean", "sd", "shares", "wrong"),
    [
        (0.2, 0.2, 0.1, False),
        (0.21, 0.0, math.nan, True),
        (0.0, 0.21, math.nan, True),
        (0.0, 0.0, 0.11, True),
        (0.0, 0.0, math.nan, False),
        (math.nan, 0.0, 0.0, True),
    ],
)
def test_what_is_wrong(mean, sd, shares, wrong):
    assert assurance.is_wrong({"mean error": mean, "sd error": sd, "shares error": shares}) == wrong


def row(how, wrong, verdict, **more):
    return {
        "problem": "a", "break": how, "seed": 0, "mean error": 0.5, "sd error": 0.1, "shares error": math.nan,
        "wrong": wrong, "khat": 0.5, "verdict": verdict.words, "CPU s": 3.0, **more,
    }  # fmt: skip


ROWS = [
    row("none", False, Trust.TRUST),
    row("three kernels", True, Trust.TRUST),
    row("base 20 times too narrow", True, Trust.DISTRUST, **{"shares error": 0.3}),
    {"problem": "a", "break": "learning rate of 0.3", "seed": 0, "failed": "ValueError: a | b", "CPU s": 1.0},
]
TABLE = """\
| problem | break | mean error | sd error | shares | answer | k̂ | verdict |
|---|---|---|---|---|---|---|---|
| a | none | 0.50 | 0.10 | – | right | 0.50 | trust |
| a | three kernels | 0.50 | 0.10 | – | wrong | 0.50 | **trust** |
| a | base 20 times too narrow | 0.50 | 0.10 | 0.30 | wrong | 0.50 | do not trust |
| a | learning rate of 0.3 | failed: ValueError: a / b, 1 CPU s | | | | | |

* broken: 3 runs, 1 refused; 2 wrong (1 trust, 0 use with care, 1 do not trust); \
0 right (0 trust, 0 use with care, 0 do not trust)
* as it comes: 1 runs, 0 refused; 0 wrong (0 trust, 0 use with care, 0 do not trust); \
1 right (1 trust, 0 use with care, 0 do not trust)
* false assurance: 1 of 2 wrong answers
  * a, three kernels, seed 0"""


def test_the_table_is_exact():
    assert assurance.markdown(ROWS) == TABLE


def test_lines_flag_false_assurance():
    assert assurance.line(ROWS[1]).startswith("a, three kernels, seed 0: FALSE ASSURANCE, wrong (mean error 0.500")
    assert "FALSE" not in assurance.line(ROWS[2])
    assert assurance.line(ROWS[3]) == "a, learning rate of 0.3, seed 0: refused (ValueError: a | b), 1 CPU s"


def test_a_base_is_moved_by_its_own_scales():
    base = Moved(GivenBase(1.0, 2.0), shift=10.0, factor=0.05)
    case = cases()["unequal-8"]()
    density = case.problem.density()
    loc, tril = base.fit(density)
    torch.testing.assert_close(loc, torch.full((8,), 21.0))
    torch.testing.assert_close(tril, 0.1 * torch.eye(8))
    assert BREAKS["base on one mode or flank"].base(case) is case.corner
    assert BREAKS["none"].base is None


@pytest.mark.parametrize(
    ("name", "target"), [("gmm40", GaussianMixture(40)), ("unequal-8", UnequalModes(8)), ("funnel", Funnel(10))]
)
def test_exact_draws_are_right_and_those_of_the_corner_are_not(name, target):
    case = cases()[name]()
    assert not assurance.is_wrong(case.problem.judged({"x": target.sample(10_000)}))
    loc, tril = case.corner.fit(case.problem.density())
    corner = loc + torch.randn(10_000, len(loc)) @ tril.T
    assert assurance.is_wrong(case.problem.judged({"x": corner}))
