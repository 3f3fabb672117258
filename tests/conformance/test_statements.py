"""What the verbs send, as the server logged it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, select, text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.orm import Mapper, Session, joinedload, selectinload

from shardrepo import Repo
from shardrepo.testing.servers import Server, count_statements

from ..conftest import SQL
from ..models import Account, Book, Chapter, Dog, Place, Post, Shelf, Tag, User

pytestmark = pytest.mark.verbs


class Sent:
    """The statements of a block, shortened to their first word; all of them to the repo's database."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    @property
    def words(self) -> list[str]:
        return [
            "RESET" if sql.startswith(("CLOSE ALL", "DISCARD ALL")) else sql.split(None, 1)[0].rstrip(";")
            for sql in self.statements
        ]


@pytest.fixture
def sent(server: Server, repo: type[Repo]) -> Callable[[], Any]:
    """Collect what the repo sends during a block, after its first connection has told the server's version."""
    name = repo.execute("SHOW application_name").scalar_one()

    @contextmanager
    def collect() -> Iterator[Sent]:
        sent = Sent()
        with count_statements(server) as counted:
            yield sent
        ours = [one for one in counted.statements if one.application_name == name]
        assert {one.database for one in ours} <= {repo.get_database().name}
        sent.statements = [one.sql for one in ours]

    return collect


@pytest.fixture
def rows(sql: SQL) -> None:
    sql("INSERT INTO users (name, age) VALUES ('Ada', 1)")
    sql("INSERT INTO tags (label) VALUES ('a')")
    sql("INSERT INTO places (row, seat) VALUES (1, 2)")
    sql("INSERT INTO shelves (label) VALUES ('tall')")
    sql("INSERT INTO books (title, shelf_id) VALUES ('One', 1), ('Two', 1)")
    sql("INSERT INTO chapters (title, book_id) VALUES ('a', 1)")


READS: dict[str, Callable[[type[Repo]], Any]] = {
    "get": lambda repo: repo.get(User, 1),
    "get of nothing": lambda repo: repo.get(User, 77),
    "get by a composite key": lambda repo: repo.get(Place, (1, 2)),
    "get of joined inheritance": lambda repo: repo.get(Dog, 1),
    "get_one": lambda repo: repo.get_one(User, 1),
    "get_by": lambda repo: repo.get_by(User, name="Ada"),
    "one": lambda repo: repo.one(select(User)),
    "one of a column": lambda repo: repo.one(select(User.name)),
    "one_or_none": lambda repo: repo.one_or_none(select(User).where(User.id == 77)),
    "all": lambda repo: repo.all(User),
    "all with a joined collection": lambda repo: repo.all(select(User).options(joinedload(User.posts))),
    "count": lambda repo: repo.count(User),
    "exists": lambda repo: repo.exists(User),
    "get_one_by": lambda repo: repo.get_one_by(User, name="Ada"),
    "all_by": lambda repo: repo.all_by(User, name="Ada"),
    "first": lambda repo: repo.first(User),
    "last": lambda repo: repo.last(select(User).order_by(User.name)),
    "aggregate": lambda repo: repo.aggregate(User, "max", User.age),
    "aggregate of some": lambda repo: repo.aggregate(select(User).limit(2), "max", User.age),
    "get with a joined collection": lambda repo: repo.get(User, 1, options=[joinedload(User.posts)]),
    "reload": lambda repo: repo.reload(repo.load(User, {"id": 1})),
    "preload": lambda repo: repo.preload(repo.load(User, {"id": 1}), User.posts),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_is_one_statement(repo: type[Repo], sent: Any, rows: None, read: str) -> None:
    """A read sends its SELECT, with no BEGIN before and no ROLLBACK after; inside a transaction too."""
    with sent() as alone:
        READS[read](repo)
    assert alone.words == ["SELECT"]
    with sent() as inside, repo.transaction():
        READS[read](repo)
        READS[read](repo)
    assert inside.words == ["BEGIN", "SELECT", "SELECT", "COMMIT"]


def test_a_read_on_a_new_connection_is_one_statement(repo: type[Repo], sent: Any, rows: None) -> None:
    """A connection to a known server opens with no question of its own."""
    repo.disconnect()
    with sent() as first:
        repo.get(User, 1)
    assert first.words == ["SELECT"]


def test_a_prepared_read_is_one_statement(repo: type[Repo], sent: Any, rows: None) -> None:
    """A read that is repeated until the driver prepares it stays one statement each time."""
    with sent() as many:
        for _ in range(12):
            repo.get(User, 1)
    assert many.words == ["SELECT"] * 12


def test_each_eager_loading_strategy_is_a_statement(repo: type[Repo], sent: Any, rows: None) -> None:
    """A joined collection costs no statement, a selected one costs one, without a transaction."""
    with sent() as shelf:
        repo.get(Shelf, 1)
    assert shelf.words == ["SELECT", "SELECT"]  # the shelf with its books, their chapters
    with sent() as user:
        repo.one(select(User).options(selectinload(User.posts)))
    assert user.words == ["SELECT", "SELECT"]


WRITES: dict[str, tuple[Callable[[type[Repo]], Any], str]] = {
    "insert": (lambda repo: repo.insert(User(name="Bob")), "INSERT"),
    "insert of a composite key": (lambda repo: repo.insert(Place(row=5, seat=5)), "INSERT"),
    "insert with a version": (lambda repo: repo.insert(Account(balance=1)), "INSERT"),
    "update": (lambda repo: repo.update(repo.get_one(User, 1), name="Bob"), "UPDATE"),
    "update with a computed column": (lambda repo: repo.update(repo.get_one(Place, (1, 2)), label="x"), "UPDATE"),
    "delete": (lambda repo: repo.delete(repo.get_one(Tag, 1)), "DELETE"),
    "insert over a conflict": (
        lambda repo: repo.insert(User(id=1, name="B"), on_conflict="replace", conflict_target="id"),
        "INSERT",
    ),
    "insert_or_update": (lambda repo: repo.insert_or_update(User(name="Bob")), "INSERT"),
    "delete of a composite key": (lambda repo: repo.delete(repo.get_one(Place, (1, 2))), "DELETE"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_proven_single_write_is_one_statement(repo: type[Repo], sent: Any, rows: None, write: str) -> None:
    """One instance in one table is one autocommitted statement, whose RETURNING brings what the server computed."""
    verb, word = WRITES[write]
    with sent() as written:
        obj = verb(repo)
    assert [each for each in written.words if each != "SELECT"] == [word]
    with sent() as reading:
        _ = [getattr(obj, column.key) for column in type(obj).__mapper__.column_attrs]
    assert reading.words == []


BULK: dict[str, tuple[Callable[[type[Repo]], Any], str]] = {
    "insert_all": (lambda repo: repo.insert_all(Tag, [{"label": f"t{n}"} for n in range(10_000)]), "INSERT"),
    "insert_all of one": (lambda repo: repo.insert_all(Tag, [{"label": "x"}], returning=True), "INSERT"),
    "insert_all over conflicts": (
        lambda repo: repo.insert_all(Tag, [{"label": "a"}, {"label": "b"}], on_conflict="nothing", returning=True),
        "INSERT",
    ),
    "insert_all of a query": (lambda repo: repo.insert_all(Tag, select(User.name.label("label"))), "INSERT"),
    "insert_all by copy": (lambda repo: repo.insert_all(Tag, [{"label": "x"}, {"label": "y"}], via="copy"), "COPY"),
    "update_all": (lambda repo: repo.update_all(select(User).limit(1), {"age": 7}, returning=True), "UPDATE"),
    "delete_all": (lambda repo: repo.delete_all(select(Chapter).where(Chapter.id == 1)), "DELETE"),
}


@pytest.mark.parametrize("write", BULK)
def test_a_write_of_many_rows_is_one_statement(repo: type[Repo], sent: Any, rows: None, write: str) -> None:
    """However many rows: without a transaction around it, and one statement of an open one."""
    verb, word = BULK[write]
    with sent() as alone:
        verb(repo)
    assert alone.words == [word]
    with sent() as inside, repo.transaction():
        repo.delete_all(Tag)
        verb(repo)
    assert inside.words == ["BEGIN", "DELETE", word, "COMMIT"]


def test_a_graph_is_one_statement_for_each_table(repo: type[Repo], sent: Any, rows: None) -> None:
    """Parents, children and what is between them, in one transaction; each table's rows in one round trip."""
    tags = [Tag(label=f"t{n}") for n in range(20)]
    with sent() as graph:
        repo.insert(User(name="B", posts=[Post(title=str(n), tags=tags[n:]) for n in range(20)]))
    words = graph.words
    assert words[0] == "BEGIN"
    assert words[-1] == "COMMIT"
    tables = [statement.split()[2] for statement in graph.statements if statement.startswith("INSERT")]
    assert [tables.count(table) for table in ("users", "posts", "tags")] == [1, 1, 1]
    # Sent one after the other without waiting: psycopg's pipeline.
    assert tables.count("post_tags") == 210


def test_a_held_connection_sends_nothing_of_its_own(repo: type[Repo], sent: Any, rows: None) -> None:
    """Only its end does: what a borrower may have left behind is reset, once."""
    with sent() as held, repo.connection() as connection:
        connection.execute(text("SELECT 1"))
        repo.get(User, 1)
        with repo.transaction():
            repo.count(User)
        repo.insert(Tag(label="x"))
    assert held.words == ["SELECT", "SELECT", "BEGIN", "SELECT", "COMMIT", "INSERT", "RESET"]


def test_a_plan_is_undone(repo: type[Repo], sent: Any, rows: None) -> None:
    """The transaction around it, or the savepoint in an open one, is rolled back."""
    with sent() as alone:
        repo.explain(User)
    assert alone.words == ["BEGIN", "EXPLAIN", "ROLLBACK", "RESET"]
    with sent() as inside, repo.transaction():
        repo.explain(User)
    assert inside.words == ["BEGIN", "SAVEPOINT", "EXPLAIN", "ROLLBACK", "COMMIT", "RESET"]


def test_call_options_send_nothing(repo: type[Repo], sent: Any, rows: None) -> None:
    """They are kept on this side."""
    with sent() as read, repo.call_options(timeout=30.0, tags={"a": 1}, execution_options={"b": 2}):
        repo.get(User, 1)
    assert read.words == ["SELECT"]


def test_a_child_of_a_stored_parent_is_one_statement(repo: type[Repo], sent: Any, rows: None) -> None:
    """A reference to a stored object is a value of the one INSERT or UPDATE."""
    user = repo.get_one(User, 1)
    with sent() as inserted:
        post = repo.insert(Post(title="x", author=user))
    assert inserted.words == ["INSERT"]
    assert repo.get_one(Post, post.id).author_id == 1


def test_a_parent_can_be_written_by_itself_afterwards(repo: type[Repo], sent: Any, rows: None) -> None:
    """A parent that was referred to is no different from before: its own update is one statement."""
    user = repo.get_one(User, 1)
    repo.insert(Post(title="x", author=user))
    with sent() as updated:
        repo.update(user, name="Bob")
    assert updated.words == ["UPDATE"]


def test_no_changes_no_statement(repo: type[Repo], sent: Any, rows: None) -> None:
    """An update that changes nothing and an insert of no rows send nothing."""
    user = repo.get_one(User, 1)
    with sent() as nothing:
        repo.update(user)
        repo.update(user, name="Ada")
        repo.insert_all(User, [])
    assert nothing.words == []


TRANSACTIONS: dict[str, tuple[Callable[[type[Repo]], Any], list[str]]] = {
    "children": (lambda repo: repo.insert(User(name="B", posts=[Post(title="x")])), ["INSERT", "INSERT"]),
    "a new parent": (lambda repo: repo.insert(Post(title="x", author=User(name="B"))), ["INSERT", "INSERT"]),
    "joined inheritance": (lambda repo: repo.insert(Dog(breed="pug")), ["INSERT", "INSERT"]),
    "rows with other keys": (
        lambda repo: repo.insert_all(User, [{"name": "x"}, {"name": "y", "age": 2}]),
        ["INSERT"] * 2,
    ),
    "values that fit no array": (
        lambda repo: repo.insert_all(User, [{"name": "x", "age": 1}, {"name": "y", "age": True}]),
        ["INSERT"] * 2,
    ),
    "cascades": (lambda repo: repo.delete(repo.get_one(Book, 2)), ["DELETE"]),
}


@pytest.mark.parametrize("write", TRANSACTIONS)
def test_what_is_not_proven_is_one_transaction(repo: type[Repo], sent: Any, rows: None, write: str) -> None:
    """A write that may take more than one statement is one transaction around them."""
    verb, words = TRANSACTIONS[write]
    with sent() as written:
        verb(repo)
    assert written.words.count("BEGIN") == written.words.count("COMMIT") == 1
    inside = written.words[written.words.index("BEGIN") + 1 :]
    assert [word for word in inside if word != "SELECT"] == [*words, "COMMIT"]


def test_a_transaction_sends_begin_and_commit_once(repo: type[Repo], sent: Any, rows: None) -> None:
    """Nested blocks send nothing of their own; a savepoint sends its two statements; one with no verb sends nothing."""
    with sent() as nested, repo.transaction(), repo.transaction():
        repo.insert(Tag(label="x"))
        with repo.savepoint():
            repo.insert(Tag(label="y"))
    assert nested.words == ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
    with sent() as empty, repo.transaction():
        pass
    assert empty.words == []


def test_a_doomed_transaction_sends_nothing_more(repo: type[Repo], sent: Any, rows: None) -> None:
    """After the first error nothing but the ROLLBACK is sent."""
    with sent() as doomed, pytest.raises(ZeroDivisionError), repo.transaction():
        with pytest.raises(IntegrityError):
            repo.insert(Tag(label="a"))
        for verb in (lambda: repo.count(Tag), lambda: repo.insert(Tag(label="z"))):
            with pytest.raises(Exception, match="doomed"):
                verb()
        raise ZeroDivisionError
    assert doomed.words == ["BEGIN", "INSERT", "ROLLBACK"]


@contextmanager
def listening(target: Any, name: str, function: Callable[..., None], **options: Any) -> Iterator[None]:
    event.listen(target, name, function, **options)
    try:
        yield
    finally:
        event.remove(target, name, function)


def log_insert(mapper: Any, connection: Connection, target: Tag) -> None:
    """As an audit log does: a statement of its own for each row written."""
    connection.execute(insert(Chapter).values(title="log"))


def fail_after(mapper: Any, connection: Connection, target: Tag) -> None:
    connection.execute(insert(Chapter).values(title="log"))
    connection.execute(text("SELECT * FROM nothing"))


MAPPER_EVENTS = [(Tag, "before_insert"), (Tag, "after_insert"), (Mapper, "after_insert")]


@pytest.mark.parametrize(("target", "name"), MAPPER_EVENTS)
def test_a_mapper_listener_makes_a_transaction(repo: type[Repo], sent: Any, sql: SQL, target: Any, name: str) -> None:
    """A write whose mapper has a listener is a transaction, because the listener may write too."""
    with listening(target, name, log_insert), sent() as written:
        repo.insert(Tag(label="x"))
    assert written.words == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    with listening(target, name, fail_after), sent() as failed, pytest.raises(ProgrammingError):
        repo.insert(Tag(label="y"))
    assert failed.words[-1] == "ROLLBACK"
    assert sql("SELECT label FROM tags") == [("x",)]
    assert sql("SELECT count(*) FROM chapters") == [(1,)]


@pytest.mark.parametrize(("verb", "name"), [("update", "after_update"), ("delete", "after_delete")])
def test_listeners_of_updates_and_deletes(repo: type[Repo], sql: SQL, rows: None, verb: str, name: str) -> None:
    """A listener that fails after an UPDATE or DELETE leaves nothing of it."""
    tag = repo.get_one(Tag, 1)
    with listening(Tag, name, fail_after), pytest.raises(ProgrammingError):
        repo.update(tag, label="x") if verb == "update" else repo.delete(tag)
    assert sql("SELECT label FROM tags") == [("a",)]
    assert (tag.label, repo.home(tag)) == ("a", repo.get_database().home)
    repo.update(tag, label="b")


def test_a_listener_of_a_parent_class(repo: type[Repo], sql: SQL) -> None:
    """A listener on a base class with propagate=True is one of its subclasses' too."""
    with listening(Book, "after_insert", fail_after, propagate=True), pytest.raises(ProgrammingError):
        repo.insert(Book(title="x"))
    assert sql("SELECT count(*) FROM books") == [(0,)]


@pytest.mark.parametrize(
    "name", ["before_flush", "after_flush", "after_flush_postexec", "before_commit", "after_begin"]
)
def test_a_session_listener_makes_a_transaction(repo: type[Repo], sent: Any, sql: SQL, name: str) -> None:
    """A listener on all sessions may write: the verb is a transaction, and leaves nothing when it fails."""

    def connection_of(session: Session, args: tuple[Any, ...]) -> Connection:
        return args[-1] if name == "after_begin" else session.connection()

    def log(session: Session, *args: Any) -> None:
        connection_of(session, args).execute(insert(Chapter).values(title="log"))

    def fail(session: Session, *args: Any) -> None:
        connection_of(session, args).execute(text("SELECT * FROM nothing"))

    with listening(Session, name, log), sent() as written:
        repo.insert(Tag(label="x"))
    assert (written.words[0], written.words[-1]) == ("BEGIN", "COMMIT")
    assert sorted(written.words[1:-1]) == ["INSERT", "INSERT"]
    with listening(Session, name, fail), pytest.raises(ProgrammingError):
        repo.insert(Tag(label="y"))
    assert sql("SELECT label FROM tags") == [("x",)]


def test_a_load_listener_sees_every_object(repo: type[Repo], rows: None) -> None:
    """A listener for loaded objects is called by `get`, too."""
    loaded: list[object] = []
    with listening(Tag, "load", lambda target, context: loaded.append(target)):
        tag = repo.get(Tag, 1)
    assert loaded == [tag]


def test_a_select_hook_sees_every_read(repo: type[Repo], rows: None) -> None:
    """A `do_orm_execute` listener, as filters for all reads use it, applies to `get`, too."""

    def hide(state: Any) -> None:
        state.statement = state.statement.where(Tag.label != "a")

    with listening(Session, "do_orm_execute", hide):
        assert repo.get(Tag, 1) is None
        assert repo.all(Tag) == []
    assert repo.get(Tag, 1) is not None


def test_a_failed_graph_leaves_nothing(repo: type[Repo], sent: Any, sql: SQL, rows: None) -> None:
    """When the second table of a write fails, the first has no row either."""
    with sent() as failed, pytest.raises(IntegrityError):
        repo.insert(User(name="Bob", posts=[Post(title=None)]))
    assert failed.words == ["BEGIN", "INSERT", "INSERT", "ROLLBACK"]
    with pytest.raises(IntegrityError):
        repo.insert(Dog())
    assert sql("SELECT count(*) FROM users WHERE name = 'Bob'") == sql("SELECT count(*) FROM animals") == [(0,)]


def test_a_failed_single_write_needs_no_rollback(repo: type[Repo], sent: Any, rows: None) -> None:
    """A single statement that the server refused has left nothing to roll back."""
    with sent() as failed, pytest.raises(IntegrityError):
        repo.insert(Tag(label="a"))
    assert failed.words == ["INSERT"]


def test_users_sql_is_followed_by_one_reset(repo: type[Repo], sent: Any, rows: None) -> None:
    """What the user's own SQL may have left is reset in one round trip, before the next borrower can see it."""
    with sent() as executed:
        repo.execute("SELECT 1")
        repo.get(Tag, 1)
    assert executed.words == ["SELECT", "RESET", "SELECT"]
    with sent() as in_session:
        with repo.session() as session:
            session.scalars(select(Tag)).all()
        repo.get(Tag, 1)
    assert in_session.words == ["BEGIN", "SELECT", "ROLLBACK", "RESET", "SELECT"]
    with sent() as connected:
        with repo.engine().begin() as connection:
            connection.execute(text("INSERT INTO tags (label) VALUES ('z')"))
        repo.get(Tag, 1)
    assert connected.words == ["BEGIN", "INSERT", "COMMIT", "RESET", "SELECT"]


def test_users_sql_in_a_transaction_is_reset_at_its_end(repo: type[Repo], sent: Any, rows: None) -> None:
    """A transaction in which the user's own SQL ran is reset after its end, one without is not."""
    with sent() as mixed, repo.transaction():
        repo.get(Tag, 1)
        repo.execute("SELECT 1")
    assert mixed.words == ["BEGIN", "SELECT", "SELECT", "COMMIT", "RESET"]
    with sent() as ours, repo.transaction():
        repo.get(Tag, 1)
    assert ours.words == ["BEGIN", "SELECT", "COMMIT"]


def test_choosing_and_borrowing_send_nothing(repo: type[Repo], sent: Any, two_databases: tuple[str, str]) -> None:
    """To choose a database opens nothing; to borrow and return a connection, or a session, sends nothing."""
    attempts = repo.stats().attempts
    with sent() as nothing:
        before = repo.set_database(two_databases[1])
        repo.set_database(before)
        with repo.using(host="127.0.0.1", port=1, database="nowhere"):
            repo.get_database()
            repo.engine()
        with repo.session():
            pass
        assert repo.stats().attempts == attempts
        with repo.engine().connect():
            pass
    assert nothing.words == []


def test_however_many_keys_are_one_parameter(repo: type[Repo], rows: None, sent: Callable[[], Any]) -> None:
    """`reload` and `preload` send one statement for any number of objects, which the server can keep prepared."""
    for verb in (repo.reload, lambda users: repo.preload(users, User.posts)):
        with sent() as several:
            for count in (1, 2, 300):
                verb([repo.load(User, {"id": key}) for key in range(1, count + 1)])
        assert len(several.statements) == 3
        assert len(set(several.statements)) == 1
