"""Which database a home means: the one that was chosen there, as long as that is remembered, and never another."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardrepo import Repo, WrongDatabaseError, databases
from shardrepo.testing.servers import Server

from ..models import Tag, User

pytestmark = pytest.mark.routing


def test_what_is_chosen_again_is_met_again(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many databases were chosen since: the memory of choices and that of homes are one."""
    monkeypatch.setattr(databases, "MAX_RESOLVED", 8)
    name, other = make_databases(2)
    repo = make_repo(other)
    with repo.using(name):
        tag = repo.insert(Tag(label="x"))
    for number in range(100):
        with repo.using(f"db{number}"):
            repo.get_database()
        with repo.using(name):
            repo.get_database()
        assert repo.reload(tag) is not None
    for number in range(8):
        with repo.using(f"other{number}"):
            repo.get_database()
    with pytest.raises(WrongDatabaseError, match="choose it with using"):
        repo.reload(tag)


def test_a_new_password_is_the_same_user(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """Who has rotated a password has not become two users of whom none may stand in for the other."""
    repo = make_repo("postgres")
    with repo.using(database):
        user = repo.insert(User(name="Ada"))
    url = server.url(database)
    asked: list[str] = []

    def password() -> str:
        asked.append("asked")
        return str(url.password)

    with repo.using(database=database, password="old"):
        repo.get_database()
    with repo.using(database=database, password=password):
        repo.get_database()
    assert repo.preload(user, User.posts).posts == []
    assert asked == ["asked"]


def test_another_user_never_stands_in(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Of two who have chosen a database, neither is taken for the one who is meant."""
    repo = make_repo("postgres")
    with repo.using(database):
        user = repo.insert(User(name="Ada"))
    with repo.using(database=database, username="somebody else"):
        repo.get_database()
    with pytest.raises(WrongDatabaseError, match="several users have chosen it"):
        repo.reload(user)
    with repo.using(database):
        assert repo.reload(user) is not None
