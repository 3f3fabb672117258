"""Processes of the demo's own, each at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.resource_tracker import ensure_running
from typing import Any, Final

# Seconds in which a process ends that finds nobody at the other end. Disposing of what does not answer takes some.
PATIENCE: Final = 60.0


class Child:
    """A new process that runs ``target(pipe, *arguments)``, starting at once.

    Ctrl-C is not for it: it has to end when it finds nobody at the other end of its pipe, which is also how it
    learns that this process was killed.

    Attributes:
        pipe: Our end.
        pid: Its number.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        # Not a fork: it would inherit this process's memory, which is to be measured, and its threads' locks.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.pipe: Pipe = ours
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()
        assert self._process.pid
        self.pid: int = self._process.pid

    def end(self) -> None:
        """Close the pipe and wait until the process has ended; one that does not is killed."""
        self.pipe.close()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Have a Ctrl-C wait until the end of the block. A process that is started in it never sees one."""
    # A process inherits what is blocked, from its first instruction on. It would inherit what is ignored, too, but a
    # Ctrl-C in that moment would be lost to this process as well.
    ensure_running()  # of itself it would start with the first process, and unblock
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
