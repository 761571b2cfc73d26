# SPDX-License-Identifier: Apache-2.0
"""Data are other data wherever they are kept; what a model changes itself is none; and no model changes its data."""

import array
import collections
import copy
import dataclasses
import enum
import functools
import sys
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_sm.base import Arguments, ModelRefusedError, PyroSMWarning
from pyro_sm.model import fingerprint as module
from pyro_sm.model.cache import bound_density
from pyro_sm.model.contents import look_at
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.fingerprint import fingerprint


def model(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.factor("data", mu * 0)


def same(before, after, model=model):
    """Whether the fingerprint of ``model``, called with a value now, is the one from before."""
    return fingerprint(model, Arguments((after,)), before).same_but(before, frozenset())


def seen(value, change, model=model):
    """Whether ``change(value)`` is seen, and that nothing is seen before."""
    before = fingerprint(model, Arguments((value,)))
    assert same(before, value, model)
    change(value)
    return not same(before, value, model)


@dataclasses.dataclass
class Record:
    y: object
    z: object = None


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


class Framed:
    """Like a data frame: nothing but an array to be had."""

    __slots__ = ("_values",)

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        return self._values


Named = collections.namedtuple("Named", "y z")


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("y", torch.zeros(3))
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.inner = nn.Linear(2, 1)
        self.extra = [np.zeros(2)]

    def forward(self, y):
        return model(y)


def assign(**values):
    return lambda value: [setattr(value, name, new) for name, new in values.items()]


CHANGES = {
    "tensor in place": (torch.zeros(3), lambda y: y.add_(1)),
    "one entry of many": (torch.zeros(2**20), lambda y: y.__setitem__(12345, 1.0)),
    "behind the counter": (torch.zeros(2**20), lambda y: y.data.__setitem__(77, 1.0)),
    "another order, without a count": (torch.arange(7.0), lambda y: y.data.copy_(y.data.flip(0))),
    "not contiguous": (torch.zeros(6, 5).T[::2], lambda y: y.add_(1)),
    "booleans": (torch.zeros(3, dtype=torch.bool), lambda y: y.logical_not_()),
    "complex": (torch.zeros(3, dtype=torch.complex64), lambda y: y.add_(1j)),
    "half": (torch.zeros(3, dtype=torch.bfloat16), lambda y: y.add_(1)),
    "memory of NumPy": (torch.from_numpy(np.arange(8.0)), lambda y: y.numpy().__iadd__(1)),
    "NumPy's, exchanged": (torch.from_numpy(np.arange(4.0)), lambda y: y.numpy().__setitem__(slice(2), [1, 0])),
    "array": (np.zeros(3), lambda y: y.__iadd__(1)),
    "array in another order": (np.arange(3), lambda y: np.copyto(y, y[::-1].copy())),
    "array of objects": (np.array([1, "a"], dtype=object), lambda y: y.__setitem__(0, 2)),
    "masked entries": (np.ma.array([1.0, 2.0], mask=[0, 0]), lambda y: y.__setitem__(0, 3.0)),
    "list": ([1.0, 2.0], lambda y: y.__setitem__(0, 3.0)),
    "list of integers": ([1, 2], lambda y: y.__setitem__(0, 3)),
    "longer list": ([1.0], lambda y: y.append(1.0)),
    "lists in a list": ([[1.0], [2.0]], lambda y: y[1].__setitem__(0, 3.0)),
    "tensors in a list": ([torch.zeros(2)], lambda y: y[0].add_(1)),
    "another tensor in a list": ([torch.zeros(2)], lambda y: y.__setitem__(0, torch.ones(2))),
    "deque": (collections.deque([1.0]), lambda y: y.append(2.0)),
    "set": ({1, 2}, lambda y: y.add(3)),
    "dict": ({"y": torch.zeros(2)}, lambda y: y.update(y=torch.ones(2))),
    "tensor in a dict in a dict": ({1: {"y": torch.zeros(2)}}, lambda y: y[1]["y"].add_(1)),
    "a key more": ({"y": 1.0}, lambda y: y.update(z=1.0)),
    "default dict": (collections.defaultdict(list, a=[1]), lambda y: y["b"].append(1)),
    "array in a tuple": ((np.zeros(2), 1), lambda y: y[0].__iadd__(1)),
    "named tuple": (Named([1.0], None), lambda y: y.y.append(2.0)),
    "dataclass": (Record(torch.zeros(2)), assign(y=torch.ones(2))),
    "tensor in a dataclass": (Record(torch.zeros(2)), lambda d: d.y.add_(1)),
    "namespace": (types.SimpleNamespace(y=1.0), assign(y=2.0)),
    "slots": (Slotted(1.0), assign(y=2.0)),
    "what NumPy makes of it": (Framed(np.zeros(3)), lambda y: y._values.__iadd__(1)),
    "bytes": (bytearray(b"ab"), lambda y: y.__setitem__(0, 1)),
    "array of the library": (array.array("d", [1.0]), lambda y: y.__setitem__(0, 2.0)),
    "buffer": (Standardised(), lambda m: m.y.add_(1)),
    "another buffer": (Standardised(), assign(y=torch.ones(3))),
    "fixed parameter": (Standardised(), lambda m: m.fixed.add_(1)),
    "parameter, as an argument": (Standardised(), lambda m: m.inner.weight.data.add_(1)),
    "attribute of a module": (Standardised(), lambda m: m.extra[0].__iadd__(1)),
    "mode of a module": (Standardised(), lambda m: m.eval()),
    "partial": (functools.partial(model, [1.0]), lambda p: p.args[0].append(2.0)),
    "distribution": (dist.Normal(torch.zeros(2), 1.0), lambda d: d.loc.add_(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    value, change = CHANGES[name]
    assert seen(value, change)


def test_the_counter_spares_reading(monkeypatch):
    """Of a tensor that only torch knows; what NumPy may change is read each time."""
    read = []
    checksum = module.look_at.__globals__["_checksum"]
    monkeypatch.setitem(module.look_at.__globals__, "_checksum", lambda y: read.append(1) or checksum(y))
    own, shared = torch.zeros(8), torch.from_numpy(np.zeros(8))
    arguments = Arguments((own, shared))
    first = fingerprint(lambda x, y: None, arguments)
    assert len(read) == 2
    fingerprint(lambda x, y: None, arguments, first)
    assert len(read) == 3
    own += 1
    fingerprint(lambda x, y: None, arguments, first)
    assert len(read) == 5


def test_reading_leaves_no_trace_on_the_tensor():
    y = torch.zeros(3)
    fingerprint(model, Arguments((y,)))
    assert y.untyped_storage().resizable()
    assert y._version == 0


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0), np.zeros((0, 2)), [], {}, float("nan"), [float("nan"), 1], torch.full((2,), torch.nan),
        np.float32(1), np.array(2.0), torch.tensor(1.0), "text", None, slice(1, 2), torch.float32, Record(1, [2]),
        enum.Enum("Kind", "a b").a, object(), iter([1]), sys.stdout, torch.Generator(), dist.Beta(1.0, 2.0), model,
        Record,
        torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), {(1, 2): 3, None: 4}, {object()},
        functools.lru_cache(model),
    ],
)  # fmt: skip
def test_what_stays_is_the_same(value):
    before = fingerprint(model, Arguments((value,)))
    assert same(before, value)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (np.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ([1.0], (1.0,)),
        ([1, 2], [1.0, 2.0]),
        (1, True),
        (object(), object()),
        (0.0, -0.0),
        (Record(1.0), Record(2.0)),
    ],
)
def test_other_values_are_other_data(value, other):
    assert not same(fingerprint(model, Arguments((value,))), other)


def test_equal_copies_are_the_same_data():
    value = {"y": torch.zeros(3), "x": [np.ones(2), Record((1.0, "a"))], "z": Standardised()}
    assert same(fingerprint(model, Arguments((value,))), copy.deepcopy(value))


def test_cycles_end():
    value = Record([1.0])
    value.z = {"itself": value}
    assert seen(value, lambda d: d.z["itself"].y.append(2.0))


def test_beyond_so_many_values_there_is_a_warning(monkeypatch):
    monkeypatch.setattr(module, "_MOST_PATHS", 20)
    with pytest.warns(PyroSMWarning, match="more than 20 values"):
        fingerprint(model, Arguments(([torch.zeros(1) for _ in range(30)],)))


# ----------------------------------------------------------------------------------------- what a model refers to

GLOBAL = {"y": [1.0]}
NUMBER = 1.0


def helper():
    return GLOBAL


def with_global(data):
    return GLOBAL


def with_helper(data):
    return [helper() for _ in range(1)]


def with_number(data):
    return NUMBER


def with_default(data, y=[1.0], *, z=[2.0]):  # noqa: B006
    return y, z


def names_what_it_does_not_load(data):
    return data.GLOBAL


def unrelated(data):
    return data


class Model:
    shared = [1.0]  # noqa: RUF012

    def __init__(self):
        self.y, self.losses = [1.0], []

    @property
    def data(self):
        return self.y

    def likelihood(self):
        return self.data, self.shared

    def method(self, data):
        return self.likelihood()

    def __call__(self, data):
        return self.method(data)


class Decorated:
    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def closed_over(y):
    def inner(data):
        return lambda: y

    return inner


def other_cell():
    y = 1.0

    def change():
        nonlocal y
        y = 2.0

    def inner(data):
        return y

    return inner, change


def test_globals_are_seen_where_they_are_loaded():
    for function, expected in (
        (with_global, True),
        (with_helper, True),
        (Decorated(with_global), True),
        (functools.partial(with_helper), True),
        (poutine.scale(with_global, 2.0), True),
        (functools.lru_cache(with_global), True),
        (names_what_it_does_not_load, False),
        (unrelated, False),
    ):
        assert seen(0, lambda _: GLOBAL["y"].append(1.0), function) == expected, function


def test_a_global_that_is_assigned_anew(monkeypatch):
    assert seen(0, lambda _: monkeypatch.setitem(globals(), "NUMBER", 2.0), with_number)


def test_names_of_a_module_of_ones_own(monkeypatch):
    settings = types.ModuleType("settings_of_a_test")
    settings.y, settings.other = [1.0], [1.0]
    monkeypatch.setitem(globals(), "settings", settings)

    def function(data):
        return settings.y

    assert seen(0, lambda _: settings.y.append(1.0), function)
    assert not seen(0, lambda _: settings.other.append(1.0), function)


def test_closures_and_defaults():
    y = [1.0]
    assert seen(0, lambda _: y.append(1.0), closed_over(y))
    inner, change = other_cell()
    assert seen(0, lambda _: change(), inner)
    assert seen(0, lambda _: with_default.__defaults__[0].append(1.0), with_default)
    assert seen(0, lambda _: with_default.__kwdefaults__["z"].append(1.0), with_default)
    assert seen(0, lambda _: setattr(unrelated, "y", 1.0), unrelated)


def test_handlers_of_pyro_hold_data():
    data = {"mu": torch.zeros(())}
    assert seen(0, lambda _: data["mu"].add_(1), poutine.condition(model, data=data))


def test_a_method_has_the_attributes_that_it_names():
    """Losses that the same object keeps are nobody's data."""
    held = Model()
    assert seen(0, lambda _: held.y.append(1.0), held.method)
    assert seen(0, lambda _: Model.shared.append(1.0), held.method)
    assert not seen(0, lambda _: held.losses.append(1.0), held.method)
    assert seen(0, lambda _: held.y.append(1.0), held)


def test_parameters_are_data_only_if_asked_for():
    net = Standardised()
    net.register_parameter("scale", nn.Parameter(torch.ones(2)))
    for trainable in (False, True):
        before = fingerprint(net, Arguments((0,)), trainable=trainable)
        with torch.no_grad():
            net.inner.weight += 1
        after = fingerprint(net, Arguments((0,)), before, trainable=trainable)
        assert after.same_but(before, frozenset()) != trainable


# ------------------------------------------------------------------------------------------------------ densities


def normal(get):
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        y = torch.as_tensor(get(data), dtype=mu.dtype)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model


def log_prob(density):
    return float(density.log_prob(torch.zeros(1, 1)))


def test_a_density_is_kept_and_bound_anew():
    model, data = normal(lambda d: d["y"]), {"y": [1.0, 2.0]}
    first, cache = bound_density((), model, Arguments((data,)))
    before = log_prob(first)
    again, kept = bound_density(cache, model, Arguments(({"y": [1.0, 2.0]},)))
    assert again is first
    assert kept is cache
    data["y"][0] = 5.0
    changed, cache = bound_density(cache, model, Arguments((data,)))
    assert changed is not first
    assert log_prob(changed) == pytest.approx(before - 12, abs=1e-5)
    # the first one's own dictionary has changed: it is no density of what it was bound to
    back, cache = bound_density(cache, model, Arguments(({"y": [1.0, 2.0]},)))
    assert back is not first
    assert log_prob(back) == before


def test_what_a_model_counts_is_no_other_data():
    calls, state = [], {"calls": 0}

    def model(data, log):
        calls.append(1)
        log.append(0.5)
        state["calls"] += 1
        state[len(calls)] = torch.zeros(2)
        pyro.factor("f", pyro.sample("mu", dist.Normal(0.0, 1.0)) * data["y"])

    arguments = Arguments(({"y": torch.ones(())}, []))
    first, cache = bound_density((), model, arguments)
    first.log_prob(torch.zeros(3, 1))
    assert bound_density(cache, model, arguments)[0] is first
    arguments.args[0]["y"] = torch.zeros(())
    assert bound_density(cache, model, arguments)[0] is not first


def test_copies_and_pickles_of_a_fingerprint():
    first = fingerprint(model, Arguments((torch.zeros(2), object())))
    assert copy.deepcopy({"a": first})["a"] is first
    assert not first.__class__.__new__(first.__class__).__dict__
    assert first.__getstate__()["records"] == {}


def test_a_sparse_tensor_cannot_be_read():
    with pytest.raises(RuntimeError, match="expected a dense tensor"):
        look_at(torch.zeros(2).to_sparse(), {})


# ------------------------------------------------------------------------------------------- arguments that change


def centred_array(y):
    y -= y.mean()
    return torch.as_tensor(y)


def centred_list(y):
    y[0] -= 1.0
    return y


def centred_dict(d):
    d["y"] = d["y"] - d["y"].mean()
    return d["y"]


def centred_record(d):
    d.y.sub_(d.y.mean())
    return d.y


def logged(y):
    return y.log_().neg_()


def enriched(d):
    d["centred"] = d["y"] - d["y"].mean()
    return d["centred"]


Y = (1.0, 2.0, 4.0)
CHANGING = {
    "tensor": (centred_array, lambda: torch.tensor(Y), "'data' in place"),
    "array": (centred_array, lambda: np.array(Y), "'data' in place"),
    "list": (centred_list, lambda: list(Y), "'data' in place"),
    "dict": (centred_dict, lambda: {"y": torch.tensor(Y)}, r"'data' \(at \['y'\]\)"),
    "dict of arrays": (centred_dict, lambda: {"y": np.array(Y)}, r"'data' \(at \['y'\]\)"),
    "tensor in a tuple": (lambda d: centred_array(d[0]), lambda: (torch.tensor(Y), 1), r"'data' \(at \[0\]\)"),
    "dataclass": (centred_record, lambda: Record(torch.tensor(Y)), r"'data' \(at \.y\)"),
    "so that it fails at the second call": (logged, lambda: torch.tensor(Y), "'data' in place"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_model_that_changes_its_arguments_is_refused(name):
    get, make, words = CHANGING[name]
    with pytest.raises(ModelRefusedError, match=f"changes its argument {words}"):
        ModelDensity(normal(get), (make(),))
    with pytest.raises(ModelRefusedError, match=f"changes its argument {words}"):
        ModelDensity(poutine.scale(normal(get), 1.0), kwargs={"data": make()})


def test_other_data_that_a_model_changes_are_refused():
    model = normal(lambda y: y.sub_(1) if len(y) == 2 else y)
    density = ModelDensity(model, (torch.tensor(Y),))
    with pytest.raises(ModelRefusedError, match="changes its argument 'data'"):
        density.with_data((torch.ones(2),))


def test_what_a_model_adds_to_a_dictionary_does_no_harm():
    density = ModelDensity(normal(enriched), ({"y": torch.tensor(Y)},))
    assert log_prob(density) == log_prob(ModelDensity(normal(lambda y: y - y.mean()), (torch.tensor(Y),)))


def test_running_statistics_are_no_argument_that_changes():
    norm = nn.BatchNorm1d(1)
    density = ModelDensity(normal(lambda d: d[0](d[1][:, None])[:, 0].detach()), ((norm, torch.tensor(Y)),))
    assert density.dim == 1
