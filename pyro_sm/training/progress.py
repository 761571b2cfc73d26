# SPDX-License-Identifier: Apache-2.0
"""What is shown of a training while it runs: where it stands, as a value that can come from another process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tqdm import tqdm


class Progress(NamedTuple):
    """``spent`` of ``total`` density evaluations; what is being done, and the figures of the last round, in words."""

    spent: int
    total: int
    doing: str = "training"
    figures: str = ""


@contextmanager
def progress_bar(
    label: str, begin: Progress, *, disable: bool, position: int | None = None
) -> Iterator[Callable[[Progress], None]]:
    """A bar, as a function to be told where the training stands.

    Args:
        label: whose training, or nothing.
        begin: where it begins.
        disable: show nothing.
        position: the line, where there are several bars.
    """
    prefix = f"{label}, " if label else ""
    with tqdm(
        total=begin.total, initial=begin.spent, unit="eval", disable=disable, desc=f"{prefix}{begin.doing}",
        dynamic_ncols=True, mininterval=0.5, position=position,
    ) as bar:  # fmt: skip

        def show(now: Progress) -> None:
            bar.total = now.total
            bar.set_description(f"{prefix}{now.doing}", refresh=False)
            if now.figures:
                bar.set_postfix_str(now.figures, refresh=False)
            bar.update(now.spent - bar.n)
            if now.doing != begin.doing or now.spent >= now.total:  # not to be swallowed by ``mininterval``
                bar.refresh()

        yield show
