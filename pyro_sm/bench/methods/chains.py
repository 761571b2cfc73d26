# SPDX-License-Identifier: Apache-2.0
"""Pyro's ``NUTS``, a chain at a time, each within what it may spend.

A gradient is counted for every leapfrog step, those of warm-up and of the search for a step size included. A chain
that has spent its share ends in the middle of a trajectory, whose draw is lost; what it has by then counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_uniform, init_to_value
from torch import Tensor

from pyro_sm.base import Evaluations
from pyro_sm.bench.methods import start
from pyro_sm.bench.methods.fit import Budget, Cost, Fit, Meter, begin
from pyro_sm.bench.methods.svi import MAX_PLATES, init_to_origin
from pyro_sm.bench.problem import Problem, by_site
from pyro_sm.targets import Target

NUM_CHAINS = 4  # Stan's default, as its 1000 draws are
_WARMUP, _KEPT = 500, 1000  # steps of a chain; of warm-up half as many as Stan's, in favour of NUTS by CPU time
_FEWEST_WARMUP = 10  # steps, in which a step size at least is found


class _IsSpentError(Exception):
    """Thrown out of a chain when its share is gone."""


class Steps(NamedTuple):
    """Steps of a chain, of ``warmup`` and of ``kept`` draws."""

    warmup: int
    kept: int


class Chain(NamedTuple):
    """What a chain leaves.

    ``draws``: unconstrained, by latent site (n, ...); empty if its share ended within the warm-up. ``samples``: the
    same, constrained; None if it was cut off. ``calls``: gradients.
    """

    draws: dict[str, Tensor]
    samples: dict[str, Tensor] | None
    calls: int


def run_chain(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    steps: Steps,
    *,
    is_spent: Callable[[int], bool] | None = None,
    init_strategy: Callable[..., Any] = init_to_uniform,
    max_plate_nesting: int | None = None,
    bar: bool = False,
) -> Chain:
    """One chain of NUTS.

    Args:
        model: of ``args``.
        args: its data.
        steps: how many.
        is_spent: of the gradients so far, before each; whether the chain has spent its share. None for no limit.
        init_strategy: where it begins.
        max_plate_nesting: of the model; None for Pyro to find out.
        bar: whether to show its progress.
    """
    calls = 0
    kept: list[dict[str, Tensor]] = []

    def counted(*data: Any) -> None:
        nonlocal calls
        if is_spent is not None and is_spent(calls):
            raise _IsSpentError
        calls += 1
        model(*data)

    def keep(kernel: Any, params: dict[str, Tensor], stage: str, step: int) -> None:
        if stage.startswith("Sample"):
            kept.append({name: value.detach().clone() for name, value in params.items()})

    mcmc = MCMC(
        NUTS(counted, max_plate_nesting=max_plate_nesting, init_strategy=init_strategy),
        num_samples=steps.kept,
        warmup_steps=steps.warmup,
        hook_fn=keep,
        disable_progbar=not bar,
    )
    samples = None
    with contextlib.suppress(_IsSpentError):
        mcmc.run(*args)
        samples = mcmc.get_samples()
    draws = {name: torch.stack([one[name] for one in kept]) for name in kept[0]} if kept else {}
    return Chain(draws, samples, calls)


# ---------------------------------------------------------------------------------------------------- on problems


def fit_by_chains(problem: Problem, seed: int, bar: bool = False) -> Fit:
    """NUTS as a Pyro user runs it: four chains, one after the other, 500 steps of warm-up and 1000 draws each."""
    chains = []
    for chain in range(NUM_CHAINS):
        begin(NUM_CHAINS * seed + chain)
        chains.append(run_chain(problem.model, problem.args, Steps(_WARMUP, _KEPT), bar=bar))
    whole = [chain.samples for chain in chains if chain.samples is not None]
    samples = {site: torch.cat([one[site] for one in whole]) for site in whole[0]}
    density = problem.density()
    calls = sum(chain.calls for chain in chains)
    samples |= density.deterministics(density.pack(samples))
    return Fit(samples, Cost(calls, calls, 0.0), Cost(0, 0, 0.0))


@dataclass(frozen=True)
class TimedChains:
    """Four chains from the origin of unconstrained space, each with a quarter of the CPU ``seconds`` allowed."""

    seconds: float

    def __call__(self, problem: Problem, seed: int, budget: Budget) -> Fit:
        """500 steps of warm-up and 1000 draws each, or what the time allows; float64.

        Raises:
            ValueError: the time was up before any chain had a draw.
        """
        started = time.process_time()
        chains = []
        for chain in range(NUM_CHAINS):
            deadline = time.process_time() + self.seconds / NUM_CHAINS
            begin(NUM_CHAINS * seed + chain)
            chains.append(self._chain(problem, deadline))
        drawn = [chain for chain in chains if chain.draws]
        if not drawn:
            raise ValueError(f"no chain ended its warm-up within {self.seconds / NUM_CHAINS:.0f} CPU seconds")
        density = problem.density(torch.float64)
        # The hook has unconstrained values, in the order of Pyro's sites.
        z = torch.cat([_latents(chain, [site.name for site in density.sites]) for chain in drawn])
        spent = time.process_time() - started
        calls = sum(chain.calls for chain in chains)
        complete = sum(chain.samples is not None for chain in chains)
        return Fit(
            by_site(density, z),
            Cost(calls, calls, spent),
            Cost(0, 0, spent * budget.draws / len(z)),
            note=f"{len(z)} draws of {len(drawn)} chains, {complete} complete",
        )

    def _chain(self, problem: Problem, deadline: float) -> Chain:
        return run_chain(
            problem.model,
            problem.args,
            Steps(_WARMUP, _KEPT),
            is_spent=lambda calls: time.process_time() > deadline,
            init_strategy=init_to_origin,
            max_plate_nesting=MAX_PLATES,
        )


def _latents(chain: Chain, sites: list[str]) -> Tensor:
    return torch.cat([chain.draws[name].reshape(len(chain.draws[name]), -1) for name in sites], 1)


# ----------------------------------------------------------------------------------------------------- on targets


@dataclass(frozen=True)
class Chains:
    """Chains from draws of the start, each with its share of the evaluations, one after the other.

    Args:
        name: of the method.
        num_chains: chains.
        evaluations_per_warmup_step: the warm-up has one step for so many evaluations of the chain's budget.
    """

    name: str = "nuts"
    num_chains: int = NUM_CHAINS
    evaluations_per_warmup_step: int = 100

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Run the chains; more draws than wanted are thinned evenly.

        Raises:
            ValueError: a chain's budget ended before its warm-up did.
        """
        begin(seed)
        meter = Meter()
        loc, scale = target.start
        allowed = budget.evaluations // self.num_chains
        warmup = max(allowed // self.evaluations_per_warmup_step, _FEWEST_WARMUP)
        calls, chains = 0, []
        for chain in range(self.num_chains):
            pyro.set_rng_seed(self.num_chains * seed + chain)
            first = loc + scale * torch.randn_like(loc)
            draws, more = self._chain(target, first, allowed, warmup)
            calls += more
            chains.append(draws)
        x = torch.cat(chains)
        note = f"{self.num_chains} chains, {x.shape[0]} draws after {warmup} warm-up steps each"
        spent = Evaluations(calls, calls)
        training = meter.look(spent)
        stride = -(-x.shape[0] // budget.draws)
        return Fit({"x": x[::stride]}, training, meter.look(spent), note=note)

    def _chain(self, target: Target, first: Tensor, allowed: int, warmup: int) -> tuple[Tensor, int]:
        chain = run_chain(
            start.model(target),
            (),
            Steps(warmup, allowed),
            is_spent=lambda calls: calls >= allowed,
            # An improper prior cannot be drawn from: both the plates and the first value are given.
            init_strategy=init_to_value(values={"x": first}),
            max_plate_nesting=0,
        )
        if not chain.draws:
            raise ValueError(f"{allowed} evaluations of a chain ended within its warm-up of {warmup} steps")
        return chain.draws["x"], chain.calls
