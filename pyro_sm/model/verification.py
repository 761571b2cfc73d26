# SPDX-License-Identifier: Apache-2.0
r"""What is checked of a model before its density is believed: against the loop, one latent at a time.

* value and score of reference points are what the loop says; where the loop fails, the model is refused;
* the same point has the same density twice: a model may draw no random numbers outside its sample statements;
* a way to evaluate batches is taken if it agrees with the loop (``batching.py``), and the slow way is warned about;
* latents that a mask leaves out, so that they only follow their prior, are warned about if there are many.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sm.base import ModelRefusedError, PyroSMWarning
from pyro_sm.density import value_and_score
from pyro_sm.model.batching import Batching, OneByOne, Reference, choose_batching
from pyro_sm.model.structure import IMPUTED, Structure
from pyro_sm.model.trace import TracedModel, describe_error, isolated_rng, prior_trace

_MANY_MASKED = 10  # fewer cost next to nothing: each is one more latent, with nothing to learn about it
_SAME_TWICE = 1e-5  # relative: a hundred roundings of float32; random numbers make differences far larger


def points_by_loop(traced: TracedModel, structure: Structure, dtype: torch.dtype, num_draws: int) -> Tensor:
    """Prior draws (N, D) one by one, which is what can be relied on before anything is verified."""
    traces = [prior_trace(traced)[0] for _ in range(num_draws)]
    return torch.stack([structure.pack_trace(trace, dtype) for trace in traces])


def score_by_loop(raw_value: Callable[[Tensor], Tensor], structure: Structure, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value (N,), NaN left as it is, and score (N, D) at ``z`` (N, D).

    ``raw_value``: ``log p̃`` by the loop, differentiable.

    Raises:
        ModelRefusedError: it fails, with a hint where discrete latents are the cause.
    """
    try:
        with torch.inference_mode(False):
            return value_and_score(raw_value, z)
    except ModelRefusedError:
        raise
    except Exception as error:
        hint = ""
        if structure.enumerated and "Boolean value of Tensor" in str(error):
            names = ", ".join(map(repr, structure.enumerated))
            hint = f"; discrete latents ({names}) have all their values at once: write torch.where instead of if"
        raise ModelRefusedError(f"the log density failed {describe_error(error)}{hint}") from error


def check_deterministic(value: Callable[[Tensor], Tensor], reference: Reference) -> None:
    """Refuse a model whose density (``value``, by the loop) at the first reference point is another one now.

    Raises:
        ModelRefusedError: it is.
    """
    with torch.no_grad(), isolated_rng(1):
        again = value(reference.z[:1])
    if not torch.allclose(again, reference.value[:1], rtol=_SAME_TWICE):
        raise ModelRefusedError(
            "the log density at one and the same point changes from call to call: the model draws random "
            "numbers outside pyro.sample; make them a site or pass them in"
        )


def chosen_batching(
    value: Callable[[Tensor, Batching], Tensor], reference: Reference, blame: Callable[[Tensor], str], stacklevel: int
) -> tuple[Batching, tuple[str, ...], int]:
    """The fastest way that agrees with the loop, why faster ones do not, and how many were tried.

    Args:
        value: ``log p̃`` (B,) of latents (B, D) in a given way.
        reference: what the loop says.
        blame: names the first site at which a batch (B, D) differs from the loop.
        stacklevel: of the warning that there is only the loop, seen from here.
    """
    batching, reasons = choose_batching(value, reference, blame)
    tried = len(reasons) + (not isinstance(batching, OneByOne))
    if isinstance(batching, OneByOne):
        warnings.warn(
            "the model can only be evaluated one latent at a time, a hundred times slower or more; "
            + "; ".join(reasons),
            PyroSMWarning,
            stacklevel=stacklevel,
        )
    return batching, reasons, tried


def warn_of_masked(structure: Structure, stacklevel: int) -> None:
    """Warn of latent sites of which a mask leaves out many values; ``stacklevel``: seen from here."""
    for name, count in structure.masked.items():
        if count >= _MANY_MASKED:
            advice = (
                "give the missing values a site of their own, with as many values, and put them into the data "
                "with index_put"
                if name.endswith(IMPUTED)
                else "give the values that count a site of their own"
            )
            warnings.warn(
                f"{count} values of the latent site {name!r} are masked out: they follow their prior and say "
                f"nothing, but each makes the latent space one dimension larger; {advice}",
                PyroSMWarning,
                stacklevel=stacklevel,
            )
