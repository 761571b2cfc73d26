# SPDX-License-Identifier: Apache-2.0
r"""What a model can see beside its arguments: the values that a function refers to.

A function refers to its closure cells, to the defaults of its arguments, to its own attributes, and to those globals
that its code (or code within it) loads; to what the functions among them refer to, and so on. A bound method refers
to those attributes of its object that its code names, or that of methods it names; a callable object, to what its
``__call__`` does; a module of one's own, to those of its names that the code mentions. Of what is installed or built
in (Pyro, torch, …) globals are nobody's data; closure cells may be, as a decorator keeps the model in one.
"""

from __future__ import annotations

import dis
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache, lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pyro
import torch

Child = tuple[str, Any]
"""A value and what leads to it, in words."""

_INSTALLED = tuple(
    {
        *(sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(os.path.dirname(os.path.abspath(str(package.__file__))) + os.sep for package in (torch, pyro)),
    }
)
_OURS = "pyro_sm"


@cache
def is_library(module: str | None) -> bool:
    """Whether a module (by name) is installed or built in, and not the user's."""
    top = (module or "").partition(".")[0]
    if top == "__main__" or not top:
        return False
    if top in sys.stdlib_module_names or top == _OURS:
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return path is not None and os.path.abspath(path).startswith(_INSTALLED)


@lru_cache(maxsize=1024)
def _loaded(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Globals that a piece of code loads, and all names it mentions; also in the code within it."""
    names = set(code.co_names)
    loaded = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, mentioned = _loaded(constant)
            loaded |= inner
            names |= mentioned
    return frozenset(loaded), frozenset(names)


def of_function(function: FunctionType) -> Iterator[Child]:
    """What a function refers to."""
    code = function.__code__
    loaded, names = _loaded(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(value, ModuleType):
            yield from _of_module(name, value, names)
        else:
            yield f"closure variable {name!r}", value
    if is_library(function.__module__):
        return
    positional = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    for name, value in zip(reversed(positional), reversed(defaults), strict=False):
        yield f"default of {name!r}", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f"default of {name!r}", value
    for name, value in function.__dict__.items():
        yield f"attribute {name!r}", value
    for name in sorted(loaded):
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            yield from _of_module(name, value, names)
        elif value is not None:
            yield f"global {name!r}", value


def _of_module(name: str, module: ModuleType, names: frozenset[str]) -> Iterator[Child]:
    if not is_library(module.__name__):
        for attribute in sorted(names & vars(module).keys()):
            value = vars(module)[attribute]
            if not isinstance(value, ModuleType):
                yield f"'{name}.{attribute}'", value


def _own_functions(kind: type, names: frozenset[str]) -> dict[str, FunctionType]:
    """Methods and properties among ``names`` that a class of the user's defines, and those that they name."""
    found: dict[str, FunctionType] = {}
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        for base in kind.__mro__:
            value = vars(base).get(name)
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(value, FunctionType) and not is_library(base.__module__):
                found[name] = value
                waiting |= _loaded(value.__code__)[1] - found.keys()
                break
    return found


def of_class(kind: type) -> Iterator[Child]:
    """Attributes of a class of the user's that may be data."""
    for base in kind.__mro__:
        if not is_library(base.__module__):
            for name, value in vars(base).items():
                callable_or_special = callable(value) or name.startswith("__") or hasattr(value, "__get__")
                if not callable_or_special:
                    yield f"class attribute {name!r}", value


def attributes(value: Any) -> Iterator[Child]:
    """The attributes that an object holds itself."""
    for name, held in vars(value).items() if hasattr(value, "__dict__") else ():
        yield f".{name}", held
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                try:
                    yield f".{name}", getattr(value, name)
                except AttributeError:
                    continue


def of_method(function: Any, owner: Any) -> Iterator[Child]:
    """What a method refers to: its function, and those attributes of ``owner`` that it, or methods it calls, name."""
    kind = owner if isinstance(owner, type) else type(owner)
    if not isinstance(function, FunctionType) or is_library(function.__module__):
        yield "method", function
        yield "object", owner
        return
    names = _loaded(function.__code__)[1]
    functions = _own_functions(kind, names)
    yield "method", function
    for name, called in sorted(functions.items()):
        yield f"method {name!r}", called
        names |= _loaded(called.__code__)[1]
    if not isinstance(owner, type):
        yield from ((label, value) for label, value in attributes(owner) if label[1:] in names)
    yield from ((label, value) for label, value in of_class(kind) if label.split("'")[1] in names)


def calls(value: Any) -> FunctionType | None:
    """The function of the user's that calling an object runs, if there is one."""
    for name in ("forward", "__call__"):
        found = _own_functions(type(value), frozenset({name})).get(name)
        if found is not None:
            return found
    return None
