"""The first `get` on a database that the process has never seen, in a full cache, against a new connection.

Every call meets a database of its own, cloned for it. The Repo holds 20 idle connections to others, so that it
closes one before it connects; it made its first connection to the server, and knows the server, long before. The
reference is what cannot be left out: psycopg's connect, the same SELECT, close. Where libpq is 18 or later, the
Repo connects with the keys that SCRAM derives from the password, which a plain `connect` derives every time;
"psycopg, given the keys" is a reference that has them too, so that what the Repo itself adds is seen.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Iterator, Mapping

import psycopg
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from .ground import Ground, User
from .measure import Figure, Goal, MissingError, Skipped, interleave

REPO, RAW, KEYS, ENGINE = "Repo.get", "psycopg", "psycopg, given the keys", "create_engine and Session.get"

_ROUNDS = 60
_POOL_SIZE = 20
_SELECT = "SELECT id, name, email, age, city, note FROM users WHERE id = %s"


def run(ground: Ground) -> Iterator[Figure | Skipped]:
    takes_keys = psycopg.pq.version() >= 180000
    with ground.databases(_POOL_SIZE + (_ROUNDS + _ROUNDS // 10) * 4) as databases:
        unseen = iter(databases)
        repo = ground.repo(databases[0], _POOL_SIZE)

        def get() -> object:
            with repo.using(next(unseen)):
                return repo.get(User, 1)

        def engine() -> object:
            made = create_engine(ground.url(next(unseen)))
            try:
                with Session(made) as session:
                    return session.get(User, 1)
            finally:
                made.dispose()

        for _ in range(_POOL_SIZE):
            get()
        subjects = {REPO: get, RAW: _raw(ground, unseen, {"password": ground.server.password}), ENGINE: engine}
        if takes_keys:
            subjects[KEYS] = _raw(ground, unseen, _scram_keys(ground))
        timings = interleave(subjects, rounds=_ROUNDS, calls=1)
        evictions = repo.stats().evictions
    if evictions < _ROUNDS:
        raise MissingError(f"a full cache: {_ROUNDS} misses evicted {evictions} connections")
    yield timings.ratio(f"{REPO} over {RAW}: connect, select, close", REPO, RAW, Goal("≤", 1.25))
    if takes_keys:
        yield timings.ratio(f"{REPO} over {KEYS}", REPO, KEYS)
    else:
        yield Skipped(f"{REPO} over {KEYS}", f"libpq 18: this is {psycopg.pq.version()}")
    yield timings.ratio(f"{ENGINE}, over {RAW}", ENGINE, RAW)
    yield from map(timings.time, subjects)


def _raw(ground: Ground, unseen: Iterator[str], credentials: Mapping[str, str]) -> Callable[[], object]:
    server = ground.server
    address = {"host": server.host, "port": str(server.port), "user": server.username}

    def connect_select_close() -> object:
        conninfo = psycopg.conninfo.make_conninfo("", **address, **credentials, dbname=next(unseen))
        with psycopg.connect(conninfo, autocommit=True) as connection:
            return connection.execute(_SELECT, (1,)).fetchone()

    return connect_select_close


def _scram_keys(ground: Ground) -> dict[str, str]:
    """Derive the keys of RFC 5802 with the salt that the server keeps, SCRAM-SHA-256$rounds:salt$…"""
    with ground.server.connect() as connection:
        row = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = current_user").fetchone()
    assert row is not None
    rounds, salt = row[0].split("$")[1].split(":")
    salted = hashlib.pbkdf2_hmac("sha256", ground.server.password.encode(), base64.b64decode(salt), int(rounds))
    names = {"scram_client_key": b"Client Key", "scram_server_key": b"Server Key"}
    return {name: base64.b64encode(hmac.digest(salted, of, "sha256")).decode() for name, of in names.items()}
