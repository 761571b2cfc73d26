# SPDX-License-Identifier: Apache-2.0
"""What an automatic guide learns from one run of its model: sites, shapes, plates; discrete sites left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors

from pyro_sm.base import Arguments, ModelRefusedError
from pyro_sm.model.trace import no_validation
from pyro_sm.model.transforms import bijection_onto


def init_to_median_or_origin(site: Any = None) -> Any:
    """Pyro's ``init_to_median``; the unconstrained origin for an improper prior, which cannot be sampled."""
    if site is None:
        return init_to_median_or_origin
    try:
        return init_to_median(site)
    except NotImplementedError:
        transform = bijection_onto(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


class Prototype(NamedTuple):
    """One run of the model.

    ``trace``: of the continuous latent sites. ``frames``: plates by name. ``stacks``: the vectorised plates of each
    site. ``shapes``: unconstrained shape of each site, in the order of the packed latent.
    """

    trace: poutine.Trace
    frames: dict[str, Any]
    stacks: dict[str, tuple[Any, ...]]
    shapes: dict[str, torch.Size]


def trace_prototype(
    model: Callable[..., Any], hide: Callable[[Any], bool], arguments: Arguments, *, whole_plates: bool
) -> Prototype:
    """As ``AutoContinuous._setup_prototype``, but sequential plates pass and discrete sites are left out.

    Args:
        model: with the guide's own initialisation of its sites.
        hide: which messages the guide does not see.
        arguments: of the model.
        whole_plates: refuse latents that are local to a subsampled plate.

    Raises:
        ModelRefusedError: such a latent, or no continuous latent at all.
    """

    def hidden(msg: Any) -> bool:
        return hide(msg) or bool(getattr(msg["fn"].support, "is_discrete", False))

    seen = poutine.block(model, hide_fn=hidden)
    with no_validation():  # only shapes count here: the likelihood may well be NaN at the starting point
        trace = arguments.call(poutine.block(poutine.trace(seen).get_trace))
    frames, shapes, stacks = {}, {}, {}
    for name, site in trace.iter_stochastic_nodes():
        stacks[name] = tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized)
        for frame in stacks[name]:
            if frame.full_size is not None and frame.size < frame.full_size and whole_plates:
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
    return Prototype(trace, frames, stacks, shapes)


def latent_names(shapes: Mapping[str, torch.Size]) -> list[str]:
    """``site`` or ``site[index]`` of every entry of the packed latent (D,), in order."""
    names = []
    for name, shape in shapes.items():
        indices = itertools.product(*(range(size) for size in shape))
        names += [f"{name}[{', '.join(map(str, index))}]" if index else name for index in indices]
    return names


def check_sites(guide_shapes: Mapping[str, torch.Size], sites: Any) -> None:
    """Whether the sites of a density are those that the guide was made for, in the order of the packed latent.

    Raises:
        ValueError: other sites, another order, or another size.
    """
    found = {site.name: torch.Size(site.unconstrained_shape) for site in sites}
    if list(found) != list(guide_shapes):
        raise ValueError(f"the guide covers the sites {list(guide_shapes)}, the model has {list(found)}")
    for name, shape in guide_shapes.items():
        if found[name].numel() != shape.numel():
            raise ValueError(
                f"site '{name}': the guide was made for unconstrained shape {tuple(shape)}, the model now has "
                f"{tuple(found[name])}"
            )
