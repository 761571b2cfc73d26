# SPDX-License-Identifier: Apache-2.0
"""Replicas: each trained as if it were alone, chains that R̂ can compare, and one lost mode that it sees."""

import math
import os
import signal

import arviz as az
import pytest
import torch
from samplers import DATA, LOG_EVIDENCE, bimodal, hierarchy, make, name, trained

from pyro_sm import (
    AutoDiffusion,
    CheckpointError,
    DiffusionSampler,
    GivenBase,
    ImportanceWeightedScoreMatching,
    StoppingRule,
    Trust,
    TrustWarning,
    WideCovering,
    check,
)
from pyro_sm.base import Draws
from pyro_sm.corrections import ImportanceResampling, NoCorrection
from pyro_sm.corrections.per_replica import PerReplica, joined
from pyro_sm.nn.mlp import MLP
from pyro_sm.weights import evidence, pareto_smooth


def pool(n, offset, log_weight=None):
    z = offset + torch.arange(float(n))[:, None]
    return Draws(z, torch.zeros(n), torch.zeros(n) if log_weight is None else log_weight)


@pytest.fixture(scope="module")
def three():
    """Three replicas of the sampler of ``test_sampler.py``, with the seeds 0, 1 and 2."""
    return trained(num_chains=3)


# -------------------------------------------------------------------------------------------------- the arithmetic


def test_each_pool_is_corrected_by_itself():
    """The second pool's weights are e^5 times the first's: together, next to nothing of the first would be chosen."""
    whole = joined([pool(100, 0), pool(100, 1000, torch.full((100,), 5.0))])
    index = PerReplica(ImportanceResampling(), 2).apply(whole, 60)
    assert bool((index[:30] < 100).all())
    assert bool((index[30:] >= 100).all())
    assert int((ImportanceResampling().apply(whole, 60) < 100).sum()) <= 2
    assert PerReplica(NoCorrection(), 2).apply(whole, 4).tolist() == [0, 1, 100, 101]
    assert PerReplica(NoCorrection(), 2).name == "none (raw draws of the guide), in each of 2 replicas"


@pytest.mark.parametrize(("size", "num_samples"), [(101, 10), (100, 9)])
def test_parts_must_be_equal(size, num_samples):
    with pytest.raises(ValueError, match="multiples of the 2 replicas"):
        PerReplica(NoCorrection(), 2).apply(pool(size, 0), num_samples)


def test_scores_are_kept_only_if_all_have_them():
    one = pool(3, 0)
    assert joined([one, one]).score is None
    scored = one._replace(score=torch.ones(3, 1))
    assert joined([scored, one]).score is None
    assert joined([scored, scored]).score.shape == (6, 1)


# ----------------------------------------------------------------------------------------------------- the sampler


def test_every_replica_is_what_it_would_be_alone(three):
    for chain, replica in enumerate(three.replicas):
        alone = trained(seed=chain)
        mine, theirs = replica.guide.state_dict(), alone.guide.state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        assert [repr(i._replace(seconds=0.0)) for i in replica.history] == [
            repr(i._replace(seconds=0.0)) for i in alone.history
        ]
        assert torch.equal(three.draws(16_002).z[chain * 5334 : (chain + 1) * 5334], alone.draws(5334).z)


def test_draws_and_evidence_of_all(three):
    samples = three.get_samples(300)
    assert samples["t"].shape == (300, 3)
    draws = three.draws(16_000)
    assert draws.z.shape == (3 * 5334, 4)
    parts = [evidence(part).log_evidence for part in draws.log_weight.split(5334)]
    mean = torch.logsumexp(torch.tensor(parts), 0) - math.log(3)
    assert three.log_evidence == pytest.approx(float(mean), abs=1e-5)
    assert abs(three.log_evidence - LOG_EVIDENCE) < 5 * three.log_evidence_se
    assert len({float(part) for part in parts}) == 3
    with pytest.raises(ValueError, match="multiples of the 3 replicas"):
        three.get_samples(100)


def test_a_larger_pool_of_one_does_not_break_the_others(three):
    three.replicas[1].draws(6000)
    draws = three.draws(16_000)
    assert draws.z.shape[0] == 18_000  # cut short, the covering component's draws would be missing from the weights
    assert abs(three.log_evidence - LOG_EVIDENCE) < 5 * three.log_evidence_se


def test_chains_are_replicas(three):
    idata = three.to_arviz(300)
    assert idata.posterior.sizes["chain"] == 3
    assert idata.posterior.attrs["num_replicas"] == 3
    samples = three.get_samples(300)["t"].reshape(3, 100, 3)
    for chain in range(3):
        own = {tuple(row) for row in three.replicas[chain].draws(5334).z[:, 1:].tolist()}
        assert {tuple(row) for row in samples[chain].tolist()} <= own
    assert idata.posterior.attrs["density_evaluations"] > 3 * 640
    assert "in each of 3 replicas" in idata.posterior.attrs["correction"]
    assert check(idata).findings.chains.rhat == pytest.approx(
        float(az.rhat(idata, method="split").to_array().max()), abs=0.02
    )


def test_report_and_summary(three, capsys):
    assert f"{sum(len(r.history) for r in three.replicas)} rounds" in three.report()
    three.summary(300)
    assert "log evidence" in capsys.readouterr().out


def test_guides_are_apart(three):
    names = {replica.guide._pyro_name for replica in three.replicas}
    assert len(names) == 3
    default = DiffusionSampler(hierarchy, num_chains=2)
    assert len({replica.guide._pyro_name for replica in default.replicas}) == 2


def test_one_chain_is_the_default_and_none_is_refused():
    assert len(make().replicas) == 1
    with pytest.raises(ValueError, match="num_chains >= 1"):
        make(num_chains=0)


def interrupted_at(sampler, chain, steps, action):
    """Let ``action`` happen in the given step of one replica."""
    replica, left = sampler.replicas[chain], [steps]
    step = replica.step

    def counted(*args):
        step(*args)
        left[0] -= 1
        if left[0] == 0:
            action()

    replica.step = counted


def assert_equal_states(mine, theirs):
    state = theirs.guide.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in mine.guide.state_dict().items())


@pytest.mark.parametrize("chain", [0, 1, 2])
def test_interrupted_and_run_again(three, chain):
    sampler = make(num_chains=3, num_workers=1)
    interrupted_at(sampler, chain, 17, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped after"):
        sampler.run(DATA)
    assert [r.schedule.finished for r in sampler.replicas] == [c < chain for c in range(3)]
    sampler.run(DATA)
    for mine, theirs in zip(sampler.replicas, three.replicas, strict=True):
        assert_equal_states(mine, theirs)


@pytest.mark.parametrize("chain", [0, 1])
def test_stopped_and_resumed_from_files(three, chain, tmp_path):
    path = tmp_path / "run.ckpt"
    stopped = make(num_chains=3, num_workers=1, checkpoint=path)
    interrupted_at(stopped, chain, 17, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        stopped.run(DATA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.ckpt", "run.ckpt.1"][: chain + 1]
    resumed = make(num_chains=3, seed=77)  # the files know better
    resumed.load(path)
    assert [replica.seed for replica in resumed.replicas] == [0, 1, 2]
    resumed.run(DATA)
    for mine, theirs in zip(resumed.replicas, three.replicas, strict=True):
        assert_equal_states(mine, theirs)
    resumed.save(tmp_path / "done.ckpt")
    again = make(num_chains=3)
    again.load(tmp_path / "done.ckpt")
    again.run(DATA)
    assert torch.equal(again.get_samples(30)["t"], resumed.get_samples(30)["t"])


def test_files_of_another_run_are_refused(three, tmp_path):
    three.save(tmp_path / "run.ckpt")
    os.replace(tmp_path / "run.ckpt.1", tmp_path / "kept")
    os.replace(tmp_path / "run.ckpt.2", tmp_path / "run.ckpt.1")
    with pytest.raises(CheckpointError, match="expected the seed 1"):
        make(num_chains=3).load(tmp_path / "run.ckpt")


def test_a_larger_budget_and_other_data_reach_all():
    sampler = trained(num_chains=2, budget=320)
    rounds = [len(replica.history) for replica in sampler.replicas]
    sampler.stopping = StoppingRule(max_evaluations=640)
    sampler.run(DATA)
    assert all(len(r.history) > n for r, n in zip(sampler.replicas, rounds, strict=True))
    sampler.run(DATA + 1)
    fresh = make(num_chains=2, budget=640)
    fresh.run(DATA + 1)
    for mine, theirs in zip(sampler.replicas, fresh.replicas, strict=True):
        assert_equal_states(mine, theirs)
        assert [repr(info._replace(seconds=0.0)) for info in mine.history] == [
            repr(info._replace(seconds=0.0)) for info in theirs.history
        ]


# ------------------------------------------------------------------------------------------------------- lost modes


def four(**options):
    return DiffusionSampler(
        bimodal,
        guide=AutoDiffusion(bimodal, num_steps=24, architecture=MLP(width=64, depth=2), name=name()),
        stopping=StoppingRule(max_evaluations=12_000),
        num_chains=4,
        disable_progbar=True,
        **options,
    )


@pytest.mark.slow
def test_replicas_that_agree_are_trusted_even_without_a_probe():
    sampler = four()
    sampler.run()
    found = sampler.check(probe=None)
    assert found.findings.chains.rhat < 1.01
    assert found.level is Trust.TRUST, str(found)
    assert check(sampler.to_arviz(4000)) == found


@pytest.mark.slow
def test_one_replica_that_lost_a_mode_is_seen():
    sampler = four(objective=ImportanceWeightedScoreMatching(covering=WideCovering(0.1, 1.0)))
    blind = sampler.replicas[3]
    blind.guide.base = GivenBase(torch.tensor([-3.0, 3.0]), 0.6)
    sampler.run()
    assert pareto_smooth(blind.draws(16_000).log_weight).khat < 0.7  # its weights see nothing
    found = sampler.check(probe=None)
    assert found.findings.chains.rhat > 1.1
    assert found.level is Trust.DISTRUST
    with pytest.warns(TrustWarning, match="R̂"):
        idata = sampler.to_arviz(4000)
    assert float(az.rhat(idata)["x"].max()) > 1.1
