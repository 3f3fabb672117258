"""Failing fast: to a server that does not answer, nobody connects but one probe at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

# As many connects to a server as may time out, one after the other, before it counts as down.
MAX_TIMEOUTS: Final = 3

# Seconds from one probe to the next: doubled from the first to the last.
FIRST_DELAY: Final = 0.1
LAST_DELAY: Final = 2.0


class Verdict(Enum):
    """What a connect says about the server. ANSWERED is also a refusal of this user or database alone."""

    ANSWERED = auto()
    REFUSED = auto()
    TIMED_OUT = auto()
    UNKNOWN = auto()


@dataclass(slots=True)
class Outage:
    """A server that is down: why, and when the next probe may try it."""

    cause: str
    retry_at: float
    delay: float = FIRST_DELAY
    probing: bool = False


class Breaker:
    """Which servers are down. Part of a ledger's books: used under its lock.

    A server is down from one refusal, or from `MAX_TIMEOUTS` timeouts in a row, until a connect is answered.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Of those servers alone of which there is something to say.
        self._timeouts: Counter[Hashable] = Counter()
        self._outages: dict[Hashable, Outage] = {}

    def outage(self, server: Hashable) -> Outage | None:
        """What keeps callers from connecting to *server* now; None if one may."""
        outage = self._outages.get(server)
        if outage is None or (not outage.probing and self._clock() >= outage.retry_at):
            return None
        return outage

    def begin(self, server: Hashable) -> Outage | None:
        """A connect begins. Returns the outage whose probe it is, None if the server is not down."""
        outage = self._outages.get(server)
        if outage is not None:
            outage.probing = True
        return outage

    def end(self, server: Hashable, verdict: Verdict, probed: Outage | None, cause: str = "") -> None:
        """A connect has ended, which *probed* an outage if it was its probe."""
        outage = self._outages.get(server)
        if outage is not None and outage is probed:
            outage.probing = False
        if verdict is Verdict.ANSWERED:
            self._timeouts.pop(server, None)
            self._outages.pop(server, None)
        elif verdict is Verdict.UNKNOWN:
            pass
        elif outage is not None:
            if outage is probed:
                outage.cause = cause
                outage.delay = min(2 * outage.delay, LAST_DELAY)
                outage.retry_at = self._clock() + outage.delay
        elif verdict is Verdict.TIMED_OUT and self._timeouts[server] + 1 < MAX_TIMEOUTS:
            self._timeouts[server] += 1
        else:
            self._timeouts.pop(server, None)
            self._outages[server] = Outage(cause, self._clock() + FIRST_DELAY)
