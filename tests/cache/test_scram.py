"""The keys that SCRAM derives from a password are derived once, and never let anybody in who has another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg import pq
from psycopg.sql import SQL, Literal

from shardrepo import AuthenticationError, Repo, UnknownDatabaseError
from shardrepo.testing.servers import Server

from ..models import Tag

pytestmark = pytest.mark.cache

takes_keys = pq.version() >= 180000


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """A role of its own, whose password is "first"."""
    with server.connect() as connection:
        connection.execute("CREATE ROLE keyed LOGIN SUPERUSER PASSWORD 'first'")
        yield "keyed"
        connection.execute("DROP ROLE keyed")


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The passwords that keys were derived from."""
    passwords: list[bytes] = []
    derive = hashlib.pbkdf2_hmac

    def remember(name: str, password: bytes, *rest: Any) -> bytes:
        passwords.append(password)
        return derive(name, password, *rest)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", remember)
    return passwords


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each connect that was traced: psycopg's connections take no patch, but a trace needs a file."""
    names: list[str] = []
    make = os.memfd_create

    def remember(name: str) -> int:
        names.append(name)
        return make(name)

    monkeypatch.setattr(os, "memfd_create", remember)
    return names


def alter(server: Server, password: str) -> None:
    with server.connect() as connection:
        connection.execute(SQL("ALTER ROLE keyed PASSWORD {}").format(Literal(password)))


def test_keys_are_derived_once_for_all_databases(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], role: str, derived: list[bytes]
) -> None:
    """Connecting to several databases of a server as one role derives the keys at the first, and uses them after."""
    names = make_databases(3)
    repo = make_repo(names[0])
    for name in names:
        with repo.using(database=name, username=role, password="first"):
            assert repo.count(Tag) == 0
    assert derived == ([b"first"] if takes_keys else [])


def test_known_keys_let_no_wrong_password_in(make_repo: Callable[..., type[Repo]], database: str, role: str) -> None:
    """After the right password has been used, a wrong one is refused, and the right one still works."""
    repo = make_repo(database)
    with repo.using(username=role, password="first"):
        repo.ping()
    with repo.using(username=role, password="wrong"), pytest.raises(AuthenticationError):
        repo.ping()
    with repo.using(username=role, password="first"):
        repo.ping()


def test_keys_that_went_stale_are_derived_again(
    make_repo: Callable[..., type[Repo]], database: str, server: Server, role: str, derived: list[bytes]
) -> None:
    """Set again, the same password has another salt: the first connect after that goes through, with new keys."""
    repo = make_repo(database)
    with repo.using(username=role, password="first"):
        repo.ping()
        alter(server, "first")
        repo.ping()
        repo.ping()
    assert derived == ([b"first", b"first"] if takes_keys else [])


@pytest.mark.parametrize("password", ["first", "pässwörd"])
def test_only_the_first_connect_is_traced(
    make_repo: Callable[..., type[Repo]],
    database: str,
    server: Server,
    role: str,
    password: str,
    traces: list[str],
) -> None:
    """A trace costs memory that nobody gets back: a role that is known is connected without one, keys or no keys."""
    alter(server, password)
    repo = make_repo(database)
    with repo.using(username=role, password=password):
        repo.ping()
        traces.clear()
        for _ in range(20):
            repo.ping()
        assert traces == []
        alter(server, password)
        repo.ping()
        assert len(traces) == (1 if takes_keys and password.isascii() else 0)


def test_keys_that_have_grown_stale_are_not_taken_for_a_wrong_password(
    make_repo: Callable[..., type[Repo]], database: str, server: Server, role: str
) -> None:
    """A wrong password that has just been refused says nothing of another one, whose keys the server has replaced."""
    repo = make_repo(database)
    alter(server, "first")
    with repo.using(username=role, password="first"):
        repo.ping()
    alter(server, "second")
    with repo.using(username=role, password="third"), pytest.raises(AuthenticationError):
        repo.ping()
    alter(server, "first")
    with repo.using(username=role, password="first"):
        repo.ping()


def test_what_fails_again_is_not_traced_again(
    make_repo: Callable[..., type[Repo]], database: str, traces: list[str]
) -> None:
    """The reason of a failed connect is that of the next ones in the same words, and each of them has it."""
    repo = make_repo(database)
    repo.ping()
    for name in ("absent1", "absent2"):
        traces.clear()
        with repo.using(name):
            for _ in range(3):
                with pytest.raises(UnknownDatabaseError) as caught:
                    repo.ping()
                assert caught.value.sqlstate == "3D000"
        assert len(traces) == 1


@pytest.mark.parametrize("password", ["first", "pässwörd"])
def test_visits_to_many_databases_are_not_traced(
    make_repo: Callable[..., type[Repo]],
    make_databases: Callable[..., list[str]],
    server: Server,
    role: str,
    password: str,
    traces: list[str],
) -> None:
    """What one database's first connect has learned holds for all of the server, new ones too: evicted and opened
    again, they are connected without a trace, which would cost each visit some 4 KiB for good."""
    alter(server, password)
    first, *others = make_databases(5)
    repo = make_repo(first, pool_size=1)
    with repo.using(username=role, password=password):
        repo.count(Tag)
    traces.clear()
    for name in others * 5:
        with repo.using(database=name, username=role, password=password):
            repo.count(Tag)
    assert repo.stats().evictions == 20
    assert traces == []


def test_an_old_password_is_refused_after_a_rotation(
    make_repo: Callable[..., type[Repo]], database: str, server: Server, role: str
) -> None:
    """Its keys are known, and worth nothing any more; the new password works at once."""
    repo = make_repo(database)
    with repo.using(username=role, password="first"):
        repo.ping()
        alter(server, "second")
        with pytest.raises(AuthenticationError):
            repo.ping()
    with repo.using(username=role, password="second"):
        repo.ping()


def test_a_password_that_is_not_ascii(
    make_repo: Callable[..., type[Repo]], database: str, server: Server, role: str, derived: list[bytes]
) -> None:
    """It is normalised by libpq alone: no key is derived here, and connects go on with the password."""
    alter(server, "pässwörd'\\")
    repo = make_repo(database)
    with repo.using(username=role, password="pässwörd'\\"):
        repo.ping()
        repo.ping()
    assert derived == []
