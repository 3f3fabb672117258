"""One database in a sandbox: its only connection, and whose turn it is to have that.

One thread at a time has it, from its first checkout to its last return, and may take it several times over.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from time import monotonic
from typing import Any, Final

from .boxed import BoxedConnection, Outer
from .calls import deadline
from .callsite import CallSite
from .database import Database
from .entries import Kind
from .errors import CheckoutTimeoutError, RepoDisposedError, SandboxError
from .pool import CachedConnection, LedgerPool, connection_of, on_behalf_of

# Seconds between two looks for a connection whose holder is gone, which nobody tells of.
_LOOK: Final = 0.05

_LOST: Final = "what this test had written there is gone. Do what ends connections in sandbox.unboxed(...)"


class Box:
    """The connection of one database in a sandbox. Opened when it is first wanted.

    Args:
        borrower: Whose it is, in the books of the cache.
        check_deferred: Whether deferred constraints are checked where a transaction would be committed.

    Attributes:
        database: Where it leads, once it was opened; None before.
    """

    def __init__(self, borrower: object, check_deferred: bool) -> None:
        self.database: Database | None = None
        self._check_deferred = check_deferred
        self._borrower = borrower
        self._record: CachedConnection | None = None
        self._outer: Outer | None = None
        # Keys of the cache whose users and passwords the server has accepted.
        self._accepted: set[object] = set()
        # Guards what follows: no I/O happens under it.
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None
        self._held = 0
        self._lent: set[Lent] = set()
        # Those whose holders were collected; finalisers append, and take no lock.
        self._lost: deque[Lent] = deque()
        self._is_untidy = False

    def lend(self, pool: LedgerPool) -> Lent:
        """A connection for the caller, once it is this thread's turn.

        Raises:
            CheckoutTimeoutError: Another thread has it, and did not return it in time; or a bound left no room for it.
            SandboxError: It was lost, and with it what the sandbox had written.
        """
        site = CallSite()
        self._take_turn(pool, site)
        try:
            record, outer = self._opened(pool)
            lent = Lent(pool, self, record, BoxedConnection.of(outer, pool.database), site)
        except BaseException:
            self._end_turn()
            raise
        self._lent.add(lent)
        return lent

    def take_back(self, lent: Lent) -> None:
        """Roll back what its borrower left open, and undo what SQL has set; then it is the next one's turn."""
        if lent not in self._lent:
            return
        try:
            self._leave(lent)
            if self._is_untidy and len(self._lent) == 1 and not lent.outer.is_lost:
                lent.outer.tidy()
                self._is_untidy = False
        finally:
            # Who has it still, detached or the driver's own, would be on a connection that is somebody else's by then.
            lent.boxed.abandon()
            self._lent.discard(lent)
            self._end_turn()

    def reclaimed(self, lent: Lent) -> None:
        """Its borrower is gone. Takes no lock: finalisers call this."""
        self._lost.append(lent)

    def start_ending(self) -> None:
        """Begin to roll back. Nobody takes a connection here any more."""
        while self._lost:
            self._leave(self._lost[0])
            self._lent.discard(self._lost.popleft())
        if self._outer is not None and not self._lent and not self._outer.is_lost:
            self._outer.start_rollback()

    def end(self) -> list[str]:
        """Return the connection to the cache once all is rolled back; what was not as it should be."""
        record, outer, where = self._record, self._outer, self.database
        if record is None or outer is None or where is None:
            return []
        problems = [f"{where.home}: {problem}" for problem in self._problems(outer)]
        for lent in self._lent:
            lent.boxed.abandon()
        if self._lent or outer.is_lost:
            # Whoever has it may be using it at this moment: nobody else may get it.
            record.invalidate()
        else:
            outer.finish_rollback()
            # All that was set in it was set in the transaction, or reset when it was returned.
            record.vouched = True
        record.give_back()
        return problems

    def _problems(self, outer: Outer) -> list[str]:
        problems = [
            f"a connection is still in use; {lent.taken.thread} took it at {lent.taken.line}: leave its block, or "
            "close its session, before the sandbox ends"
            for lent in self._lent
            if lent.taken is not None
        ]
        if outer.is_lost:
            problems.append(f"its connection was lost: {_LOST}")
        problems += [
            f"the transaction was ended by hand at {line}: what had been written until then may be there for good; let "
            "`with repo.transaction():` do it, or use sandbox.unboxed(...)"
            for line in outer.ended_by_hand
        ]
        if outer.levels.has_undone:
            problems.append(
                "what one unit of work had committed was undone when another one, begun before it, was rolled back: "
                "they share one connection here. Let them end in the order of a stack, or use sandbox.unboxed(...)"
            )
        return problems

    # Whose turn it is

    def _take_turn(self, pool: LedgerPool, site: CallSite) -> None:
        caller, begun = threading.current_thread(), monotonic()
        latest = begun + pool.settings.checkout_timeout
        latest = min(latest, deadline.get() or latest)
        with self._changed:
            while not self._is_free_for(caller):
                left = latest - monotonic()
                if left <= 0:
                    raise self._timed_out(pool, site, monotonic() - begun)
                self._changed.wait(min(left, _LOOK))
            self._holder = caller
            self._held += 1

    def _is_free_for(self, caller: threading.Thread) -> bool:
        active = self._held - len(self._lost)
        return active == 0 or self._holder is caller or self._holder is None or not self._holder.is_alive()

    def _end_turn(self) -> None:
        with self._changed:
            self._held -= 1
            if self._held == 0:
                self._holder = None
            self._changed.notify_all()

    def _timed_out(self, pool: LedgerPool, site: CallSite, seconds: float) -> CheckoutTimeoutError:
        holder = self._holder
        taken = next((str(lent.taken) for lent in list(self._lent)), "nobody knows where")
        frame = None if holder is None else sys._current_frames().get(holder.ident or 0)
        now = "".join(traceback.format_stack(frame)) if frame is not None else "nobody knows where\n"
        return CheckoutTimeoutError(
            f"no connection to {pool.database.home} within {seconds:.1f} s: a sandbox has one of each database, and "
            f"{holder.name if holder is not None else 'a thread'} has this one. Return it there first, by leaving the "
            f"block or closing the session that has it.\n\nTaken at:\n{taken}\n\nIts thread is at:\n{now}\n"
            f"Wanted at:\n{site}",
            database=pool.database,
            bounds={},
        )

    # The connection; whoever has the turn calls these

    def _opened(self, pool: LedgerPool) -> tuple[CachedConnection, Outer]:
        if pool.ledger.disposed:
            raise RepoDisposedError(f"{pool.database.home} is a disposed repo's: define a new one")
        if self._record is None or self._outer is None:
            self._record = record = self._open(pool)
            self._outer = Outer(connection_of(record), check_deferred=self._check_deferred)
            self.database = pool.database
        elif self._outer.is_lost:
            raise SandboxError(f"the sandbox's connection to {pool.database.home} was lost: {_LOST}")
        elif pool.database.key not in self._accepted:
            # Another user, password or option. It gets this connection only if the server would have it.
            pool.take_aside(Kind.TRANSIENT).give_back()
        self._accepted.add(pool.database.key)
        while self._lost:
            self.take_back(self._lost.popleft())
        return self._record, self._outer

    def _open(self, pool: LedgerPool) -> CachedConnection:
        token = on_behalf_of.set(self._borrower)
        try:
            record = pool.take_aside(Kind.PINNED)
        except CheckoutTimeoutError as error:
            if not error.held:
                raise
            raise SandboxError(
                f"the sandbox has a connection to each of {', '.join(error.held)}, and there may be no other one, to "
                f"{pool.database.home}: raise {' or '.join(error.bounds)} for tests, or use fewer databases in this one"
            ) from error
        finally:
            on_behalf_of.reset(token)
        record.taken = None  # held for long by design, which is no leak
        return record

    def _leave(self, lent: Lent) -> None:
        """End the transaction of one who returns it, or is gone."""
        connection = lent.boxed
        self._is_untidy |= (connection.used and not lent.vouched) or connection.leaves_traces
        if not lent.outer.is_lost:
            connection.leave()


class Lent(CachedConnection):
    """A connection that a box has lent, as SQLAlchemy's pools see it."""

    __slots__ = ("box", "boxed")

    def __init__(
        self, pool: LedgerPool, box: Box, real: CachedConnection, boxed: BoxedConnection, site: CallSite
    ) -> None:
        super().__init__(pool, real.entry, connect=False)
        self.box = box
        self.taken = site
        self.dbapi_connection = self.boxed = boxed

    @property
    def outer(self) -> Outer:
        """The transaction that its own lie in."""
        return self.boxed.outer

    def get_connection(self) -> Any:
        # Never connects anew: that would lead out of the box.
        return self.boxed

    def give_back(self) -> None:
        self.box.take_back(self)
        self.pool.listeners.tell("checkin", self.pool.database, monotonic() - self.opened_at)

    def reclaimed(self) -> None:
        self.box.reclaimed(self)
