# mypy: allow-untyped-calls
"""What a type checker must infer of factories. Checked by `make types`, never imported."""

from __future__ import annotations

from typing import assert_type

from factory.declarations import Sequence

from shardrepo import DEFAULT, Repo
from shardrepo.testing.factories import BoundFactory, RepoFactory

from ..models import User


class AppRepo(Repo, config="postgresql+psycopg://app@db01/app"):
    """A repo as an application defines it."""


class UserFactory(RepoFactory[User]):
    """A factory as an application defines it."""

    class Meta:
        model = User
        repo = AppRepo
        get_or_create = ("email",)

    name = Sequence(lambda n: f"user {n}")


assert_type(UserFactory.create(name="Ada"), User)
assert_type(UserFactory.create_batch(2, name="Ada"), list[User])
assert_type(UserFactory.build(), User)
assert_type(UserFactory.build_batch(2), list[User])
assert_type(UserFactory.on("shard02"), BoundFactory[User])
assert_type(UserFactory.on(DEFAULT).create(), User)
assert_type(UserFactory.on(host="db02", database="shard02").create_batch(2), list[User])
assert_type(UserFactory.on({"database": "shard02"})(name="Ada"), User)
assert_type(UserFactory.on("shard02").build(), User)
assert_type(UserFactory.on("shard02").build_batch(2), list[User])
