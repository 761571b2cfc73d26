# SPDX-License-Identifier: Apache-2.0
r"""Several trainings at once, each in a process of its own.

Four stacked networks take as long as four single ones (a step is bound by arithmetic), so what helps is more cores.
Models are closures, which cannot be pickled: the processes are forked. A forked process

* has one thread: the threads that its parent's OpenMP believes in do not exist there, and the result must not depend
  on how many cores there are;
* ignores Ctrl-C, which a terminal sends to all of its processes: the parent says when to stop, between two steps;
* tells its parent of progress and warnings, then of what it raised, then its state, which is that of a checkpoint.

One pipe for each, and both ends know when the other is gone: a process that was killed leaves no one waiting for it,
and one whose parent was killed saves and ends.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from pyro_sm.training.progress import Progress

_POLL = 0.1  # seconds between two looks at Ctrl-C


class Task(NamedTuple):
    """A training, as functions that are called in its process.

    ``train``: given a function that says whether to stop, and one to be told of progress. ``state``: called after it,
    also if it raised; for ``torch.load(..., weights_only=True)``.
    """

    label: str
    train: Callable[[Callable[[], bool], Callable[[Progress], None]], None]
    state: Callable[[], dict[str, Any]]


class Outcome(NamedTuple):
    """``state``: None if the training never began or its process was killed. ``error``: what it raised, or None."""

    state: dict[str, Any] | None = None
    error: Exception | None = None


class RemoteTraceback(Exception):
    """The cause of an error that was raised in another process: its traceback there, as text."""


class _Warned(NamedTuple):
    text: str
    category: type[Warning]
    filename: str
    lineno: int


class _Raised(NamedTuple):
    error: Exception
    where: str


class _State(NamedTuple):
    content: bytes


# ------------------------------------------------------------------------------------------------------ how many


def obstacle(args: Sequence[Any], *, compiles: bool = False) -> str:
    """Why a training on these arguments cannot be done in forked processes; empty if it can.

    ``compiles``: whether guides do. The compiler's own workers do not live on in a fork.
    """
    if compiles:
        return "networks are compiled, which is not safe in forked processes"
    if sys.platform != "linux":
        return f"processes are forked, which is not safe on {sys.platform}"
    if torch.cuda.is_available():
        return "CUDA cannot be used in forked processes (hide the device with CUDA_VISIBLE_DEVICES='' if it is idle)"
    devices = {a.device.type for a in args if isinstance(a, Tensor)} | {torch.get_default_device().type}
    if devices != {"cpu"}:
        return f"the arguments are on {', '.join(sorted(devices - {'cpu'}))}"
    if multiprocessing.current_process().daemon:
        return "this process is itself a daemonic worker, which may have no children"
    return ""


def num_processes(asked: int | None, num_tasks: int, args: Sequence[Any], *, compiles: bool = False) -> int:
    """How many processes to use for ``num_tasks`` trainings on these arguments; 1 for this one alone.

    Raises:
        ValueError: more than one was asked for, and there is an obstacle.
    """
    if num_tasks == 1 or asked == 1:
        return 1
    reason = obstacle(args, compiles=compiles)
    if asked is None:
        return 1 if reason else min(len(os.sched_getaffinity(0)), num_tasks)
    if reason:
        raise ValueError(f"expected num_workers=1 or None, found {asked}: {reason}")
    return min(asked, num_tasks)


# ---------------------------------------------------------------------------------------------- in the new process


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way to another process, else its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        unchanged = type(copy) is type(error) and str(copy) == str(error)
    except Exception:  # whatever a foreign class does when it is pickled
        unchanged = False
    return error if unchanged else RuntimeError(f"{type(error).__name__}: {error}")


def _work(task: Task, pipe: Connection, others: Sequence[Connection]) -> None:
    """What a forked process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # before anything that would wait for the parent's threads
    for inherited in others:  # or no one would notice that the parent is gone
        inherited.close()

    def tell(message: NamedTuple) -> None:
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(pickle.dumps(message))

    def warned(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        try:
            tell(_Warned(str(message), category, filename, lineno))
        except (pickle.PicklingError, AttributeError):  # a class within a function
            tell(_Warned(f"{category.__name__}: {message}", UserWarning, filename, lineno))

    warnings.showwarning = warned
    try:
        task.train(pipe.poll, tell)
    except Exception as error:
        tell(_Raised(_portable(error), traceback.format_exc()))
    stream = io.BytesIO()
    torch.save(task.state(), stream)
    tell(_State(stream.getvalue()))


# ------------------------------------------------------------------------------------------------------ in this one


@dataclass
class _Training:
    """A task in its process, as the parent sees it."""

    task: Task
    process: BaseProcess
    pipe: Connection
    show: Callable[[Progress], None]
    outcome: Outcome = field(default_factory=Outcome)

    def stop(self) -> None:
        """Ask it to."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(b"")

    def receive(self, warned: set[_Warned]) -> bool:
        """Take one message; whether it was the last, and the process has ended."""
        try:
            message = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._end()
            return True
        if isinstance(message, Progress):
            self.show(message)
        elif isinstance(message, _Warned):
            if message not in warned:
                warned.add(message)
                warnings.warn_explicit(*message)
        elif isinstance(message, _Raised):
            self.outcome = self.outcome._replace(error=self._named(message))
        else:
            content = torch.load(io.BytesIO(message.content), weights_only=True)
            self.outcome = self.outcome._replace(state=content)
        return False

    def _named(self, raised: _Raised) -> Exception:
        error = raised.error
        if error.args and str(error) == error.args[0]:
            error.args = (f"{self.task.label}: {error.args[0]}", *error.args[1:])
        error.__cause__ = RemoteTraceback(f"{self.task.label}, in its process:\n{raised.where}")
        return error

    def _end(self) -> None:
        self.process.join()
        if self.outcome.state is None and self.outcome.error is None:
            code = self.process.exitcode or 0
            by = f" ({signal.Signals(-code).name})" if code < 0 else ""
            memory = "; a system that runs out of memory does this" if code == -signal.SIGKILL else ""
            self.outcome = Outcome(
                error=RuntimeError(
                    f"{self.task.label}: its process ended with exit code {code}{by} before it was finished{memory}"
                )
            )
        self.close()

    def close(self) -> None:
        """End the process if it still runs, and forget it."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _begin(task: Task, show: Callable[[Progress], None], running: Sequence[_Training]) -> _Training:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    others = [ours, *(training.pipe for training in running)]
    process = context.Process(target=_work, args=(task, theirs, others), name=task.label, daemon=True)
    with warnings.catch_warnings():  # Python 3.12 warns of threads; none of them is waited for in the new process
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        process.start()
    theirs.close()
    return _Training(task, process, ours, show)


def train_in_processes(
    tasks: Sequence[Task],
    num_workers: int,
    interrupted: Callable[[], bool],
    shows: Sequence[Callable[[Progress], None]],
) -> list[Outcome]:
    """Train all, at most ``num_workers`` at once; in the order of ``tasks``, what became of them.

    If one fails, or ``interrupted()``, the others are stopped between two steps, and those that have not begun do not
    begin. Whatever ends this function, no process is left behind.

    Args:
        tasks: the trainings.
        num_workers: processes at once.
        interrupted: whether to stop.
        shows: one function per task, to be told of its progress.
    """
    waiting = deque(range(len(tasks)))
    trainings: dict[int, _Training] = {}
    running: dict[Connection, int] = {}
    warned: set[_Warned] = set()
    stopping = False
    try:
        while running or (waiting and not stopping):
            failed = any(training.outcome.error is not None for training in trainings.values())
            if not stopping and (failed or interrupted()):
                stopping = True
                for index in running.values():
                    trainings[index].stop()
            while waiting and not stopping and len(running) < num_workers:
                index = waiting.popleft()
                trainings[index] = _begin(tasks[index], shows[index], [trainings[i] for i in running.values()])
                running[trainings[index].pipe] = index
            for pipe in wait(list(running), timeout=_POLL):
                if isinstance(pipe, Connection) and trainings[running[pipe]].receive(warned):
                    del running[pipe]
    finally:
        for index in running.values():
            trainings[index].close()
    return [trainings[i].outcome if i in trainings else Outcome() for i in range(len(tasks))]
