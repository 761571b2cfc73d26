# SPDX-License-Identifier: Apache-2.0
r"""A Pyro model and its data as a batched density on R^D.

For continuous latent sites ``θ_s = T_s(z_s)``, with ``T_s`` the bijection from R^n onto the site's support,

    ``log p̃(z) = log p(θ, data) + Σ_s log |det ∂T_s/∂z_s|``,

discrete latents summed out exactly. ``z`` is the concatenation of the flattened ``z_s`` in the order of the
model's trace. ``log p̃`` is in nats; its integral over R^D is the evidence of the data. A ``poutine.mask`` that is a
tensor leaves out data, but not the prior of a latent: what is masked out integrates to one.

What is refused, by the name of the site and with what to do about it
(:class:`~pyro_sm.base.ModelRefusedError`): a structure that changes from call to call; discrete latents that
cannot be enumerated; supports that depend on other latents; angles, whose density has no integral over the real
line; NaN in data that no mask leaves out; data that the model itself changes; plates that draw their own subsample;
randomness outside sample statements; no latents at all; shapes that do not fit; a log density that is finite nowhere
near the prior.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sm.base import Arguments, Evaluations, PyroSMWarning
from pyro_sm.density import without_nan
from pyro_sm.model.batching import (
    Batching,
    OneByOne,
    OuterPlate,
    Reference,
    Values,
    VMap,
    first_disagreement,
    reference_points,
)
from pyro_sm.model.compiled import CompiledScores
from pyro_sm.model.fingerprint import arguments_unchanged
from pyro_sm.model.readouts import ReadOuts
from pyro_sm.model.structure import Site, Structure, check_same, inspect_model
from pyro_sm.model.trace import TracedModel, isolated_rng
from pyro_sm.model.verification import (
    check_deterministic,
    chosen_batching,
    points_by_loop,
    score_by_loop,
    warn_of_masked,
)

__all__ = ["Batching", "ModelDensity", "OneByOne", "OuterPlate", "Site", "VMap"]

# A million bytes or two of terms of the log density stay in the cache of a core; a run of the model costs a
# millisecond, whatever the batch, and several under ``vmap``.
_TERMS_IN_CACHE = 2**18
_FEWEST_ROWS, _FEWEST_ROWS_BY_VMAP = 256, 1024


def _nothing(z: Tensor) -> Tensor:
    """Zeros (B,) that depend on ``z`` (B, D): they keep a graph alive where every row is impossible."""
    return torch.nan_to_num(0 * z.sum(1), nan=0.0)


class ModelDensity:
    """``log p̃(z)`` of a Pyro model, batched, with its score. A :class:`~pyro_sm.base.Density`.

    Args:
        model: any Pyro model: a function, a ``PyroModule``, or either wrapped in handlers.
        args: its positional arguments (the data).
        kwargs: its keyword arguments.
        batching: how to evaluate a batch. By default the fastest way that agrees with the loop in value and
            score, found by trial; a way given here is used without trial.
        chunk_size: split larger batches, for memory. By default 4096 for enumerated models and ``VMap``; on a CPU so
            few that the terms of 256 latents or more, one for each of the data, stay in its cache.
        compile: compile :meth:`log_prob_and_score` with ``torch.compile``, once per batch shape. The data are
            baked in; models with trainable parameters are not compiled.
        max_plate_nesting: lower bound on the number of batch dimensions to reserve for the model.
        dtype: of ``z``; by default that of the model's own prior draws (promoted if they are mixed).
        device: checked against the device of the model's prior draws, if given.

    Attributes:
        evaluations: latents pushed through the model by the user of this object.
        verification_evaluations: those of the constructor; not part of ``evaluations``.
        sites: continuous latent sites in trace order.
        observed: data by site name (``pyro.factor`` statements are not among them).
        deterministic: names of ``pyro.deterministic`` sites.
        improper: latent sites whose prior cannot be sampled.
        batching: the way in use.
        batching_reasons: why the faster ways were not taken.

    Raises:
        ModelRefusedError: see the head of this file.
        ValueError: the model's prior draws live on another device than ``device``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        batching: Batching | None = None,
        chunk_size: int | None = None,
        compile: bool = False,
        max_plate_nesting: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"expected a positive chunk_size, found {chunk_size}")
        self.evaluations = Evaluations()
        self.verification_evaluations = Evaluations()
        self._has_prior: bool | None = None
        self._traced = TracedModel(model, tuple(args), dict(kwargs or {}))
        with torch.inference_mode(False), isolated_rng(0):
            with arguments_unchanged(model, Arguments(self._traced.args, self._traced.kwargs)):
                structure, traces = inspect_model(self._traced, max_plate_nesting=max_plate_nesting)
            self._adopt(structure)
            self.dtype = dtype or structure.dtype
            if device is not None and torch.device(device).type != self.device.type:
                raise ValueError(f"expected the model's latents on {device}, found them on {self.device}")
            first = torch.stack([structure.pack_trace(trace, self.dtype) for trace in traces])
            drawn = partial(points_by_loop, self._traced, structure, self.dtype)
            reference = reference_points(first, drawn, self._score_reference)
            self.verification_evaluations.values += 1
            check_deterministic(self._reference_value, reference)
            self._probe = reference.z[torch.arange(3) % len(reference.z)]
            self.batching_reasons: tuple[str, ...] = ()
            self.batching: Batching = batching or self._choose(reference)
        warn_of_masked(structure, stacklevel=4)
        self._chunk_size = chunk_size
        self._compiled = CompiledScores() if compile else None
        if structure.params:
            warnings.warn(
                f"the model has trainable parameters ({', '.join(structure.params)}): losses on scores use "
                "their current values and do not train them; give them priors, or train them with an ELBO",
                PyroSMWarning,
                stacklevel=2,
            )

    def _adopt(self, structure: Structure) -> None:
        self._structure = structure
        self.sites = structure.sites
        self.dim = structure.sites[-1].stop
        self.device = structure.device
        self.observed = structure.observed
        self.deterministic = tuple(structure.deterministic)
        self.improper = structure.improper

    # ------------------------------------------------------------------------------------------ the density

    @property
    def max_plate_nesting(self) -> int:
        """Batch dimensions in use, as Pyro's kernels and losses want to know."""
        return self._structure.nesting

    @property
    def batching_method(self) -> str:
        """``"outer plate"``, ``"vmap"`` or ``"one by one"``."""
        return self.batching.name

    @property
    def chunk_size(self) -> int | None:
        """Largest number of latents pushed through the model at once; ``None`` for any."""
        if self._chunk_size is not None:
            return self._chunk_size
        bounds = [4096] if self._structure.enumerated or isinstance(self.batching, VMap) else []
        if self.device.type == "cpu":
            fewest = _FEWEST_ROWS_BY_VMAP if isinstance(self.batching, VMap) else _FEWEST_ROWS
            bounds.append(max(_TERMS_IN_CACHE // self._num_terms(), fewest))
        return min(bounds, default=None)

    def _num_terms(self) -> int:
        """About how many numbers the log density of one latent goes through; ``pyro.factor`` hides its data."""
        given = (*self._traced.args, *self._traced.kwargs.values())
        data = self.observed.values() or [value for value in given if isinstance(value, Tensor)]
        return self.dim + sum(values.numel() for values in data)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p̃`` in nats, ``-inf`` where it is not a number. ``z``: (B, D); returns (B,).

        Differentiable in ``z`` (twice, too) while grad is enabled.

        Raises:
            ValueError: ``z`` is not of shape (B, D).
        """
        z = self._checked(z)
        self.evaluations.values += z.shape[0]
        if z.shape[0] == 0:
            return z.sum(1)
        raw = torch.cat([self._raw_value(chunk, self.batching) for chunk in self._chunks(z)])
        self.evaluations.not_a_number += int(torch.isnan(raw).sum())
        return without_nan(raw)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p̃`` (B,) and its gradient (B, D), both detached; works under ``no_grad`` and inference mode.

        The score is zero where ``log p̃ = -inf``.

        Raises:
            ValueError: ``z`` is not of shape (B, D).
        """
        z = self._checked(z)
        self.evaluations.values += z.shape[0]
        self.evaluations.scores += z.shape[0]
        with torch.inference_mode(False):
            z = z.clone() if z.is_inference() else z.detach()
            if z.shape[0] == 0:
                return z.sum(1), z
            results = [self._scored(chunk) for chunk in self._chunks(z)]
            raw = torch.cat([value for value, _ in results])
            self.evaluations.not_a_number += int(torch.isnan(raw).sum())
            return without_nan(raw), torch.cat([score for _, score in results])

    def log_prob_one_by_one(self, z: Tensor) -> Tensor:
        """The reference route: every latent through its own run of the model. ``z``: (B, D); returns (B,)."""
        z = self._checked(z)
        self.evaluations.values += z.shape[0]
        return self._reference_value(z)

    def _reference_value(self, z: Tensor) -> Tensor:
        if z.shape[0] == 0:
            return z.sum(1)
        return torch.cat([self._value(row, OneByOne()) for row in z.split(1)])

    def _checked(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"expected latents of shape (B, {self.dim}), found {tuple(z.shape)}")
        return z.to(self.dtype)

    def _chunks(self, z: Tensor) -> Sequence[Tensor]:
        size = self.chunk_size
        return (z,) if size is None or z.shape[0] <= size else z.split(size)

    def _value(self, z: Tensor, batching: Batching) -> Tensor:
        if z.shape[0] == 0:
            return z.sum(1)
        return without_nan(self._raw_value(z, batching))

    def _raw_value(self, z: Tensor, batching: Batching) -> Tensor:
        values, log_det = self._structure.constrain(z)
        value = self._log_joint(batching, values, z.shape[0]).to(self.dtype)
        return value if log_det is None else value + log_det

    def _scored(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiled is not None and not self._structure.params and not isinstance(self.batching, OneByOne):
            return self._compiled(self._score_eagerly, z)
        return self._score_eagerly(z)

    def _score_eagerly(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The value, with NaN that are still to be counted, and the score."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            raw = self._raw_value(leaf, self.batching) + _nothing(leaf)
            (score,) = torch.autograd.grad(without_nan(raw).sum(), leaf)
        raw = raw.detach()
        return raw, torch.where((raw > -math.inf)[:, None], score, 0.0)  # 0 · ∞ in the chain rule is NaN

    def _log_joint(self, batching: Batching, values: Values, size: int) -> Tensor:
        """One latent with a singular matrix must not take its batch down: find it by halving."""
        try:
            return batching.log_joint(self._traced, values, size)
        except torch.linalg.LinAlgError:
            if size == 1:
                return torch.full((1,), -math.inf, dtype=self.dtype, device=self.device)
            half = size // 2
            left = {name: value[:half] for name, value in values.items()}
            right = {name: value[half:] for name, value in values.items()}
            return torch.cat([self._log_joint(batching, left, half), self._log_joint(batching, right, size - half)])

    # ------------------------------------------------------------------------------- latents and their sites

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Constrained values by site name. ``z``: (B, D); returns (B, *site.shape) each."""
        return self._structure.constrain(self._checked(z))[0]

    def pack(self, values: Values) -> Tensor:
        """The inverse of :meth:`unpack`: (B, *site.shape) each; returns (B, D).

        Raises:
            ValueError: a site is missing or has the wrong shape.
        """
        return self._structure.pack(values, self.dtype)

    # ----------------------------------------------------------------------------------- draws and read-outs

    def prior_draws(self, num_draws: int) -> Tensor:
        """Draws of the latents from the prior, unconditioned by the data. Returns (N, D).

        Sites in :attr:`improper` are drawn uniformly from (-2, 2) in unconstrained space.
        """
        return self._readouts().prior_draws(num_draws)

    @property
    def has_prior(self) -> bool:
        """Whether :meth:`log_prior` is the density of :meth:`prior_draws` for this model."""
        if self._has_prior is None:
            try:
                self._has_prior = bool(torch.isfinite(self.log_prior(self._probe)).any())
            except (NotImplementedError, ValueError):
                self._has_prior = False
        return self._has_prior

    def log_prior(self, z: Tensor) -> Tensor:
        """Log density (B,) in nats of :meth:`prior_draws` at ``z`` (B, D): no data, no factors, no scales, no masks.

        Not part of ``evaluations``: the likelihood, which costs, is not evaluated. Differentiable in ``z``.

        Raises:
            NotImplementedError: a prior is improper, or depends on a discrete latent.
        """
        return self._readouts().log_prior(self._checked(z))

    def log_prior_terms(self, z: Tensor) -> dict[str, Tensor]:
        """Log prior density of each latent site in its own space, nats: no data, no factors, no scales, no masks.

        ``z``: (B, D); returns (B, *shape) by site name, with the shape of the site less its event dimensions. Their
        sum differs from :meth:`log_prior` by the log determinant of the maps onto the sites' supports.

        Raises:
            NotImplementedError: a prior is improper, or depends on a discrete latent.
        """
        if not self.has_prior:
            self.log_prior(self._probe)  # says why
            raise NotImplementedError("the prior has no finite density where it was looked at")
        return self._readouts().log_prior_terms(self._checked(z))

    def posterior_predictive(self, z: Tensor) -> dict[str, Tensor]:
        """Fresh draws of the observed sites, and the deterministic sites, given the latents.

        ``z``: (B, D); returns (B, *shape) by site name. Discrete latents are drawn from their prior given
        ``z``.
        """
        return self._readouts().posterior_predictive(self._checked(z))

    def deterministics(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the ``pyro.deterministic`` sites. ``z``: (B, D); returns (B, *shape) by site name."""
        return self._readouts().deterministics(self._checked(z))

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Pointwise log likelihood of each observed site, masked but not scaled.

        ``z``: (B, D); returns (B, *shape) by site name, with the shape of the data less its event dimensions.

        Raises:
            NotImplementedError: the model has discrete latents, so that its data are not independent given
            ``z``.
        """
        return self._readouts().log_likelihood(self._checked(z))

    def _readouts(self) -> ReadOuts:
        return ReadOuts(self._traced, self._structure, self.batching, self._probe, self.dtype)

    # ------------------------------------------------------------------------------------------- other data

    def with_data(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> ModelDensity:
        """The same model on other data: same latents, same batching, and a shared count of evaluations.

        Raises:
            ModelRefusedError: the latent sites or their shapes are not those of this density.
        """
        other = copy.copy(self)
        other._traced = TracedModel(self._traced.model, tuple(args), dict(kwargs or {}))
        other._traced.params = self._traced.params
        with isolated_rng(0), arguments_unchanged(self._traced.model, Arguments(tuple(args), dict(kwargs or {}))):
            structure, _ = inspect_model(other._traced, num_traces=1, max_plate_nesting=self._structure.nesting)
        check_same(
            self._structure.signature,
            structure.signature,
            "the new data change the latents, so this needs a ModelDensity of its own",
        )
        other._adopt(structure)
        if self._compiled is not None:
            other._compiled = CompiledScores()
        return other

    @property
    def is_prior(self) -> bool:
        """Whether nothing is observed, and no ``pyro.factor`` says anything: the density is the prior's."""
        return not self.observed and not self._structure.factors

    def param_values(self) -> dict[str, Tensor]:
        """Copies of the values that the model's ``pyro.param`` statements have now, unconstrained, by name."""
        store = pyro.get_param_store()
        values = {name: store._params.get(name, self._traced.params.get(name)) for name in self._structure.params}
        return {name: value.detach().clone() for name, value in values.items() if value is not None}

    def counted_apart(self, evaluations: Evaluations) -> ModelDensity:
        """The same density, counting on ``evaluations`` from now on."""
        other = copy.copy(self)
        other.evaluations = evaluations
        return other

    # ---------------------------------------------------------------------------------------- construction

    def _score_reference(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Value, NaN left as it is, and score by the loop; not part of ``evaluations``."""
        self.verification_evaluations.values += z.shape[0]
        self.verification_evaluations.scores += z.shape[0]

        def raw(leaf: Tensor) -> Tensor:
            values = [self._raw_value(row, OneByOne()) for row in leaf.split(1)]
            return torch.cat(values) + _nothing(leaf)

        return score_by_loop(raw, self._structure, z)

    def _choose(self, reference: Reference) -> Batching:
        def blame(z: Tensor) -> str:
            return first_disagreement(self._traced, self._structure.constrain(z)[0], z.shape[0])

        batching, self.batching_reasons, tried = chosen_batching(self._value, reference, blame, stacklevel=4)
        self.verification_evaluations.values += tried * len(reference.z)
        self.verification_evaluations.scores += tried * len(reference.z)
        return batching
