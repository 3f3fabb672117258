"""Factories of factory_boy write through a repo: each call into one database, the one that is current then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeAlias

import factory
import pytest
from factory.fuzzy import FuzzyInteger
from sqlalchemy import event, func, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import DetachedInstanceError

from shardrepo import (
    DEFAULT,
    ConfigError,
    ConstraintError,
    NoDatabaseError,
    Repo,
    TransactionDoomedError,
    WrongDatabaseError,
)
from shardrepo.testing.batch import insert_objects
from shardrepo.testing.factories import RepoFactory
from shardrepo.testing.servers import Server, count_statements

from ..conftest import contents, run_sql
from ..models import Account, Animal, Base, Book, Dog, Note, Place, Post, Tag, User, post_tags

pytestmark = pytest.mark.testing

Factory: TypeAlias = Any


@pytest.fixture
def names(two_databases: tuple[str, str]) -> tuple[str, str]:
    """The repo's default database, and another."""
    return two_databases


@pytest.fixture
def repo(names: tuple[str, str], make_repo: Callable[..., type[Repo]]) -> type[Repo]:
    repo = make_repo(names[0])
    repo.exists(User)  # what SQLAlchemy asks a server at its first connection is not among the statements counted
    return repo


@pytest.fixture
def users(repo: type[Repo]) -> Factory:
    """A factory of one row."""

    class UserFactory(RepoFactory[User]):
        class Meta:
            model = User

        name = factory.Sequence(lambda n: f"user {n}")

    return with_repo(UserFactory, repo)


@pytest.fixture
def posts(repo: type[Repo], users: Factory) -> Factory:
    """A factory of a row and the one that it refers to."""

    class PostFactory(RepoFactory[Post]):
        class Meta:
            model = Post

        title = factory.Sequence(lambda n: f"post {n}")
        author = factory.SubFactory(users)

    return with_repo(PostFactory, repo)


def with_repo(base: Factory, used: type[Repo], **meta: Any) -> Factory:
    """The same factory, with a repo and what else its Meta is to say."""
    return type(base.__name__, (base,), {"Meta": type("Meta", (), {"repo": used, **meta})})


def deriving(base: Factory, meta: dict[str, Any] | None = None, **declared: Any) -> Factory:
    """A factory that declares more."""
    return type(base.__name__, (base,), {"Meta": type("Meta", (), meta or {}), **declared})


def found(server: Server, name: str, table: str = "users", what: str = "name") -> list[Any]:
    """What a table holds, by its key."""
    return [value for (value,) in run_sql(server, name, f"SELECT {what} FROM {table} ORDER BY id")]


def sent(counted: Any) -> list[str]:
    """The first words of statements."""
    return [statement.sql.split()[0] for statement in counted.statements]


# One object


def test_create_inserts(server: Server, names: tuple[str, str], repo: type[Repo], users: Factory) -> None:
    """One statement; the object is detached, has its key and the server's defaults, and remembers its home."""
    users.create()
    with count_statements(server, database=names[0]) as counted:
        user = users.create(age=3)
    assert sent(counted) == ["INSERT"]
    assert (user.id, user.name, user.age, user.city, user.name_length) == (2, "user 1", 3, "nowhere", 6)
    assert repo.home(user) == repo.get_database().home
    assert found(server, names[0]) == ["user 0", "user 1"]
    with pytest.raises(DetachedInstanceError):
        len(user.posts)
    assert repo.update(user, name="x") is user


def test_build_and_stub_send_nothing(server: Server, names: tuple[str, str], posts: Factory) -> None:
    """Nor do they need a database; what they make is not stored, nor are its parts."""
    with count_statements(server) as counted:
        post, stub = posts.build(), posts.stub()
        many = posts.build_batch(2)
        bound = posts.on(names[1])
        built = [bound.build(), *bound.build_batch(1)]
    assert len(counted) == 0
    assert [Repo.home(each) for each in (post, post.author, *many, *built)] == [None] * 6
    assert stub.author.name == "user 1"


def test_a_call_makes_what_the_strategy_says(server: Server, names: tuple[str, str], users: Factory) -> None:
    """Also one that is bound to a database."""
    building = deriving(users, {"strategy": factory.BUILD_STRATEGY})
    assert users().id == 1
    assert users.on(names[1])().id == 1
    assert building().id is None
    assert building.on(names[1])().id is None
    assert [len(found(server, name)) for name in names] == [1, 1]


# Which database


def test_the_database_is_the_current_one(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory
) -> None:
    """At each call anew: by default, by set_database, by using and by on, with one factory."""
    one, other = names
    users.create(name="1")
    repo.set_database(other)
    users.create(name="2")
    with repo.using(one):
        users.create(name="3")
        users.on(other).create(name="4")
        users.create(name="5")
    users.on(DEFAULT).create(name="6")
    users.create_batch(2, name="7")
    assert found(server, one) == ["1", "3", "5", "6"]
    assert found(server, other) == ["2", "4", "7", "7"]


def test_on_takes_what_using_takes(server: Server, names: tuple[str, str], repo: type[Repo], users: Factory) -> None:
    """A name, a mapping, options, a URL or a database; what was chosen before is chosen afterwards."""
    _, other = names
    with repo.using(other):
        database = repo.get_database()
    for bound in (
        users.on(other), users.on({"database": other}), users.on(database=other), users.on(database),
        users.on(server.url(other)),
    ):  # fmt: skip
        assert repo.home(bound.create()) == database.home
        assert [repo.home(user) for user in bound.create_batch(2)] == [database.home] * 2
        assert repo.get_database().name == names[0]
    with pytest.raises(ConstraintError):
        users.on(other).create(id=1)
    assert repo.get_database().name == names[0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "no database given: pass a name"),
        ((), {"databse": "x"}, "did you mean 'database'"),
        (("",), {}, "database is empty"),
        (("x",), {"host": "db02"}, "not by both"),
        ((3,), {}, "cannot choose a database by int 3"),
    ],
)
def test_on_refuses_what_names_no_database(
    users: Factory, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    """At once, not at the first object."""
    with pytest.raises(ConfigError, match=message):
        users.on(*arguments, **options)


def test_threads_have_databases_of_their_own(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory
) -> None:
    """One factory serves many at a time, each by turns with the other."""
    barrier = threading.Barrier(2)

    def work(name: str) -> list[str | None]:
        homes = []
        with repo.using(name):
            for _ in range(10):
                barrier.wait(10)
                homes.append(repo.home(users.create(name=name)))
        return homes

    with ThreadPoolExecutor(2) as executor:
        homes = list(executor.map(work, names))
    assert [{str(home).rpartition("/")[2] for home in each} for each in homes] == [{name} for name in names]
    assert [found(server, name) for name in names] == [[name] * 10 for name in names]


def test_tasks_have_databases_of_their_own(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory
) -> None:
    """One factory serves many at a time, each by turns with the other."""

    async def work(name: str) -> None:
        with repo.using(name):
            for _ in range(10):
                users.create(name=name)
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*map(work, names))

    asyncio.run(main())
    assert [found(server, name) for name in names] == [[name] * 10 for name in names]


def test_nothing_chosen_is_an_error(names: tuple[str, str], make_repo: Callable[..., type[Repo]]) -> None:
    """Where the repo says that a database has to be chosen; on chooses one."""
    base = deriving(RepoFactory, {"model": User}, name="x")
    users = with_repo(base, make_repo(names[0], require_database=True))
    for create in (users.create, lambda: users.create_batch(2)):
        with pytest.raises(NoDatabaseError):
            create()
    assert users.on(names[0]).create().id == 1


# One graph, one home


def test_a_graph_has_one_home(server: Server, names: tuple[str, str], repo: type[Repo], posts: Factory) -> None:
    """Parents, children and their children are where the outermost one is, in one transaction."""
    one, other = names
    users = with_repo(deriving(RepoFactory, {"model": User}, name="x"), repo)
    writers = deriving(users, posts=factory.RelatedFactoryList(posts, factory_related_name="author", size=3))
    posts.on(other).create()
    with count_statements(server, database=other) as counted:
        writers.on(other).create()
    assert contents(server, one) == []
    assert found(server, other, "posts", "author_id") == [1, 2, 2, 2]
    assert sent(counted) == ["BEGIN", *["INSERT"] * 4, "COMMIT"]


def test_what_is_chosen_meanwhile_is_chosen_for_itself(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory, posts: Factory
) -> None:
    """What a lazy attribute or a hook leaves chosen changes nothing for the graph, nor afterwards."""
    one, other = names

    def leave(*_: Any) -> str:
        repo.set_database(other)
        return "left"

    leaving = deriving(users, city=factory.LazyFunction(leave))
    assert repo.home(leaving.create()).endswith(one)
    assert [repo.home(each).rpartition("/")[2] for each in leaving.create_batch(2)] == [one, one]
    assert repo.get_database().name == one

    def look(*_: Any, **__: Any) -> str:
        with repo.using(other):
            return users.create(name="elsewhere").name

    looking = deriving(posts, title=factory.LazyFunction(look), hook=factory.PostGeneration(look))
    looking = deriving(looking, late=factory.RelatedFactory(posts))
    post = looking.create()
    assert {repo.home(post), repo.home(post.author)} == {repo.get_database().home}
    assert found(server, one, "posts", "author_id") == [4, 5]
    assert found(server, other) == ["elsewhere"] * 2


def test_a_database_cannot_be_left_chosen_in_a_transaction(
    names: tuple[str, str], server: Server, repo: type[Repo], posts: Factory
) -> None:
    """As anywhere else: it is an error, and nothing is kept of the graph."""
    switching = deriving(posts, hook=factory.PostGeneration(lambda *_, **__: repo.set_database(names[1])))
    with pytest.raises(WrongDatabaseError, match="a transaction is open"):
        switching.create()
    assert contents(server, names[0]) == contents(server, names[1]) == []


@pytest.mark.parametrize("given", ["author", "author_id", "excluded"])
def test_an_object_of_another_home_is_refused(
    server: Server, names: tuple[str, str], users: Factory, posts: Factory, given: str
) -> None:
    """Whatever it would be used for, in one object and in several; nothing is written."""
    one, other = names
    user = users.on(one).create()
    by_key = deriving(
        posts, {"exclude": ("author",)}, author_id=factory.SelfAttribute("author.id"), tag=factory.SubFactory(posts)
    )
    by_key = deriving(by_key, {"exclude": ("author", "tag")})
    used = {"author": posts, "author_id": by_key, "excluded": deriving(by_key, author_id=None)}[given]
    for create in (used.on(other).create, lambda **given: used.on(other).create_batch(2, **given)):
        with pytest.raises(WrongDatabaseError, match=f"User belongs to .*{one}, and .*{other} is the current"):
            create(author=user)
    assert contents(server, other) == []
    assert len(contents(server, one)) == 1


def test_an_object_of_another_home_is_refused_however_it_comes_in(
    server: Server, names: tuple[str, str], users: Factory, posts: Factory
) -> None:
    """Also by what a factory makes of its attributes, or a model of its arguments."""
    user = users.create()
    adjusting = deriving(posts, _adjust_kwargs=classmethod(lambda cls, **kwargs: {**kwargs, "author": user}))
    for create in (adjusting.on(names[1]).create, lambda **given: adjusting.on(names[1]).create_batch(2, **given)):
        with pytest.raises(WrongDatabaseError, match="User belongs to"):
            create(author=None)
    assert contents(server, names[1]) == []


def test_an_object_of_the_same_home_is_referred_to(
    server: Server, names: tuple[str, str], users: Factory, posts: Factory
) -> None:
    """By its key; it is the object that was passed, and one insert is one statement."""
    user = users.on(names[1]).create()
    with count_statements(server, database=names[1]) as counted:
        post = posts.on(names[1]).create(author=user)
    assert post.author is user
    assert post.author_id == user.id
    assert sent(counted) == ["INSERT"]


def test_repos_of_two_configs_meet_in_no_graph(
    server: Server, names: tuple[str, str], repo: type[Repo], make_repo: Callable[..., type[Repo]], posts: Factory
) -> None:
    """The error names both, and nothing is kept; a repo that shares the config is the same databases."""

    class Sharing(repo):  # type: ignore[misc,valid-type]
        pass

    other = make_repo(names[0])
    other.__name__ = "OtherRepo"
    foreign = with_repo(deriving(RepoFactory, {"model": User}, name="x"), other)
    with pytest.raises(ConfigError, match=r"writes through OtherRepo and is used by .*, which writes through AppRepo"):
        deriving(posts, author=factory.SubFactory(foreign)).create()
    with pytest.raises(ConfigError, match="repos of two configs"):
        deriving(posts, foreign=factory.RelatedFactory(foreign)).create()
    assert contents(server, names[0]) == []
    sharing = with_repo(deriving(RepoFactory, {"model": User}, name="shared"), Sharing)
    assert deriving(posts, author=factory.SubFactory(sharing)).create().author.name == "shared"


def test_a_factory_of_another_kind_uses_ours(names: tuple[str, str], repo: type[Repo], users: Factory) -> None:
    """Each object goes where is current when it is made."""

    class PairFactory(factory.DictFactory):
        first = factory.SubFactory(users)
        second = factory.SubFactory(users)

    with repo.using(names[1]):
        made = PairFactory.create()
    assert {repo.home(made["first"]).rpartition("/")[2], repo.home(made["second"]).rpartition("/")[2]} == {names[1]}


# All or nothing


@pytest.mark.parametrize("several", [False, True])
def test_a_graph_that_fails_leaves_nothing(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory, posts: Factory, several: bool
) -> None:
    """Whatever fails in it: an insert, a hook, a lazy attribute; one object or several."""

    def fail(*_: Any, **__: Any) -> None:
        raise LookupError

    author = factory.SubFactory(users)
    failing = [
        (deriving(posts, title=None, author=factory.Maybe(factory.LazyFunction(bool), None, author)), ConstraintError),
        (deriving(posts, title=None, author=factory.Transformer(author, transform=lambda user: user)), ConstraintError),
        (deriving(posts, title=None), ConstraintError),
        (deriving(posts, hook=factory.PostGeneration(fail)), LookupError),
        (deriving(posts, late=factory.RelatedFactory(deriving(posts, title=None))), ConstraintError),
        (deriving(posts, title=factory.LazyAttribute(lambda post: fail(post.author))), LookupError),
    ]
    for used, error in failing:
        with pytest.raises(error):
            used.create_batch(2) if several else used.create()
    assert contents(server, names[0]) == []
    assert not repo.in_transaction()


def test_a_graph_is_part_of_the_open_transaction(
    server: Server, names: tuple[str, str], repo: type[Repo], posts: Factory
) -> None:
    """It is rolled back with that, and one that fails dooms it unless it stands in a savepoint."""
    with repo.transaction():
        posts.create()
        posts.create_batch(2)
        repo.rollback()
    assert contents(server, names[0]) == []
    with pytest.raises(TransactionDoomedError), repo.transaction():
        with pytest.raises(ConstraintError):
            posts.create(title=None)
    with repo.transaction():
        with pytest.raises(ConstraintError), repo.savepoint():
            posts.create(title=None)
        posts.create(title="kept")
    assert found(server, names[0], "posts", "title") == ["kept"]


def test_what_failed_is_not_written_with_its_parent(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory, posts: Factory
) -> None:
    """A parent that was passed forgets the child that was not stored, whether its children are loaded or not."""
    for parent in (users.create(), repo.preload(users.create(), User.posts)):
        for create in (posts.create, lambda **given: posts.create_batch(2, **given)):
            with pytest.raises(ConstraintError):
                create(author=parent, title=None)
        with pytest.raises(ConstraintError):
            posts.create_batch(2, author=parent, title=factory.Iterator([func.lower("X"), None]))
        with pytest.raises(ZeroDivisionError):
            posts.create_batch(2, author=parent, title=factory.Iterator([1, 0], getter=lambda n: str(1 / n)))
        repo.update(parent, age=5)
    assert found(server, names[0], "posts", "title") == []
    assert found(server, names[0], what="age") == [5, 5]


def test_rollback_in_a_hook_ends_the_create(
    server: Server, names: tuple[str, str], repo: type[Repo], posts: Factory
) -> None:
    """As it ends `transact`: nothing is kept, and what it is given is returned."""
    ending = deriving(posts, hook=factory.PostGeneration(lambda *_, **__: repo.rollback("ended")))
    assert ending.create() == "ended"
    assert contents(server, names[0]) == []


# Many


def test_a_batch_is_one_insert(server: Server, names: tuple[str, str], repo: type[Repo], users: Factory) -> None:
    """In order, as many single ones would be: detached, with keys and the server's defaults, at home."""
    one, other = names
    with count_statements(server, database=other) as counted:
        many = users.on(other).create_batch(100, age=factory.Sequence(lambda n: n))
    assert sent(counted) == ["INSERT"]
    assert [user.id for user in many] == list(range(1, 101))
    assert [user.name for user in many] == [f"user {user.age}" for user in many] == found(server, other)
    assert {(user.city, user.name_length > 5, user.email) for user in many} == {("nowhere", True, None)}
    with repo.using(other):
        assert repo.home(many[0]) == repo.home(many[-1]) == repo.get_database().home
        assert repo.update(many[3], name="x").name == "x"
        assert repo.preload(many, User.posts)[5].posts == []
    assert found(server, one) == []


def test_a_batch_of_none_sends_nothing(server: Server, users: Factory, posts: Factory) -> None:
    """There is nothing to insert."""
    with count_statements(server) as counted:
        assert users.create_batch(0) == posts.create_batch(0) == []
    assert len(counted) == 0


def test_a_batch_of_one_is_an_insert(server: Server, names: tuple[str, str], users: Factory) -> None:
    """Of one statement, as long as there is nothing else to do."""
    with count_statements(server, database=names[0]) as counted:
        (user,) = users.create_batch(1)
    assert user.id == 1
    assert sent(counted) == ["INSERT"]


def test_the_parents_of_a_batch_come_first(
    server: Server, names: tuple[str, str], repo: type[Repo], posts: Factory
) -> None:
    """One by one, then all that refer to them at once, in one transaction."""
    with count_statements(server, database=names[0]) as counted:
        many = posts.create_batch(3)
    assert sent(counted) == ["BEGIN", *["INSERT"] * 4, "COMMIT"]
    assert [(post.author.id, post.author_id) for post in many] == [(1, 1), (2, 2), (3, 3)]


def test_a_batch_with_one_parent_is_one_insert(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory, posts: Factory
) -> None:
    """The parent is written by key and stays as it is."""
    user = users.create()
    with count_statements(server, database=names[0]) as counted:
        many = posts.create_batch(50, author=user)
    assert sent(counted) == ["INSERT"]
    assert {(post.author, post.author_id) for post in many} == {(user, 1)}
    repo.update(user, name="x")
    assert found(server, names[0], "posts", "author_id") == [1] * 50


def test_rows_with_other_columns_are_inserted_in_order(server: Server, names: tuple[str, str], users: Factory) -> None:
    """What is None and has no default is given as such; where only some have a value for a default, it is each."""
    emails = deriving(users, email=factory.Iterator(["a", None, "b", None]))
    with count_statements(server, database=names[0]) as counted:
        many = emails.create_batch(4)
    assert sent(counted) == ["INSERT"]
    assert [(user.id, user.email) for user in many] == [(1, "a"), (2, None), (3, "b"), (4, None)]
    cities = deriving(users, city=factory.Iterator(["x", None, "y"]))
    with count_statements(server, database=names[0]) as counted:
        many = cities.create_batch(3)
    assert sent(counted) == ["BEGIN", *["INSERT"] * 3, "COMMIT"]
    assert [(user.id, user.city) for user in many] == [(5, "x"), (6, "nowhere"), (7, "y")]


def test_a_batch_is_what_as_many_creates_are(server: Server, names: tuple[str, str], repo: type[Repo]) -> None:
    """Whatever the mapping is: versions, defaults of Python's and the server's, JSON, arrays, several tables."""
    factories: list[Factory] = [
        deriving(RepoFactory, {"model": Account}, balance=factory.Sequence(lambda n: n)),
        deriving(
            RepoFactory, {"model": Note}, heading=factory.Sequence(lambda n: f"h{n}"), token="t", words=["a", "b"],
            data=factory.Dict({"a": factory.Sequence(lambda n: n), "b": None}),
        ),
        deriving(RepoFactory, {"model": Note}, heading="h", token="t", data=None, kind=func.lower("X")),
        deriving(RepoFactory, {"model": Note}, heading=factory.Sequence(lambda n: f"n{n}"), token="t", data=None),
        deriving(RepoFactory, {"model": Note}, heading=factory.Sequence(lambda n: f"m{n}"), token="t"),
        deriving(RepoFactory, {"model": Place}, row=1, seat=factory.Sequence(lambda n: n), changed="x"),
        deriving(RepoFactory, {"model": Dog}, breed="b"),
        deriving(RepoFactory, {"model": Animal}),
        deriving(RepoFactory, {"model": Book}, title="t", text="deferred"),
    ]  # fmt: skip
    for base in factories:
        used = with_repo(base, repo)
        together = used.on(names[0]).create_batch(3)
        used.reset_sequence(force=True)
        apart = [used.on(names[1]).create() for _ in range(3)]
        for one, other in zip(together, apart, strict=True):
            columns = {*type(one).__mapper__.column_attrs.keys()} - {"headline"}  # which only a SELECT computes
            assert [getattr(one, name) for name in columns] == [getattr(other, name) for name in columns]
    one, other = (contents(server, name) for name in names)
    assert one == other
    assert len(one) == 3 * (len(factories) + 1)


def test_a_batch_of_joined_tables_is_inserted_one_by_one(
    server: Server, names: tuple[str, str], repo: type[Repo]
) -> None:
    """In one transaction: two rows for each."""
    dogs = with_repo(deriving(RepoFactory, {"model": Dog}, breed="b"), repo)
    with count_statements(server, database=names[0]) as counted:
        many = dogs.create_batch(2)
    assert sent(counted) == ["BEGIN", *["INSERT"] * 4, "COMMIT"]
    assert [(dog.id, dog.kind) for dog in many] == [(1, "dog"), (2, "dog")]


@pytest.mark.parametrize(
    ("target", "name"), [(User, "after_insert"), (User, "refresh_flush"), (Session, "after_attach")]
)
def test_who_listens_hears_of_each(repo: type[Repo], users: Factory, target: Any, name: str) -> None:
    """A batch is inserted one by one where there is a listener that would hear nothing of rows."""
    heard = []

    def listener(*arguments: Any) -> None:
        heard.append(arguments)

    event.listen(target, name, listener)
    try:
        users.create_batch(3)
    finally:
        event.remove(target, name, listener)
    assert len(heard) == 3


def test_a_batch_of_graphs_is_created_one_by_one(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory, posts: Factory
) -> None:
    """What is declared to follow an insert follows that of each; all in one transaction."""
    writers = deriving(users, posts=factory.RelatedFactory(posts, factory_related_name="author"))
    with count_statements(server, database=names[0]) as counted:
        writers.create_batch(2)
    assert sent(counted) == ["BEGIN", *["INSERT"] * 4, "COMMIT"]
    assert found(server, names[0], "posts", "author_id") == [1, 2]


def test_new_children_come_with_each(server: Server, names: tuple[str, str], repo: type[Repo], users: Factory) -> None:
    """Objects that are passed and not stored yet are inserted with what refers to them."""
    parents = deriving(users, posts=factory.LazyFunction(lambda: [Post(title="child")]))
    many = parents.create_batch(2)
    assert [user.posts[0].author_id for user in many] == [1, 2]
    assert found(server, names[0], "posts", "author_id") == [1, 2]


def test_objects_of_several_classes_are_inserted_one_by_one(
    server: Server, names: tuple[str, str], repo: type[Repo]
) -> None:
    """As a model may make them that chooses a class for itself."""
    insert_objects(repo, [User(name="x"), Tag(label="y"), User(name="z")])
    assert (found(server, names[0]), found(server, names[0], "tags", "label")) == (["x", "z"], ["y"])


def test_a_batch_that_fails_leaves_nothing(server: Server, names: tuple[str, str], users: Factory) -> None:
    """Neither rows nor objects: it is all or none, also where it is one by one."""
    for extra in ({}, {"city": factory.Iterator([None, "x"])}):
        with pytest.raises(ConstraintError):
            deriving(users, email=factory.Iterator(["a", "b", "a"]), **extra).create_batch(3)
    assert found(server, names[0]) == []


@pytest.mark.parametrize("name", ["_create", "create", "_after_postgeneration"])
def test_what_is_overridden_is_called_for_each(
    server: Server, names: tuple[str, str], users: Factory, name: str
) -> None:
    """A factory that has its own way to create uses it in a batch too."""
    called = []

    def overridden(cls: Any, *arguments: Any, **kwargs: Any) -> Any:
        called.append(cls)
        return getattr(super(own, cls), name)(*arguments, **kwargs)

    own = deriving(users, **{name: classmethod(overridden)})
    assert [user.id for user in own.create_batch(2)] == [1, 2]
    assert called == [own, own]


# What factory_boy promises


def test_attributes_are_declared_as_ever(repo: type[Repo], users: Factory) -> None:
    """Every kind of declaration, in one object and in several."""

    class RichFactory(users):  # type: ignore[misc,valid-type]
        class Meta:
            exclude = ("domain",)
            rename = {"town": "city"}

        class Params:
            grown = factory.Trait(age=factory.LazyFunction(lambda: 40))
            shouting = False

        domain = "x.org"
        town = factory.Maybe("shouting", yes_declaration="ROME", no_declaration="rome")
        age = FuzzyInteger(1, 9)
        email = factory.LazyAttributeSequence(lambda user, n: f"{user.name}.{n}@{user.domain}")
        name = factory.Transformer(factory.Faker("first_name"), transform=str.lower)

    for user in (
        RichFactory.create(grown=True, shouting=True),
        *RichFactory.create_batch(2, grown=True, shouting=True),
    ):
        assert (user.age, user.city, user.name) == (40, "ROME", user.name.lower())
        assert user.email == f"{user.name}.{user.id - 1}@x.org"
    user = RichFactory.create(name="ADA")
    assert (user.name, user.city, 1 <= user.age <= 9) == ("ada", "rome", True)
    assert repo.reload(user).email == "ada.3@x.org"


def test_a_sequence_is_reset(users: Factory) -> None:
    """It counts over all databases, and over create and build."""
    assert [users.create().name, users.build().name, *(user.name for user in users.create_batch(2))] == [
        "user 0", "user 1", "user 2", "user 3",
    ]  # fmt: skip
    users.reset_sequence(7, force=True)
    assert users.create().name == "user 7"
    assert users.create(__sequence=42).name == "user 42"
    assert [user.name for user in users.create_batch(2, __sequence=43)] == ["user 43", "user 43"]


def test_inline_arguments_are_passed_by_place(repo: type[Repo]) -> None:
    """To a model whose constructor takes them so."""

    class Own(DeclarativeBase):
        pass

    class Named(Own):
        __tablename__ = "tags"
        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str]

        def __init__(self, label: str) -> None:
            self.label = f"<{label}>"

    named = with_repo(deriving(RepoFactory, {"model": Named, "inline_args": ("label",)}), repo)
    named = deriving(named, label=factory.Sequence(str))
    assert [named.create().label, *(each.label for each in named.create_batch(2))] == ["<0>", "<1>", "<2>"]


def test_factories_inherit(server: Server, names: tuple[str, str], repo: type[Repo]) -> None:
    """The repo of an abstract base, its declarations, and what a subclass says in their place."""

    class BaseFactory(RepoFactory):
        class Meta:
            abstract = True

    AppFactory = with_repo(BaseFactory, repo, abstract=True)
    TagFactory = deriving(AppFactory, {"model": Tag}, label="tag")
    RedFactory = deriving(TagFactory, label="red")
    assert [TagFactory.create().label, RedFactory.on(names[1]).create().label] == ["tag", "red"]
    with pytest.raises(factory.FactoryError, match="abstract"):
        AppFactory.create()
    with pytest.raises(factory.FactoryError, match="abstract"):
        AppFactory.create_batch(2)


def test_helpers_make_factories(repo: type[Repo]) -> None:
    """factory.create and its like, with a base that has a repo."""
    AppFactory = with_repo(RepoFactory, repo)
    assert factory.create(Tag, FACTORY_CLASS=AppFactory, label="a").id == 1
    assert [tag.id for tag in factory.create_batch(Tag, 2, FACTORY_CLASS=AppFactory, label=factory.Sequence(str))] == [
        2,
        3,
    ]
    made = factory.make_factory(Tag, FACTORY_CLASS=AppFactory, label="b")
    assert made.simple_generate(False).id is None
    assert [tag.id for tag in made.generate_batch("create", 1)] == [4]


def test_nested_attributes_reach_the_graph(repo: type[Repo], users: Factory, posts: Factory) -> None:
    """By name from outside, by SelfAttribute from inside."""
    titled = deriving(users, posts=factory.RelatedFactory(posts, "author", title=factory.SelfAttribute("author.name")))
    user = titled.create(name="Ada")
    assert repo.get_one_by(Post, author_id=user.id).title == "Ada"
    assert titled.create(posts__title="other").id == 2
    assert posts.create(author__name="Bob", author__city="x").author.city == "x"
    upwards = deriving(posts, author=factory.SubFactory(users, name=factory.SelfAttribute("..title")))
    assert upwards.create(title="up").author.name == "up"
    assert posts.create(author=None).author is None


def test_what_hooks_change_is_stored(server: Server, names: tuple[str, str], repo: type[Repo], posts: Factory) -> None:
    """Attributes, and references to stored objects; a hook that changes nothing sends nothing."""

    class HookedFactory(posts):  # type: ignore[misc,valid-type]
        @factory.post_generation
        def renamed(self, create: bool, title: Any, **_: Any) -> None:
            if title:
                self.title = title

        @factory.post_generation
        def tags(self, create: bool, labels: Any, **_: Any) -> None:
            if create and labels:
                repo.preload(self, Post.tags).tags.extend(repo.insert(Tag(label=label)) for label in labels)

    post = HookedFactory.on(names[1]).create(renamed="x", tags=["a", "b"])
    assert HookedFactory.build(renamed="y", tags=["c"]).title == "y"
    assert found(server, names[1], "posts", "title") == ["x"] == [post.title]
    assert run_sql(server, names[1], "SELECT * FROM post_tags ORDER BY 2") == [(1, 1), (1, 2)]
    with count_statements(server, database=names[0]) as counted:
        HookedFactory.create()
    assert sent(counted) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_what_a_called_method_changes_is_stored(server: Server, names: tuple[str, str], repo: type[Repo]) -> None:
    """PostGenerationMethodCall, as of a password that is to be hashed; in one object and in several."""

    class Own(DeclarativeBase):
        pass

    class Locked(Own):
        __tablename__ = "tags"
        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str]

        def lock(self, key: str) -> None:
            self.label = f"{self.label} locked by {key}"

    locked = with_repo(RepoFactory, repo, model=Locked)
    locked = deriving(locked, label=factory.Sequence(str), key=factory.PostGenerationMethodCall("lock", "me"))
    many = [locked.create(key="you"), *locked.create_batch(2)]
    assert [each.label for each in many] == ["0 locked by you", "1 locked by me", "2 locked by me"]
    assert found(server, names[0], "tags", "label") == [each.label for each in many]


# Get or create


@pytest.fixture
def tags(repo: type[Repo]) -> Factory:
    return with_repo(deriving(RepoFactory, {"model": Tag}, label="tag"), repo, get_or_create=("label",))


def test_what_is_there_is_taken(server: Server, names: tuple[str, str], repo: type[Repo], tags: Factory) -> None:
    """As it is stored, in the database that is current; else it is created."""
    first = tags.create()
    with count_statements(server, database=names[0]) as counted:
        assert tags.create().id == first.id
    assert sent(counted) == ["SELECT"]
    assert [tag.id for tag in tags.create_batch(2, label=factory.Iterator(["tag", "new"]))] == [1, 2]
    assert repo.home(tags.on(names[1]).create()) != repo.home(first)
    assert [found(server, name, "tags", "label") for name in names] == [["tag", "new"], ["tag"]]


@pytest.mark.parametrize("open_", [False, True])
def test_what_comes_in_between_is_taken(
    server: Server, names: tuple[str, str], repo: type[Repo], users: Factory, open_: bool
) -> None:
    """Somebody else inserts it after it was looked for; another conflict is an error."""

    def insert_first(*_: Any) -> None:
        run_sql(
            server, names[0], "INSERT INTO users (name, age, email) VALUES ('theirs', 1, 'a') ON CONFLICT DO NOTHING"
        )

    unique = deriving(users, {"get_or_create": ["email"]}, email="a")
    event.listen(User, "before_insert", insert_first)
    try:
        with repo.transaction() if open_ else nullcontext():
            assert unique.create().name == "theirs"
            assert unique.create().name == "theirs"
        with pytest.raises(ConstraintError) as caught:
            unique.create(email="b", id=1)
        assert caught.value.constraint == "users_pkey"
    finally:
        event.remove(User, "before_insert", insert_first)


def test_what_is_looked_for_has_a_value(tags: Factory, users: Factory) -> None:
    """One that is not declared, or None, would find anything or nothing."""
    with pytest.raises(ConfigError, match=r"no value for 'email' of its Meta\.get_or_create: declare or pass one"):
        deriving(users, {"get_or_create": ("email",)}).create()
    with pytest.raises(ValueError, match="label"):
        tags.create(label=None)


# What is wrong


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"repo": "MyRepo"}, "Meta.repo is 'MyRepo', which is no subclass of Repo"),
        ({"repo": User}, "Meta.repo is .*User.*, which is no subclass of Repo"),
        ({"get_or_create": "email"}, r"Meta.get_or_create is 'email': give a tuple"),
        ({"get_or_create": (User.email,)}, "give a tuple of attributes"),
        ({"sqlalchemy_session": None}, "Meta.sqlalchemy_session is .*: say repo here"),
        ({"sqlalchemy_session_factory": None}, "Meta.sqlalchemy_session_factory is .*: say repo here"),
        ({"sqlalchemy_session_persistence": "commit"}, "say repo here"),
        ({"sqlalchemy_get_or_create": ("email",)}, "say get_or_create here"),
    ],
)
def test_a_meta_that_says_nothing_is_refused(meta: dict[str, Any], message: str) -> None:
    """Where it is written."""
    with pytest.raises(ConfigError, match=message):
        deriving(RepoFactory, {"model": User, **meta})


def test_a_factory_without_a_repo_only_builds(users: Factory) -> None:
    """To create is an error that says what is missing, also as part of another one."""
    alone = deriving(RepoFactory, {"model": User}, name="x")
    assert alone.build().name == "x"
    for create in (alone.create, lambda: alone.create_batch(2), lambda: alone.on("shard02")):
        with pytest.raises(ConfigError, match="RepoFactory has no repo to write with: say repo = MyRepo in its Meta"):
            create()
    with pytest.raises(ConfigError, match="has no repo to write with"):
        deriving(users, after=factory.RelatedFactory(alone)).create()


def test_a_repo_without_a_config_is_refused() -> None:
    """With the error of the repo itself."""
    with pytest.raises(ConfigError, match="Repo has no config"):
        with_repo(deriving(RepoFactory, {"model": User}), Repo).create()


@pytest.mark.parametrize("model", [dict, Base, post_tags])
def test_a_model_that_is_not_mapped_is_refused(repo: type[Repo], model: Any) -> None:
    """Before it is called; what it is and what to do is said."""
    wrong = with_repo(RepoFactory, repo, model=model)
    for create in (wrong.create, lambda: wrong.create_batch(2)):
        with pytest.raises(ConfigError, match=r"which is no mapped class .*: name one as Meta\.model"):
            create()


def test_a_table_that_is_not_there_is_explained(repo: type[Repo], names: tuple[str, str], users: Factory) -> None:
    """The server's error has a note of what can be done; it names the factory, the model and the database."""

    class Own(DeclarativeBase):
        pass

    class Missing(Own):
        __tablename__ = "missing"
        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str]

    missing = with_repo(deriving(RepoFactory, {"model": Missing}, label="x"), repo)
    looked_for = deriving(missing, {"get_or_create": ("label",)})
    part = deriving(users, {"exclude": ("part",)}, part=factory.SubFactory(missing))
    for create in (missing.create, lambda: missing.create_batch(2), looked_for.create, part.create):
        with pytest.raises(ProgrammingError) as caught:
            create()
        notes = "\n".join(caught.value.__notes__)
        assert f"database: {repo.get_database().home}" in notes
        assert notes.count("writes Missing, whose table is not there: migrate this database, choose the one") == 1


def test_another_error_of_the_server_is_passed_on(repo: type[Repo], users: Factory) -> None:
    """Without a note of ours."""
    with pytest.raises(ProgrammingError) as caught:
        users.create(name=text("nonsense"))
    assert not any("whose table" in note for note in caught.value.__notes__)
