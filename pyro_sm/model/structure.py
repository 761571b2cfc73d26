# SPDX-License-Identifier: Apache-2.0
r"""What one learns about a Pyro model from running it a few times: its latents, its data, or a reason to
refuse.

:func:`inspect_model` runs the model from its prior and either describes it (:class:`Structure`) or raises
:class:`~pyro_sm.base.ModelRefusedError`, which names the site, what was found there, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from pyro_sm.base import ModelRefusedError
from pyro_sm.model.trace import (
    Recorder,
    TracedModel,
    first_line,
    is_deterministic,
    no_validation,
    nodes,
    prior_trace,
    support_transform,
)


class Site(NamedTuple):
    """One continuous latent site and its place in ``z``."""

    name: str
    shape: Size
    """Shape of a constrained value, plates included, batch of latents excluded."""
    unconstrained_shape: Size
    start: int
    stop: int
    """``z[:, start:stop]`` is this site, flattened."""
    support: constraints.Constraint
    transform: Transform
    """From unconstrained to constrained; ``biject_to(support)``, or its completion."""
    plates: tuple[tuple[str, int, int], ...]
    """``(name, dim, size)`` of the vectorised plates around the site, left to right."""

    @property
    def is_identity(self) -> bool:
        """Whether the site is unconstrained already."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return isinstance(transform, ComposeTransform) and not transform.parts


def finite(z: Tensor) -> Tensor:
    """Prior draws on the edge of their support are infinite when unconstrained: ±50 stands in for them."""
    return torch.nan_to_num(z, nan=0.0, posinf=50.0, neginf=-50.0)


@dataclass
class Structure:
    """What does not change from call to call."""

    sites: tuple[Site, ...]
    observed: dict[str, Tensor]
    log_prob_shapes: dict[str, Size]
    """Shape of the pointwise log likelihood of each observed site."""
    factors: tuple[str, ...]
    """Names of the ``pyro.factor`` statements."""
    deterministic: dict[str, Size]
    enumerated: tuple[str, ...]
    improper: tuple[str, ...]
    masked: dict[str, int]
    """How many values of a latent site a mask leaves out; they follow their prior."""
    params: tuple[str, ...]
    """Names of the trainable parameters inside the model."""
    nesting: int
    """Number of batch dimensions in use: the first free one is ``-1 - nesting``."""
    signature: tuple[tuple[str, ...], ...]
    dtype: torch.dtype
    device: torch.device

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Site values (B, *shape), and the log determinant (B,) unless every site is unconstrained."""
        size = z.shape[0]
        values: dict[str, Tensor] = {}
        log_det: Tensor | None = None
        for site, flat in zip(self.sites, z.split([site.stop - site.start for site in self.sites], 1), strict=True):
            u = flat.reshape(size, *site.unconstrained_shape)
            if site.is_identity:
                values[site.name] = u
                continue
            value = site.transform(u)
            term = site.transform.log_abs_det_jacobian(u, value).reshape(size, -1).sum(1)
            values[site.name] = value
            log_det = term if log_det is None else log_det + term
        return values, log_det

    def pack(self, values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`constrain`: (B, *site.shape) each; returns (B, D)."""
        columns = []
        for site in self.sites:
            if site.name not in values:
                raise ValueError(f"expected a value for every latent site, found none for {site.name!r}")
            value = values[site.name]
            if value.shape[1:] != site.shape:
                raise ValueError(
                    f"expected values of shape {('B', *site.shape)} for the site {site.name!r}, "
                    f"found {tuple(value.shape)}"
                )
            u = value if site.is_identity else site.transform.inv(value)
            columns.append(u.reshape(value.shape[0], -1).to(dtype))
        return torch.cat(columns, 1)

    def pack_trace(self, trace: Trace, dtype: torch.dtype) -> Tensor:
        """The latents of one recorded run, (D,); values on the edge of a support are made finite."""
        z = self.pack({site.name: nodes(trace)[site.name]["value"][None] for site in self.sites}, dtype)[0]
        return finite(z)


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return bool(getattr(fn, "has_enumerate_support", False))


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and isinstance(
        fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution
    ):
        fn = fn.base_dist
    return fn


def _plates(site: Any) -> tuple[tuple[str, int, int], ...]:
    frames = [(f.name, int(f.dim), int(f.size)) for f in site["cond_indep_stack"] if f.dim is not None]
    return tuple(sorted(frames, key=lambda frame: frame[1]))


def _signature(trace: Trace, *, latent_only: bool = False) -> tuple[tuple[str, ...], ...]:
    """One row of strings per sample site: all that has to stay the same from call to call."""
    rows = []
    for name, site in nodes(trace).items():
        kind = "observed" if site["is_observed"] else "latent"
        shape = tuple(site["value"].shape) if isinstance(site["value"], Tensor) else ()
        rows.append((name, kind, f"shape {shape}", f"plates {_plates(site)}"))
    return tuple(row for row in rows if row[1] == "latent" or not latent_only)


def check_same(reference: tuple[tuple[str, ...], ...], other: tuple[tuple[str, ...], ...], why: str) -> None:
    """Compare two signatures.

    Raises:
        ModelRefusedError: naming the first site that differs.
    """
    if reference == other:
        return
    for first, second in zip(reference, other, strict=False):
        if first[0] != second[0]:
            raise ModelRefusedError(f"site {first[0]!r} in one call is site {second[0]!r} in another: {why}")
        if first != second:
            found = [f"{a} in one call, {b} in another" for a, b in zip(first, second, strict=True) if a != b]
            raise ModelRefusedError(f"site {first[0]!r} has {'; '.join(found)}: {why}")
    longer = max(reference, other, key=len)
    extra = longer[min(len(reference), len(other))][0]
    raise ModelRefusedError(f"site {extra!r} is there in one call and not in another: {why}")


IMPUTED = "_unobserved"
"""How Pyro ends the name of a latent site that stands for the missing values of ``obs_mask=``."""
_CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
_DYNAMIC = "the structure of the model changes from call to call, which no fixed vector of latents can describe"


def _is_imputed(name: str) -> bool:
    """Whether Pyro made the site for the missing values of ``pyro.sample(..., obs_mask=)``."""
    return name.endswith(IMPUTED)


def _is_computed(site: Any) -> bool:
    """Whether an observed site is a Delta at a value made of latents, as ``poutine.reparam`` leaves one behind."""
    return isinstance(_base(site["fn"]), dist.Delta) and bool(torch.equal(_base(site["fn"]).v, site["value"]))


def _check_data(name: str, traces: list[Trace]) -> None:
    """Refuse data that are no tensor, and NaN that no mask leaves out."""
    value = nodes(traces[0])[name]["value"]
    if not isinstance(value, Tensor | Number):
        raise ModelRefusedError(
            f"the data of the observed site {name!r} are of type {type(value).__name__}, which Pyro cannot compare "
            "with tensors: pass torch.as_tensor(...)"
        )
    bad = []
    for trace in traces:
        site = nodes(trace)[name]
        mask = site["mask"] if isinstance(site["mask"], Tensor) else torch.tensor(site["mask"] is not False)
        nan = torch.as_tensor(site["value"]).isnan()
        nan = nan.reshape(*nan.shape[: nan.dim() - site["fn"].event_dim], -1).any(-1)
        try:
            bad.append(int((nan & mask.to(nan.device)).sum()))
        except RuntimeError:
            return  # a mask that does not fit is refused where the density is evaluated
    if min(bad):
        raise ModelRefusedError(
            f"the data of the observed site {name!r} have {min(bad)} NaN: leave them out with "
            "poutine.mask(mask=...), or impute them with pyro.sample(..., obs=data, obs_mask=...)"
        )


def _check_latent(name: str, site: Any) -> None:
    fn: Any = site["fn"]
    if _is_discrete(fn):
        if not getattr(fn, "has_enumerate_support", False):
            raise ModelRefusedError(
                f"the latent site {name!r} is discrete ({type(_base(fn)).__name__}) and cannot be "
                "enumerated; "
                "if it is data, pass it to the model; otherwise replace it by a continuous or a finite one"
                + ("; a missing count says nothing, so poutine.mask can leave it out" if _is_imputed(name) else "")
            )
        return
    if isinstance(_base(fn), _CIRCULAR):
        raise ModelRefusedError(
            f"the latent site {name!r} ({type(_base(fn)).__name__}) lives on a circle, but is given to Pyro as a "
            "real number: its density repeats without end and has no integral. Draw a vector (x, y) from a standard "
            "normal law, take the angle torch.atan2(y, x), and put the law of the angle into pyro.factor"
        )
    if isinstance(_base(fn), dist.Delta):
        raise ModelRefusedError(
            f"the latent site {name!r} is a Delta, which has no density; use pyro.deterministic instead"
        )
    value, expected = tuple(site["value"].shape), tuple(fn.shape())
    if value != expected:
        raise ModelRefusedError(f"the latent site {name!r} has shape {value}, its distribution {expected}")


def _check_observed(name: str, site: Any) -> Size:
    """The shape of the log likelihood of an observed site."""
    fn: Any = site["fn"]
    shape = tuple(site["value"].shape)
    try:
        with torch.no_grad(), no_validation():
            log_prob = fn.log_prob(site["value"])
    except (ValueError, RuntimeError) as error:
        raise ModelRefusedError(
            f"the observed site {name!r} has data of shape {shape} and a distribution of shape "
            f"{tuple(fn.shape())}: {first_line(error)}"
        ) from error
    batch = shape[: len(shape) - fn.event_dim]
    if log_prob.shape != fn.batch_shape and tuple(log_prob.shape) != batch:
        raise ModelRefusedError(
            f"the observed site {name!r} has data of shape {shape} and a distribution of shape "
            f"{tuple(fn.shape())}, which broadcast to {tuple(log_prob.shape)}: every value would be compared "
            "with every other; reshape the data or the parameters"
        )
    return log_prob.shape


def _make_sites(traces: list[Trace], enumerated: tuple[str, ...]) -> tuple[Site, ...]:
    sites: list[Site] = []
    start = 0
    for name, site in nodes(traces[0]).items():
        if site["is_observed"] or name in enumerated:
            continue
        fn: Any = site["fn"]
        transform = support_transform(name, fn)
        shape = transform.inv(site["value"]).shape
        probe = torch.linspace(-1, 1, max(shape.numel(), 1), dtype=site["value"].dtype, device=site["value"].device)
        probe = probe[: shape.numel()].reshape(shape)
        for other in traces[1:]:
            if not torch.equal(support_transform(name, nodes(other)[name]["fn"])(probe), transform(probe)):
                raise ModelRefusedError(
                    f"the support of the latent site {name!r} depends on other latents; draw a site with a "
                    "fixed "
                    "support (Uniform(0, 1), say) and shift and scale it with pyro.deterministic"
                )
        stop = start + shape.numel()
        sites.append(Site(name, site["value"].shape, shape, start, stop, fn.support, transform, _plates(site)))
        start = stop
    return tuple(sites)


def _latent_dtype_device(traces: list[Trace], sites: tuple[Site, ...]) -> tuple[torch.dtype, torch.device]:
    values = {site.name: nodes(traces[0])[site.name]["value"] for site in sites}
    devices = {str(value.device): name for name, value in values.items()}
    if len(devices) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ModelRefusedError(f"the latent sites are on different devices ({listed}); put them on one")
    dtype = next(iter(values.values())).dtype
    for value in values.values():
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype, next(iter(values.values())).device


def _check_runs(traces: list[Trace], first: Recorder) -> None:
    """Nothing random but the values of the sites."""
    for name, (size, full) in first.subsampled.items():
        raise ModelRefusedError(
            f"the plate {name!r} draws a random subsample ({size} of {full}) inside the model, so its "
            "density is random, and weights need the whole likelihood: leave subsample_size out. (A batch that is "
            "fixed, pyro.plate(name, full_size, subsample=indices), is taken as it is, and scaled up)"
        )
    signature = _signature(traces[0])
    for trace in traces[1:]:
        check_same(signature, _signature(trace), _DYNAMIC)


def inspect_model(
    traced: TracedModel, *, num_traces: int = 6, max_plate_nesting: int | None = None
) -> tuple[Structure, list[Trace]]:
    """Run the model ``num_traces`` times from its prior and describe it. Sets ``traced`` up for evaluation.

    Returns the structure and the traces.

    Raises:
        ModelRefusedError: for whatever the head of ``density.py`` lists.
    """
    runs = [prior_trace(traced) for _ in range(num_traces)]
    traces = [trace for trace, _ in runs]
    first = runs[0][1]
    _check_runs(traces, first)
    enumerated, factors, observed, shapes, deterministic = [], [], {}, {}, {}
    nesting = max_plate_nesting or 0
    for name, site in nodes(traces[0]).items():
        value = site["value"]
        fn: Any = site["fn"]
        if is_deterministic(site):
            deterministic[name] = value.shape
            continue
        if site["is_observed"] and not isinstance(_base(fn), dist.Unit):
            _check_data(name, traces)
        if not site["is_observed"]:
            _check_latent(name, site)
            if _is_discrete(fn):
                enumerated.append(name)
            nesting = max(nesting, len(fn.batch_shape))
        elif isinstance(_base(fn), dist.Unit):
            factors.append(name)
            nesting = max(nesting, len(fn.batch_shape))
        elif _is_computed(site):
            deterministic[name] = value.shape  # its density, mostly 0, is counted all the same
            nesting = max(nesting, len(fn.batch_shape))
        else:
            observed[name] = value if isinstance(value, Tensor) else torch.as_tensor(value)
            shapes[name] = _check_observed(name, site)
            nesting = max(nesting, len(shapes[name]))
        nesting = max([nesting, *(-dim for _, dim, _ in _plates(site))])
    sites = _make_sites(traces, tuple(enumerated))
    if not sites:
        what = f" (only discrete ones: {', '.join(enumerated)})" if enumerated else ""
        raise ModelRefusedError(f"the model has no continuous latent site{what}, so there is nothing to infer")
    dtype, device = _latent_dtype_device(traces, sites)
    traced.enumerated = frozenset(enumerated)
    traced.nesting = nesting
    traced.event_dims = {site.name: nodes(traces[0])[site.name]["fn"].event_dim for site in sites}
    structure = Structure(
        sites=sites,
        observed={name: value.detach() for name, value in observed.items()},
        log_prob_shapes=shapes,
        factors=tuple(factors),
        deterministic=deterministic,
        enumerated=tuple(enumerated),
        improper=tuple(dict.fromkeys(first.improper)),
        masked={site.name: first.left_out(site.name, site.shape) for site in sites if site.name in first.masked},
        params=tuple(first.param_values),
        nesting=nesting,
        signature=_signature(traces[0], latent_only=True),
        dtype=dtype,
        device=device,
    )
    return structure, traces
