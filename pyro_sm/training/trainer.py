# SPDX-License-Identifier: Apache-2.0
r"""The training of one guide: rounds and optimiser steps until the schedule ends it, with a state that can be stored.

A *step* is one loss of :class:`~pyro_sm.ImportanceWeightedScoreMatching`, its gradient clipped, and one update by
Adam; every so many steps a round precedes it. Between two steps the state is complete: what is interrupted, stored
and restored goes on bit for bit. The generator is the trainer's own; the global one is put back.
"""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from pyro_sm.base import Arguments, CheckpointError, Draws, Evaluations, PyroSMWarning, RoundInfo
from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.guides.bound import BoundDiffusion
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.fingerprint import Fingerprint, Path, changed_by_running, fingerprint
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching, TrainingState
from pyro_sm.training import state as stored_state
from pyro_sm.training.checkpoint import read_checkpoint, write_checkpoint
from pyro_sm.training.interrupt import deferred_interrupt
from pyro_sm.training.progress import Progress, progress_bar
from pyro_sm.training.random_state import devices, rng_state, set_rng_state
from pyro_sm.training.schedule import Schedule, StoppingRule, last_round

# A gradient's norm is about one when training begins and falls; a batch with a few weights that dominate it can be
# hundreds, and one such step would undo a round. Ten lets all but these pass.
_MOST_GRADIENT = 10.0
_DRAWS_SEED = 7919  # added to the seed: draws are not made with the numbers that the training was


def beside(path: str | os.PathLike[str], chain: int) -> str:
    """The checkpoint of a replica: the first's own, those of the others with ``.1``, ``.2``, … at the end."""
    return f"{os.fspath(path)}.{chain}" if chain else os.fspath(path)


def _warn_of_prior(density: ModelDensity) -> None:
    sites = ", ".join(repr(site.name) for site in density.sites)
    warnings.warn(
        f"no site of the model is observed, and it has no pyro.factor: the posterior of {sites} is the prior. Was "
        "obs= forgotten, or were the data not passed?",
        PyroSMWarning,
        stacklevel=6,
    )


class Trainer:
    """Trains one guide on one model.

    Args:
        model: a Pyro model.
        guide: an untrained guide of it; copies of it are trained, anew for other data.
        objective: how to train it.
        stopping: budget and stopping rule.
        learning_rate: of Adam, before annealing.
        seed: of all randomness.
        checkpoint: file to save the state to during a run, or None.
        checkpoint_every: seconds between checkpoints.
        disable_progbar: no progress bar.
        label: whose training this is, in the progress bar; empty for the only one.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoDiffusion,
        objective: ImportanceWeightedScoreMatching,
        *,
        stopping: StoppingRule,
        learning_rate: float,
        seed: int,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: float,
        disable_progbar: bool,
        label: str = "",
    ) -> None:
        self.model = model
        self.guide = guide
        self.objective = objective
        self.stopping = stopping
        self.learning_rate = learning_rate
        self.seed = seed
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.disable_progbar = disable_progbar
        self.label = label
        self.schedule = Schedule()
        self.drawn = Evaluations()
        self._untrained = copy.deepcopy(guide)
        self._optimiser: torch.optim.Adam | None = None
        self._rng: list[Tensor] | None = None
        self._running = False
        self._loaded: dict[str, Any] | None = None
        self._bound: BoundDiffusion | None = None
        self._data: Fingerprint | None = None
        self._params: dict[str, Tensor] = {}
        self._changing: frozenset[Path] = frozenset()
        self._pool: Draws | None = None
        self._last_saved = -math.inf

    def replica(self, chain: int, num_chains: int) -> Trainer:
        """One of ``num_chains`` trainings alike; all but the first with copies of guide and objective."""
        guide = self.guide if not chain else self.guide.renamed(f"{self.guide._pyro_name}.replica{chain}")
        return Trainer(
            self.model,
            guide,
            copy.deepcopy(self.objective) if chain else self.objective,
            stopping=self.stopping,
            learning_rate=self.learning_rate,
            seed=self.seed + chain,
            checkpoint=None if self.checkpoint is None else beside(self.checkpoint, chain),
            checkpoint_every=self.checkpoint_every,
            disable_progbar=self.disable_progbar,
            label=f"replica {chain + 1}/{num_chains}",
        )

    # -- what there is -----------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[RoundInfo, ...]:
        """What each round measured, oldest first."""
        return self.objective.history

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to store."""
        return self._optimiser is not None

    @property
    def bound(self) -> BoundDiffusion:
        """The guide on its data.

        Raises:
            ValueError: nothing has been run yet.
        """
        if self._bound is None:
            raise ValueError("call run(...) with the model's arguments first")
        return self._bound

    @property
    def density(self) -> ModelDensity:
        """The model on its data, with the evaluations of the training."""
        return self.bound.density

    def density_counted_apart(self, evaluations: Evaluations) -> ModelDensity:
        """The same, counting on ``evaluations``: a training has a budget, what comes after it has none."""
        return self.density.counted_apart(evaluations)

    def draws(self, num_draws: int) -> Draws:
        """At least so many weighted draws, kept for later calls; see :meth:`~pyro_sm.AutoDiffusion.draw_weighted`."""
        if self._pool is None or self._pool.z.shape[0] < num_draws:
            density = self.density_counted_apart(self.drawn)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + _DRAWS_SEED)
                self._pool = self.guide.draw_weighted(
                    density, num_draws, self.bound.arguments, covering=self.objective.covering
                )
        return self._pool

    # -- running -----------------------------------------------------------------------------------------------

    def allow(self, stopping: StoppingRule) -> None:
        """The budget and the rule of the next run; a larger budget reopens a training that it ended."""
        self.stopping = stopping

    def begin_with(self, seed: int) -> None:
        """Another seed, for a training that has not begun."""
        self.seed = seed

    def run(self, arguments: Arguments) -> None:
        """Train until the schedule ends it, with a bar; Ctrl-C stops between two steps.

        Raises:
            KeyboardInterrupt: it was stopped; another call goes on.
        """
        with self.own_rng():
            self.bind(arguments)
            if self.schedule.finished:
                return
            with deferred_interrupt() as interrupted, self.bar() as show:
                before = self._fingerprint(self.bound.arguments)
                try:
                    self.train(interrupted, show)
                finally:
                    self._remember(before)
                if not self.schedule.finished:
                    self._save_if_asked(force=True)
                    raise KeyboardInterrupt(
                        f"stopped after {len(self.history)} rounds; run() with the same arguments goes on"
                    )
            self.warn_of_nan()
        self._save_if_asked(force=True)

    def run_apart(self, interrupted: Callable[[], bool], show: Callable[[Progress], None]) -> None:
        """Train what was bound before, in a process of its own."""
        with self.own_rng():
            self.train(interrupted, show)
        if self.schedule.finished:
            self.warn_of_nan()
        self._save_if_asked(force=True)

    def bind(self, arguments: Arguments) -> None:
        """Bind guide and objective to the data; begin anew for other data, go on for a budget that has grown.

        Raises:
            ModelRefusedError: the model cannot be evaluated in batches, or the arguments do not fit it.
            CheckpointError: a loaded checkpoint belongs to another model or other data.
        """
        now = self._fingerprint(arguments)
        if self._data is not None and not self._is_same(now):
            guide = copy.deepcopy(self._untrained)
            guide.inspect(self.model, arguments)  # refused before anything is given up
            self._start_afresh(guide)
        # What the model has changed since, in itself, is no reason to bind the guide anew. But the arguments that it
        # is bound to may be others by now.
        if self._bound is None or not self._is_same(self._fingerprint(self._bound.arguments)):
            self._bound = self.guide.bind(self.model, *arguments.args, **arguments.kwargs)
            if self.density.is_prior:
                _warn_of_prior(self.density)
        self._remember(now)
        self.objective.bind(self.guide, self.density)
        if self._optimiser is None:
            weights = self.guide.network_weights.unconstrained()
            self._optimiser = torch.optim.Adam([weights], lr=self.learning_rate)
        if self._loaded is not None:
            stored_state.check_model(self._loaded, self.density)
            self.become(self._loaded)
            self._loaded = None
        self._reopen_if_budget_grew()

    # -- data --------------------------------------------------------------------------------------------------

    def _fingerprint(self, arguments: Arguments) -> Fingerprint:
        """The model's data; its parameters are data, too, as nothing here trains them."""
        return fingerprint(self.model, arguments, self._data, trainable=True)

    def _is_same(self, now: Fingerprint) -> bool:
        """Whether data and parameters are those of the last run."""
        if self._data is None or not now.same_but(self._data, self._changing):
            return False
        params = self.density.param_values()
        return params.keys() == self._params.keys() and all(
            torch.equal(value, self._params[name]) for name, value in params.items()
        )

    def _remember(self, before: Fingerprint) -> None:
        """The data as they are after the model was run; what it changed since ``before`` is not the user's doing."""
        after = self._fingerprint(self.bound.arguments)
        self._changing |= changed_by_running(before, after)
        self._data, self._params = after, self.density.param_values()

    def train(self, interrupted: Callable[[], bool], show: Callable[[Progress], None]) -> None:
        """Steps until training ends, or until ``interrupted()``."""

        def go_on(beta: float) -> bool:
            show(self._standing(f"seeding, β={beta:.2g}" if beta > 0 else "seeding, looking for modes"))
            return not interrupted()

        self._pool = None
        while not self.schedule.finished:
            self.step(go_on, lambda: show(self._standing()))
            if interrupted():
                break
        if self.schedule.finished:
            show(self._standing())

    def step(self, go_on: Callable[[float], bool], report: Callable[[], None]) -> None:
        """One optimiser step, and the round before it if one is due, which is reported.

        Where ``go_on`` ends the seeding of a population, nothing has happened.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        optimiser = self._optimiser
        if optimiser is None:
            raise ValueError("call run(...) first")
        rounds = len(self.history)
        for group in optimiser.param_groups:
            group["lr"] = self._rate()
        optimiser.zero_grad()
        loss = self._loss_and_grads(go_on)
        if loss is None:
            return
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in round {rounds}: lower the learning rate (now "
                f"{self.learning_rate}), or check the model for overflow"
            )
        weights = [p for group in optimiser.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, _MOST_GRADIENT)
        optimiser.step()
        if len(self.history) > rounds:
            report()
            self.schedule = self.schedule.after_round(self.stopping, self.history, self._last_round())
        if self.objective.round_due():
            ended = len(self.history) >= self.schedule.ends_at(self._last_round())
            if ended:  # before the save, so that a checkpoint that says "finished" is
                self.objective.refit(self.bound)
            self.schedule = self.schedule._replace(finished=ended)
            self._save_if_asked(force=False)

    def _loss_and_grads(self, go_on: Callable[[float], bool]) -> float | None:
        """The loss of a step, its gradients left with the weights; None if ``go_on`` ended it.

        Of what was ended, or interrupted at once, generators and counts are put back, so that it can be done again.
        """
        rng, counted = rng_state(), self.density.evaluations
        before = astuple(counted)
        state = self.objective.state
        try:
            loss = self.objective.step_loss(self.guide, self.bound, go_on=go_on)
            if loss is not None:
                self.objective.backward(loss)
                return float(loss.detach())
        except KeyboardInterrupt:
            self.objective.state = state
            self._undo(rng, before)
            raise
        self._undo(rng, before)
        return None

    def _undo(self, rng: list[Tensor], before: tuple[int, ...]) -> None:
        set_rng_state(rng)
        counted = self.density.evaluations
        counted.values, counted.scores, counted.not_a_number = before

    def _start_afresh(self, guide: AutoDiffusion) -> None:
        """New data, new inference: what was learned for other data may have lost modes that matter here."""
        self.guide.release()  # or the store would hand the old parameters to the new guide
        self.guide = guide
        self.objective.state = TrainingState()
        self.schedule = Schedule()
        self.drawn = Evaluations()
        self._optimiser = None
        self._bound = None
        self._pool = None
        torch.manual_seed(self.seed)

    @contextmanager
    def own_rng(self) -> Iterator[None]:
        """Run on the trainer's own generator state and give the global one back untouched."""
        # Training needs gradients, wherever it is called.
        with torch.random.fork_rng(devices()), torch.inference_mode(False), torch.enable_grad():
            if self._rng is None or self._optimiser is None:  # a run that failed before training leaves no trace
                torch.manual_seed(self.seed)
            else:
                set_rng_state(self._rng)
            self._running = True
            try:
                yield
            finally:
                self._running = False
                self._rng = rng_state()

    # -- schedule ----------------------------------------------------------------------------------------------

    def _last_round(self) -> int:
        objective = self.objective
        return last_round(
            self.stopping,
            self.history,
            num_draws=objective.num_draws,
            evaluations_per_round=objective.evaluations_per_round,
            seeding=objective.state.seeding,
        )

    def _rate(self) -> float:
        """Learning rate of the step to come."""
        objective = self.objective
        rounds = len(self.history) + objective.state.steps / objective.steps_per_round
        return self.learning_rate * self.schedule.rate(rounds)

    def _reopen_if_budget_grew(self) -> None:
        spent = self.history[-1].density_evaluations - self.objective.state.seeding if self.history else 0
        if self.stopping.max_evaluations - spent >= self.objective.num_draws:  # room for a round
            self.schedule = self.schedule.reopened(self.stopping, self.history, self._last_round())

    # -- what is shown -----------------------------------------------------------------------------------------

    def bar(self, line: int | None = None) -> AbstractContextManager[Callable[[Progress], None]]:
        """A progress bar, at this ``line`` where there are several."""
        return progress_bar(self.label, self._standing(), disable=self.disable_progbar, position=line)

    def _standing(self, doing: str = "training") -> Progress:
        """Where training stands, to be shown."""
        budget = self.stopping.max_evaluations + self.objective.state.seeding
        if not self.history:
            return Progress(0, budget, doing)
        info = self.history[-1]
        spent = info.density_evaluations
        figures = (
            f"round {info.round}, γ={info.gamma:.2f}, ESS={info.ess:.2f}, k̂={info.khat:.2f}, "
            f"log Z={info.log_evidence:.2f}±{info.log_evidence_se:.2f}"
        )
        return Progress(spent, spent if self.schedule.finished else budget, doing, figures)

    def warn_of_nan(self) -> None:
        """Say so if the density was NaN somewhere."""
        evaluations = self.density.evaluations
        if evaluations.not_a_number:
            share = evaluations.not_a_number / max(evaluations.values, 1)
            warnings.warn(
                f"the log density was NaN at {evaluations.not_a_number} latents ({share:.1%} of those evaluated); "
                "they were taken to be impossible. If the likelihood should be finite there, the posterior is wrong",
                PyroSMWarning,
                stacklevel=3,
            )

    # -- saving ------------------------------------------------------------------------------------------------

    def _save_if_asked(self, *, force: bool) -> None:
        if self.checkpoint is None:
            return
        if force or time.monotonic() - self._last_saved > self.checkpoint_every:
            self.save(self.checkpoint)
            self._last_saved = time.monotonic()

    def _settings(self) -> dict[str, str]:
        return stored_state.settings(self.guide, self.objective, self.learning_rate)

    def content(self) -> dict[str, Any]:
        """The whole state, as it goes into a checkpoint.

        Raises:
            ValueError: nothing has been run yet.
        """
        if self._optimiser is None:
            raise ValueError("there is nothing to save: call run(...) first")
        return {
            "settings": self._settings(),
            "seed": self.seed,
            "guide": {k: v.detach() for k, v in self.guide.state_dict().items()},
            "optimiser": self._optimiser.state_dict(),
            "rng": rng_state() if self._running or self._rng is None else self._rng,
            **stored_state.stored(self.objective.state, self.density, self.schedule),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to ``path``, atomically.

        Raises:
            CheckpointError: the file cannot be written.
            ValueError: nothing has been run yet.
        """
        write_checkpoint(path, self.content())

    def load(self, path: str | os.PathLike[str], *, expected_seed: int | None = None) -> None:
        """Read a state; the next :meth:`bind` takes it over, and checks that model and data are the same.

        Raises:
            CheckpointError: the file is missing, damaged, was made with other settings, or with another seed than
                ``expected_seed``.
        """
        content = read_checkpoint(path)
        stored_state.check_settings(content, self._settings(), os.fspath(path))
        if expected_seed is not None and content["seed"] != expected_seed:
            raise CheckpointError(
                f"expected the seed {expected_seed} in '{os.fspath(path)}', found {content['seed']}: it belongs to "
                "another run"
            )
        self._loaded = content
        self.seed = content["seed"]

    def become(self, content: dict[str, Any]) -> None:
        """Take over a state of this model on these data, generators included."""
        self._pool = None
        self.guide.load_state_dict(content["guide"])
        if self._optimiser is not None:
            self._optimiser.load_state_dict(content["optimiser"])
        self.objective.state = stored_state.restored(content, self.density)
        self.schedule = Schedule(*content["schedule"])
        counted, held = stored_state.restored_evaluations(content), self.density.evaluations
        held.values, held.scores, held.not_a_number = counted.values, counted.scores, counted.not_a_number
        set_rng_state(content["rng"])
