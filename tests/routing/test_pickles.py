"""Objects that are pickled in one process and unpickled in another are at home where they were."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.engine import URL
from sqlalchemy.orm import selectinload

from shardrepo import Repo, WrongDatabaseError
from shardrepo.testing.servers import Server, count_statements

from ..conftest import run_sql
from ..models import Post, Tag, User
from .conftest import Pair

pytestmark = pytest.mark.routing

ROOT = Path(__file__).parents[2]

# The other process: `given` comes from here, `answer` goes back.
OTHER = """
import pickle
import sys

from shardrepo import Repo, WrongDatabaseError
from tests.models import Post, Tag, User

A, B = sys.argv[2:]

class MyRepo(Repo, config={"url": sys.argv[1], "application_name": "unpickled"}):
    pass

def refused(verb, *args, **kwargs):
    try:
        verb(*args, **kwargs)
    except WrongDatabaseError as error:
        return error
    raise AssertionError(f"{verb} was not refused")

given = pickle.load(sys.stdin.buffer)
"""


def in_another_process(pair: Pair, work: str, given: object, url: URL | None = None) -> Any:
    """Run *work* on the unpickled *given*, with a repo whose default is *url*, by default B; returns its `answer`."""
    url = url or pair.server.url(pair.b)
    script = OTHER + textwrap.dedent(work) + "\npickle.dump(answer, sys.stdout.buffer)\nMyRepo.dispose()\n"
    command = [sys.executable, "-W", "error", "-c", script, url.render_as_string(hide_password=False), pair.a, pair.b]
    done = subprocess.run(command, cwd=ROOT, input=pickle.dumps(given), capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return pickle.loads(done.stdout)


def test_it_is_updated_at_home(repo: type[Repo], pair: Pair) -> None:
    """Another process writes the object where it is stored, and gives back one that is written here."""
    work = """
        assert MyRepo.home(given).endswith("/" + A)
        with MyRepo.using(A):
            answer = MyRepo.update(given, name=given.name + ", there")
    """
    user = in_another_process(pair, work, repo.get_one(User, 1))
    assert repo.home(user) == pair.home(pair.a)
    repo.update(user, name=user.name + " and back")
    assert pair.sql(pair.a, "SELECT name FROM users WHERE id = 1") == [("Ada of A, there and back",)]
    assert pair.sql(pair.b, "SELECT name FROM users WHERE id = 1") == [("Ada of B",)]


def test_it_is_refused_elsewhere(repo: type[Repo], pair: Pair) -> None:
    """Another process whose current database is another one sends nothing for the object, changed or not."""
    work = """
        answer = []
        for user in given:
            session = MyRepo.session()
            for verb in (MyRepo.update, MyRepo.delete, session.add, session.merge, session.delete, MyRepo.reload):
                answer.append(refused(verb, user))
            session.close()
            answer.append(refused(MyRepo.update, user, name="never"))
            answer.append(refused(MyRepo.insert, Post(title="never", author=user)))
    """
    changed = repo.get_one(User, 2)
    changed.name = "changed"
    before = pair.contents()
    with count_statements(pair.server) as sent:
        errors = in_another_process(pair, work, [repo.get_one(User, 1), changed])
    assert not [one.sql for one in sent.statements if one.application_name == "unpickled" and "users" in one.sql]
    assert len(errors) == 16
    assert {pair.home(pair.a)} == {home for error in errors for home in (error.expected, error.found)} - {
        pair.home(pair.b),
        None,
    }
    assert pair.contents() == before


def test_all_of_a_graph_is_at_home(repo: type[Repo], pair: Pair) -> None:
    """What was loaded along with an object is at home too, and stays one graph."""
    work = """
        post = given.posts[0]
        tag = post.tags[0]
        assert post.author is given
        homes = {MyRepo.home(each) for each in (given, post, tag)}
        for each in (post, tag):
            refused(MyRepo.delete, each)
        with MyRepo.using(A):
            MyRepo.update(tag, label="there")
            MyRepo.update(post, title="there")
        answer = given, homes
    """
    options = [selectinload(User.posts).options(selectinload(Post.tags), selectinload(Post.author))]
    before = pair.contents()
    user, homes = in_another_process(pair, work, repo.one(select(User).where(User.id == 1), options=options))
    assert homes == {pair.home(pair.a)}
    assert {repo.home(each) for each in (user, *user.posts, *user.posts[0].tags)} == homes
    assert pair.contents()[1] == before[1]
    assert pair.sql(pair.a, "SELECT title, label FROM posts, tags WHERE posts.id = 1") == [("there", "there")]


def test_a_copy_goes_where_it_was_made_for(repo: type[Repo], pair: Pair) -> None:
    """One made by `rehome` is inserted by another process into its database, and into no other."""
    pair.sql(pair.b, "DELETE FROM post_tags; DELETE FROM tags")
    work = """
        with MyRepo.using(A):
            answer = refused(MyRepo.insert, given)
        MyRepo.insert(given)
        answer = given, answer
    """
    copied, error = in_another_process(pair, work, repo.rehome(repo.get_one(Tag, 1), pair.b))
    assert (error.expected, error.found) == (pair.home(pair.a), pair.home(pair.b))
    assert repo.home(copied) == pair.home(pair.b)
    with pytest.raises(WrongDatabaseError):
        repo.update(copied, label="never")
    assert pair.sql(pair.b, "SELECT id, label FROM tags") == [(1, "t of A")]


@pytest.fixture
def rotate(server: Server) -> Iterator[Callable[[str], URL]]:
    """Give a role another password; returns its URL."""
    run_sql(server, "postgres", "CREATE ROLE rotating LOGIN SUPERUSER")

    def rotate(password: str) -> URL:
        run_sql(server, "postgres", f"ALTER ROLE rotating PASSWORD '{password}'")
        return server.url("postgres").set(username="rotating", password=password)

    yield rotate
    run_sql(server, "postgres", "DROP ROLE rotating")


def test_a_home_outlives_a_password(
    pair: Pair, make_repo: Callable[..., type[Repo]], rotate: Callable[..., URL]
) -> None:
    """An object that was pickled under one user and password is at home under another password and another user."""
    before = make_repo(url=rotate("first").set(database=pair.a))
    stored = pickle.dumps(before.get_one(User, 1))
    assert b"first" not in stored
    rotated = rotate("second").set(database=pair.b)
    work = """
        refused(MyRepo.update, given, name="never")
        with MyRepo.using(A):
            answer = MyRepo.update(given, name="rotated")
    """
    user = in_another_process(pair, work, pickle.loads(stored), rotated)
    make_repo(pair.a).update(user, age=99)
    assert pair.sql(pair.a, "SELECT name, age FROM users WHERE id = 1") == [("rotated", 99)]
    assert pair.sql(pair.b, "SELECT name, age FROM users WHERE id = 1") == [("Ada of B", 1)]
