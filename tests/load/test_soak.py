"""The main job while everything fails: no row goes astray, none is lost, and service comes back by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy.engine import URL

from benchmarks.soak import EXPECTED, FAULTS, Result, Soak
from shardrepo.demo.load import Plan
from shardrepo.testing.servers import Servers

OPERATIONS = 20_000

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def result(servers: Servers, urls: Sequence[URL]) -> Result:
    """The soak, run once for all tests of this module. Threads try so many operations; some of them fail."""
    plan = Plan(threads=12, think=0.005, seconds=None, operations=OPERATIONS)
    result = Soak(servers, urls, plan).run()
    print(result)
    return result


def test_everything_has_failed(result: Result) -> None:
    """Every kind of fault happened at least once, and callers were told of it in the ways that they may expect."""
    assert set(result.faults) == set(FAULTS)
    assert set(result.errors) <= EXPECTED
    assert result.errors.total() > 0
    assert result.operations + result.errors.total() == OPERATIONS


def test_no_row_is_wrong(result: Result) -> None:
    """Whatever was read or written is in the database that was meant."""
    assert (result.wrong, result.strays) == (0, 0)
    assert result.rows > OPERATIONS * 0.8


def test_no_write_is_lost_or_doubled(result: Result) -> None:
    """What was said to be inserted is there once; what may or may not have been is there once at most."""
    assert result.misplaced == {}


def test_nothing_stays_broken(result: Result) -> None:
    """After each fault its server is of use again; at the end nothing is open but what is idle."""
    assert result.broken == []
