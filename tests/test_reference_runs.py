# SPDX-License-Identifier: Apache-2.0
"""Two short runs, recorded before the package was rearranged (revision 184cc54): the same seed, the same numbers.

In double precision, the network included, so that processors that round differently agree to the tolerance.
"""

import json
from pathlib import Path

import pytest
import torch

from pyro_sm import AutoDiffusion, DiffusionSampler, GivenBase, ImportanceWeightedScoreMatching, StoppingRule
from pyro_sm.examples import eight_schools
from pyro_sm.examples.improper import factor_model
from pyro_sm.targets import GaussianMixture

RECORDED = json.loads((Path(__file__).parent / "data" / "reference_runs.json").read_text())


def run(model, args, base, seed=0):
    """Log evidence (nats), k̂, and the first two numbers of each site in the first ten of 4000 draws."""
    guide = AutoDiffusion(model, base=base, network_dtype=torch.float64, num_steps=16, name=f"reference{seed}")
    sampler = DiffusionSampler(
        model,
        guide=guide,
        objective=ImportanceWeightedScoreMatching(512, steps_per_round=20, batch_size=256),
        stopping=StoppingRule(max_evaluations=2048),
        seed=seed,
        disable_progbar=True,
    )
    sampler.run(*args)
    draws = {name: x[:10].reshape(10, -1)[:, :2] for name, x in sampler.get_samples(4000).items()}
    return sampler.log_evidence, sampler.khat, draws


def mixture():
    target = GaussianMixture(dtype=torch.float64)
    return factor_model(target.log_prob, target.dim), (), GivenBase(*target.start)


def schools():
    data = eight_schools.data()
    return eight_schools.noncentered, tuple(x.double() for x in data), None


@pytest.mark.parametrize(("name", "problem"), [("eight", schools), ("gmm40", mixture)])
def test_one_seed_gives_what_it_gave(float64, name, problem):
    log_evidence, khat, draws = run(*problem())
    recorded = RECORDED[name]
    assert log_evidence == pytest.approx(recorded["log_evidence"], abs=1e-6)
    assert khat == pytest.approx(recorded["khat"], abs=1e-6)
    assert draws.keys() == recorded["draws"].keys()
    for site, x in draws.items():
        torch.testing.assert_close(x, torch.tensor(recorded["draws"][site]), rtol=0, atol=1e-6)


def test_another_seed_gives_something_else(float64):
    assert abs(run(*mixture(), seed=1)[0] - RECORDED["gmm40"]["log_evidence"]) > 1e-4
