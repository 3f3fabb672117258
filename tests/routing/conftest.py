"""A repo over two databases that hold different rows under the same primary keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from shardrepo import Repo
from shardrepo.testing.servers import Server

from ..conftest import contents, run_sql

ROWS = """
    INSERT INTO users (name, age) VALUES ('Ada of {0}', 1), ('Bob of {0}', 2);
    INSERT INTO posts (title, author_id) VALUES ('x of {0}', 1), ('y of {0}', 2);
    INSERT INTO tags (label) VALUES ('t of {0}');
    INSERT INTO post_tags VALUES (1, 1);
    INSERT INTO shelves (label) VALUES ('shelf of {0}');
    INSERT INTO books (title, shelf_id) VALUES ('book of {0}', 1);
    INSERT INTO accounts (balance, version) VALUES (1, 1);
    INSERT INTO animals (kind) VALUES ('dog');
    INSERT INTO dogs VALUES (1, 'dog of {0}');
"""


@dataclass(frozen=True)
class Pair:
    """Two databases, a and b, the homes of their rows, and what they hold."""

    server: Server
    a: str
    b: str

    def home(self, name: str) -> str:
        return f"127.0.0.1:{self.server.port}/{name}"

    def contents(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        return contents(self.server, self.a), contents(self.server, self.b)

    def sql(self, name: str, statement: str) -> list[tuple[Any, ...]]:
        return run_sql(self.server, name, statement)


@pytest.fixture
def pair(server: Server, two_databases: tuple[str, str]) -> Pair:
    """Two databases with the same keys in every table, whose texts say which one they are in."""
    for label, name in zip("AB", two_databases, strict=True):
        run_sql(server, name, ROWS.format(label))
    return Pair(server, *two_databases)


@pytest.fixture
def repo(pair: Pair, make_repo: Callable[..., type[Repo]]) -> type[Repo]:
    """A repo whose default is a."""
    return make_repo(pair.a)
