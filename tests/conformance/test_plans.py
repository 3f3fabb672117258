"""Queries as SQL, and how the server would run them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update

from shardrepo import Repo
from shardrepo.testing.servers import Server, count_statements

from ..conftest import SQL
from ..models import Dog, Post, Tag, User

pytestmark = pytest.mark.verbs

QUERIES: dict[str, tuple[Any, dict[str, Any] | None, str]] = {
    "a class": (User, None, "Seq Scan on users"),
    "a select": (select(User).where(User.id.in_([1, 2])), None, "users"),
    "a class of two tables": (Dog, None, "Join"),
    "a select of columns": (select(User.name).join(User.posts), None, "posts"),
    "an insert": (insert(Tag).values(label="x"), None, "Insert on tags"),
    "an update": (update(Tag).values(label=Tag.label + "x").returning(Tag.id), None, "Update on tags"),
    "a delete": (delete(Post), None, "Delete on posts"),
    "text": ("SELECT * FROM users WHERE name = :name", {"name": "Ada"}, "Filter"),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a transaction"])
def test_the_plan_of_anything(repo: type[Repo], sql: SQL, query: str, inside: bool) -> None:
    """It is run if that is asked for, and undone, also in a transaction that goes on."""
    sql("INSERT INTO tags (label) VALUES ('a')")
    statement, parameters, expected = QUERIES[query]
    if not inside:
        plan = repo.explain(statement, parameters, analyze=True)
    else:
        with repo.transaction():
            repo.insert(Tag(label="b"))
            plan = repo.explain(statement, parameters, analyze=True)
    assert expected in plan
    assert "Execution Time" in plan
    assert sql("SELECT label FROM tags ORDER BY 1") == ([("a",), ("b",)] if inside else [("a",)])


def test_formats(repo: type[Repo]) -> None:
    """JSON as what it says, the others as strings."""
    (plan,) = repo.explain(User, format="json")
    assert plan["Plan"]["Relation Name"] == "users"
    assert repo.explain(User, format="xml").startswith("<explain")
    assert repo.explain(User, format="yaml").startswith("- Plan:")


def test_switches(repo: type[Repo]) -> None:
    """PostgreSQL's own, on and off."""
    assert "cost=" in repo.explain(User)
    assert "cost=" not in repo.explain(User, costs=False)
    assert "Output: " in repo.explain(User, verbose=True)
    with pytest.raises(ValueError, match="did you mean 'analyze'"):
        repo.explain(User, analyse=True)
    with pytest.raises(ValueError, match="unknown format"):
        repo.explain(User, format="csv")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a mapped class"):
        repo.explain(User(name="x"))  # type: ignore[arg-type]


def test_sql_of_a_query(repo: type[Repo], server: Server) -> None:
    """As the driver is given it, and nothing is sent; with the values in it, to be read."""
    with count_statements(server) as counted:
        sql, parameters = repo.to_sql(select(User.id).where(User.name == "Ada", User.id.in_([1, 2])))
        shown, nothing = repo.to_sql(select(User.id).where(User.name == "Ada"), literal_binds=True)
        assert repo.to_sql(User)[0].startswith("SELECT users.id")
        assert repo.to_sql(text("SELECT :x")) == ("SELECT %(x)s", {"x": None})
    assert counted.statements == []
    assert "WHERE users.name = %(name_1)s::VARCHAR" in sql
    assert sorted(map(str, parameters.values())) == ["1", "2", "Ada"]
    assert "users.name = 'Ada'" in shown
    assert nothing == {}
    run = repo.engine().connect()
    try:
        assert run.exec_driver_sql(sql, parameters).all() == []
    finally:
        run.close()
