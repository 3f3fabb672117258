"""Results as they are wanted, from a cursor that the server keeps."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import joinedload, selectinload

from shardrepo import Repo, TransactionDoomedError, TransactionOwnerError
from shardrepo.testing.servers import Server

from ..conftest import LONG, SQL, await_, run_sql
from ..models import Post, Tag, User

pytestmark = pytest.mark.verbs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _rows(sql: SQL) -> None:
    sql("INSERT INTO tags (label) SELECT 'n' || n FROM generate_series(1, 1200) n")
    sql("INSERT INTO users (name, age) VALUES ('Ada', 1), ('Bob', 2)")
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1), ('y', 1), ('z', 2)")


@pytest.mark.parametrize("batch", [1, 7, 500, 5000])
def test_everything_comes_once(repo: type[Repo], batch: int) -> None:
    """Objects in the query's order, detached and at home, whatever the batch."""
    with repo.stream(select(Tag).where(Tag.id <= 1200).order_by(Tag.id), batch=batch) as tags:
        found = [(tag.id, inspect(tag).detached, repo.home(tag)) for tag in tags]
    assert found == [(key, True, repo.get_database().home) for key in range(1, 1201)]
    assert repo.stats().in_use == 0


def test_columns(repo: type[Repo]) -> None:
    """One column gives values, several give rows."""
    with repo.stream(select(func.generate_series(1, 3))) as numbers:
        assert list(numbers) == [1, 2, 3]
    with repo.stream(select(User.id, User.name).order_by(User.id)) as rows:
        assert [tuple(row) for row in rows] == [(1, "Ada"), (2, "Bob")]


def test_it_fetches_what_is_wanted(repo: type[Repo], server: Server) -> None:
    """The server has sent no more than is asked for, and its cursor is gone when the block is left half way."""
    cursors = text("SELECT count(*) FROM pg_cursors")
    with repo.transaction():
        with repo.stream(select(Tag).order_by(Tag.id), batch=10) as tags:
            assert next(tags).label == "n1"
            assert repo.execute(cursors).scalar_one() == 1
        assert repo.execute(cursors).scalar_one() == 0
        assert repo.count(Tag) == 1200


def test_what_is_loaded_along(repo: type[Repo]) -> None:
    """Loader options work batch by batch; a join that multiplies rows cannot be taken apart, and is refused."""
    query = select(User).order_by(User.id)
    with repo.stream(query, batch=1, options=[selectinload(User.posts).selectinload(Post.tags)]) as users:
        assert [len(user.posts) for user in users] == [2, 1]
    with (
        repo.stream(query, options=[joinedload(User.posts)]) as users,
        pytest.raises(InvalidRequestError, match="yield"),
    ):
        list(users)


def test_it_only_reads(repo: type[Repo], sql: SQL) -> None:
    """Outside a transaction it has one of its own, in which the server refuses to write."""
    with repo.stream(select(func.setval("tags_id_seq", 5))) as values, pytest.raises(DBAPIError) as caught:
        list(values)
    assert isinstance(caught.value.orig, ReadOnlySqlTransaction)
    assert f"database: {repo.get_database().home}" in caught.value.__notes__
    repo.insert(Tag(label="written"))  # the next borrower of the connection may


def test_it_is_one_snapshot_of_its_own(repo: type[Repo]) -> None:
    """What is written meanwhile, by verbs on other connections, makes no difference to it."""
    with repo.stream(select(Tag).order_by(Tag.id), batch=100) as tags:
        next(tags)
        assert repo.stats().in_use == 1
        repo.insert(Tag(label="late"))
        assert sum(1 for _ in tags) == 1199
    assert repo.count(Tag) == 1201


def test_in_a_transaction(repo: type[Repo]) -> None:
    """It sees what the transaction has written, and an error in it dooms that."""
    with repo.transaction():
        repo.insert(Tag(label="mine"))
        with repo.stream(Tag) as tags:
            assert sum(1 for _ in tags) == 1201
        assert repo.stats().in_use == 1
    with pytest.raises(TransactionDoomedError), repo.transaction():
        with pytest.raises(DBAPIError), repo.stream(select(1 / (User.id - 1))) as quotients:
            list(quotients)
        repo.count(Tag)


def test_it_stays_where_it_began(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """Whatever is chosen in the block, and whoever goes on with it."""
    used, other = two_databases
    home = repo.get_database().home
    with repo.stream(select(Tag).order_by(Tag.id), batch=100) as tags:
        assert repo.home(next(tags)) == home
        with repo.using(other):
            assert {repo.home(next(tags)) for _ in range(500)} == {home}
        found: list[Tag] = []
        thread = threading.Thread(target=lambda: found.extend(tags))
        thread.start()
        thread.join()
    assert len(found) == 699
    assert {repo.home(tag) for tag in found} == {home}


def test_a_transaction_of_somebody_else(repo: type[Repo]) -> None:
    """Its owner alone streams from it."""
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with repo.stream(Tag):
                pass
        except TransactionOwnerError as error:
            caught.append(error)

    with repo.transaction():
        thread = threading.Thread(target=contextvars.copy_context().run, args=(elsewhere,))
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_one_that_is_left_behind(repo: type[Repo]) -> None:
    """A block that ends early gives its connection back; so does one whose body fails."""
    with repo.stream(Tag, batch=1) as tags:
        next(tags)
    with pytest.raises(KeyError), repo.stream(Tag, batch=1) as tags:
        raise KeyError(next(tags).label)
    assert repo.stats().in_use == 0
    with pytest.raises(StopIteration):
        next(tags)
    await_(lambda: repo.execute("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'").scalar_one() == 0)


def test_bad_input(repo: type[Repo]) -> None:
    """A batch of nothing, and what is no query."""
    streams: Any = repo.stream
    for batch in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="batch"), streams(Tag, batch=batch):
            pytest.fail("entered")
    for query in ("SELECT 1", text("SELECT 1"), None):
        with pytest.raises(TypeError), streams(query):
            pytest.fail("entered")
    assert repo.stats().attempts == 0


# Prints by how many MiB the process grew over so many objects.
MEMORY = """
import resource, sys
from sqlalchemy import func, select
from shardrepo import Repo
from tests.models import Tag

class MyRepo(Repo, config=sys.argv[1]): pass

def stream(count):
    with MyRepo.stream(select(Tag).where(Tag.id <= count)) as tags:
        return sum(1 for _ in tags)

assert stream(1000) == 1000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert stream(int(sys.argv[2])) == int(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_many_objects_in_bounded_memory(server: Server, database: str) -> None:
    """A hundred thousand take less than 10 MiB, in the long run a million less than 50: they are let go of."""
    count, limit = (1_000_000, 50) if LONG else (100_000, 10)
    run_sql(server, database, "INSERT INTO tags (label) SELECT n::text FROM generate_series(1, %s) n", [count])
    url = server.url(database).render_as_string(hide_password=False)
    command = [sys.executable, "-c", MEMORY, url, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # our own
    assert done.returncode == 0, done.stderr
    print(f"{count} objects, {done.stdout.strip()} MiB")
    assert int(done.stdout) < limit
