# SPDX-License-Identifier: Apache-2.0
r"""AutoDiffusion: a diffusion sampler as an automatic guide.

The guide's posterior is the law of ``z = m + L u``, where ``u`` comes from K reverse Gaussian kernels around a
denoiser (``sampling/reverse.py``), or, where a true log density is wanted, from the probability flow of the same
denoiser (``sampling/flow.py``). Before training it is its Gaussian base ``N(m, L Lᵀ)``, exactly.

All parameters live in the param store under the guide's name, so that ``param_store.save`` and ``load`` carry them:
``network_weights`` (the whole network as one vector: one store access per call), ``base_loc``, ``base_scale_tril``,
``start_loc``, ``log_start_scale``, ``log_variance_factor`` and ``ratios``. A reverse-KL objective (``Trace_ELBO``)
trains all but the last by gradient; score matching trains the network, and refits the last four. A guide that was
moved to several modes (:meth:`AutoDiffusion.rebase`) also has an ``anchor_…``, and one that has straightened a funnel
(:meth:`AutoDiffusion.straighten`) a ``coupling_…``, which nothing trains.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakIdKeyDictionary

from pyro_sm.base import Arguments, Density, Draws, ModelRefusedError, PyroSMWarning
from pyro_sm.diffusion.anchor import Anchor, fit_anchor
from pyro_sm.diffusion.coupling import Coupling
from pyro_sm.diffusion.coupling_fit import entropy, fit_coupling, refit_coupling
from pyro_sm.diffusion.covering import Covering, default_covering, draw_with_covering
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.flow import FlowSolver
from pyro_sm.diffusion.kernels import Kernels, gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.diffusion.tails import HeavyTails
from pyro_sm.gaussians.gaussian import fits, moments_of
from pyro_sm.guides.bases import Base, PriorBase
from pyro_sm.guides.bound import BoundDiffusion
from pyro_sm.guides.posterior import DiffusionPosterior, FlowTransform
from pyro_sm.model.cache import Cache, bound_density
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import no_validation
from pyro_sm.model.transforms import bijection_onto
from pyro_sm.nn.compiled import CompiledNetwork
from pyro_sm.nn.mlp import MLP, Architecture
from pyro_sm.nn.pieces import InPieces

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_PARAMETERS = (
    "network_weights",
    "base_loc",
    "base_scale_tril",
    "start_loc",
    "log_start_scale",
    "log_variance_factor",
    "ratios",
)
# There only after a rebase to several modes, in the order of Anchor's fields.
_ANCHOR = ("anchor_log_weight", "anchor_loc", "anchor_values", "anchor_vectors")
# There only after latents were found that drive the scales of others, in the order of Coupling's fields.
_COUPLING = tuple(f"coupling_{name}" for name in Coupling._fields)
_OPTIONAL = (*_ANCHOR, *_COUPLING)
# Nats per draw that a coupling must save to take the place of one with the same drivers, and of one with others. The
# first is several times the noise of some thousand draws; the second has to be worth another beginning.
_BETTER_COUPLING, _OTHER_COUPLING = 0.1, 0.5
# Which guide a store entry belongs to: Pyro hands a second guide of the same name the first one's tensors silently.
_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def init_to_median_or_origin(site: Any = None) -> Any:
    """Pyro's ``init_to_median``; the unconstrained origin for an improper prior, which cannot be sampled."""
    if site is None:
        return init_to_median_or_origin
    try:
        return init_to_median(site)
    except NotImplementedError:
        transform = bijection_onto(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


class AutoDiffusion(AutoContinuous):
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
        num_steps: K, reverse kernels per draw; where they stand is fitted (``sampling/levels.py``).
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
        if num_steps < 2:
            raise ValueError(f"expected num_steps >= 2, found {num_steps}")
        if not network_dtype.is_floating_point:
            raise ValueError(f"expected a floating-point network_dtype, found {network_dtype}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.create_plates = create_plates
        self._pyro_name = name or type(self).__name__
        self._raw_model: tuple[Callable[..., Any]] | None = (model,)
        self.base = base or PriorBase()
        self.levels = levels or NoiseRange()
        self.num_steps = num_steps
        self.architecture = architecture or MLP()
        self.network_dtype = network_dtype
        self.compiles = compile  # nn.Module has a method of the plain name
        self.heavy = heavy
        self.context = context
        self.solver = solver or FlowSolver()
        self._cached_densities: Cache = ()
        self._skeleton: tuple[nn.Module] | None = None
        self._compiled: CompiledNetwork | None = None
        self._shapes: list[tuple[str, torch.Size]] = []
        self._dimensions: tuple[int, int] | None = None
        self._aligned = True

    # -- set-up ------------------------------------------------------------------------------------------------

    def _trace_prototype(self, args: Args, kwargs: Kwargs) -> None:
        """As ``AutoContinuous._setup_prototype``, but sequential plates pass and discrete sites are left out."""

        def hide(msg: Any) -> bool:
            return self._prototype_hide_fn(msg) or bool(getattr(msg["fn"].support, "is_discrete", False))

        model = poutine.block(self.model, hide_fn=hide)
        with no_validation():  # only shapes count here: the likelihood may well be NaN at the starting point
            prototype = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
        if self.master is not None:
            self.master()._check_prototype(prototype)
        frames, shapes, stacks = {}, {}, {}
        for name, site in prototype.iter_stochastic_nodes():
            stacks[name] = tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized)
            for frame in stacks[name]:
                if frame.full_size is not None and frame.size < frame.full_size and self.create_plates is None:
                    raise ModelRefusedError(
                        f"site '{name}' is local to the plate '{frame.name}', which is subsampled to {frame.size} "
                        f"of {frame.full_size}: AutoDiffusion would learn the subsample's latents only. Use the "
                        "full plate"
                    )
                frames[frame.name] = frame
            with helpful_support_errors(site):
                shapes[name] = bijection_onto(site["fn"].support).inv(site["value"]).shape
        if not shapes:
            raise ModelRefusedError("the model has no continuous latent site: there is nothing to infer")
        self.prototype_trace = prototype
        self._prototype_frames = frames
        self._cond_indep_stacks = stacks
        self._unconstrained_shapes = shapes
        self.latent_dim = sum(shape.numel() for shape in shapes.values())
        with poutine.block():  # NeuTraReparam asks for them, and score matching never calls the guide
            self._create_plates(*args, **kwargs)

    def _architecture(self, aligned: bool) -> Architecture:
        """By default latents have networks of their own only if whitening is ``aligned`` with them.

        A fitted correlated base mixes them, and what is left has nothing of its own.
        """
        chosen = self.architecture
        if isinstance(chosen, MLP) and chosen.latent_width is None and not aligned:
            return replace(chosen, latent_width=0)
        return chosen

    def _build(self, dim: int, context_dim: int, *, aligned: bool) -> nn.Module:
        """The network without its weights: a skeleton for ``functional_call``."""
        network = self._architecture(aligned).build(dim, 2 * dim, context_dim)
        self._skeleton, self._compiled, self._aligned = (network,), None, aligned
        self._shapes = [(name, p.shape) for name, p in network.named_parameters()]
        self._dimensions = (dim, context_dim)
        return network

    @pyro_method
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        density = None
        if not self._has_parameters():
            # Before the prototype: this is where a model that cannot be handled is refused in words.
            with poutine.block():
                density = self.density(self._model_for_density(args, kwargs), args, kwargs)
        self._trace_prototype(args, kwargs)
        try:
            self._fit_base(density, args, kwargs)
        except BaseException:  # an interrupt, too: half a set-up must not pass for one
            self.prototype_trace = None
            raise

    def _fit_base(self, density: ModelDensity | None, args: Args, kwargs: Kwargs) -> None:
        """Check the parameters that are there (no ``density``), or create them around a base fitted to it."""
        context = self._context(args, kwargs)
        context_dim = 0 if context is None else context.shape[-1]
        if density is None:
            if self._dimensions != (self.latent_dim, context_dim):
                raise ValueError(
                    f"the loaded parameters belong to a model with (latents, context) sizes {self._dimensions}; "
                    f"this model has {(self.latent_dim, context_dim)}"
                )
            return
        self._check_sites(density)
        with torch.no_grad(), poutine.block():
            loc, scale_tril = self.base.fit(density)
        self._create_parameters(loc, scale_tril, context_dim)

    def _create_parameters(self, loc: Tensor, scale_tril: Tensor, context_dim: int) -> None:
        dim = loc.shape[0]
        aligned = torch.equal(scale_tril, scale_tril.diagonal().diag())
        network = self._build(dim, context_dim, aligned=aligned)
        weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
        ratios = self.levels.levels(self.num_steps, dtype=loc.dtype, device=loc.device)
        kernels = gaussian_kernels(ratios, dim)
        self._register(
            {
                "network_weights": weights.to(loc.device, self.network_dtype),
                "base_loc": loc.clone(),
                "base_scale_tril": scale_tril.clone(),
                "start_loc": kernels.start_loc,
                "log_start_scale": kernels.start_scale.log(),
                "log_variance_factor": kernels.variance_factor.log(),
                "ratios": kernels.ratios,
            }
        )

    def _register(self, values: dict[str, Tensor]) -> None:
        """Create the Pyro parameters, adopting (after a check) what the store holds under their names."""
        store = pyro.get_param_store()
        for name, value in values.items():
            full_name = f"{self._pyro_name}.{name}"
            if full_name in store:
                held = store[full_name]
                if held.shape != value.shape:
                    raise ValueError(
                        f"the param store already holds '{full_name}' with shape {tuple(held.shape)}, this guide "
                        f"needs {tuple(value.shape)}: call pyro.clear_param_store(), or give this guide a name of "
                        "its own: AutoDiffusion(model, name=...)"
                    )
                owner = _OWNERS.get(store._params[full_name])
                if owner is not None and owner() not in (None, self):
                    warnings.warn(
                        f"the param store already holds '{full_name}' of another guide: this guide shares its "
                        "parameters. Call pyro.clear_param_store() first, or give this guide a name of its own",
                        PyroSMWarning,
                        stacklevel=2,
                    )
            setattr(self, name, PyroParam(value, constraints.real))
            _OWNERS[getattr(self, name).unconstrained()] = weakref.ref(self)

    def release(self) -> None:
        """Take this guide's parameters out of the param store, so that another guide may have the names."""
        store = pyro.get_param_store()
        for name in (*_PARAMETERS, *_OPTIONAL):
            full_name = f"{self._pyro_name}.{name}"
            mine = self._parameters.get(f"{name}_unconstrained")
            if mine is not None and full_name in store and store._params[full_name] is mine:
                del store[full_name]

    def _has_parameters(self) -> bool:
        return "network_weights" in self._pyro_params

    def _model_for_density(self, args: Args, kwargs: Kwargs) -> Callable[..., Any]:
        if self._raw_model is None:
            raise ValueError("this guide was unpickled without its model: set it with guide.attach(model)")
        model = self._raw_model[0]
        if self.master is None:
            return model
        # A part of an AutoGuideList: its blocked model draws the other parts' sites afresh in every run, so its
        # density is random. They are held at the values of the list's prototype.
        own = poutine.block(poutine.trace(poutine.block(model, self._prototype_hide_fn)).get_trace)(*args, **kwargs)
        whole = self.master().prototype_trace
        held = {name: site["value"] for name, site in whole.iter_stochastic_nodes() if name not in own.nodes}
        return poutine.condition(self.master().model, data=held)

    def attach(self, model: Callable[..., Any]) -> None:
        """Give an unpickled guide its model back (models are not pickled, as in Pyro)."""
        self._raw_model = (model,)
        self._model = (model,)

    @pyro_method
    def setup(self, model: Callable[..., Any], args: Args, kwargs: Kwargs) -> None:
        """Trace the model and create the parameters, if that has not happened yet."""
        if self._raw_model is None:
            self.attach(model)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def bind(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> BoundDiffusion:
        """The guide with the model's density on these arguments; sets the guide up, if that has not happened yet.

        Raises:
            ModelRefusedError: the model cannot be evaluated in batches, or the data change its latents.
        """
        self.setup(model, args, kwargs)
        return BoundDiffusion(self, self.density(model, args, kwargs), Arguments(args, kwargs))

    # -- the diffusion behind the guide ------------------------------------------------------------------------

    def _context(self, args: Args, kwargs: Kwargs) -> Tensor | None:
        return None if self.context is None else self.context(*args, **kwargs)

    def _network(self, weights: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The network as a function of its input alone: weights are fetched once, not once per layer and step."""
        if self._skeleton is None:
            raise ValueError("call the guide once before using its network")
        skeleton, shapes = self._skeleton[0], self._shapes

        def bound(weights: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
            pieces = weights.split([shape.numel() for _, shape in shapes])
            state = {name: p.view(shape) for (name, shape), p in zip(shapes, pieces, strict=True)}
            state |= {name: buffer.to(weights) for name, buffer in skeleton.named_buffers()}
            return lambda *given: torch.func.functional_call(skeleton, state, given)

        if self.compiles and self._compiled is None:
            rows = skeleton.rows_in_cache if isinstance(skeleton, InPieces) else None
            self._compiled = CompiledNetwork(lambda w, *given: bound(w)(*given), rows)
        compiled = self._compiled
        evaluate = bound(weights) if compiled is None else functools.partial(compiled, weights)

        def network(x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
            dtype = weights.dtype
            return evaluate(x.to(dtype), c.to(dtype), None if context is None else context.to(dtype)).to(x.dtype)

        return network

    @pyro_method
    def diffusion(self, args: Args = (), kwargs: Kwargs | None = None) -> Diffusion:
        """The sampler behind the guide, in plain torch, with the current parameters."""
        if not self._has_parameters():
            raise ValueError("call the guide (or setup) once, with the model's arguments, before using its sampler")
        self._forget_what_was_not_loaded()
        base_loc = self.base_loc
        kernels = Kernels(
            self.ratios.detach(),  # their order must hold, and gradients do not know that
            self.log_variance_factor.exp(),
            self.start_loc,
            self.log_start_scale.exp(),
        )
        network = self._network(self.network_weights)
        denoiser = Denoiser(network, self._context(args, kwargs or {}), self._anchor())
        scale_tril, coupling = self.base_scale_tril.tril(), self._coupling()
        return Diffusion(denoiser, kernels, base_loc, scale_tril, self.solver, self.heavy, coupling)

    @pyro_method
    def density(self, model: Callable[..., Any], args: Args, kwargs: Kwargs) -> ModelDensity:
        """The model's batched density on this data; verified once, then rebound while only data change."""
        density, cache = bound_density(self._cached_densities, model, args, kwargs)
        if cache is not self._cached_densities:
            if self.prototype_trace is not None:
                self._check_sites(density)
            self._cached_densities = cache
        return density

    def _check_sites(self, density: ModelDensity) -> None:
        found = {site.name: torch.Size(site.unconstrained_shape) for site in density.sites}
        if list(found) != list(self._unconstrained_shapes):  # their order is that of the packed latent
            raise ValueError(
                f"the guide covers the sites {list(self._unconstrained_shapes)}, the model has {list(found)}"
            )
        for name, shape in self._unconstrained_shapes.items():
            if found[name].numel() != shape.numel():
                raise ValueError(
                    f"site '{name}': the guide was made for unconstrained shape {tuple(shape)}, the model now has "
                    f"{tuple(found[name])}"
                )

    @pyro_method
    def refit(self, z: Tensor, args: Args = (), kwargs: Kwargs | None = None) -> None:
        """Refit levels, variance factors and start to equally weighted latents ``z`` (N, D)."""
        with torch.no_grad():
            process = self.diffusion(args, kwargs)
            kernels = process.fit(z, isotropic=self.architecture.isotropic and process.is_round())
            self.start_loc.copy_(kernels.start_loc)
            self.log_start_scale.copy_(kernels.start_scale.log())
            self.log_variance_factor.copy_(kernels.variance_factor.log())
            self.ratios.copy_(kernels.ratios)

    @pyro_method
    def rebase(self, z: Tensor, group: Tensor | None = None, args: Args = (), kwargs: Kwargs | None = None) -> bool:
        """Move the base to the moments of equally weighted latents ``z`` (N, D); False, and nothing, once trained.

        A base that is good enough for them stays. Where they show a funnel, it is straightened first
        (:meth:`straighten`). Else, with a ``group`` (N,) for each of them, the guide becomes a mixture of normal laws
        at the groups: its anchor. The network's input and output are relative to all of these: what it has learned
        would mean something else.
        """
        with torch.no_grad():
            process = self.diffusion(args, kwargs)
            level = torch.zeros(1, dtype=z.dtype, device=z.device)
            learned = self._network(self.network_weights)(z[:8], level, process.denoiser.context)
            if bool((learned != 0).any()):
                return False
            coupling = fit_coupling(z) if self._may_couple() else None
            if coupling is not None or not fits(process.to_white(z)):
                self._move_base(z, coupling)
            self._drop(_ANCHOR)
            # A funnel has as many modes as its neck has corners, and they mean nothing.
            if group is not None and coupling is None and not self.architecture.isotropic:
                anchor = fit_anchor(self.diffusion(args, kwargs).to_white(z), group)
                if anchor is not None:
                    self._register(dict(zip(_ANCHOR, anchor, strict=True)))
        return True

    @pyro_method
    def straighten(self, z: Tensor, args: Args = (), kwargs: Kwargs | None = None, *, begin: bool = True) -> bool:
        """Straighten what equally weighted latents ``z`` (N, D) show to be a funnel; whether anything was changed.

        They do where some of them drive the scales of others (:mod:`pyro_sm.diffusion.coupling`), by so much that a
        Gaussian loses half a nat a draw by it. What the network has learned is then lost: it was about other
        coordinates. A coupling that is in use follows the draws; what the network has learned is then kept, being
        nearly right.

        Args:
            z: the latents.
            args: of the model.
            kwargs: of the model.
            begin: whether to do so where no coupling is in use, or one with other drivers.
        """
        held = self._coupling()
        if not self._may_couple() or self._anchor() is not None or (held is None and not begin):
            return False
        with torch.no_grad():
            found = fit_coupling(z) if begin else None
            if held is not None:
                followed = refit_coupling(z, held)
                if found is None or not entropy(z, found) < entropy(z, followed) - _OTHER_COUPLING:
                    return self._follow(z, self.diffusion(args, kwargs), held, followed)
            if found is None:
                return False
            self._move_base(z, found)
            if self._dimensions is not None:
                network = self._build(*self._dimensions, aligned=self._aligned)
                self.network_weights.copy_(torch.cat([p.reshape(-1) for p in network.parameters()]))
        return True

    def _may_couple(self) -> bool:
        """Not where a base has to be round, nor where one guide serves many data sets: each has its own funnel."""
        return not self.architecture.isotropic and self.context is None

    def drivers(self) -> list[str]:
        """The latents, ``site`` or ``site[index]``, that the others are straightened by; none without a coupling."""
        coupling = self._coupling()
        if coupling is None:
            return []
        names = []
        for name, shape in self._unconstrained_shapes.items():
            indices = itertools.product(*(range(size) for size in shape))
            names += [f"{name}[{', '.join(map(str, index))}]" if index else name for index in indices]
        return [names[int(i)] for i in coupling.drivers().nonzero()]

    def _follow(self, z: Tensor, process: Diffusion, held: Coupling, followed: Coupling) -> bool:
        """Take the coupling that has ``followed`` the draws, if it is better; the base stays, if it fits."""
        if not entropy(z, followed) < entropy(z, held) - _BETTER_COUPLING:
            return False
        for name, value in zip(_COUPLING, followed, strict=True):
            getattr(self, name).copy_(value)
        if not fits(replace(process, coupling=followed).to_white(z)):
            self._move_base(z, followed)
        return True

    def _move_base(self, z: Tensor, coupling: Coupling | None) -> None:
        """The base to the moments of equally weighted latents ``z`` (N, D), straightened; kernels as at first."""
        self._drop(_COUPLING)
        if coupling is not None:
            self._register(dict(zip(_COUPLING, coupling, strict=True)))
            z = coupling.straighten(z)
        loc, scale_tril = moments_of(z, isotropic=self.architecture.isotropic)
        kernels = gaussian_kernels(self.ratios, len(loc))
        self.base_loc.copy_(loc)
        self.base_scale_tril.copy_(scale_tril)
        self.start_loc.copy_(kernels.start_loc)
        self.log_start_scale.copy_(kernels.start_scale.log())
        self.log_variance_factor.copy_(kernels.variance_factor.log())

    def _drop(self, names: tuple[str, ...]) -> None:
        store = pyro.get_param_store()
        for name in names:
            if name in self._pyro_params:
                if f"{self._pyro_name}.{name}" in store:
                    del store[f"{self._pyro_name}.{name}"]
                delattr(self, name)

    def _forget_what_was_not_loaded(self) -> None:
        """Drop an anchor or a coupling where a network was loaded into the store, and none of these with it.

        Pyro follows a store that was loaded parameter by parameter, and keeps what was not in the file.
        """
        store = pyro.get_param_store()._params

        def replaced(name: str) -> bool:
            held = store.get(f"{self._pyro_name}.{name}")
            return held is not None and held is not self._parameters.get(f"{name}_unconstrained")

        if replaced("network_weights"):
            for names in (_ANCHOR, _COUPLING):
                if not replaced(names[0]):
                    self._drop(names)

    def _optional(self, names: tuple[str, ...]) -> tuple[Tensor, ...] | None:
        """Parameters that are not always there."""
        if names[0] not in self._pyro_params:
            store = pyro.get_param_store()
            held = {name: f"{self._pyro_name}.{name}" for name in names}
            if not all(full_name in store for full_name in held.values()):
                return None
            self._register({name: store[full_name] for name, full_name in held.items()})  # a store that was loaded
        return tuple(getattr(self, name).detach() for name in names)

    def _anchor(self) -> Anchor | None:
        held = self._optional(_ANCHOR)
        return None if held is None else Anchor(*held)

    def _coupling(self) -> Coupling | None:
        held = self._optional(_COUPLING)
        return None if held is None else Coupling(*held)

    def draw_weighted(
        self,
        density: Density,
        num_draws: int,
        args: Args = (),
        kwargs: Kwargs | None = None,
        *,
        covering: Covering | None = None,
    ) -> Draws:
        """Independent draws with their density and log weight; ``num_draws`` density evaluations.

        The guide's own draws come first; the last tenth (or what ``covering`` says) is the prior's (or, if it is
        improper, a widened base's), so that
        the weights, and the k̂ computed from them, see what the guide has lost within its reach.
        """
        with torch.no_grad(), poutine.block():
            process = self.diffusion(args, kwargs)
            return draw_with_covering(process, density, covering or default_covering(density), num_draws)[0]

    # -- what Pyro expects of an AutoContinuous ----------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all sites; as ``AutoContinuous.forward``, with the bijections that ``ModelDensity`` uses.

        Torch's own registry has none onto positive-definite matrices or their Cholesky factors.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for site, unconstrained in self._unpack_latent(latent):
            name, event_dim = site["name"], site["fn"].event_dim
            transform = bijection_onto(site["fn"].support)
            value = transform(unconstrained)
            log_density: Tensor | float = 0.0
            if poutine.get_mask() is not False:
                pointwise = -transform.log_abs_det_jacobian(unconstrained, value)
                log_density = sum_rightmost(pointwise, pointwise.dim() - value.dim() + event_dim)
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=event_dim))
        return result

    def get_posterior(self, *args: Any, **kwargs: Any) -> DiffusionPosterior:
        """The posterior over the packed latent (D,): reparametrised draws, and their log density."""
        return DiffusionPosterior(self.diffusion(args, kwargs))

    def get_base_dist(self) -> dist.TorchDistribution:
        """``N(m_T, s_T²)/(1+r_K²)``: what the probability flow starts from (for ``NeuTraReparam``)."""
        loc, scale = self.diffusion().flow().base()
        return dist.Normal(loc, scale).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The probability flow from :meth:`get_base_dist` to latent space."""
        if self.context is not None and not args and not kwargs:
            raise NotImplementedError("a guide with a context has no transform that is free of the data")
        return FlowTransform(self.diffusion(args, kwargs))

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("AutoDiffusion is not Gaussian: use median(), quantiles() or draws")

    def _site_draws(self, num_draws: int, args: Args, kwargs: Kwargs) -> Iterable[tuple[str, Tensor]]:
        """Constrained draws by site, sample dimension first."""
        z, _ = self.diffusion(args, kwargs).draw(num_draws)
        start = 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            piece = z[:, start : start + shape.numel()].reshape(num_draws, *shape)
            yield name, bijection_onto(site["fn"].support)(piece)
            start += shape.numel()

    @torch.no_grad()
    def median(self, *args: Any, num_draws: int = 4096, **kwargs: Any) -> dict[str, Tensor]:
        """Median of guide draws in unconstrained space, as a point of each site's support; unweighted."""
        self.setup(self._raw_model[0] if self._raw_model else self.model, args, kwargs)
        z, _ = self.diffusion(args, kwargs).draw(num_draws)
        middle = z.median(0).values
        return {site["name"]: bijection_onto(site["fn"].support)(u) for site, u in self._unpack_latent(middle)}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Iterable[float], *args: Any, num_draws: int = 4096, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Elementwise quantiles of guide draws, by site, shape (len(quantiles), \\*site); unweighted."""
        self.setup(self._raw_model[0] if self._raw_model else self.model, args, kwargs)
        levels = torch.as_tensor(quantiles)
        return {name: torch.quantile(x, levels.to(x), dim=0) for name, x in self._site_draws(num_draws, args, kwargs)}

    # -- saving and copying ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch; on a guide that was never called, the parameters are created from the state's shapes.

        So are an anchor and a coupling, and what the state has not is dropped.
        """
        self._drop(_OPTIONAL)
        for name in _OPTIONAL:
            if f"{name}_unconstrained" in state_dict:
                value = state_dict[f"{name}_unconstrained"].detach().clone()
                setattr(self, name, PyroParam(value, constraints.real))
        if not self._has_parameters():
            values = {name: state_dict[f"{name}_unconstrained"] for name in _PARAMETERS}
            weights, loc = values["network_weights"], values["base_loc"]
            context_dim, aligned = self._infer_network(loc.shape[0], weights.numel())
            self._build(loc.shape[0], context_dim, aligned=aligned)
            for name, value in values.items():
                setattr(self, name, PyroParam(value.detach().clone(), constraints.real))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _infer_network(self, dim: int, num_weights: int) -> tuple[int, bool]:
        """Context size and alignment whose network has this many weights.

        The count grows by a fixed step per context entry, which networks of the latents' own are no multiple of. A
        guide without a context has a network without one: a count that would fit one is another architecture's.
        """
        expected = []
        for aligned in (True, False):
            build = self._architecture(aligned).build
            without, with_one = (sum(p.numel() for p in build(dim, 2 * dim, c).parameters()) for c in (0, 1))
            context_dim, rest = divmod(num_weights - without, max(with_one - without, 1))
            if not rest and (context_dim >= 0 if self.context is not None else context_dim == 0):
                return context_dim, aligned
            expected.append(without)
        sizes = " or ".join(map(str, sorted(set(expected))))
        raise ValueError(
            f"the state holds a network of {num_weights} weights; {self.architecture} for {dim} latents has {sizes}: "
            "construct the guide with the architecture it was trained with, and the context, if it had one"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own version clears the model of the *live* guide; here only the copy loses it.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        state = self.__dict__.copy()
        state |= {"_model": None, "_raw_model": None, "master": None, "_cached_densities": (), "_compiled": None}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoDiffusion:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._raw_model = self._model, self._raw_model
        return new
