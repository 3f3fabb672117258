"""One database in a sandbox: its only connection, and whose turn it is to have that.

One thread at a time has it, from its first checkout to its last return, and may take it several times over.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final

import psycopg

from .boxed import LOST, BoxedConnection, Outer
from .calls import deadline
from .callsite import CallSite
from .database import Database
from .entries import Kind
from .errors import CheckoutTimeoutError, RepoDisposedError, SandboxError
from .pool import CachedConnection, LedgerPool, connection_of, on_behalf_of

# Seconds between two looks for a connection whose holder is gone, which nobody tells of.
_LOOK: Final = 0.05


class Box:
    """The connection of one database in a sandbox. Opened when it is first wanted.

    Args:
        borrower: Whose it is, in the books of the cache.
        check_usable: Raises once the sandbox is over.
        check_deferred: Whether deferred constraints are checked where a transaction would be committed.

    Attributes:
        database: Where it leads, once it was opened; None before.
    """

    def __init__(self, borrower: object, check_usable: Callable[[], object], check_deferred: bool) -> None:
        self.database: Database | None = None
        self._borrower = borrower
        self._check_usable = check_usable
        self._check_deferred = check_deferred
        # Keys of the cache whose users and passwords the server has accepted.
        self._accepted: set[object] = set()
        # Guards what follows: no I/O happens under it.
        self._changed = threading.Condition()
        self._record: CachedConnection | None = None
        self._outer: Outer | None = None
        # How many times each thread has it, or is about to.
        self._turns: Counter[threading.Thread] = Counter()
        self._lent: set[Lent] = set()
        self._is_over = False
        # The holder's: whether SQL of the users' own has run, and what it may have left in the session is still there.
        self._is_untidy = False

    def lend(self, pool: LedgerPool) -> Lent:
        """A connection for the caller, once it is this thread's turn.

        Raises:
            CheckoutTimeoutError: Another thread has it, and did not return it in time; or a bound left no room for it.
            SandboxError: It was lost, and with it what the sandbox had written.
        """
        thread, site = threading.current_thread(), CallSite()
        self._take_turn(thread, pool, site)
        try:
            record, outer = self._opened(pool)
            if self._is_untidy and not self._lent:
                outer.tidy()
                self._is_untidy = False
            with self._changed:
                if self._is_over:
                    self._check_usable()
                lent = Lent(pool, self, record, BoxedConnection.of(outer, pool.database), thread, site)
                self._lent.add(lent)
        except BaseException:
            self._end_turn(thread)
            raise
        return lent

    def take_back(self, lent: Lent) -> None:
        """Roll back what its borrower left open; then it is the next one's turn."""
        if lent not in self._lent:
            return
        try:
            self._leave(lent)
        finally:
            # Who has it still, detached or the driver's own, would be on a connection that is somebody else's by then.
            lent.boxed.abandon()
            self._end_turn(lent.thread, lent)

    def start_ending(self) -> None:
        """Begin to roll back, unless somebody has it. Nobody takes a connection here any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            outer, is_held = self._outer, bool(self._holders())
        if outer is None or is_held:
            return
        with suppress(psycopg.Error, SandboxError):  # it is closed then
            self._take_back_lost()
        if not self._lent and not outer.is_lost:
            outer.start_rollback(tidy=self._is_untidy)

    def end(self) -> list[str]:
        """Return the connection to the cache once all is rolled back; what was not as it should be."""
        record, outer = self._record, self._outer
        if record is None or outer is None or self.database is None:
            return []
        problems = [
            f"a connection is still in use; {lent.taken.thread} took it at {lent.taken.line}: leave its block, or "
            "close its session, before the sandbox ends"
            for lent in self._lent
            if lent.taken is not None
        ]
        problems += outer.problems()
        for lent in self._lent:
            lent.boxed.abandon()
        try:
            if self._lent or self._holders() or outer.is_lost:
                # Whoever has it may be using it at this moment: nobody else may get it.
                record.invalidate()
            else:
                problems += outer.finish_rollback()
                # All that was set in it was set in the transaction, and what outlives that was reset with it.
                record.vouched = not problems
        finally:
            record.give_back()
        return [f"{self.database.home}: {problem}" for problem in problems]

    # Whose turn it is

    def _take_turn(self, caller: threading.Thread, pool: LedgerPool, site: CallSite) -> None:
        begun = monotonic()
        latest = begun + pool.settings.checkout_timeout
        latest = min(latest, deadline.get() or latest)
        with self._changed:
            while others := self._holders() - {caller}:
                self._check_usable()
                left = latest - monotonic()
                if left <= 0:
                    raise self._timed_out(pool, min(others, key=str), site, monotonic() - begun)
                self._changed.wait(min(left, _LOOK))
            self._turns[caller] += 1

    def _holders(self) -> set[threading.Thread]:
        """The threads whose turn it is: not those that have ended, nor of those whose connections were collected."""
        lost = [lent.thread for lent in self._lent if lent.is_lost]
        return {
            thread for thread, count in list(self._turns.items()) if count > lost.count(thread) and thread.is_alive()
        }

    def _end_turn(self, thread: threading.Thread, lent: Lent | None = None) -> None:
        with self._changed:
            self._turns[thread] -= 1
            if not self._turns[thread]:
                del self._turns[thread]  # a sandbox may outlive many threads
            self._lent.discard(lent)
            self._changed.notify_all()

    def _timed_out(
        self, pool: LedgerPool, holder: threading.Thread, site: CallSite, seconds: float
    ) -> CheckoutTimeoutError:
        taken = next((str(lent.taken) for lent in self._lent if lent.thread is holder), "nobody knows where")
        frame = sys._current_frames().get(holder.ident or 0)
        now = "".join(traceback.format_stack(frame)) if frame is not None else "nobody knows where\n"
        return CheckoutTimeoutError(
            f"no connection to {pool.database.home} within {seconds:.1f} s: a sandbox has one of each database, and "
            f"{holder.name} has this one. Return it there first, by leaving the block or closing the session that has "
            f"it.\n\nTaken at:\n{taken}\n\nIts thread is at:\n{now}\nWanted at:\n{site}",
            database=pool.database,
            bounds={},
        )

    # The connection; whoever has the turn calls these

    def _opened(self, pool: LedgerPool) -> tuple[CachedConnection, Outer]:
        if pool.ledger.disposed:
            raise RepoDisposedError(f"{pool.database.home} is a disposed repo's: define a new one")
        if self._record is None or self._outer is None:
            opened = self._open(pool)
        elif self._outer.is_lost:
            raise SandboxError(f"the sandbox's connection to {pool.database.home} was lost: {LOST}")
        else:
            opened = self._record, self._outer
            if pool.database.key not in self._accepted:
                # Another user, password or option. It gets this connection only if the server would have it.
                pool.take_aside(Kind.TRANSIENT).give_back()
        self._accepted.add(pool.database.key)
        self._take_back_lost()
        return opened

    def _open(self, pool: LedgerPool) -> tuple[CachedConnection, Outer]:
        record = self._taken(pool)
        record.taken = None  # held for long by design, which is no leak
        real = connection_of(record)
        outer = Outer(real, check_deferred=self._check_deferred, patience=pool.settings.connect_timeout)
        with self._changed:
            if not self._is_over:
                self._record, self._outer, self.database = record, outer, pool.database
        if self._record is not record:
            # It was ended meanwhile, and nobody will do so again.
            record.give_back()
            self._check_usable()
        return record, outer

    def _taken(self, pool: LedgerPool) -> CachedConnection:
        token = on_behalf_of.set(self._borrower)
        try:
            return pool.take_aside(Kind.PINNED)
        except CheckoutTimeoutError as error:
            if not error.held:
                raise
            raise SandboxError(
                f"the sandbox has a connection to each of {', '.join(error.held)}, and there may be no other one, to "
                f"{pool.database.home}: raise {' or '.join(error.bounds)} for tests, or use fewer databases in this one"
            ) from error
        finally:
            on_behalf_of.reset(token)

    def _take_back_lost(self) -> None:
        for lent in [lent for lent in self._lent if lent.is_lost]:
            self.take_back(lent)

    def _leave(self, lent: Lent) -> None:
        """End the transaction of one who returns it, or is gone."""
        connection = lent.boxed
        self._is_untidy |= (connection.used and not lent.vouched) or connection.leaves_traces
        if not connection.outer.is_lost:
            connection.leave()


class Lent(CachedConnection):
    """A connection that a box has lent, as SQLAlchemy's pools see it."""

    __slots__ = ("box", "boxed", "is_lost", "thread")

    def __init__(
        self,
        pool: LedgerPool,
        box: Box,
        real: CachedConnection,
        boxed: BoxedConnection,
        thread: threading.Thread,
        site: CallSite,
    ) -> None:
        super().__init__(pool, real.entry, connect=False)
        self.box = box
        self.thread = thread
        # Whether its borrower was collected. Finalisers set it, and take no lock.
        self.is_lost = False
        self.taken = site
        self.dbapi_connection = self.boxed = boxed

    def get_connection(self) -> Any:
        # Never connects anew: that would lead out of the box.
        return self.boxed

    def give_back(self) -> None:
        self.box.take_back(self)
        self.pool.listeners.tell("checkin", self.pool.database, monotonic() - self.opened_at)

    def reclaimed(self) -> None:
        self.is_lost = True
