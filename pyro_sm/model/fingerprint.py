# SPDX-License-Identifier: Apache-2.0
r"""What a model is called with and what it refers to, by value: to see whether data are other data now.

A fingerprint is a record for every path from the model and its arguments to a value: dictionaries, lists, sets,
dataclasses, objects with attributes, tensors, arrays (what has ``__array__``, too), modules with their buffers and
parameters, ``functools.partial``, and what functions refer to (``reachable.py``). Values, not objects, are recorded:
equal data are the same data. Tensors are read only if they may have changed (``contents.py``); all else costs some
3 µs a path.

*What is not seen*: inside of objects without attributes (generators, files, compiled extensions) and of those that
belong to Python itself or to inference (optimisers, guides, this package's own): they are the same as long as they
are the same object. Beyond 10⁵ paths nothing is looked at, which is warned of.

*What a model changes itself*, such as a counter, is no other data. What changes while it is run is left out of
comparisons, unless it is a tensor, an array or numbers in an argument: then its density is another one at each call.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_sm.base import Arguments, ModelRefusedError, PyroSMWarning
from pyro_sm.model import reachable
from pyro_sm.model.contents import Record, SeenTensor, array_record, buffer_record, look_at, tensor_record
from pyro_sm.model.reachable import Child

Path = tuple[str, ...]
"""What leads to a value, in words; the first is "argument" or "model"."""

_MOST_PATHS = 100_000  # some .3 s; data of so many objects are slower than that in the model
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type(...), slice, range, np.generic, enum.Enum,
          torch.dtype, torch.device, BuiltinFunctionType, ModuleType)  # fmt: skip
_PLAIN = {"types", "collections", "argparse"}  # of Python's own classes, those that are there to hold anything
_INFERENCE = ("pyro.infer", "pyro.optim", "pyro.params", "torch.optim", "pyro_sm")
_OF_A_MODULE = frozenset(vars(nn.Module()))
_DATA = {"tensor", "array", "numbers"}


def _is_inference(kind: type) -> bool:
    return kind.__module__.startswith(_INFERENCE)


def _is_opaque(kind: type) -> bool:
    top = kind.__module__.partition(".")[0]
    return _is_inference(kind) or (top in sys.stdlib_module_names and top not in _PLAIN)


def _atom(value: Any) -> Record:
    if isinstance(value, float):
        return (type(value), value.hex())  # NaN is no other NaN
    if isinstance(value, np.generic):
        return (type(value), value.tobytes())
    if isinstance(value, slice):
        return (slice, str(value))
    return (type(value), value)


def _sequence(values: Any) -> tuple[Record, Iterable[Child]]:
    kinds = set(map(type, values))
    if kinds <= {float}:
        return ("numbers", type(values), len(values), array.array("d", values).tobytes()), ()
    if kinds <= {int, float, bool}:
        return ("numbers", type(values), len(values), (tuple(values), frozenset(kinds))), ()
    if all(issubclass(kind, _ATOMS) and kind not in (slice, float) for kind in kinds):
        return ("sequence", type(values), len(values), tuple(values)), ()
    return ("sequence", type(values), len(values)), ((f"[{i}]", value) for i, value in enumerate(values))


def _mapping(values: Mapping[Any, Any]) -> tuple[Record, Iterable[Child]]:
    keys = [key if isinstance(key, str | int) else repr(key) for key in values]
    return ("mapping", type(values), frozenset(keys)), (
        (f"[{key!r}]", value) for key, value in zip(keys, values.values(), strict=True)
    )


def _module(module: nn.Module, *, trainable: bool) -> tuple[Record, Iterable[Child]]:
    held: list[Child] = [(f"buffer {name!r}", value) for name, value in module._buffers.items()]
    for name, value in module._parameters.items():
        if value is not None and (trainable or not value.requires_grad):
            held.append((f"parameter {name!r}", value))
    held += [(f".{name}", value) for name, value in module._modules.items()]
    held += [
        (f".{name}", value)
        for name, value in vars(module).items()
        if name not in _OF_A_MODULE and not name.startswith("_pyro")
    ]
    return ("module", type(module), module.training), itertools.chain(held, _what_it_calls(module))


def _what_it_calls(value: Any) -> Iterator[Child]:
    function = reachable.calls(value)
    if function is not None:
        yield from reachable.of_method(function, value)


def _object(value: Any) -> tuple[Record, Iterable[Child]]:
    """Anything else."""
    kind = type(value)
    if callable(value) and hasattr(value, "__wrapped__") and kind.__module__ == "functools":
        return ("wrapper", kind), [("function", value.__wrapped__)]
    if _is_opaque(kind):
        return _opaque(value), ()
    if hasattr(kind, "__array__"):
        return ("array-like", kind), [("values", np.asarray(value))]
    held = list(reachable.attributes(value))
    if not held and (dataclasses.is_dataclass(value) or hasattr(value, "__dict__")):
        return ("object", kind), itertools.chain(reachable.of_class(kind), _what_it_calls(value))
    if not held:
        return _opaque(value), ()
    return ("object", kind), itertools.chain(held, reachable.of_class(kind), _what_it_calls(value))


def _opaque(value: Any) -> Record:
    kind = type(value)
    if kind.__hash__ not in (None, object.__hash__) and kind.__eq__ is not object.__eq__:
        return ("value", kind, value)  # what has a hash of its own does not change
    return ("identity", kind, id(value))


def _look(value: Any, *, trainable: bool) -> tuple[Record, Iterable[Child]]:
    """The record of anything but a tensor, and what is within it."""
    if isinstance(value, _ATOMS):
        return _atom(value), ()
    if isinstance(value, FunctionType):
        # Functions are told apart by their code: one that is defined anew is no other one for that.
        return ("function", value.__code__), reachable.of_function(value)
    if isinstance(value, MethodType):
        return ("method", value.__func__.__qualname__), reachable.of_method(value.__func__, value.__self__)
    if isinstance(value, partial):
        given = [("function", value.func), *((f"given {i + 1}", a) for i, a in enumerate(value.args))]
        return ("partial",), [*given, *((f"given {name!r}", a) for name, a in value.keywords.items())]
    if isinstance(value, nn.Module) and not _is_inference(type(value)):
        return _module(value, trainable=trainable)
    if isinstance(value, np.ndarray):
        return (array_record(value), ()) if value.dtype != object else _sequence(value.reshape(-1).tolist())
    if isinstance(value, bytearray | memoryview | array.array):
        return buffer_record(value), ()
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, list | tuple | collections.deque):
        return _sequence(value)
    if isinstance(value, Set):
        return ("set", type(value), frozenset(v if isinstance(v, _ATOMS) else id(v) for v in value)), ()
    if isinstance(value, type):
        found = () if reachable.is_library(value.__module__) else reachable.of_class(value)
        return ("class", value.__module__, value.__qualname__), found
    return _object(value)


class Fingerprint:
    """Records by path, and what the tensors among them were when they were read.

    Copies of it are itself: it never changes, and what it refers to is compared by value.

    Args:
        records: what is compared.
        seen: tensors by ``id``; holding them keeps an ``id`` from being given away.
        held: other objects that are compared by identity.
    """

    def __init__(self, records: Mapping[Path, Record], seen: Mapping[int, SeenTensor], held: tuple[Any, ...]) -> None:
        self.records = records
        self.seen = seen
        self._held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Fingerprint:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"records": {}, "seen": {}, "_held": ()}  # models are not pickled: nothing is known of them

    def differing(self, other: Fingerprint) -> list[Path]:
        """Paths whose records are not the same, or are in one of the two only."""
        mine, theirs = self.records, other.records
        return [path for path in {**mine, **theirs} if not _equal(mine.get(path), theirs.get(path))]

    def same_but(self, other: Fingerprint, ignored: frozenset[Path]) -> bool:
        """Whether both are of the same data, but for what is at or below the paths ``ignored``."""
        return not any(
            all(path[:length] not in ignored for length in range(len(path) + 1)) for path in self.differing(other)
        )


def _equal(mine: Record | None, theirs: Record | None) -> bool:
    try:
        return bool(mine == theirs)
    except Exception:  # an __eq__ of the user's that gives no truth value
        return False


def _innermost(model: Callable[..., Any]) -> Callable[..., Any]:
    """What Pyro's handlers around a model call in the end: it knows the names of its arguments."""
    while isinstance(model, partial) and len(model.args) >= 2 and str(model.func.__module__).startswith("pyro."):
        model = model.args[1]
    return model.forward if isinstance(model, nn.Module) else model


def _named(model: Callable[..., Any], arguments: Arguments) -> list[tuple[Path, Any]]:
    """The arguments with the names that the model has for them."""
    given: Mapping[str, Any]
    try:
        given = inspect.signature(_innermost(model)).bind(*arguments.args, **arguments.kwargs).arguments
    except (TypeError, ValueError):  # not to be called like this, or without a signature
        given = {**{str(i + 1): value for i, value in enumerate(arguments.args)}, **arguments.kwargs}
    return [(("argument", name), value) for name, value in given.items()]


def fingerprint(
    model: Callable[..., Any],
    arguments: Arguments,
    before: Fingerprint | None = None,
    *,
    trainable: bool = False,
) -> Fingerprint:
    """What ``model`` is called with and what it refers to, now.

    Args:
        model: a Pyro model.
        arguments: to call it with.
        before: an earlier fingerprint, so that tensors which did not change since need not be read.
        trainable: whether trainable parameters that the model refers to are looked at; those that are arguments are.
    """
    known = {} if before is None else before.seen
    seen: dict[int, SeenTensor] = {}
    records: dict[Path, Record] = {}
    held: dict[int, tuple[Path, Any]] = {}  # an object that is held keeps its id
    kept: list[Any] = []
    waiting = [*_named(model, arguments), (("model",), model)][::-1]
    while waiting:
        path, value = waiting.pop()
        everything = trainable or path[0] == "argument"
        if isinstance(value, nn.Parameter) and value.requires_grad and not everything:
            continue
        if len(records) >= _MOST_PATHS:
            _warn_of_many()
            break
        if isinstance(value, Tensor):
            records[path] = _of_tensor(value, known, seen)
            kept.append(value)
            continue
        if not isinstance(value, _ATOMS):
            first, _ = held.setdefault(id(value), (path, value))
            if first != path:
                records[path] = ("again", first)
            if first != path or path in records:
                continue
        records[path], children = _look(value, trainable=everything)
        if records[path][0] in ("identity", "set"):
            kept.append(value)
        waiting += [((*path, label), child) for label, child in children]
    return Fingerprint(records, seen, tuple(kept))


def _warn_of_many() -> None:
    warnings.warn(
        f"the model refers to more than {_MOST_PATHS} values; whether data change is seen in the first of them only: "
        "pass them as tensors or arrays",
        PyroSMWarning,
        stacklevel=6,
    )


def _of_tensor(tensor: Tensor, known: Mapping[int, SeenTensor], seen: dict[int, SeenTensor]) -> Record:
    if id(tensor) not in seen:
        try:
            seen[id(tensor)] = look_at(tensor, known)
        except (RuntimeError, NotImplementedError):  # sparse, or without memory: by what torch counts
            return ("identity", type(tensor), id(tensor), 0 if tensor.is_inference() else tensor._version)
    return tensor_record(seen[id(tensor)])


def changed_by_running(before: Fingerprint, after: Fingerprint) -> frozenset[Path]:
    """Paths that a model changes itself."""
    return frozenset(before.differing(after))


@contextmanager
def arguments_unchanged(model: Callable[..., Any], arguments: Arguments) -> Iterator[None]:
    """Refuse a model that changes data among its arguments while it is run in this context.

    Raises:
        ModelRefusedError: a tensor, an array or numbers in an argument are others than before.
    """
    before = fingerprint(model, arguments)
    try:
        yield
    except ModelRefusedError as error:
        _refuse_changed(before, fingerprint(model, arguments, before), error)
        raise
    _refuse_changed(before, fingerprint(model, arguments, before), None)


def _refuse_changed(before: Fingerprint, after: Fingerprint, cause: Exception | None) -> None:
    for path in before.differing(after):
        mine, now = before.records.get(path), after.records.get(path)
        data = mine is not None and now is not None and mine[0] == now[0] and mine[0] in _DATA
        resized = data and mine is not None and now is not None and mine[0] == "numbers" and mine[2] != now[2]
        of_module = any(label.startswith(("buffer", "parameter")) for label in path)
        if path[0] == "argument" and data and not resized and not of_module:
            raise ModelRefusedError(
                f"the model changes its argument {path[1]!r}{_within(path)} in place, so that its density is another "
                "one at each call; work on a copy (y = y - y.mean() instead of y -= y.mean()), and pass data that "
                "are not changed yet"
            ) from cause


def _within(path: Path) -> str:
    return f" (at {''.join(path[2:])})" if len(path) > 2 else ""
