"""Every public method of a Repo honours the database that is current where it is called; a new one needs a case."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from shardrepo import Repo
from shardrepo.testing.servers import Server

from ..conftest import contents, plant_decoys, run_sql
from ..models import Post, Tag, User

pytestmark = pytest.mark.routing

HERE = select(func.current_database())


def here(repo: type[Repo]) -> str:
    """Where a statement runs."""
    return str(repo.execute(HERE).scalar_one())


def in_connection(repo: type[Repo]) -> str:
    with repo.connection() as connection:
        assert here(repo) == connection.execute(HERE).scalar_one()
        return here(repo)


def in_session(repo: type[Repo]) -> str:
    with repo.session() as session:
        return str(session.scalar(HERE))


def in_engine(repo: type[Repo]) -> str:
    with repo.engine().connect() as connection:
        return str(connection.scalar(HERE))


def in_transaction(repo: type[Repo]) -> str:
    with repo.transaction():
        assert repo.in_transaction()
        with repo.savepoint():
            name = here(repo)
        with repo.detached():
            assert not repo.in_transaction()
            assert here(repo) == name
    return name


def rolled_back(repo: type[Repo]) -> str:
    name = repo.get_database().name
    assert repo.transact(lambda: repo.insert(Tag(label="lost")) and repo.rollback(here(repo))) == name
    return name


def streamed(repo: type[Repo]) -> str:
    with repo.stream(User) as users:
        (user,) = users
        return str(user.name)


def carried(repo: type[Repo]) -> str:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(repo.carry(lambda: here(repo))).result()


def optioned(repo: type[Repo]) -> str:
    with repo.call_options(timeout=30.0):
        return here(repo)


def explained(repo: type[Repo]) -> str:
    (plan,) = repo.explain(select(User).where(User.name == func.current_database()), format="json", analyze=True)
    assert plan["Plan"]["Actual Rows"] == 1
    assert "users" in repo.to_sql(User)[0]
    return here(repo)


def disconnected(repo: type[Repo]) -> str:
    """Only the current database's connections are closed; the other's stay."""
    name = here(repo)
    (other,) = {"lasting1", "lasting2"} - {name}
    with repo.using(other):
        here(repo)
    before = repo.stats()
    repo.disconnect()
    assert repo.stats().idle == before.idle - 1
    hits = repo.stats().hits
    with repo.using(other):
        here(repo)
    assert repo.stats().hits == hits + 1
    return name


def written(repo: type[Repo]) -> str:
    user = repo.insert(User(name="new", posts=[Post(title="p")]))
    assert repo.insert(User(name="new", id=user.id), on_conflict="nothing") is None
    repo.insert_or_update(User(name="newer"))
    repo.update(user, name="changed")
    assert repo.insert_all(User, [{"name": "x"}, {"name": "y"}]).count == 2
    assert repo.insert_all(User, [{"name": "z"}], via="copy").count == 1
    assert repo.update_all(select(User).where(User.name == "z"), {"name": "zz"}).count == 1
    assert repo.delete_all(select(User).where(User.name.in_(["x", "y", "zz"]))).count == 3
    repo.delete(repo.reload(user))
    assert sorted(repo.all(select(User.name))) == sorted(["newer", repo.get_database().name])
    return str(repo.get_one(User, 1).name)


def made_and_dropped(repo: type[Repo]) -> str:
    """A name is one of the default's server, as for `set_database`, whatever is current."""
    name = repo.get_database().name
    made = f"{name}made"
    assert repo.create_database(made, template="template_app")
    assert repo.database_exists(made)
    repo.rename_database(made, f"{made}2")
    assert not repo.database_exists(made)
    assert repo.drop_database(f"{made}2")
    return name


def object_at_home(repo: type[Repo]) -> str:
    user = repo.load(User, {"id": 1, "name": "x"})
    assert repo.home(repo.rehome(User(name="y"))) == repo.home(user) == repo.get_database().home
    with repo.using(None):
        assert repo.preload(user, User.posts).posts == []
        return str(repo.reload(user).name)


def chosen(repo: type[Repo]) -> str:
    name = repo.get_database().name
    before = repo.set_database(name)
    assert repo.get_database().name == name
    repo.set_database(before)
    with repo.using(name):
        return here(repo)


def pinged(repo: type[Repo]) -> str:
    name = repo.get_database().name
    with repo.using("not there"), pytest.raises(Exception, match="not there"):
        repo.ping()
    assert repo.ping() > 0
    return name


# Which case proves which methods.
CASES: dict[Callable[[type[Repo]], str], str] = {
    lambda repo: repo.get(User, 1).name: "get",
    lambda repo: repo.get_one(User, 1).name: "get_one",
    lambda repo: repo.get_by(User, id=1).name: "get_by",
    lambda repo: repo.get_one_by(User, id=1).name: "get_one_by",
    lambda repo: repo.one(User).name: "one",
    lambda repo: repo.one_or_none(select(User.name)): "one_or_none",
    lambda repo: repo.first(User).name: "first",
    lambda repo: repo.last(User).name: "last",
    lambda repo: repo.all(select(User.name))[0]: "all",
    lambda repo: repo.all_by(User, id=1)[0].name: "all_by",
    lambda repo: repo.get_database().name * repo.count(User): "count",
    lambda repo: (
        repo.get_database().name * repo.exists(select(User).where(User.name == repo.get_database().name))
    ): "exists",
    lambda repo: repo.aggregate(User, "max", User.name): "aggregate",
    lambda repo: here(repo): "execute",
    streamed: "stream",
    object_at_home: "load reload preload home rehome",
    written: "insert insert_all insert_or_update update update_all delete delete_all",
    in_transaction: "transaction savepoint in_transaction detached",
    rolled_back: "transact rollback",
    in_connection: "connection",
    in_session: "session",
    in_engine: "engine",
    carried: "carry",
    optioned: "call_options",
    explained: "explain to_sql",
    chosen: "set_database get_database using",
    disconnected: "disconnect",
    pinged: "ping",
    made_and_dropped: "create_database database_exists rename_database drop_database",
}

# Of all databases at once, or called by the verbs.
OF_NO_DATABASE = {
    *("stats", "disconnect_all", "dispose", "databases", "across", "sandbox"),
    *("prepare_query", "default_options", "configure_engine", "locate", "list_databases"),
}


def test_every_public_method_has_a_case() -> None:
    """One that is added without a case fails here."""
    public = {name for name in dir(Repo) if not name.startswith("_")}
    assert public == {name for names in CASES.values() for name in names.split()} | OF_NO_DATABASE


@pytest.mark.parametrize("way", ["set_database", "using", "default"])
@pytest.mark.parametrize("case", CASES, ids=CASES.values())
def test_a_method_honours_the_current_database(
    make_repo: Callable[..., type[Repo]],
    server: Server,
    two_databases: tuple[str, str],
    case: Callable[[type[Repo]], str],
    way: str,
) -> None:
    """Chosen or default, while the other database holds rows with the same keys, none of which changes."""
    used, other = two_databases
    plant_decoys(server, other)
    run_sql(server, used, "INSERT INTO users (name, age) VALUES (current_database(), 1)")
    before = contents(server, other)
    repo = make_repo(used if way == "default" else other)
    if way == "default":
        assert case(repo) == used
    elif way == "using":
        with repo.using(used):
            assert case(repo) == used
    else:
        repo.set_database(used)
        assert case(repo) == used
    assert contents(server, other) == before
