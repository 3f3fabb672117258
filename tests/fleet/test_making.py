"""Making databases, at head from their first moment, and dropping them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from shardrepo import ConfigError, ReadOnlyError, UnknownDatabaseError, fleet
from shardrepo.across import Outcome
from shardrepo.errors import ConnectError
from shardrepo.testing.servers import Server, Servers

from ..conftest import run_sql
from .conftest import AGE, USERS, Project

IMPOSSIBLE = 'op.execute("SELECT 1/0")'


@pytest.fixture
def template(servers: Servers) -> Iterator[str]:
    """The name of a template that no server has yet; it is dropped after the test."""
    name = f"template_{secrets.token_hex(4)}"
    yield name
    for server in servers:
        if server.running and name in server.databases():
            server.drop_database(name, force=True)


@pytest.fixture
def copied(make_project: Callable[..., Project], template: str) -> Project:
    """A project without databases, which are to be copies of the template, on one server."""
    project = make_project(template_database=template)
    project.revise("0001", None, USERS, 'op.drop_table("users")')
    return project


@pytest.fixture
def empty(make_project: Callable[..., Project], server: Server) -> Project:
    """A project without databases and without a template, on one server."""
    project = make_project(on=[server])
    project.revise("0001", None, USERS, 'op.drop_table("users")')
    return project


def named(project: Project, *endings: str) -> list[str]:
    return [project.prefix + ending for ending in endings]


def address(server: Server) -> str:
    return f"{server.host}:{server.port}"


def create(project: Project, *names: str, on: Server | None = None, **options: Any) -> list[Outcome[fleet.Made]]:
    """Make them, and have the project know them; what became of each, by name."""
    where = {} if on is None else {"server": address(on)}
    made = list(fleet.create(project.repo, names, source=project.source, **where, **options))
    project.where |= {outcome.name: on or project.servers[0] for outcome in made}
    return sorted(made, key=lambda outcome: outcome.name)


def test_one_is_made_empty_and_migrated(empty: Project) -> None:
    """Without a template; it is at head when it is told of."""
    (made,) = create(empty, *named(empty, "one"))
    assert made.result() == fleet.Made(None, ("0001",))
    assert made.home == empty.home(made.name)
    assert empty.revision(made.name) == ["0001"]


def test_one_that_was_not_there_can_be_chosen_at_once(empty: Project) -> None:
    """Though the directory has just said that there is none, and when it is dropped, that there is one."""
    (name,) = named(empty, "one")
    with pytest.raises(UnknownDatabaseError), empty.repo.using(name):
        empty.repo.ping()
    create(empty, name)
    with empty.repo.using(name):
        assert empty.repo.ping() > 0
    assert [outcome.result() for outcome in fleet.drop(empty.repo, [name])] == [True]
    with pytest.raises(UnknownDatabaseError), empty.repo.using(name):
        empty.repo.ping()


def test_the_template_is_made_if_it_is_missing(copied: Project, template: str) -> None:
    """On the server that is asked for and on no other; what is made is its copy, and it is no member itself."""
    first, second, _ = copied.servers
    made = create(copied, *named(copied, "one", "two"), on=second)
    assert [each.result() for each in made] == [fleet.Made(template, ("0001",))] * 2
    assert [copied.revision(each.name) for each in made] == [["0001"]] * 2
    assert template in second.databases()
    assert template not in first.databases()
    assert [member.name for member in fleet.members(copied.repo).found] == named(copied, "one", "two")


def test_a_template_that_is_behind_is_brought_to_head(copied: Project, template: str) -> None:
    """Before anything is copied from it; what else is in it is copied too."""
    (server, *_) = copied.servers
    create(copied, *named(copied, "old"), on=server)
    run_sql(server, template, "INSERT INTO users VALUES (1, 'everywhere')")
    copied.revise("0002", "0001", AGE)
    (made,) = create(copied, *named(copied, "new"), on=server)
    assert made.result().revisions == ("0002",)
    assert copied.revision(made.name) == ["0002"]
    assert copied.sql(made.name, "SELECT * FROM users") == [(1, "everywhere", None)]
    assert copied.revision(named(copied, "old")[0]) == ["0001"]


def test_a_template_at_an_unknown_revision_is_refused(copied: Project, template: str) -> None:
    """Nothing is made from it, and it stays as it is; on other servers nothing is wrong."""
    first, second, _ = copied.servers
    create(copied, *named(copied, "old"), on=first)
    run_sql(first, template, "UPDATE alembic_version SET version_num = 'ffff'")
    (refused,) = create(copied, *named(copied, "new"), on=first)
    assert f"the template {address(first)}/{template} could not be brought to head" in str(refused.error)
    assert "ffff" in str(refused.error)
    assert refused.name not in first.databases()
    (made,) = create(copied, *named(copied, "other"), on=second)
    assert made.ok


def test_a_template_that_cannot_be_migrated_is_removed_again(copied: Project, template: str) -> None:
    """If it was made for this; one that was there before stays at the last revision that worked."""
    (server, *_) = copied.servers
    copied.revise("0002", "0001", IMPOSSIBLE)
    (failed,) = create(copied, *named(copied, "one"), on=server)
    assert isinstance(failed.error, fleet.Failure)
    assert (failed.error.revision, failed.error.sqlstate) == ("0002", "22012")
    assert not {template, failed.name} & set(server.databases())
    server.create_database(template)
    (failed,) = create(copied, *named(copied, "one"), on=server)
    assert failed.error is not None
    assert failed.name not in server.databases()
    assert run_sql(server, template, "SELECT version_num FROM alembic_version") == [("0001",)]


def test_one_that_cannot_be_migrated_is_removed_again(empty: Project) -> None:
    """Whatever its migration has done already; the others that were to be made fail by themselves."""
    empty.revise("0002", "0001", IMPOSSIBLE)
    made = create(empty, *named(empty, "one", "two", "three"))
    assert [getattr(each.error, "revision", None) for each in made] == ["0002"] * 3
    assert not set(named(empty, "one", "two", "three")) & set(empty.servers[0].databases())


def test_one_whose_migration_is_interrupted_is_removed_again(empty: Project) -> None:
    """Ctrl-C goes on to whoever has begun it, and nothing is left."""
    empty.revise("0002", "0001", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        create(empty, *named(empty, "one"))
    assert named(empty, "one")[0] not in empty.servers[0].databases()


def test_one_that_exists_is_left_as_it_is(empty: Project) -> None:
    """It fails by itself, with what is in it, whether it is at head or not; the others are made."""
    empty.add(1)
    (old,) = empty.names
    empty.sql(old, "CREATE TABLE precious AS SELECT 1 AS x")
    new, failed = sorted(create(empty, old, *named(empty, "new")), key=lambda outcome: not outcome.ok)
    assert (new.name, failed.name) == (named(empty, "new")[0], old)
    assert "already exists" in str(failed.error)
    assert empty.sql(old, "SELECT * FROM precious") == [(1,)]
    assert empty.revision(old) == []


def test_a_template_in_use_is_named_with_what_to_do(copied: Project, template: str) -> None:
    """Nobody may be connected to a template while it is copied; this process's own connections are closed for it."""
    (server, *_) = copied.servers
    create(copied, *named(copied, "one"), on=server)
    with copied.repo.using({"host": server.host, "port": server.port, "database": template}):
        copied.repo.ping()
        assert create(copied, *named(copied, "two"), on=server)[0].ok
    with server.connect(template):
        (failed,) = create(copied, *named(copied, "three"), on=server)
    told = str(fleet.Failure.of(failed.error or AssertionError()))
    assert f'source database "{template}" is being accessed by other users' in told
    assert "end what is, or name another" in told
    assert failed.name not in server.databases()
    assert create(copied, *named(copied, "three"), on=server)[0].ok


def test_somebody_has_to_know_on_which_server(copied: Project, servers: Servers) -> None:
    """Of several nobody guesses: a name, a host that several have, or one that none has, is refused before anything."""
    before = [server.databases() for server in servers]
    for server, said in [
        (None, "on which server is"),
        ("127.0.0.1", "is 3 of the directory's servers"),
        ("db07", "is none of the directory's servers"),
    ]:
        with pytest.raises(ConfigError, match=said):
            fleet.create(copied.repo, named(copied, "one"), server=server, source=copied.source)
    assert [server.databases() for server in servers] == before


def test_a_name_is_not_taken_twice(copied: Project) -> None:
    """What another server has is refused, as nobody could tell the two apart; nothing is made, the rest neither."""
    first, second, _ = copied.servers
    (old,) = copied.add(1, on=first)
    with pytest.raises(ConfigError, match=f"'{old}' is on {address(first)} already"):
        create(copied, *named(copied, "new"), old, on=second)
    assert not {old, *named(copied, "new")} & set(second.databases())


def test_while_a_server_is_down_others_get_new_ones(make_project: Callable[..., Project], servers: Servers) -> None:
    """The server is named; what the one that is down has cannot be known, and is not waited for."""
    project = make_project(on=servers[:2], connect_timeout=2.0)
    project.revise("0001", None, USERS)
    servers[1].stop()
    try:
        assert create(project, *named(project, "one"), on=servers[0])[0].ok
        (failed,) = create(project, *named(project, "two"), on=servers[1])
        assert isinstance(failed.error, ConnectError)
    finally:
        servers[1].start()


def test_the_directory_may_know_it_beforehand(make_project: Callable[..., Project], servers: Servers) -> None:
    """Then that is where it is made, without being told; also where the directory cannot say which there are."""
    server = servers[2]
    name = f"known_{secrets.token_hex(4)}"
    options = {"host": server.host, "port": server.port, "password": server.password}
    project = make_project(directory={name: options})
    project.revise("0001", None, USERS)
    try:
        (made,) = create(project, name)
        assert made.home == f"{address(server)}/{name}"
        assert name in server.databases()
    finally:
        server.drop_database(name)


def test_the_directory_may_call_it_otherwise(make_project: Callable[..., Project], server: Server) -> None:
    """It is told by the name that it was asked for, and made by the one that it has there."""
    real = f"real_{secrets.token_hex(4)}"
    where = {"host": server.host, "port": server.port, "password": server.password, "database": real}
    project = make_project(on=[server], directory={"alias": where})
    project.revise("0001", None, USERS)
    try:
        for options in ({}, {"on": server}):
            (made,) = create(project, "alias", **options)
            assert (made.name, made.ok, made.home) == ("alias", True, f"{address(server)}/{real}")
            with project.repo.using("alias"):
                assert project.repo.ping() > 0
            assert fleet.drop(project.repo, ["alias"]).collect() == {"alias": True}
    finally:
        if real in server.databases():
            server.drop_database(real)


def test_without_a_directory_it_is_the_defaults_server(make_project: Callable[..., Project], server: Server) -> None:
    """Unless another one is named, which has the default's port if it says none."""
    project = make_project(on=[server], directory=None)
    project.revise("0001", None, USERS)
    made = create(project, *named(project, "one")) + create(project, *named(project, "two"), on=server)
    assert [each.home for each in made] == [project.home(each.name) for each in made]
    (made,) = fleet.create(project.repo, named(project, "three"), server=server.host, source=project.source)
    assert made.result().revisions == ("0001",)


def test_it_belongs_to_who_is_named(empty: Project) -> None:
    """A role that the server has; one that it has not is an error, and nothing is left."""
    (server,) = empty.servers
    role = f"owner_{secrets.token_hex(4)}"
    run_sql(server, "postgres", f"CREATE ROLE {role}")
    (made,) = create(empty, *named(empty, "one"), owner=role)
    owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s"
    assert run_sql(server, "postgres", owner, [made.name]) == [(role,)]
    server.drop_database(made.name)
    run_sql(server, "postgres", f"DROP ROLE {role}")
    (failed,) = create(empty, *named(empty, "two"), owner=role)
    assert f'role "{role}" does not exist' in str(failed.error)
    assert failed.name not in server.databases()


def test_many_are_made_at_once(copied: Project) -> None:
    """On several servers by turns, and each once, however often it is named."""
    names = named(copied, *map(str, range(6)))
    made = create(copied, *names, *names, on=copied.servers[1])
    assert [each.name for each in made] == names
    assert all(each.ok for each in made)


def test_a_repo_that_only_reads_makes_none(make_project: Callable[..., Project]) -> None:
    """It is refused before anything is asked."""
    project = make_project(read_only=True)
    with pytest.raises(ReadOnlyError, match="create writes"):
        fleet.create(project.repo, ["one"], source=project.source)


def test_only_what_is_named_is_dropped(empty: Project) -> None:
    """No name is no selection of all; one that there is not keeps the others too."""
    names = empty.add(3)
    for nothing in ([], "", names[0]):
        with pytest.raises(ConfigError, match="by their names, as in"):
            fleet.drop(empty.repo, nothing)
        with pytest.raises(ConfigError, match="by their names, as in"):
            fleet.create(empty.repo, nothing)
    with pytest.raises(UnknownDatabaseError, match="'nobody'"):
        fleet.drop(empty.repo, [names[0], "nobody"])
    assert set(names) <= set(empty.servers[0].databases())
    assert fleet.drop(empty.repo, names[:2]).collect() == dict.fromkeys(names[:2], True)
    assert set(names) & set(empty.servers[0].databases()) == {names[2]}


def test_one_in_use_is_dropped_by_force_alone(empty: Project) -> None:
    """Without it, the error says what to do; this process's own idle connections are no use of it."""
    (name,) = empty.add(1)
    with empty.repo.using(name):
        empty.repo.ping()
    with empty.servers[0].connect(name) as other:
        (refused,) = fleet.drop(empty.repo, [name])
        assert "force" in str(fleet.Failure.of(refused.error or AssertionError()))
        assert other.execute("SELECT 1").fetchone() == (1,)
        assert fleet.drop(empty.repo, [name], force=True).collect() == {name: True}
        with pytest.raises(psycopg.OperationalError):
            other.execute("SELECT 1")
