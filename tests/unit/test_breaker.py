"""When a server counts as down, and who tries whether it is back."""

from __future__ import annotations

import pytest

from shardrepo.breaker import Breaker, Outage, Verdict

ANSWERED, REFUSED, TIMED_OUT, UNKNOWN = Verdict


class Servers:
    """A breaker with a clock to be moved, and connects that end as they are told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.breaker = Breaker(lambda: self.now)

    def connect(self, verdict: Verdict, server: str = "db01") -> None:
        self.breaker.end(server, verdict, self.breaker.begin(server), verdict.name)

    def is_down(self, server: str = "db01") -> bool:
        return self.breaker.outage(server) is not None


@pytest.fixture
def servers() -> Servers:
    return Servers()


def test_one_refusal_is_enough(servers: Servers) -> None:
    """Who is refused has an answer that others would get too; of other servers it says nothing."""
    servers.connect(REFUSED)
    assert servers.is_down()
    assert not servers.is_down("db02")


def test_three_timeouts_in_a_row(servers: Servers) -> None:
    """A slow answer may be chance, twice."""
    for _ in range(2):
        servers.connect(TIMED_OUT)
        assert not servers.is_down()
    servers.connect(TIMED_OUT)
    assert servers.is_down()


def test_an_answer_ends_the_row(servers: Servers) -> None:
    """Timeouts count from the last answer on."""
    for verdict in (TIMED_OUT, TIMED_OUT, ANSWERED, TIMED_OUT, TIMED_OUT):
        servers.connect(verdict)
    assert not servers.is_down()


def test_what_says_nothing_changes_nothing(servers: Servers) -> None:
    """A connect that was interrupted neither counts nor ends the row."""
    for verdict in (TIMED_OUT, UNKNOWN, TIMED_OUT, UNKNOWN):
        servers.connect(verdict)
    assert not servers.is_down()
    servers.connect(TIMED_OUT)
    assert servers.is_down()


def test_probes_are_further_and_further_apart(servers: Servers) -> None:
    """The first may go after a tenth of a second; later ones after twice as long each, up to two."""
    servers.connect(REFUSED)
    waited = []
    for _ in range(7):
        outage = servers.breaker.outage("db01")
        assert outage is not None
        waited.append(round(outage.retry_at - servers.now, 6))
        servers.now = outage.retry_at
        assert not servers.is_down()
        servers.connect(REFUSED)
    assert waited == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_one_probe_at_a_time(servers: Servers) -> None:
    """While one tries, the others fail, however long it takes; an answer ends the outage."""
    servers.connect(REFUSED)
    servers.now = 0.1
    probe = servers.breaker.begin("db01")
    servers.now = 60
    assert servers.is_down()
    servers.breaker.end("db01", ANSWERED, probe)
    assert not servers.is_down()


def test_a_probe_that_was_interrupted_is_due_again(servers: Servers) -> None:
    """It has shown nothing: the next caller tries."""
    servers.connect(REFUSED)
    servers.now = 0.1
    servers.connect(UNKNOWN)
    assert not servers.is_down()


def test_a_connect_that_was_under_way_ends_the_outage_when_answered(servers: Servers) -> None:
    """Whoever is answered shows that the server is back, probe or not."""
    earlier = servers.breaker.begin("db01")
    servers.connect(REFUSED)
    servers.breaker.end("db01", ANSWERED, earlier)
    assert not servers.is_down()


def test_a_connect_that_was_under_way_does_not_put_off_the_probe(servers: Servers) -> None:
    """Many that fail at the same time count once."""
    under_way = [servers.breaker.begin("db01") for _ in range(9)]
    for probed in under_way:
        servers.breaker.end("db01", REFUSED, probed)
    servers.now = 0.1
    assert not servers.is_down()


def test_an_old_probe_is_not_taken_for_the_new(servers: Servers) -> None:
    """One that ends after its outage lets no second probe go beside that of the next."""
    servers.connect(REFUSED)
    servers.now = 0.1
    old = servers.breaker.begin("db01")
    servers.breaker.end("db01", ANSWERED, None)
    servers.connect(REFUSED)
    servers.now = 0.2
    new = servers.breaker.begin("db01")
    assert isinstance(new, Outage)
    assert new is not old
    servers.breaker.end("db01", REFUSED, old)
    servers.now = 60
    assert servers.is_down()


def test_the_last_cause_is_known(servers: Servers) -> None:
    """Whoever fails without a try is told why the last one failed."""
    servers.connect(REFUSED)
    servers.now = 0.1
    servers.connect(TIMED_OUT)
    outage = servers.breaker.outage("db01")
    assert outage is not None
    assert outage.cause == "TIMED_OUT"


def test_nothing_is_kept_of_a_server_that_answers(servers: Servers) -> None:
    """What has failed once and answers again leaves no trace."""
    for number in range(100):
        for verdict in (TIMED_OUT, ANSWERED, REFUSED, ANSWERED):
            servers.connect(verdict, f"db{number}")
    assert (servers.breaker._outages, dict(servers.breaker._timeouts)) == ({}, {})
