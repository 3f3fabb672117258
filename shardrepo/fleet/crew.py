"""Who carries out the tasks: processes of our own, or an executor of somebody else's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, Final, Protocol

from ..across import Outcome
from ..errors import ConfigError
from . import worker
from .outcomes import Migration
from .plan import Task
from .worker import Manner, carry_out

# Forks of a process that has no threads whose locks they could inherit, and nothing of this one's: what all workers
# import it has imported (decision 17 has the seconds).
_FORKS: Final = multiprocessing.get_context("forkserver")
_IMPORTED: Final = ["shardrepo.fleet.worker", "shardrepo.engines", "psycopg"]

# Seconds that a scheduler gets to answer.
_ANSWER: Final = 10


class Crew(Protocol):
    """What carries out tasks, as many at a time as it is wide."""

    width: int

    def submit(self, manner: Manner, task: Task) -> Future[Outcome[Migration]]:
        """Begin a task. Its future ends in an outcome, or in an error where who had it was lost."""
        ...

    def free(self, future: Future[Outcome[Migration]]) -> None:
        """Take note that *future* has ended, and replace who was lost with it."""
        ...

    def stop(self) -> None:
        """Have what runs end between two statements."""
        ...

    def close(self) -> None:
        """Let everybody go."""
        ...


class Processes:
    """Worker processes, each of which has one task at a time, so that one that is killed takes no other's with it.

    They are started when there is something to do, and end with this process, whatever ends that: what one of them is
    doing then stops between two statements.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        _FORKS.set_forkserver_preload(_IMPORTED)
        self._stop: Any = _FORKS.RawValue("b", 0)
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Outcome[Migration]], ProcessPoolExecutor] = {}

    def submit(self, manner: Manner, task: Task) -> Future[Outcome[Migration]]:
        while True:
            lane = self._idle.pop() if self._idle else self._lane()
            try:
                with _interrupts_ignored():
                    future = lane.submit(carry_out, manner, task)
            except BrokenExecutor:  # its process has died while it had nothing to do
                lane.shutdown(wait=True)
                continue
            self._busy[future] = lane
            return future

    def free(self, future: Future[Outcome[Migration]]) -> None:
        lane = self._busy.pop(future)
        if future.exception() is None:
            self._idle.append(lane)
        else:
            lane.shutdown(wait=True)

    def stop(self) -> None:
        self._stop.value = 1

    def close(self) -> None:
        # One after the other: who has been told once, without waiting, is not waited for when he is told again.
        for lane in (*self._idle, *self._busy.values()):
            lane.shutdown(wait=True, cancel_futures=True)

    def _lane(self) -> ProcessPoolExecutor:
        # The environment of now: the process that is forked has that of the first time.
        told = (self._stop, dict(os.environ))
        return ProcessPoolExecutor(1, mp_context=_FORKS, initializer=_enlist, initargs=told)


class Guests:
    """The workers of an executor that is not ours: it is used, and left as it is."""

    def __init__(self, executor: Executor, width: int) -> None:
        self.width = width
        self._executor = executor
        self._running: set[Future[Outcome[Migration]]] = set()

    def submit(self, manner: Manner, task: Task) -> Future[Outcome[Migration]]:
        future = self._executor.submit(carry_out, manner, task)
        self._running.add(future)
        return future

    def free(self, future: Future[Outcome[Migration]]) -> None:
        self._running.discard(future)

    def stop(self) -> None:
        for future in list(self._running):
            future.cancel()

    def close(self) -> None:
        self.stop()


@contextmanager
def executor_of(url: str | None) -> Iterator[Executor | None]:
    """The executor that *url* names, ``dask://host:port`` for a Dask cluster; none if that is None.

    Raises:
        ConfigError: There is no such kind, what it needs is not installed, or nobody answers there.
    """
    if url is None:
        yield None
        return
    scheme, _, address = url.partition("://")
    if scheme != "dask" or not address:
        raise ConfigError(f"an executor is named as dask://host:port, not {url!r}")
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError("a Dask cluster takes what is not installed: pip install 'shardrepo[dask]'") from error
    try:
        client = Client(f"tcp://{address}", timeout=_ANSWER)  # type: ignore[no-untyped-call]  # it has no types
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Dask scheduler answers at {address} within {_ANSWER} s: {error}") from error
    with client:
        # Impure: the same task is to be done as often as it is asked for.
        yield client.get_executor(pure=False)  # type: ignore[no-untyped-call]


def _enlist(stop: Any, environ: Mapping[str, str]) -> None:
    """Make this process a worker: Ctrl-C is its parent's, and it does not outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environ)
    orphaned = threading.Event()
    worker.is_stopped = lambda: bool(stop.value) or orphaned.is_set()
    threading.Thread(target=_follow_parent, args=(orphaned,), name="shardrepo-orphan", daemon=True).start()


def _follow_parent(orphaned: threading.Event) -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    orphaned.set()
    with worker.alembic_in_use:
        os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is ignored is inherited by the processes that are started, from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
