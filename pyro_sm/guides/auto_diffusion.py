# SPDX-License-Identifier: Apache-2.0
r"""AutoDiffusion: a diffusion sampler as an automatic guide.

The guide's posterior is the law of ``z = m + L u``, where ``u`` comes from K reverse Gaussian kernels around a
denoiser (``diffusion/kernels.py``), or, where a true log density is wanted, from the probability flow of the same
denoiser (``diffusion/flow.py``). Before training it is its Gaussian base ``N(m, L Lᵀ)``, exactly.

All parameters live in the param store under the guide's name, so that ``param_store.save`` and ``load`` carry them
(``guides/parameters.py``): ``network_weights`` (the whole network as one vector, ``nn/bound.py``), ``base_loc``,
``base_scale_tril``, ``start_loc``, ``log_start_scale``, ``log_variance_factor`` and ``ratios``. A reverse-KL
objective (``Trace_ELBO``) trains all but the last by gradient; score matching trains the network, and refits the last
four. A guide that was moved to several modes also has an ``anchor_…``, and one that has non-centred a funnel a
``coupling_…``, which nothing trains. What is fitted to draws is computed by the sampler itself
(``diffusion/diffusion.py``), as a new value; the guide only takes it over (:meth:`AutoDiffusion.adapt`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.nn.module import pyro_method
from torch import Tensor

from pyro_sm.base import Arguments, Density, Draws, check_type
from pyro_sm.diffusion.anchor import Anchor
from pyro_sm.diffusion.coupling import Coupling
from pyro_sm.diffusion.covering import Covering, default_covering, draw_with_covering
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.flow import FlowSolver
from pyro_sm.diffusion.kernels import Kernels, gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.diffusion.tails import HeavyTails
from pyro_sm.guides import parameters
from pyro_sm.guides.bases import Base, PriorBase
from pyro_sm.guides.bound import BoundDiffusion
from pyro_sm.guides.latent_guide import LatentGuide
from pyro_sm.guides.prototype import check_sites, init_to_median_or_origin, latent_names
from pyro_sm.model.density import ModelDensity
from pyro_sm.nn.bound import FlatNetwork
from pyro_sm.nn.mlp import MLP, Architecture

_KERNELS = ("start_loc", "log_start_scale", "log_variance_factor", "ratios")
_PARAMETERS = ("network_weights", "base_loc", "base_scale_tril", *_KERNELS)
# There only in a guide that was moved to several modes, and where latents drive the scales of others.
_ANCHOR = ("anchor_log_weight", "anchor_loc", "anchor_values", "anchor_vectors")
_COUPLING = tuple(f"coupling_{name}" for name in Coupling._fields)
_OPTIONAL = (*_ANCHOR, *_COUPLING)
_NOTHING = Arguments()


class AutoDiffusion(LatentGuide):
    r"""A diffusion sampler over the entire unconstrained latent space, used like ``AutoNormal``.

    Usage::

        guide = AutoDiffusion(model)
        svi = SVI(model, guide, Adam({"lr": 1e-3}), ImportanceWeightedScoreMatching())
        for _ in range(1000):
            svi.step(data)
        idata = to_arviz(model, guide, data)

    Discrete latent sites are left to the objective, which sums them out.

    Args:
        model: a Pyro model.
        base: how to choose the Gaussian base; the prior's robust moments by default, which covers every mode.
        levels: range of noise-to-signal ratios in whitened space; where in it the kernels stand is fitted.
        num_steps: K, reverse kernels per draw; where they stand is fitted (``diffusion/levels.py``).
        architecture: the network, built as soon as the number of latents is known.
        network_dtype: of the network alone. Whatever the model's, float32 is good enough: kernels and weights are
            computed in the model's own dtype from what the network says, so that its rounding is part of the guide
            and not an error of its density. The probability flow's tolerances are bounded by it.
        compile: the network through ``torch.compile``: half a minute to a minute for each kind of use, after which
            training and draws take two thirds to four fifths of the time (``bench cost --compile``). It pays for long
            trainings and networks of particles.
        heavy: :class:`~pyro_sm.HeavyTails` of the kernels, for funnels given as a bare density and other
            targets whose narrow parts are not found; None for Gaussian kernels.
        context: maps the model's ``*args, **kwargs`` to a context vector (C,) that the network is given.
        solver: tolerances of the probability flow, for ``get_posterior().log_prob`` of foreign values.
        init_loc_fn: as in Pyro's guides; used for the prototype trace only.
        create_plates: as in ``AutoNormal``.
        name: prefix of the names in the param store; the class name by default.

    Raises:
        ModelRefusedError: at the first call, if the model cannot be made a batched density.
        ValueError: at the first call, if the param store holds parameters of another shape under these names.

    Source: "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
    https://arxiv.org/abs/2505.19431 .
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        base: Base | None = None,
        levels: NoiseRange | None = None,
        num_steps: int = 48,
        architecture: Architecture | None = None,
        network_dtype: torch.dtype = torch.float32,
        compile: bool = False,
        heavy: HeavyTails | None = None,
        context: Callable[..., Tensor] | None = None,
        solver: FlowSolver | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median_or_origin,
        create_plates: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        check_type("model", model, callable(model), "callable: a Pyro model")
        fits = base is None or (hasattr(base, "fit") and not isinstance(base, type))
        check_type("base", base, fits, "an object such as PriorBase(), LaplaceBase() or GivenBase(loc, scale)")
        if num_steps < 2:
            raise ValueError(f"expected num_steps >= 2, found {num_steps}")
        if not network_dtype.is_floating_point:
            raise ValueError(f"expected a floating-point network_dtype, found {network_dtype}")
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates, name=name)
        self.base = base or PriorBase()
        self.levels = levels or NoiseRange()
        self.num_steps = num_steps
        self.architecture = architecture or MLP()
        self.network_dtype = network_dtype
        self.compiles = compile  # nn.Module has a method of the plain name
        self.heavy = heavy
        self.context = context
        self.solver = solver or FlowSolver()
        self._network: FlatNetwork | None = None
        # Latents, entries of the context, and whether the base is diagonal: what the network was built for.
        self.register_buffer("network_sizes", None)

    # -- set-up ------------------------------------------------------------------------------------------------

    def _build(self, dim: int, context_dim: int, *, aligned: bool) -> FlatNetwork:
        """A network that begins anew. By default latents have networks of their own only if whitening is ``aligned``.

        A fitted correlated base mixes them, and what is left has nothing of its own.
        """
        chosen = self.architecture
        if isinstance(chosen, MLP) and chosen.latent_width is None and not aligned:
            chosen = replace(chosen, latent_width=0)
        network = FlatNetwork(chosen, dim, context_dim, compiles=self.compiles)
        self._network = network
        self.network_sizes = torch.tensor([dim, context_dim, int(aligned)])
        return network

    @pyro_method
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        arguments, density = Arguments(args, kwargs), None
        if not parameters.has(self, "network_weights"):
            # Before the prototype: this is where a model that cannot be handled is refused in words.
            with poutine.block():
                density = self._density(self._model_for_density(arguments), arguments)
        self._trace_prototype(arguments)
        try:
            self._fit_base(density, arguments)
        except BaseException:  # an interrupt, too: half a set-up must not pass for one
            self.prototype_trace = None
            raise

    def _fit_base(self, density: ModelDensity | None, arguments: Arguments) -> None:
        """Check the parameters that are there (no ``density``), or create them around a base fitted to it."""
        context = self._context(arguments)
        sizes = (self.latent_dim, 0 if context is None else context.shape[-1])
        if density is None:
            held = None if self._network is None else (self._network.dim, self._network.context_dim)
            if held != sizes:
                raise ValueError(
                    f"the loaded parameters belong to a model with (latents, context) sizes {held}; this model has "
                    f"{sizes}"
                )
            return
        check_sites(self._unconstrained_shapes, density.sites)
        with torch.no_grad(), poutine.block():
            loc, scale_tril = self.base.fit(density)
        self._create_parameters(loc, scale_tril, sizes[1])

    def _create_parameters(self, loc: Tensor, scale_tril: Tensor, context_dim: int) -> None:
        aligned = torch.equal(scale_tril, scale_tril.diagonal().diag())
        network = self._build(len(loc), context_dim, aligned=aligned)
        kernels = gaussian_kernels(self.levels.levels(self.num_steps, dtype=loc.dtype, device=loc.device), len(loc))
        values = (loc.clone(), scale_tril.clone(), *_stored(kernels))
        weights = network.first_weights().to(loc.device, self.network_dtype)
        parameters.register(self, dict(zip(_PARAMETERS, (weights, *values), strict=True)))

    def renamed(self, name: str) -> AutoDiffusion:
        """A copy with parameters of its own, under another name in the param store."""
        copied = copy.deepcopy(self)
        copied._pyro_name = name
        return copied

    def release(self) -> None:
        """Take this guide's parameters out of the param store, so that another guide may have the names."""
        parameters.release(self, (*_PARAMETERS, *_OPTIONAL))

    # -- the diffusion behind the guide ------------------------------------------------------------------------

    @pyro_method
    def bind(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> BoundDiffusion:
        """The guide with the model's density on these arguments; sets the guide up, if that has not happened yet.

        The density is verified once, then kept while model and data stay the same, and rebound while only data
        change.

        Raises:
            ModelRefusedError: the model cannot be evaluated in batches, or the data change its latents.
            ValueError: the guide was made for other sites, or the param store holds others under its names.
        """
        if self._raw_model is None:
            self.attach(model)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        arguments = Arguments(args, kwargs)
        return BoundDiffusion(self, self._density(model, arguments), arguments)

    def _context(self, arguments: Arguments) -> Tensor | None:
        return None if self.context is None else arguments.call(self.context)

    @pyro_method
    def diffusion(self, arguments: Arguments = _NOTHING) -> Diffusion:
        """The sampler behind the guide, in plain torch, with the current parameters.

        Args:
            arguments: of the model, for the context; a guide without one needs none.

        Raises:
            ValueError: the guide was never set up.
        """
        if self._network is None or not parameters.has(self, "network_weights"):
            raise ValueError("call the guide (or bind) once, with the model's arguments, before using its sampler")
        self._forget_what_was_not_loaded()
        kernels = Kernels(
            self.ratios.detach(),  # their order must hold, and gradients do not know that
            self.log_variance_factor.exp(),
            self.start_loc,
            self.log_start_scale.exp(),
        )
        anchor, coupling = parameters.optional(self, _ANCHOR), parameters.optional(self, _COUPLING)
        return Diffusion(
            Denoiser(
                self._network.at(self.network_weights),
                self._context(arguments),
                None if anchor is None else Anchor(*anchor),
            ),
            kernels,
            self.base_loc,
            self.base_scale_tril.tril(),
            self.solver,
            self.heavy,
            None if coupling is None else Coupling(*coupling),
            isotropic=self.architecture.isotropic,
        )

    @pyro_method
    def adapt(self, process: Diffusion, arguments: Arguments = _NOTHING) -> None:
        """Take over a sampler that was fitted to draws: base, kernels, anchor and coupling; a new network if it says
        so.

        What is as it was is not written: a logarithm and its exponential are not each other's inverse to the last
        bit.
        """
        with torch.no_grad():
            now = self.diffusion(arguments)
            if not all(torch.equal(new, old) for new, old in zip(process.kernels, now.kernels, strict=True)):
                for name, value in zip(_KERNELS, _stored(process.kernels), strict=True):
                    getattr(self, name).copy_(value)
            if not torch.equal(process.base_loc, now.base_loc):
                self.base_loc.copy_(process.base_loc)
            if not torch.equal(process.base_scale_tril, now.base_scale_tril):
                self.base_scale_tril.copy_(process.base_scale_tril)
            parameters.write(self, _COUPLING, process.coupling, now.coupling)
            parameters.write(self, _ANCHOR, process.denoiser.anchor, now.denoiser.anchor)
            if process.begins_anew and self._network is not None:
                dim, context_dim, aligned = self.network_sizes.tolist()
                network = self._build(dim, context_dim, aligned=bool(aligned))
                self.network_weights.copy_(network.first_weights())

    def _forget_what_was_not_loaded(self) -> None:
        """Drop an anchor or a coupling where a network was loaded into the store, and none of these with it."""
        if parameters.replaced(self, "network_weights"):
            for names in (_ANCHOR, _COUPLING):
                if not parameters.replaced(self, names[0]):
                    parameters.drop(self, names)

    def drivers(self) -> list[str]:
        """The latents, ``site`` or ``site[index]``, that drive the scales of others; none without a coupling."""
        held = parameters.optional(self, _COUPLING)
        if held is None:
            return []
        names = latent_names(self._unconstrained_shapes)
        return [names[int(i)] for i in Coupling(*held).drivers().nonzero()]

    def draw_weighted(
        self,
        density: Density,
        num_draws: int,
        arguments: Arguments = _NOTHING,
        *,
        covering: Covering | None = None,
    ) -> Draws:
        """Independent draws with their density and log weight; ``num_draws`` density evaluations.

        The guide's own draws come first; the last tenth (or what ``covering`` says) is the prior's (or, if it is
        improper, a widened base's), so that the weights, and the k̂ computed from them, see what the guide has lost
        within its reach.
        """
        with torch.no_grad(), poutine.block():
            process = self.diffusion(arguments)
            return draw_with_covering(process, density, covering or default_covering(density), num_draws)[0]

    # -- saving ------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch; on a guide that was never called, the parameters are created from the state's shapes.

        So are an anchor and a coupling, and what the state has not is dropped.

        Raises:
            ValueError: the state's network is of another architecture.
        """
        parameters.drop(self, _OPTIONAL)
        for name in _OPTIONAL:
            if f"{name}_unconstrained" in state_dict:
                parameters.create(self, name, state_dict[f"{name}_unconstrained"].detach().clone())
        if not parameters.has(self, "network_weights"):
            values = {name: state_dict[f"{name}_unconstrained"] for name in _PARAMETERS}
            dim, context_dim, aligned = state_dict["network_sizes"].tolist()
            network, held = self._build(dim, context_dim, aligned=bool(aligned)), values["network_weights"].numel()
            if network.num_weights != held or (context_dim > 0) != (self.context is not None):
                raise ValueError(
                    f"the state holds a network of {held} weights, for {dim} latents and a context of {context_dim} "
                    f"entries; {self.architecture} for them has {network.num_weights}: construct the guide with the "
                    "architecture it was trained with, and the context, if it had one"
                )
            for name, value in values.items():
                parameters.create(self, name, value.detach().clone())
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _stored(kernels: Kernels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernels as the guide keeps them, in the order of ``_KERNELS``."""
    return kernels.start_loc, kernels.start_scale.log(), kernels.variance_factor.log(), kernels.ratios
