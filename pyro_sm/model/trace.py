# SPDX-License-Identifier: Apache-2.0
r"""Running a Pyro model without being noticed.

A run is sealed off from whatever Pyro is doing around it (plates, masks, traces, enumeration, validation):
the :class:`Recorder` is the last handler that sees the model's sample statements. Only ``pyro.param``
statements of parameters that live in the param store pass outwards, so that ``SVI`` sees them; parameters
that do not live there yet are served from a private copy and never enter it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _ENUM_ALLOCATOR, Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Size, Tensor
from torch.distributions.transforms import Transform

from pyro_sm.base import ModelRefusedError
from pyro_sm.model.enumeration import EnumerateSites, FunctionalEnumMessenger, enumerated_log_joint
from pyro_sm.model.transforms import bijection_onto

BATCH_PLATE = "_pyro_sm_batch"
_PRIOR_TRIES = 100  # draws of a prior before its support is taken to be missed always, and not by bad luck


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed every generator a model may use, and put them all back afterwards."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002 (models use it)
    cuda_state = torch.cuda.get_rng_state_all() if cuda else []
    try:
        pyro.set_rng_seed(seed)
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
        if cuda:
            torch.cuda.set_rng_state_all(cuda_state)


@contextmanager
def no_validation() -> Iterator[None]:
    """No argument checks, in Pyro or torch: a value outside of a support is ``-inf``, not an error."""
    validate = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validate)


@contextmanager
def _sealed() -> Iterator[None]:
    """Empty plate and enumeration allocators, no validation, and a param store that stays as it is."""
    dims, enum = _DIM_ALLOCATOR._stack, dict(_ENUM_ALLOCATOR.__dict__)
    store = pyro.get_param_store()
    known = set(store.keys())
    _DIM_ALLOCATOR._stack = []
    try:
        with no_validation():
            yield
    finally:
        _DIM_ALLOCATOR._stack = dims
        _ENUM_ALLOCATOR.__dict__.clear()
        _ENUM_ALLOCATOR.__dict__.update(enum)
        for name in [name for name in store.keys() if name not in known]:  # noqa: SIM118 (not a dict)
            # a PyroModule writes to the store directly; ``del store[name]`` needs the tensor still alive
            store._param_to_name.pop(store._params.pop(name), None)
            store._constraints.pop(name, None)


def support_transform(name: str, fn: Any) -> Transform:
    """The bijection from R^n onto the support of ``fn``; refuses the site ``name`` if there is none."""
    try:
        return bijection_onto(fn.support)
    except NotImplementedError:
        raise ModelRefusedError(
            f"the latent site {name!r} ({type(fn).__name__}) has a support that cannot be mapped onto R^n; "
            "rewrite it with a distribution whose support Pyro can transform (a direction on a sphere: "
            f"poutine.reparam(model, {{{name!r}: ProjectedNormalReparam()}}))"
        ) from None


def _as_data(fn: Any, value: Any) -> Any:
    """Observed numbers as tensors, and booleans as numbers where Pyro would subtract them."""
    if isinstance(value, bool | int | float):
        value = torch.as_tensor(value)
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    coin = isinstance(fn, torch.distributions.Bernoulli | torch.distributions.Binomial)
    if coin and isinstance(value, Tensor) and value.dtype == torch.bool:
        return value.to(torch.get_default_dtype())
    return value


class Recorder(Messenger):
    """Serves values to the model's sites, records the sites, and lets none of them be seen further out.

    Args:
        values: values of latent sites. Sites not among them are drawn, if ``draw``, else an unknown latent is
            an error (enumerated sites have their value by the time it comes here).
        redraw: names of observed sites to be drawn afresh instead.
        params: private parameters, filled on first use.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        params: dict[str, Tensor],
        *,
        draw: bool = False,
        redraw: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.values = values
        self.params = params
        self.draw = draw
        self.redraw = redraw
        self.trace = Trace()
        self.last = ""
        self.improper: list[str] = []
        self.masked: dict[str, Tensor] = {}
        self.subsampled: dict[str, tuple[int, int]] = {}
        self.param_values: dict[str, Tensor] = {}
        self.known_params = frozenset(pyro.get_param_store().keys())

    def left_out(self, name: str, shape: Size) -> int:
        """How many values of the latent site ``name``, of this shape, a mask leaves out."""
        mask = self.masked[name]
        return int((~mask).sum()) * (shape.numel() // max(mask.numel(), 1))

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "param":
            self._serve_param(msg)
            return
        msg["stop"] = True
        if msg["type"] != "sample":
            return
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            if msg["value"] is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
                self.subsampled[str(msg["name"])] = (fn.subsample_size, fn.size)
            return
        self.last = str(msg["name"])
        if self.last in self.redraw:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        if not msg["is_observed"] and isinstance(msg["mask"], Tensor):
            # What a mask leaves out of model and guide alike integrates to one: it follows its prior. (Without it
            # the density would be flat in the latents that nothing depends on, and have no integral.)
            self.masked[self.last] = msg["mask"]
            msg["mask"] = None
        if msg["is_observed"]:
            msg["value"] = _as_data(msg["fn"], msg["value"])
        if msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        value = self.values.get(self.last)
        if value is None:
            value = self._draw(msg)
        msg["value"], msg["done"] = value, True

    def _draw(self, msg: Message) -> Tensor:
        if not self.draw:
            raise ModelRefusedError(
                f"the latent site {msg['name']!r} was not there when the model was inspected: its structure "
                "changes from call to call, which no fixed vector of latents can describe"
            )
        fn: Any = msg["fn"]
        try:
            return fn(*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            transform = support_transform(self.last, fn)
            shape = transform.inverse_shape(fn.shape())
            self.improper.append(self.last)
            return transform(torch.empty(shape).uniform_(-2, 2))

    def _serve_param(self, msg: Message) -> None:
        name = str(msg["name"])
        if name in self.known_params:
            return
        msg["stop"] = True
        if name in pyro.get_param_store() or msg["value"] is not None or len(msg["args"]) < 2:
            return  # written by a PyroModule a moment ago, or without an initial value: Pyro's business
        initial = msg["args"][1]
        if isinstance(initial, torch.nn.Parameter):
            msg["value"] = initial  # live
        else:
            if name not in self.params:
                initial = initial() if callable(initial) else initial
                self.params[name] = initial.detach().clone()
                self.params[name]._pyro_unconstrained_param = self.params[name]  # type: ignore[attr-defined]
            msg["value"] = self.params[name]
        msg["done"] = True

    def _postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "param" and isinstance(msg["value"], Tensor):
            fixed = isinstance(msg["value"], torch.nn.Parameter) and not msg["value"].requires_grad
            if not fixed:
                self.param_values[str(msg["name"])] = msg["value"]
        elif msg["type"] == "sample" and not isinstance(msg["fn"], _Subsample):
            infer = msg["infer"] or {}
            if not infer.get("_do_not_trace"):
                self.trace.add_node(str(msg["name"]), **msg.copy())


class TracedModel:
    """A model with its data, run under a :class:`Recorder`."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.params: dict[str, Tensor] = {}
        self.enumerated: frozenset[str] = frozenset()
        self.nesting = 0
        self.event_dims: dict[str, int] = {}

    def run(self, recorder: Recorder, size: int | None = None) -> Trace:
        """Run the model once; with ``size``, inside a plate left of all its own batch dimensions."""
        with ExitStack() as stack:
            stack.enter_context(_sealed())
            stack.enter_context(recorder)
            if self.enumerated and not recorder.draw:
                first = -1 - self.nesting - (size is not None)
                stack.enter_context(FunctionalEnumMessenger(first_available_dim=first))
                stack.enter_context(EnumerateSites(self.enumerated))
            if size is not None:
                stack.enter_context(pyro.plate(BATCH_PLATE, size, dim=-1 - self.nesting))
            try:
                self.model(*self.args, **self.kwargs)
            except Exception as error:
                if not hasattr(error, "pyro_sm_site"):
                    error.pyro_sm_site = recorder.last  # type: ignore[attr-defined]
                raise
        return recorder.trace

    def condition(self, values: Mapping[str, Tensor], size: int | None = None) -> Trace:
        """Trace with the latents given, deterministic sites left out (they carry no density)."""
        trace = self.run(Recorder(values, self.params), size)
        for name in [name for name, site in trace.nodes.items() if is_deterministic(site)]:
            trace.remove_node(name)
        for site in nodes(trace).values():
            if site["is_observed"] and isinstance(site["mask"], Tensor) and isinstance(site["value"], Tensor):
                site["value"] = without_placeholders(site["value"], site["mask"], site["fn"].event_dim)
        return trace

    def log_joint(self, values: Mapping[str, Tensor], size: int | None = None) -> Tensor:
        """``log p`` of latents and data, without the Jacobian. () or, inside a plate, (size,)."""
        trace = self.condition(values, size)
        with no_validation():
            if self.enumerated:
                return enumerated_log_joint(trace, BATCH_PLATE if size is not None else None)
            return self._sum(trace, next(iter(values.values())), size)

    def _sum(self, trace: Trace, like: Tensor, size: int | None) -> Tensor:
        total: Tensor | None = None
        for name, site in trace.nodes.items():
            term = site_log_prob(name, site)
            if term.device != like.device:
                term = term.to(like.device)  # ImproperUniform answers on the CPU
            if size is None:
                term = term.sum()
            else:
                if term.dim() != self.nesting + 1 or term.shape[0] != size:
                    expected = (size, *("…",) * self.nesting)
                    raise ValueError(f"site {name!r}: log density {tuple(term.shape)} instead of {expected}")
                term = term.reshape(size, -1).sum(-1)
            total = term if total is None else total + term
        return like.new_zeros(() if size is None else size) if total is None else total


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_error(error: Exception) -> str:
    """One line: what was raised and at which site of the model."""
    site = getattr(error, "pyro_sm_site", "")
    where = f"at or after site {site!r}: " if site else ""
    lines = str(error).strip().splitlines()[:2]
    return f"{where}{type(error).__name__}: {' '.join(line.strip() for line in lines)}"[:300]


def nodes(trace: Trace) -> dict[str, Any]:
    """The recorded sites; untyped, because Pyro's own types leave most fields optional."""
    return trace.nodes


def is_deterministic(site: Message) -> bool:
    """Whether the site is a ``pyro.deterministic`` statement."""
    return bool((site["infer"] or {}).get("_deterministic"))


def site_log_prob(name: str, site: Message, *, scaled: bool = True) -> Tensor:
    """Log density of one recorded site, masked, and scaled unless told not to."""
    fn: Any = site["fn"]
    try:
        value = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.linalg.LinAlgError):
            raise
        raise ValueError(f"site {name!r}: {first_line(error)}") from error
    return scale_and_mask(value, site["scale"] if scaled else 1.0, site["mask"])


def without_placeholders(value: Tensor, mask: Tensor, event_dim: int) -> Tensor:
    """Data with the NaN of masked-out events replaced by the first event that is not masked out.

    ``value``: (*batch, *event); ``mask``: broadcasts to batch. The density is masked there, but its gradient would be
    0 · NaN. The replacement is an event of the same site, so it is in the support.
    """
    batch, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
    aligned = zip(reversed(mask.shape), reversed(batch), strict=False)
    fits = mask.dim() <= len(batch) and all(m in (1, b) for m, b in aligned)
    if not value.is_floating_point() or value.numel() == 0 or not fits:
        return value
    kept = mask.expand(batch).reshape(-1)
    rows = value.reshape(len(kept), -1)
    placeholder = ~kept & rows.isnan().any(-1)
    filled = torch.where(placeholder[:, None], rows[kept.to(torch.uint8).argmax()], rows)
    return filled.reshape(batch + event)


def call_model(run: Callable[[], Trace]) -> Trace:
    """Run, turning whatever the user's code raises into one readable refusal.

    Raises:
        ModelRefusedError: the model raised, or lacks an argument.
    """
    try:
        return run()
    except ModelRefusedError:
        raise
    except TypeError as error:
        if re.search(r"\(\) (missing|takes|got) |argument", str(error)):
            raise ModelRefusedError(f"the model could not be called: {first_line(error)}") from None
        raise ModelRefusedError(f"the model failed {describe_error(error)}") from error
    except ZeroDivisionError as error:
        if "size cannot be zero" not in str(error):
            raise ModelRefusedError(f"the model failed {describe_error(error)}") from error
        site = getattr(error, "pyro_sm_site", "")
        raise ModelRefusedError(
            f"a plate of the model{f' after site {site!r}' if site else ''} has the size 0: do the data have no rows?"
        ) from error
    except Exception as error:
        raise ModelRefusedError(f"the model failed {describe_error(error)}") from error


def prior_trace(traced: TracedModel, size: int | None = None) -> tuple[Trace, Recorder]:
    """One ancestral draw from the prior; improper sites are uniform in (-2, 2) before the transform."""
    for remaining in reversed(range(_PRIOR_TRIES)):
        recorder = Recorder({}, traced.params, draw=True)
        try:
            with torch.no_grad():
                return call_model(partial(traced.run, recorder, size)), recorder
        except ModelRefusedError as error:
            # a draw with a singular matrix is one the model gives no density to
            if not isinstance(error.__cause__, torch.linalg.LinAlgError) or not remaining or size is not None:
                raise
    raise AssertionError("unreachable")
