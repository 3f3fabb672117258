"""Which databases of a fleet are meant, and what is said where none is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from shardrepo import Repo
from shardrepo.database import Database
from shardrepo.errors import ConfigError, UnknownDatabaseError
from shardrepo.fleet.members import ALL, Member, Selection, _selected, members

DOWN = {"db09:5432": OSError("down")}


def member(name: str, host: str = "db01", *tags: str, port: int = 5432) -> Member:
    return Member(name, Database(host, port, name), tags=frozenset(tags))


def refused(where: Selection, found: Sequence[Member], failures: dict[str, Exception] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        _selected(where, found, failures or {})
    return str(caught.value)


# What is meant


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (ALL, True),
        (Selection(match=("shard0*",)), True),
        (Selection(match=("x*", "*1")), True),
        (Selection(match=("SHARD*",)), False),
        (Selection(servers=("db01",)), True),
        (Selection(servers=("DB01:5432",)), True),
        (Selection(servers=("db01:5433",)), False),
        (Selection(servers=("db0",)), False),
        (Selection(tags=("eu",)), True),
        (Selection(tags=("eu", "big")), True),
        (Selection(tags=("eu", "us")), False),
        (Selection(match=("shard*",), servers=("db02",)), False),
    ],
)
def test_what_is_admitted(where: Selection, expected: bool) -> None:
    """One of the patterns, one of the servers, and all of the tags."""
    assert where.admits(member("shard01", "db01", "eu", "big")) is expected


@pytest.mark.parametrize(
    ("host", "given"),
    [("::1", "::1"), ("::1", "[::1]"), ("::1", "[::1]:5432"), ("/run/PG", "/run/PG"), ("/run/PG", "/run/PG:5432")],
)
def test_servers_that_are_no_names(host: str, given: str) -> None:
    """IPv6 addresses, in brackets or not, and folders of sockets."""
    assert Selection(servers=(given,)).reaches(Database(host, 5432, "x").server)


@pytest.mark.parametrize("name", ["names", "match", "servers", "tags"])
@pytest.mark.parametrize("given", ["shard0*", ["a"], ("a", ""), (1,), None])
def test_what_is_no_selection(name: str, given: Any) -> None:
    """A text, of which one character would be a pattern for all, is refused."""
    with pytest.raises(ConfigError, match=f"{name} of a selection is a tuple of texts"):
        Selection(**{name: given})


def test_a_selection_on_paper() -> None:
    """It is read as it was written; one that leaves nothing out is known."""
    where = Selection(("a",), ("b*",), ("c",), ("d",))
    assert Selection.of(where.as_dict()) == where
    assert (where.is_all, ALL.is_all, Selection.of(ALL.as_dict())) == (False, True, ALL)


# Nothing is meant


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (Selection(match=("x*",)), "match=x* selects none of 2 databases, the first of which is 'shard01'"),
        (Selection(servers=("db03",)), "servers=db03 selects none of 2 databases: did you mean 'db02'?"),
        (Selection(servers=("db01:5433",)), "did you mean 'db01:5432'?"),
        (Selection(servers=("zzz",)), ": known are db01, db01:5432, db02, db02:5432"),
        (Selection(tags=("us",)), "tags=us selects none of 2 databases: known are eu"),
        (Selection(tags=("eus",)), "did you mean 'eu'?"),
        (Selection(match=("*1",), tags=("eu",)), "match=*1, tags=eu selects none of 2 databases, the first"),
    ],
)
def test_what_may_have_been_meant(where: Selection, said: str) -> None:
    """A server or tag that nobody has is told with the nearest one, or with those that there are."""
    assert said in refused(where, [member("shard01"), member("shard02", "db02", "eu")])


def test_a_server_that_nobody_has_while_another_is_down() -> None:
    """What could not be listed is no excuse: the mistake is told, and not taken for an empty fleet."""
    where = Selection(servers=("db03",))
    assert "servers=db03 selects none of 1 databases: did you mean 'db0" in refused(where, [member("a")], dict(DOWN))
    assert "selects none of 0 databases: did you mean 'db09'?" in refused(where, [], dict(DOWN))


def test_what_could_not_be_listed() -> None:
    """It is told of servers that are meant, where nothing else may be found; of no others."""
    found = [member("shard01")]
    nothing = _selected(Selection(servers=("db09",)), found, DOWN)
    assert (nothing.found, nothing.failures) == ([], DOWN)
    rest = _selected(Selection(servers=("db01",)), found, DOWN)
    assert (rest.found, rest.failures) == (found, {})
    assert [type(each).__name__ for each in _selected(ALL, found, DOWN).targets()] == ["Outcome", "Target"]


def test_a_fleet_of_none() -> None:
    """An empty directory is no mistake."""
    assert _selected(ALL, [], {}).targets() == []


# From a repo


class App(
    Repo,
    config={
        "url": "postgresql+psycopg://db01/postgres",
        "template_database": "shard02",
        "directory": {"shard01": {"host": "db01", "tags": ["eu"]}, "shard02": {"host": "db02"}, "shard03": "db03"},
    },
):
    """A repo that never connects."""


def test_members_of_a_repo() -> None:
    """All that the directory lists, in its order, but for the template; also that if it is named."""
    assert [(each.name, each.database.host, each.tags) for each in members(App).found] == [
        ("shard01", "db01", frozenset({"eu"})),
        ("shard03", "db03", frozenset()),
    ]
    named = members(App, Selection(("shard03", "shard02", "shard03")))
    assert [each.name for each in named.found] == ["shard03", "shard02"]


def test_names_that_the_directory_does_not_know() -> None:
    """All of them are told at once."""
    with pytest.raises(UnknownDatabaseError, match="knows no database 'x', 'y': check the spelling"):
        members(App, Selection(("x", "shard01", "y")))
