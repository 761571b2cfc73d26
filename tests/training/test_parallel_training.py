# SPDX-License-Identifier: Apache-2.0
"""Replicas in processes of their own: what they would be here, whatever ends them, and nothing left behind."""

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from samplers import DATA, books, make, trained

from pyro_sm import CheckpointError, ModelRefusedError, PyroSMWarning, StoppingRule
from pyro_sm.training.processes import Outcome, RemoteTraceback, Task, num_processes, train_in_processes
from pyro_sm.training.progress import Progress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def children():
    """Ids of this process's children, zombies among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(path.parent.name)
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = children()  # of other tests
    yield
    assert multiprocessing.active_children() == []
    assert children() <= before  # not even a zombie


@pytest.fixture(scope="module")
def sequential():
    return trained(num_chains=3, num_workers=1)


def parallel(**options):
    return make(**{"num_chains": 3, "num_workers": 2, **options})


def counted(sampler):
    return [vars(replica.density.evaluations) for replica in sampler.replicas]


def assert_all_equal(one, other):
    """Draws and history of every replica, what they say together, and what they have cost."""
    for mine, theirs in zip(one.replicas, other.replicas, strict=True):
        assert_equal_states(mine, theirs)
    assert counted(one) == counted(other)
    assert torch.equal(one.get_samples(60)["t"], other.get_samples(60)["t"])
    assert one.log_evidence == other.log_evidence


def assert_equal_states(mine, theirs):
    """All that another step, or another draw, depends on."""
    assert books(mine) == books(theirs)
    assert mine.schedule == theirs.schedule
    one, other = mine.content(), theirs.content()
    for content in (one, other):
        content["history"] = content["seconds"] = None  # the clock
    assert_same(one, other)


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def acting(chain, action, **options):
    """Three replicas; in the process of the given one, ``action`` happens in a model run of its fourth round."""
    sampler = parallel(**options)
    replica, here = sampler.replicas[chain], os.getpid()
    collect = replica.objective._collect

    def acted(*args):
        if os.getpid() != here and len(replica.history) == 3:
            action()
        return collect(*args)

    replica.objective._collect = acted
    return sampler


# --------------------------------------------------------------------------------------------------- the same result


@pytest.mark.parametrize("num_workers", [2, 3])
def test_each_is_what_it_would_be_here(sequential, num_workers):
    before = torch.get_rng_state()
    pids = []
    sampler = parallel(num_workers=num_workers)
    for replica in sampler.replicas:
        replica.train = lambda *args, real=replica.train: (pids.append(os.getpid()), real(*args))
    sampler.run(DATA)
    assert pids == []  # none was trained in this process
    assert_all_equal(sampler, sequential)
    assert torch.equal(torch.get_rng_state(), before)
    for replica in sampler.replicas:  # as a guide of these names would find them
        held = pyro.get_param_store()[f"{replica.guide._pyro_name}.network_weights"]
        assert torch.equal(held, replica.guide.network_weights)
    assert all(replica.history[-1].seconds > 0 for replica in sampler.replicas)
    assert sampler.report().split(" rounds")[0] == sequential.report().split(" rounds")[0]
    assert sampler.check(probe=None).findings == sequential.check(probe=None).findings
    assert (
        sampler.to_arviz(60).posterior.attrs["density_evaluations"]
        == (sequential.to_arviz(60).posterior.attrs["density_evaluations"])
    )


def test_threads_of_the_parent_make_no_difference(sequential):
    """After two threads have worked here, which a forked process would wait for; and one thread is what it has."""
    torch.set_num_threads(2)
    try:
        torch.randn(400, 400) @ torch.randn(400, 400)
        torch.randn(1_000_000).exp()
        sampler = parallel()
        sampler.run(DATA)
        threads = train_in_processes(
            [Task("one", lambda stop, show: None, lambda: {"threads": torch.get_num_threads()})],
            2, lambda: False, [print],
        )  # fmt: skip
        assert threads == [Outcome({"threads": 1})]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for mine, theirs in zip(sampler.replicas, sequential.replicas, strict=True):
        assert_equal_states(mine, theirs)


def test_a_larger_budget_and_other_data(sequential):
    sampler = parallel(budget=320)
    sampler.run(DATA)
    draws = sampler.get_samples(30)["t"]
    sampler.run(DATA)  # finished: nothing happens
    assert torch.equal(sampler.get_samples(30)["t"], draws)
    sampler.stopping = StoppingRule(max_evaluations=640)
    sampler.run(DATA)
    here = trained(num_chains=3, num_workers=1, budget=320)
    here.stopping = StoppingRule(max_evaluations=640)
    here.run(DATA)
    assert_all_equal(sampler, here)
    assert not torch.equal(sampler.get_samples(30)["t"], draws)
    sampler.run(DATA + 1)
    assert_all_equal(sampler, trained(DATA + 1, num_chains=3, num_workers=1))


def test_from_a_thread(sequential):
    sampler = parallel()
    thread = threading.Thread(target=sampler.run, args=(DATA,))
    thread.start()
    thread.join()
    assert_all_equal(sampler, sequential)


def test_a_population_and_coordinates_come_back():
    """A posterior that its base cannot reach: the state has particles, and an anchor that the bound guide lacks."""

    def far():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 20.0).to_event(1))
        near = [dist.Normal(at, 0.05).log_prob(x).sum(-1) for at in (-9.0, 3.0)]
        pyro.factor("modes", torch.logaddexp(*near))

    options = {"model": far, "budget": 256, "num_chains": 2}
    here, apart = make(**options, num_workers=1), make(**options, num_workers=2)
    here.run()
    apart.run()
    assert here.objective.state.population is not None
    assert "anchor_loc" in here.guide._pyro_params
    assert here.replicas[0].guide.state_dict().keys() == apart.replicas[0].guide.state_dict().keys()
    for mine, theirs in zip(apart.replicas, here.replicas, strict=True):
        assert_equal_states(mine, theirs)


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_written_by_each_and_loaded_again(sequential, tmp_path):
    path = tmp_path / "run.ckpt"
    sampler = parallel(checkpoint=path, checkpoint_every=0.0, budget=320)
    sampler.run(DATA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.ckpt", "run.ckpt.1", "run.ckpt.2"]
    loaded = parallel(seed=77, stopping=sampler.stopping)
    loaded.load(path)
    loaded.run(DATA)
    assert_all_equal(loaded, sampler)
    loaded.save(tmp_path / "again")
    more = parallel()
    more.load(tmp_path / "again")
    more.run(DATA)
    sampler.stopping = more.stopping
    sampler.run(DATA)
    assert_all_equal(more, sampler)
    with pytest.raises(CheckpointError, match="other data"):
        load_and_run(path, DATA + 5)


def load_and_run(path, data):
    sampler = parallel()
    sampler.load(path)
    sampler.run(data)


SCRIPT = """
import os, signal, sys, time
sys.path[:0] = {tests!r}
import torch; torch.set_num_threads(1)
import samplers, test_parallel_training as here
path = {path!r}
def action():
    open(path + f".{{os.getpid()}}.reached", "w").close()
    time.sleep({seconds})
sampler = here.acting(1, action, checkpoint=path)
try:
    sampler.run(samplers.DATA)
except KeyboardInterrupt as error:
    print("interrupted:", error, flush=True)
    assert here.multiprocessing.active_children() == []
    print([len(r.history) for r in sampler.replicas], flush=True)
    # what happened in the fourth round does not happen in the second session
    del sampler.replicas[1].objective._collect
    sampler.run(samplers.DATA)
    sampler.save(path + ".end")
"""


def begun(tmp_path, seconds):
    """A script that trains, once its second replica has reached its fourth round; and the id of that process."""
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    script = SCRIPT.format(tests=folders, path=str(tmp_path / "s"), seconds=seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    for _ in range(1200):
        if reached := list(tmp_path.glob("*.reached")):
            return process, int(reached[0].name.split(".")[1])
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError("the second replica never came to its fourth round")


@pytest.mark.parametrize("whom", ["the parent alone", "all, as a terminal does"])
def test_ctrl_c_and_run_again(sequential, tmp_path, whom):
    process, worker = begun(tmp_path, 0.5)
    if whom == "the parent alone":
        os.kill(process.pid, signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
        for _ in range(2):  # of which a process that noted the first would know no better than to break off
            time.sleep(0.05)
            os.kill(worker, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    lines = out.splitlines()
    assert lines[0].startswith("interrupted: stopped after ")
    assert "rounds of the replicas; run() with the same arguments goes on" in lines[0]
    assert lines[1].split(", ")[1] == "4"  # the round in which it was noticed is complete
    stopped = make(num_chains=3, num_workers=1)
    stopped.load(tmp_path / "s.end")
    stopped.run(DATA)
    assert_all_equal(stopped, sequential)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process, worker = begun(tmp_path, 0.5)
    process.kill()
    process.communicate(timeout=60)
    for _ in range(400):
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.05)
            continue
        break
    else:
        pytest.fail("the worker is still there")
    saved = make(num_chains=3)
    saved.load(tmp_path / "s")  # with what they had come to
    assert len(saved.replicas[1]._loaded["history"]) == 4  # and they did not go on


def test_a_second_ctrl_c_ends_it_at_once(sequential):
    """What the processes had come to is lost; what was here before is not."""
    here = os.getpid()

    def action():
        for _ in range(2):
            os.kill(here, signal.SIGINT)
            time.sleep(0.4)
        time.sleep(60)

    sampler = acting(1, action)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.run(DATA)
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []
    del sampler.replicas[1].objective._collect
    sampler.run(DATA)
    assert_all_equal(sampler, sequential)


# ------------------------------------------------------------------------------------------------------------ errors


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def failing(error):
    def action():
        raise error

    return action


def test_an_error_of_a_replica_is_raised_here(sequential):
    sampler = acting(1, failing(ModelRefusedError("site 'a'")))
    with pytest.raises(ModelRefusedError) as caught:
        sampler.run(DATA)
    assert type(caught.value) is ModelRefusedError
    assert str(caught.value) == "replica 2/3: site 'a'"
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in action" in str(caught.value.__cause__)
    assert multiprocessing.active_children() == []
    assert len(sampler.replicas[1].history) == 3  # each as far as it had come
    assert len(sampler.replicas[2].history) == 0  # two at once, and then no more
    del sampler.replicas[1].objective._collect
    sampler.run(DATA)
    for chain in (0, 2):
        assert_equal_states(sampler.replicas[chain], sequential.replicas[chain])
    assert sampler.replicas[1].schedule.finished


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("no draw"), ValueError, "one: no draw"),
        (KeyError("a"), KeyError, "'a'"),
        (FileNotFoundError(2, "gone", "data"), FileNotFoundError, "[Errno 2] gone: 'data'"),
        (Unpicklable("this", "that"), RuntimeError, "one: Unpicklable: this and that"),
    ],
)
def test_errors_keep_their_type_and_text(error, kind, text):
    [outcome] = train_in_processes([Task("one", lambda *_: failing(error)(), dict)], 2, lambda: False, [print])
    assert type(outcome.error) is kind
    assert str(outcome.error) == text
    assert outcome.state == {}


def test_what_is_found_before_training_needs_no_process(monkeypatch):
    def impossible(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        pyro.factor("never", mu * 0 - math.inf)

    monkeypatch.setattr(os, "fork", failing(AssertionError("forked")))
    with pytest.raises(ValueError, match="the log density is finite, with a finite score, at none of"):
        parallel(model=impossible).run(DATA)


@pytest.mark.parametrize("how", [signal.SIGKILL, 3])
def test_a_killed_process_is_named(sequential, how, tmp_path):
    def action():
        if how == signal.SIGKILL:
            os.kill(os.getpid(), how)
        sys.exit(how)

    sampler = acting(1, action, checkpoint=tmp_path / "s", checkpoint_every=0.0)
    said = r"replica 2/3: .* exit code -9 \(SIGKILL\).* memory" if how == signal.SIGKILL else "replica 2/3: .* code 3"
    with pytest.raises(RuntimeError, match=said):
        sampler.run(DATA)
    assert multiprocessing.active_children() == []
    assert sampler.replicas[1].history == ()
    assert len(sampler.replicas[0].history) > 0  # the others' state is kept
    saved = parallel()
    saved.load(tmp_path / "s")  # and what the killed one had written is there
    assert saved.replicas[1]._loaded["history"]
    saved.run(DATA)
    assert_all_equal(saved, sequential)


def test_those_that_wait_do_not_begin_after_a_failure():
    begun = []
    tasks = [
        Task("first", lambda stop, show: 1 / 0, dict),
        Task("second", lambda stop, show: None, dict),
        Task("third", lambda stop, show: None, lambda: {"value": 3}),
    ]
    outcomes = train_in_processes(tasks, 1, lambda: False, [begun.append] * 3)
    assert isinstance(outcomes[0].error, ZeroDivisionError)
    assert outcomes[0].state == {}
    assert outcomes[1:] == [Outcome(), Outcome()]
    outcomes = train_in_processes(tasks[1:], 1, lambda: False, [begun.append] * 2)
    assert outcomes == [Outcome({}), Outcome({"value": 3})]


# ----------------------------------------------------------------------------------------- warnings and progress


def warn_all(texts):
    def work(text):
        def train(stop, show):
            for _ in range(2):
                warnings.warn(text, PyroSMWarning, stacklevel=1)

        return train

    tasks = [Task(text, work(text), dict) for text in texts]
    return train_in_processes(tasks, 2, lambda: False, [print] * len(texts))


def test_a_warning_arrives_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcomes = warn_all(["far", "far", "wide"])
    assert all(outcome.error is None for outcome in outcomes)
    assert sorted(str(w.message) for w in caught) == ["far", "wide"]
    assert all(w.category is PyroSMWarning and w.filename == __file__ for w in caught)


def test_filters_hold_in_the_processes():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        assert [o.error for o in warn_all(["far"])] == [None]
    assert caught == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(warn_all(["far"])[0].error, PyroSMWarning)


def test_a_warning_of_the_training_reaches_the_user():
    def hole(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        pyro.factor("hole", torch.where(mu > 1, mu.new_tensor(math.nan), mu))

    sampler = parallel(model=hole)
    with pytest.warns(PyroSMWarning, match="log density was NaN at") as caught:
        sampler.run(DATA)
    texts = [str(w.message) for w in caught if "NaN at" in str(w.message)]
    assert len(texts) == len(set(texts))
    assert all(c["not_a_number"] > 0 for c in counted(sampler))


def test_progress_is_told_here(capsys):
    sampler = parallel()
    for replica in sampler.replicas:
        replica.disable_progbar = False
    sampler.run(DATA)
    shown = capsys.readouterr().err
    for chain in (1, 2, 3):
        assert f"replica {chain}/3, training" in shown
    assert shown.count("640/640") >= 3
    assert "round 10" in shown
    told = []
    task = Task("one", lambda stop, show: [show(Progress(i, 5)) for i in range(3)], dict)
    train_in_processes([task], 2, lambda: False, [told.append])
    assert told == [Progress(i, 5) for i in range(3)]
    quiet = parallel()
    quiet.run(DATA)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------- how many


def test_how_many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    assert num_processes(None, 3, [DATA]) == 3
    assert num_processes(None, 9, [DATA, "text"]) == 4
    assert num_processes(7, 9, []) == 7
    assert num_processes(7, 3, []) == 3
    assert num_processes(1, 3, []) == 1
    assert num_processes(7, 1, []) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(1))
    assert num_processes(None, 3, []) == 1


@pytest.mark.parametrize(
    ("patch", "args", "match"),
    [
        ((sys, "platform", "darwin"), [], "not safe on darwin"),
        ((torch.cuda, "is_available", lambda: True), [], "CUDA"),
        ((os, "devnull", os.devnull), [torch.empty(2, device="meta")], "on meta"),
        ((multiprocessing.current_process(), "_config", {"daemon": True}), [], "daemonic"),
    ],
)
def test_obstacles(monkeypatch, patch, args, match):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    monkeypatch.setattr(*patch)
    assert num_processes(None, 3, args) == 1
    assert num_processes(1, 3, args) == 1
    assert num_processes(2, 1, args) == 1
    with pytest.raises(ValueError, match=f"expected num_workers=1 or None, found 2: .*{match}"):
        num_processes(2, 3, args)


def test_one_replica_or_one_worker_never_forks(monkeypatch):
    monkeypatch.setattr(os, "fork", failing(AssertionError("forked")))
    make(num_workers=4, budget=128).run(DATA)
    make(num_chains=2, num_workers=1, budget=128).run(DATA)
    monkeypatch.setattr("pyro_sm.training.processes.obstacle", lambda args, compiles: "no")
    make(num_chains=2, budget=128).run(DATA)
    with pytest.raises(ValueError, match="found 2: no"):
        make(num_chains=2, num_workers=2).run(DATA)


def test_none_forks_where_it_can(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2))
    monkeypatch.setattr(os, "fork", failing(AssertionError("forked")))
    with pytest.raises(AssertionError, match="forked"):
        make(num_chains=2, budget=128).run(DATA)


def test_num_workers_must_be_positive():
    with pytest.raises(ValueError, match="num_workers >= 1, found 0"):
        make(num_workers=0)
