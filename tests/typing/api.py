"""What a type checker must infer of the public API. Checked by `make types`, never imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, assert_type

from sqlalchemy import select
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.orm import selectinload

from shardrepo import BulkResult, Choice, Database, Outcome, Repo, RoutedSession, Stats
from shardrepo.across import Outcomes
from shardrepo.directory import Location

from ..models import User


class AppRepo(Repo, config="postgresql+psycopg://app@db01/app"):
    """A repo as an application defines it."""


user = AppRepo.insert(User(name="Ada"))

assert_type(user, User)
assert_type(AppRepo.get(User, 1), User | None)
assert_type(AppRepo.get_one(User, 1), User)
assert_type(AppRepo.get_by(User, name="Ada"), User | None)
assert_type(AppRepo.get_one_by(User, name="Ada"), User)
assert_type(AppRepo.get(User, 1, options=[selectinload(User.posts)]), User | None)
assert_type(AppRepo.one(User), User)
assert_type(AppRepo.one(select(User)), User)
assert_type(AppRepo.one_or_none(select(User.name)), str | None)
assert_type(AppRepo.all(User), list[User])
assert_type(AppRepo.all(select(User.id)), list[int])
assert_type(AppRepo.all_by(User, name="Ada"), list[User])
assert_type(AppRepo.first(User), User | None)
assert_type(AppRepo.last(select(User.id)), int | None)
assert_type(AppRepo.stream(User), AbstractContextManager[Iterator[User]])
assert_type(AppRepo.stream(select(User.name)), AbstractContextManager[Iterator[str]])
assert_type(AppRepo.load(User, {"id": 1}), User)
assert_type(AppRepo.reload(user), User | None)
assert_type(AppRepo.reload([user]), list[User | None])
assert_type(AppRepo.preload([user], User.posts), list[User])
assert_type(AppRepo.count(User), int)
assert_type(AppRepo.exists(select(User)), bool)
assert_type(AppRepo.insert_all(User, [{"name": "Ada"}]), BulkResult)
assert_type(AppRepo.insert_all(User, select(User.name), on_conflict="nothing", returning=User.id), BulkResult)
assert_type(AppRepo.insert(User(name="x"), on_conflict="raise"), User)
assert_type(AppRepo.insert(User(name="x"), on_conflict="replace", conflict_target=User.id), User | None)
assert_type(AppRepo.insert(User(name="x"), on_conflict={User.age: User.age + 1}, conflict_target="id"), User | None)
assert_type(
    AppRepo.insert(User(name="x"), on_conflict=lambda excluded: {"age": excluded.age}, conflict_target=[User.id]),
    User | None,
)
assert_type(AppRepo.insert_or_update(user), User)
assert_type(AppRepo.update_all(select(User), {"city": "x"}, inc={User.age: 1}, returning=True), BulkResult)
assert_type(AppRepo.delete_all(User, returning=["id"]), BulkResult)
assert_type(AppRepo.databases(), list[Location])
assert_type(AppRepo.connection(), AbstractContextManager[Connection])
assert_type(AppRepo.call_options(timeout=1.0, tags={"a": 1}), AbstractContextManager[None])
assert_type(AppRepo.to_sql(User), tuple[str, dict[str, Any]])
assert_type(AppRepo.update(user, name="Grace"), User)
assert_type(AppRepo.delete(user), User)
assert_type(AppRepo.rehome(user, "shard02"), User)
assert_type(AppRepo.home(user), str | None)
assert_type(AppRepo.transact(lambda: 1, isolation="serializable"), int)
assert_type(AppRepo.transaction(read_only=True, timeout=5.0), AbstractContextManager[None])
assert_type(AppRepo.set_database("shard02"), Choice | None)
assert_type(AppRepo.set_database(host="db02", database="shard201"), Choice | None)
assert_type(AppRepo.get_database(), Database)
assert_type(AppRepo.session(), RoutedSession)
assert_type(AppRepo.engine(), Engine)
assert_type(AppRepo.create_database("shard03", template="shard02", if_not_exists=True), bool)
assert_type(AppRepo.drop_database(host="db02", database="shard201", force=True), bool)
assert_type(AppRepo.database_exists({"database": "shard03"}), bool)
assert_type(AppRepo.across().all(User), Outcomes[list[User]])
assert_type(AppRepo.across(["shard01"]).all(select(User.name)).collect(), dict[str, list[str]])
assert_type(AppRepo.across(AppRepo.databases(), per_server=2, timeout=5.0).count(User).collect(), dict[str, int])
assert_type(AppRepo.across([{"host": "db02", "database": "shard201"}]).execute("SELECT 1"), Outcomes[Result[Any]])
assert_type([outcome.result() for outcome in AppRepo.across().map(lambda: 1)], list[int])
assert_type(next(AppRepo.across().count(User)), Outcome[int])
assert_type(AppRepo.stats(), Stats)


@AppRepo.carry
def length(text: str) -> int:
    """A function that is carried keeps its signature."""
    return len(text)


assert_type(length("a"), int)
