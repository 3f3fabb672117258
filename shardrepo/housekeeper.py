"""What a cache does while nobody asks: it closes what has grown old, and warns of what is held too long."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Final

from .pool import Books, CachedConnection, carry_out, holder, tell_closed

logger: Final = logging.getLogger("shardrepo.pool")

# Seconds between two looks, at most; and the part of the shortest age after which to look, at least.
INTERVAL: Final = 1.0
PART: Final = 0.25

# Closings that may wait for listeners to be told of them.
MAX_UNTOLD: Final = 1000

# Seconds for which more connections than the target have to be busy before that is worth a warning.
OVER_TARGET: Final = 1.0


class Housekeeper:
    """One daemon thread per cache, from the first connection until the ledger, which it holds weakly, is done with.

    Args:
        ledger: The books to look after.
        warn_after: Seconds after which a connection that is still held is logged; None for never.
    """

    def __init__(self, ledger: Books, warn_after: float | None) -> None:
        # Of all queues the one into which a finaliser may put something.
        self._end: SimpleQueue[None] = SimpleQueue()
        end = self._end
        self._ledger = weakref.ref(ledger, lambda _: end.put(None))
        self._warn_after = warn_after
        ages = (ledger.ages.idle_timeout, ledger.ages.max_lifetime, warn_after or INTERVAL)
        self._interval = min(INTERVAL, PART * min(ages))
        self._thread: threading.Thread | None = None
        self._teller: threading.Thread | None = None
        # What was closed and nobody was told of yet; the oldest are dropped when those who listen take too long.
        self._untold: deque[CachedConnection] = deque(maxlen=MAX_UNTOLD)
        self._warned_of_target = False

    def attend(self) -> None:
        """Start the thread unless it runs: it does not in a forked child."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="shardrepo-housekeeper", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                return self._end.get(timeout=self._interval)
            except Empty:
                ledger = self._ledger()
                if ledger is None:
                    return None
                self._look_after(ledger)
                if ledger.disposed and not ledger.loans():
                    return None
                del ledger

    def _look_after(self, ledger: Books) -> None:
        try:
            self._tell(carry_out(ledger, ledger.sweep()))
            self._warn_of_leaks(ledger)
            self._warn_of_target(ledger)
        except Exception:
            logger.exception("the cache could not be looked after; the next try is in %s s", self._interval)

    def _tell(self, closed: Sequence[CachedConnection]) -> None:
        """Tell who listens, in a thread that they may hold up for as long as they like."""
        if not any(record.pool.listeners.close or record.pool.listeners.evict for record in closed):
            tell_closed(closed)
        else:
            if (dropped := len(self._untold) + len(closed) - MAX_UNTOLD) > 0:
                logger.warning("a listener takes too long: nobody is told that %d connections were closed", dropped)
            self._untold.extend(closed)
        if self._untold and (self._teller is None or not self._teller.is_alive()):
            self._teller = threading.Thread(target=self._tell_untold, name="shardrepo-teller", daemon=True)
            self._teller.start()

    def _tell_untold(self) -> None:
        while self._untold:
            tell_closed([self._untold.popleft()])

    def _warn_of_leaks(self, ledger: Books) -> None:
        if self._warn_after is None:
            return
        for entry, seconds in ledger.loans():
            record = entry.connection
            if seconds < self._warn_after or record is None or record.taken is None or record.warned:
                continue
            record.warned = True
            database = record.pool.database
            logger.warning(
                "a connection to %s has been held for %.1f s by %s, and was taken here:\n%s",
                database.home,
                seconds,
                holder(entry),
                record.taken,
                extra=record.pool.listeners.labels(database),
            )

    def _warn_of_target(self, ledger: Books) -> None:
        stats = ledger.stats()
        if stats.over_target < OVER_TARGET:
            self._warned_of_target = False
        elif not self._warned_of_target:
            self._warned_of_target = True
            logger.warning(
                "for %.1f s, %d connections have been busy at a time, above pool_size=%d: nothing is kept meanwhile. "
                "Raise pool_size to the connections that are busy at peak, and the databases to keep warm",
                stats.over_target,
                stats.in_use + stats.connecting,
                stats.pool_size,
            )
