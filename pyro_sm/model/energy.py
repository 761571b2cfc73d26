# SPDX-License-Identifier: Apache-2.0
r"""An unnormalised Pyro model of the data themselves: ``log p̃(x; θ)``, differentiable in ``x`` and in ``θ``.

The model has one continuous latent site, the data vector ``x`` (D,), usually with an improper prior, and says
what it thinks of it with ``pyro.factor``:

    def energy():
        pyro.module("net", net)                                            # or pyro.param, or a PyroModule
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (D,)))
        pyro.factor("f", net(x).squeeze(-1))

Its normaliser ``Z(θ)`` is never needed: ``∇_x log p̃`` does not contain it. A batch of data is evaluated in the way
:class:`~pyro_sm.model.density.ModelDensity` found to agree with a loop over its rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_sm.base import Arguments, ModelRefusedError, PyroSMWarning
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import call_model, isolated_rng, support_transform


class _Anywhere(Messenger):
    """Gives latents some value in their support, and takes nothing from the random stream for it."""

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        if msg["is_observed"] or msg["done"] or msg["value"] is not None or isinstance(fn, _Subsample):
            return
        try:
            with isolated_rng(0):
                value = fn(*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            transform = support_transform(str(msg["name"]), fn)
            value = transform(torch.zeros(transform.inverse_shape(fn.shape())))
        msg["value"], msg["done"] = value, True


class _Placed(Messenger):
    """Gives flat priors on vectors the dtype and device of ``like``, which they do not have of their own.

    They are replaced by a normal law without density, from which Pyro can draw.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        if msg["is_observed"] or not isinstance(fn, dist.ImproperUniform):
            return
        support = fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is constraints.real:
            zeros = self.like.new_zeros(fn.shape())
            msg["fn"] = dist.Normal(zeros, torch.ones_like(zeros)).to_event(fn.event_dim).mask(False)


def _is_sample(msg: Message) -> bool:
    return msg["type"] == "sample"


class ModelEnergy:
    """``log p̃(x; θ)`` of a Pyro model with ``x`` as its one latent, batched, with live parameters.

    Args:
        model: a Pyro model as described at the head of this file.
        arguments: of the model (not the data).
        like: some data (N, D), for dtype, device and D.

    Attributes:
        dim: D.
        params: names of the parameters that Pyro saw.
        density: the :class:`~pyro_sm.model.density.ModelDensity` in use.

    Raises:
        ModelRefusedError: more than one latent site, one that is not an unconstrained vector, or anything that
            :class:`~pyro_sm.model.density.ModelDensity` refuses.
        ValueError: the site and the data differ in dimension.
    """

    def __init__(self, model: Callable[..., Any], arguments: Arguments, like: Tensor) -> None:
        self.model = model
        self.arguments = arguments
        self._like = like[:1].detach()
        self.params = self._create_params()
        self.density = self._build(like)
        self.dim = self.density.dim
        self._check_site(like)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with _Placed(self._like):
            return self.model(*args, **kwargs)

    def _create_params(self) -> tuple[str, ...]:
        """Run the model once in the open, so that its parameters enter the store and ``SVI`` sees them."""
        with (
            torch.no_grad(),
            poutine.trace(param_only=True) as capture,
            poutine.block(hide_fn=_is_sample),
            _Anywhere(),
        ):
            call_model(lambda: self.arguments.call(self._run))
        return tuple(capture.trace.nodes)

    def _build(self, like: Tensor) -> ModelDensity:
        with warnings.catch_warnings():
            # it says that score losses do not train them: these do
            warnings.filterwarnings("ignore", "the model has trainable parameters", PyroSMWarning)
            with poutine.block():
                return ModelDensity(self._run, self.arguments.args, self.arguments.kwargs, dtype=like.dtype)

    def _check_site(self, like: Tensor) -> None:
        sites = self.density.sites
        if len(sites) != 1:
            raise ModelRefusedError(
                f"expected one continuous latent site, the data vector, found {len(sites)}: "
                f"{', '.join(repr(site.name) for site in sites)}; an energy model has no other latents (give those "
                "a value with pyro.param, or integrate them out)"
            )
        site = sites[0]
        if len(site.shape) != 1:
            raise ModelRefusedError(
                f"expected the latent site {site.name!r} to be a vector (D,), found shape {tuple(site.shape)}"
            )
        if not site.is_identity:
            raise ModelRefusedError(
                f"expected the latent site {site.name!r} to be unconstrained, found support {site.support}: score "
                "matching needs a density that is smooth on all of R^D; transform the data first"
            )
        if site.shape[0] != like.shape[1]:
            raise ValueError(
                f"expected data of shape (N, {site.shape[0]}) for the latent site {site.name!r}, "
                f"found {tuple(like.shape)}"
            )

    def is_of(self, model: Callable[..., Any], arguments: Arguments, x: Tensor) -> bool:
        """Whether this is the energy of ``model`` on these very arguments, for data like ``x`` (N, D)."""
        mine, theirs = self.arguments, arguments
        return (
            self.model is model
            and self.dim == x.shape[1]
            and self.density.dtype == x.dtype
            and len(mine.args) == len(theirs.args)
            and mine.kwargs.keys() == theirs.kwargs.keys()
            and all(a is b for a, b in zip(mine.args, theirs.args, strict=True))
            and all(value is theirs.kwargs[name] for name, value in mine.kwargs.items())
        )

    def refresh(self) -> None:
        """Put the parameters back into the store, if somebody cleared it."""
        store = pyro.get_param_store()
        if any(name not in store for name in self.params):
            self.params = self._create_params()

    def recheck(self, x: Tensor) -> None:
        """Compare rows of ``x`` (N, D) with a loop over them; look for another way to batch if they differ.

        An untrained network may give the same value everywhere, which says little about how it may be batched.
        """
        rows = x[:3].detach()
        with torch.no_grad(), poutine.block(), isolated_rng(0):
            together, alone = self.density.log_prob(rows), self.density.log_prob_one_by_one(rows)
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3):
            self.density = self._build(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p̃(x; θ)`` (B,) in nats for ``x`` (B, D); twice differentiable in ``x``, and in ``θ``.

        Raises:
            ValueError: the density is not finite at some row of ``x``.
        """
        value = self.density.log_prob(x)
        bad = int((~torch.isfinite(value.detach())).sum())
        if bad:
            raise ValueError(
                f"expected a finite log density at every row of the data, found {bad} of {len(x)} without: an "
                "energy model must be positive wherever (noised) data can be"
            )
        return value
