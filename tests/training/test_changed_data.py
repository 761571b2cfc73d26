# SPDX-License-Identifier: Apache-2.0
"""A second run on data that have changed is a new training, wherever they are; on the same data it is none."""

import copy
import dataclasses

import numpy as np
import pyro
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from samplers import DATA, assert_equal, hierarchy, trained

from pyro_sm.base import ModelRefusedError


@dataclasses.dataclass
class Record:
    y: torch.Tensor


GLOBAL = [DATA + 1]


class Held(PyroModule):
    def __init__(self, y):
        super().__init__()
        self.register_buffer("y", y)
        self.shift = PyroParam(torch.zeros(()))

    def forward(self, _):
        hierarchy(self.y + self.shift.detach())


def closed_over(box):
    def model(_):
        hierarchy(box["y"])

    return model


def with_param(y):
    with torch.no_grad():
        shift = pyro.param("shift", torch.zeros(3))
    hierarchy(y + shift.detach())


def from_global(_):
    hierarchy(GLOBAL[0])


def in_closure():
    box = {"y": DATA + 1}
    return closed_over(box), None, lambda _: box.update(y=DATA)


def in_buffer():
    module = Held(DATA + 1)
    return module, None, lambda _: module.y.sub_(1)


KINDS = {
    "dict": lambda: (lambda d: hierarchy(d["y"]), {"y": DATA + 1}, lambda d: d.update(y=DATA)),
    "list": lambda: (lambda d: hierarchy(torch.tensor(d)), [0.0, 0.0, 2.0], lambda d: d.__setitem__([0, 1][0], 1.0)),
    "array": lambda: (lambda d: hierarchy(torch.tensor(d)), DATA.numpy() + 1, lambda d: d.__isub__(np.float32(1))),
    "dataclass": lambda: (lambda d: hierarchy(d.y), Record(DATA + 1), lambda d: d.y.sub_(1)),
    "closure": in_closure,
    "global": lambda: (from_global, None, lambda _: GLOBAL.__setitem__(0, DATA)),
    "buffer": in_buffer,
}


@pytest.mark.filterwarnings("ignore:the model has trainable parameters")
@pytest.mark.parametrize("kind", KINDS)
def test_changed_data_are_learned_anew(kind):
    model, data, change = KINDS[kind]()
    sampler = trained(data, model=model)
    before = sampler.log_evidence
    sampler.run(data)
    assert sampler.log_evidence == before
    change(data)
    sampler.run(data)
    assert sampler.log_evidence != before
    assert_equal(sampler, trained(data, model=model))


@pytest.mark.filterwarnings("ignore:the model has trainable parameters")
def test_changed_parameters_are_learned_anew():
    sampler = trained(model=with_param)
    history = sampler.history
    sampler.run(DATA)
    assert sampler.history is history
    pyro.param("shift").data.fill_(1.0)
    sampler.run(DATA)
    assert sampler.history is not history
    assert_equal(sampler, trained(DATA + 1))
    history = sampler.history
    pyro.param("shift").data.zero_()
    sampler.run(DATA)
    assert sampler.history is not history
    assert_equal(sampler, trained())


@pytest.mark.filterwarnings("ignore:the model has trainable parameters")
def test_changed_parameters_of_a_module_are_learned_anew():
    module = Held(DATA)
    sampler = trained(None, model=module)
    history = sampler.history
    sampler.run(None)
    assert sampler.history is history
    module.shift = torch.ones(())
    sampler.run(None)
    assert_equal(sampler, trained(DATA + 1))


def test_what_a_model_does_to_itself_is_no_other_data():
    """Counts that go up when the model is inspected, trained on and drawn from."""

    class Counting:
        calls, late = 0, ()

        def __call__(self, y):
            self.calls += 1
            if self.calls > 100:
                self.late = (*self.late, self.calls)
            hierarchy(y)

    sampler = trained(model=Counting())
    history = sampler.history
    sampler.get_samples(50)
    sampler.run(DATA)
    assert sampler.history is history


def test_a_copy_goes_on():
    data = {"y": DATA + 1}
    sampler = trained(data, model=lambda d: hierarchy(d["y"]), budget=320)
    copied = copy.deepcopy(sampler)
    history = copied.history
    copied.run(data)
    assert copied.history is history
    pyro.clear_param_store()  # which both write to
    data["y"] = DATA
    copied.run(data)
    assert_equal(copied, trained(budget=320))


def test_after_a_refused_run_everything_is_as_it_was():
    sampler = trained()
    history, samples = sampler.history, sampler.get_samples(50)
    for bad in (DATA * torch.nan, "text"):
        with pytest.raises(ModelRefusedError):
            sampler.run(bad)
    assert sampler.history is history
    assert torch.equal(sampler.get_samples(50)["t"], samples["t"])
    sampler.run(DATA)
    assert sampler.history is history
    assert_equal(sampler, trained())
