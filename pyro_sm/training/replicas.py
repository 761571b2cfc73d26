# SPDX-License-Identifier: Apache-2.0
"""Several trainings of the same posterior, seen as one: run in turn or at once, drawn from, saved, loaded.

Each guide is trained like one that was trained alone with its own seed; what their draws say together is in
``corrections/per_replica.py``. Where there are cores for it they are trained at once: all are bound to the data here,
each is trained in a process of its own (``training/processes.py``), and its state is taken over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from pyro_sm.base import Arguments, Draws, Evaluations
from pyro_sm.corrections.per_replica import joined
from pyro_sm.training.interrupt import deferred_interrupt
from pyro_sm.training.processes import Task, num_processes, train_in_processes
from pyro_sm.training.schedule import StoppingRule
from pyro_sm.training.trainer import Trainer, beside
from pyro_sm.weights import Evidence


class Replicas:
    """Trainers, one per chain.

    Args:
        trainers: with guides, seeds and checkpoints of their own.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = tuple(trainers)

    @classmethod
    def of(cls, trainer: Trainer, num_chains: int) -> Replicas:
        """A trainer and copies of it, each with a guide, a seed and a checkpoint of its own."""
        if num_chains == 1:
            return cls((trainer,))
        return cls([trainer.replica(chain, num_chains) for chain in range(num_chains)])

    def run(self, arguments: Arguments, stopping: StoppingRule, num_workers: int | None) -> None:
        """Train all that are not finished.

        Args:
            arguments: of the model.
            stopping: budget and rule, for each.
            num_workers: processes; as many as there are trainings and cores if None, where processes can be forked.

        Raises:
            KeyboardInterrupt: they were stopped; another call goes on.
            ValueError: ``num_workers`` > 1 and no processes can be forked.
            RuntimeError: a process was killed.
        """
        for trainer in self.trainers:
            trainer.allow(stopping)
        compiles = self.trainers[0].guide.compiles
        processes = num_processes(num_workers, len(self.trainers), arguments.values, compiles=compiles)
        if processes > 1:
            _train_at_once(self.trainers, arguments, processes)
        else:
            for trainer in self.trainers:
                trainer.run(arguments)

    def draws(self, num_draws: int) -> Draws:
        """At least so many weighted draws: as many of each, one after the other."""
        each = -(-num_draws // len(self.trainers))
        pools = [trainer.draws(each) for trainer in self.trainers]
        if len(pools) == 1:
            return pools[0]
        size = max(len(pool.z) for pool in pools)  # one of them may have been asked for more by itself
        return joined([trainer.draws(size) for trainer in self.trainers])

    def counted(self) -> Evaluations:
        """Evaluations of training, and of the draws since, by all."""
        trained = [trainer.density.evaluations for trainer in self.trainers]
        return sum([*trained, *(trainer.drawn for trainer in self.trainers)], Evaluations())

    def report(self, estimate: Evidence, khat: float, ess: float) -> str:
        """Evidence (nats), weights and cost, a line each; non-centred coordinates, where there are any."""
        first, counted = self.trainers[0], self.counted()
        rounds = sum(len(trainer.history) for trainer in self.trainers)
        seconds = sum(trainer.history[-1].seconds for trainer in self.trainers)
        lines = (
            f"log evidence  {estimate.log_evidence:.3f} ± {estimate.log_evidence_se:.3f} nats\n"
            f"weights       Pareto k̂ {khat:.2f} (trust below 0.7), effective share {ess:.2f}\n"
            f"cost          {counted.values} density and {counted.scores} gradient "
            f"evaluations ({first.density.batching_method}), {rounds} rounds, {seconds:.0f} s of training"
        )
        if first.guide.drivers():
            lines += f"\ncoordinates   non-centred: scales driven by {', '.join(first.guide.drivers())}"
        return lines

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the states of those that have begun.

        Raises:
            CheckpointError: a file cannot be written.
            ValueError: the first has not begun.
        """
        for chain, trainer in enumerate(self.trainers):
            if trainer.has_begun or not chain:
                trainer.save(beside(path, chain))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read states; the next run checks that model and data are the same.

        Raises:
            CheckpointError: the first file is missing, or one is damaged, or was made with other settings.
        """
        first, *others = self.trainers
        first.load(path)
        for chain, trainer in enumerate(others, 1):
            if os.path.exists(beside(path, chain)):
                trainer.load(beside(path, chain), expected_seed=first.seed + chain)
            else:  # stopped before its turn
                trainer.begin_with(first.seed + chain)


def _train_at_once(trainers: Sequence[Trainer], arguments: Arguments, processes: int) -> None:
    for trainer in trainers:
        with trainer.own_rng():
            trainer.bind(arguments)
    left = [trainer for trainer in trainers if not trainer.schedule.finished]
    tasks = [Task(trainer.label, trainer.run_apart, trainer.content) for trainer in left]
    with deferred_interrupt() as interrupted, contextlib.ExitStack() as bars:
        lines = reversed([*enumerate(left)])  # the first is closed first, or they would end in reverse order
        shows = [bars.enter_context(trainer.bar(line)) for line, trainer in lines][::-1]
        outcomes = train_in_processes(tasks, processes, interrupted, shows)
        for trainer, outcome in zip(left, outcomes, strict=True):
            if outcome.state is not None:
                with trainer.own_rng():
                    trainer.become(outcome.state)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    if not all(trainer.schedule.finished for trainer in left):
        rounds = ", ".join(str(len(trainer.history)) for trainer in trainers)
        raise KeyboardInterrupt(
            f"stopped after {rounds} rounds of the replicas; run() with the same arguments goes on"
        )
