"""Processes of the demo's own, each at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any


class Child:
    """A new process that runs ``target(pipe, *arguments)``, starting at once.

    Ctrl-C is not for it: it has to end when it finds nobody at the other end of its pipe, which is also how it
    learns that this process was killed.

    Attributes:
        pipe: Our end.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        # Not a fork: it would inherit this process's memory, which is to be measured, and its threads' locks.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.pipe: Pipe = ours
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        with _interrupts_ignored():
            self._process.start()
        theirs.close()

    def end(self) -> None:
        """Close the pipe and wait until the process has ended."""
        self.pipe.close()
        self._process.join()
        self._process.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    # A process inherits what is ignored, from its first instruction on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
