"""Writes of many rows: what they write, what they return, and what they refuse before anything is sent."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import column, func, inspect, literal, select, text, values
from sqlalchemy.exc import DataError
from sqlalchemy.orm import aliased

from shardrepo import BulkResult, ConstraintError, Repo, inserting

from ..conftest import SQL
from ..models import Account, Animal, Dog, Note, Numbered, Place, Post, Tag, User, post_tags

pytestmark = pytest.mark.verbs

SANDBOXED = True


# insert_all


@pytest.mark.parametrize("via", ["insert", "copy"])
def test_rows_are_inserted(repo: type[Repo], sql: SQL, via: Any) -> None:
    """Each row with what it says, and the table's and the mapping's defaults for the rest."""
    rows = [{"name": "Ada", "email": "a@x", "age": 36}, {"name": "Bob", "email": None, "age": 40}]
    assert repo.insert_all(User, rows, via=via) == BulkResult(2, None)
    assert sql("SELECT id, name, email, age, city, name_length FROM users ORDER BY id") == [
        (1, "Ada", "a@x", 36, "nowhere", 3),
        (2, "Bob", None, 40, "nowhere", 3),
    ]


@pytest.mark.parametrize("via", ["insert", "copy"])
def test_rows_with_different_keys(repo: type[Repo], sql: SQL, via: Any) -> None:
    """What a row leaves out has its default, whatever other rows say."""
    rows = [{"name": "a"}, {"age": 7, "name": "b"}, {"name": "c", "city": "Bern"}, {"name": "d", "age": 8}]
    assert repo.insert_all(User, rows, via=via).count == 4
    assert sql("SELECT name, age, city FROM users ORDER BY name") == [
        ("a", 0, "nowhere"), ("b", 7, "nowhere"), ("c", 0, "Bern"), ("d", 8, "nowhere"),
    ]  # fmt: skip


@pytest.mark.parametrize("via", ["insert", "copy"])
def test_any_iterable_is_taken_a_chunk_at_a_time(
    repo: type[Repo], sql: SQL, monkeypatch: pytest.MonkeyPatch, via: Any
) -> None:
    """A generator is never taken whole into memory: at most two chunks are ahead of what is written."""
    monkeypatch.setattr(inserting, "CHUNK", 10)
    ahead: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(105):
            ahead.append(number - repo.count(Tag))
            yield {"label": f"t{number}"}

    with repo.transaction():
        assert repo.insert_all(Tag, rows(), via=via).count == 105
    assert sql("SELECT count(*), count(DISTINCT label) FROM tags") == [(105, 105)]
    assert max(ahead) == (19 if via == "insert" else 99)


def test_more_rows_than_a_statement_has_parameters(repo: type[Repo], sql: SQL) -> None:
    """The server's limit of 65,535 parameters is no limit on rows, whichever way they are sent."""
    rows = [{"name": f"n{number}", "email": f"{number}@x", "age": number} for number in range(30_000)]
    assert repo.insert_all(User, rows).count == 30_000
    notes = [{"heading": str(number), "words": ["w"], "data": None} for number in range(12_000)]
    found = repo.insert_all(Note, notes, returning=Note.heading)
    assert found.rows == [str(number) for number in range(12_000)]
    assert sql("SELECT count(*), count(DISTINCT email), sum(age) FROM users") == [(30_000, 30_000, 449_985_000)]


def test_a_select_is_inserted_by_the_server(repo: type[Repo], sql: SQL) -> None:
    """Its columns go where their names say; the rest has its defaults, and a version its first."""
    sql("INSERT INTO tags (label) VALUES ('x'), ('y')")
    result = repo.insert_all(User, select(Tag.label.label("name"), (Tag.id + 10).label("age")).order_by(Tag.id))
    assert result == BulkResult(2, None)
    assert sql("SELECT name, age, city FROM users ORDER BY id") == [("x", 11, "nowhere"), ("y", 12, "nowhere")]
    assert repo.insert_all(Account, select(Tag.id.label("balance")), returning=Account.version).rows == [1, 1]


def test_returning_is_in_the_order_of_the_rows(repo: type[Repo], sql: SQL) -> None:
    """Also when rows with the same keys are sent together."""
    rows = [{"name": f"n{n}"} if n % 3 else {"name": f"n{n}", "age": n} for n in range(50)]
    found = repo.insert_all(User, rows, returning=[User.name, User.id])
    assert found.rows is not None
    assert [row.name for row in found.rows] == [f"n{n}" for n in range(50)]
    assert {(row.name, row.id) for row in found.rows} == set(sql("SELECT name, id FROM users"))


@pytest.mark.parametrize("rows", [[{"name": "a"}], [{"name": "a"}, {"name": "b"}]], ids=["one", "many"])
def test_returning_objects(repo: type[Repo], rows: list[dict[str, Any]]) -> None:
    """They are whole, detached, and at home in the database that they were written to."""
    found = repo.insert_all(User, rows, returning=True)
    assert found.rows is not None
    assert [(user.id, user.name, user.city, user.name_length) for user in found.rows] == [
        (n, row["name"], "nowhere", 1) for n, row in enumerate(rows, 1)
    ]
    for user in found.rows:
        assert repo.home(user) == repo.get_database().home
        assert inspect(user).detached
        assert repo.update(user, name="changed").name == "changed"


def test_returning_one_column_or_name(repo: type[Repo]) -> None:
    """One column gives its values, whether it is an attribute or a name."""
    assert repo.insert_all(Tag, [{"label": "a"}, {"label": "b"}], returning="label").rows == ["a", "b"]
    assert repo.insert_all(Tag, [{"label": "c"}], returning=Tag.id).rows == [3]
    assert repo.insert_all(Tag, [{"label": "d"}], returning=["id", "label"]).rows == [(4, "d")]
    label = Tag.__table__.c.label
    assert repo.insert_all(Tag, [{"label": "e"}, {"label": "f"}], returning=label).rows == ["e", "f"]
    assert repo.update_all(select(Tag).where(Tag.id == 1), {"label": "g"}, returning=label).rows == ["g"]
    assert repo.delete_all(select(Tag).where(Tag.id == 1), returning=[label]).rows == ["g"]


def test_attributes_that_are_called_otherwise_than_their_columns(repo: type[Repo], sql: SQL) -> None:
    """Rows name attributes; a column's own name may be anything."""
    rows = [{"heading": "50%", "kind": "a"}, {"heading": "%s", "kind": "b"}]
    for via in ("insert", "copy"):
        repo.insert_all(Note, rows, via=via)  # type: ignore[arg-type]
    repo.insert_all(Note, rows[:1])
    assert sql('SELECT "Title %%", count(*) FROM notes GROUP BY 1 ORDER BY 1'.replace("%%", "%")) == [
        ("%s", 2), ("50%", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("via", ["insert", "copy"])
@pytest.mark.parametrize("extra", [{}, {"words": ["w"]}], ids=["as arrays", "one by one"])
def test_a_default_that_python_computes_is_computed_for_each_row(
    repo: type[Repo], sql: SQL, via: Any, extra: dict[str, Any]
) -> None:
    """Also one that looks at the row that it is for."""
    repo.insert_all(Note, [{"heading": f"h{n}", **extra} for n in range(20)], via=via)
    assert sql("SELECT count(DISTINCT token), min(shout), max(shout) FROM notes") == [(20, "H0", "H9")]


@pytest.mark.parametrize("via", ["insert", "copy"])
def test_arrays_and_json(repo: type[Repo], via: Any) -> None:
    """Values that no array of values can carry are stored as one row would store them."""
    rows = [
        {"heading": "a", "words": ["x", 'y"', None, "{}"], "data": {"n": [1, None]}},
        {"heading": "b", "words": [], "data": None},
        {"heading": "c", "words": None, "data": "text"},
    ]
    repo.insert_all(Note, rows, via=via)
    found = repo.all(select(Note).order_by(Note.heading))
    assert [(note.words, note.data) for note in found] == [(row["words"], row["data"]) for row in rows]
    sent_alone = repo.insert(Note(heading="d", words=rows[0]["words"], data=rows[0]["data"]))
    assert (sent_alone.words, sent_alone.data) == (found[0].words, found[0].data)


def test_json_null_is_what_it_is_when_rows_are_sent_alone(repo: type[Repo], sql: SQL) -> None:
    """None for JSON is JSON's null, by whichever way it goes."""
    rows = [{"heading": "a", "data": None}, {"heading": "b", "data": None}]
    repo.insert_all(Note, rows)
    repo.insert_all(Note, rows, via="copy")
    repo.insert_all(Note, rows[:1])
    assert sql("SELECT DISTINCT data IS NULL, data::text FROM notes") == [(False, "null")]


def test_values_of_several_types_in_one_column(repo: type[Repo], sql: SQL) -> None:
    """A column whose values are not of one Python type is stored as its rows say, alone and in a transaction."""
    rows = [{"name": "a", "age": 1}, {"name": "b", "age": True}, {"name": "c", "age": None}]
    assert repo.insert_all(User, rows[:2]).count == 2
    with repo.transaction():
        assert repo.insert_all(User, rows[:2], returning=User.age).rows == [1, 1]
    assert sql("SELECT count(*), sum(age) FROM users") == [(4, 4)]


def test_a_late_chunk_that_fits_no_array_costs_no_earlier_one(
    repo: type[Repo], sql: SQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of every chunk is stored, whichever of them has to be sent in another way."""
    monkeypatch.setattr(inserting, "CHUNK", 10)
    for odd in range(45):
        rows = [{"name": f"{odd}.{n}", "age": True if n == odd else n} for n in range(45)]
        assert repo.insert_all(User, rows).count == 45
        assert repo.delete_all(User).count == 45


def test_what_is_too_long_is_refused_and_never_cut(repo: type[Repo], sql: SQL) -> None:
    """A value that its column has no room for is an error, not its beginning."""
    for via in ("insert", "copy"):
        with pytest.raises(DataError):
            repo.insert_all(Note, [{"heading": "ok"}, {"heading": "x" * 21}], via=via)  # type: ignore[arg-type]
    assert sql("SELECT count(*) FROM notes") == [(0,)]


def test_rows_that_are_all_defaults(repo: type[Repo], sql: SQL) -> None:
    """Rows without keys are rows too."""
    assert repo.insert_all(Animal, [{}, {}, {}], returning=Animal.id).rows == [1, 2, 3]
    assert sql("SELECT DISTINCT kind FROM animals") == [("animal",)]


def test_rows_of_joined_inheritance(repo: type[Repo], sql: SQL) -> None:
    """A row goes to each of its tables."""
    assert repo.insert_all(Dog, [{"breed": "pug"}, {"breed": "lab"}]) == BulkResult(2, None)
    assert sql("SELECT kind, breed FROM animals JOIN dogs USING (id) ORDER BY breed") == [
        ("dog", "lab"),
        ("dog", "pug"),
    ]
    for options in ({"via": "copy"}, {"returning": True}, {"on_conflict": "nothing"}):
        with pytest.raises(ValueError, match="several tables"):
            repo.insert_all(Dog, [{"breed": "pug"}], **options)  # type: ignore[arg-type]


def test_rows_of_a_table(repo: type[Repo], sql: SQL) -> None:
    """A `Table`, such as the one between two classes, takes rows as a class does."""
    sql("INSERT INTO posts (title) VALUES ('p')")
    sql("INSERT INTO tags (label) VALUES ('a'), ('b')")
    rows = [{"post_id": 1, "tag_id": 1}, {"post_id": 1, "tag_id": 2}]
    assert repo.insert_all(post_tags, rows, returning=True).rows == [(1, 1), (1, 2)]
    assert repo.insert_all(post_tags, rows, on_conflict="nothing").count == 0
    assert sql("SELECT count(*) FROM post_tags") == [(2,)]


def test_versions_begin_at_the_first(repo: type[Repo]) -> None:
    """A row with a version can be updated by it afterwards."""
    repo.insert_all(Account, [{"balance": 1}, {"balance": 2}])
    repo.insert_all(Account, [{"balance": 3}], via="copy")
    for account in repo.all(Account):
        assert account.version == 1
        assert repo.update(account, balance=9).version == 2


def test_rows_go_where_it_was_called(repo: type[Repo], sql: SQL, two_databases: tuple[str, str]) -> None:
    """Whatever the generator that yields them chooses meanwhile, and however many chunks are taken ahead."""
    (other,) = set(two_databases) - {repo.get_database().name}

    def rows(number: int) -> Iterator[dict[str, Any]]:
        with repo.using(other):
            for n in range(number):
                yield {"label": f"{number}.{n}"}

    for number in (1, 19_999, 20_000, 30_001):
        assert repo.insert_all(Tag, rows(number), via="copy").count == number
    assert sql("SELECT count(*) FROM tags") == [(70_001,)]


def test_a_failure_in_a_transaction_leaves_nothing_of_the_call(
    repo: type[Repo], sql: SQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is not the database's, which does not doom the transaction."""
    monkeypatch.setattr(inserting, "CHUNK", 10)

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"label": str(n)} for n in range(45))
        raise ZeroDivisionError

    with repo.transaction():
        repo.insert(Tag(label="before"))
        with pytest.raises(ZeroDivisionError):
            repo.insert_all(Tag, rows())
        with pytest.raises(ValueError, match="unknown column"):
            repo.insert_all(Tag, [*({"label": str(n)} for n in range(45)), {"lable": "x"}])
        repo.insert(Tag(label="after"))
    assert sql("SELECT label FROM tags ORDER BY id") == [("before",), ("after",)]


def test_rows_of_any_mapping(repo: type[Repo], sql: SQL) -> None:
    """Only the keys that a row has count, also of one that has an answer for every key."""
    counting: defaultdict[str, Any] = defaultdict(str, {"name": "b"})
    rows = [{"name": "a"}, counting, ChainMap({"name": "c"}, {"age": 3}), OrderedDict(age=4, name="d")]
    assert repo.insert_all(User, rows).count == 4
    assert dict(counting) == {"name": "b"}
    assert sql("SELECT name, age FROM users ORDER BY name") == [("a", 0), ("b", 0), ("c", 3), ("d", 4)]
    with pytest.raises(ConstraintError):
        repo.insert_all(User, [{"name": "e"}, defaultdict(str, {"age": 3})])


@pytest.mark.parametrize("via", ["insert", "copy"])
def test_rows_that_ask_the_database(repo: type[Repo], sql: SQL, via: Any) -> None:
    """A mapping that reads its values with the repo can do so in the transaction that its row is inserted in."""

    class Numbered(OrderedDict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return f"{super().__getitem__(name)} after {repo.count(Tag)}"

    repo.insert(Tag(label="first"))
    with repo.transaction():
        assert repo.insert_all(Tag, [Numbered(label="x"), Numbered(label="y")], via=via).count == 2
    assert sql("SELECT label FROM tags ORDER BY id") == [("first",), ("x after 1",), ("y after 1",)]


def test_empty_rows_return_each(repo: type[Repo], sql: SQL) -> None:
    """As many as there are, also among others."""
    assert repo.insert_all(Place, [], returning=True).rows == []
    found = repo.insert_all(Numbered, [{}, {"label": "q"}, {}, {}], returning=True).rows
    assert [each.label for each in found or ()] == ["none", "q", "none", "none"]
    assert sql("SELECT count(*) FROM numbered") == [(4,)]


def test_a_mapping_with_another_key_than_its_table(repo: type[Repo], sql: SQL) -> None:
    """Rows are found by the mapping's key, and no other row is written."""
    repo.insert_all(Numbered, [{"id": 1, "number": 2}, {"id": 2, "number": 3}, {"id": 3, "number": 1}])
    assert repo.update_all(select(Numbered).where(Numbered.number == 2).limit(1), {"label": "hit"}).count == 1
    assert sql("SELECT id, number FROM numbered WHERE label = 'hit'") == [(1, 2)]
    assert repo.delete_all(select(Numbered).where(Numbered.number == 3).limit(1), returning="id").rows == [2]


def test_a_column_of_another_class_is_refused(repo: type[Repo], sql: SQL) -> None:
    """It is never taken for one of the same name."""
    sql("INSERT INTO users (name, age) VALUES ('a', 1)")
    for verb in (
        lambda: repo.update_all(User, {Post.id: 7}),
        lambda: repo.update_all(User, {"age": 7}, returning=Post.id),
        lambda: repo.insert(User(id=1, name="x"), on_conflict=[Animal.id], conflict_target="id"),
        lambda: repo.insert(User(id=1, name="x"), on_conflict="nothing", conflict_target=Post.id),
        lambda: repo.insert_all(User, [{"name": "x"}], returning=[Tag.__table__.c.id]),
    ):
        with pytest.raises(ValueError, match="is no column of User"):
            verb()
    assert sql("SELECT id, age FROM users") == [(1, 1)]


def test_copy_into_a_translated_schema(repo: type[Repo], sql: SQL) -> None:
    """As every other statement goes there."""
    sql("CREATE SCHEMA tenant CREATE TABLE tags (id serial PRIMARY KEY, label text)")
    try:
        with repo.call_options(execution_options={"schema_translate_map": {None: "tenant"}}):
            repo.insert_all(Tag, [{"label": "x"}, {"label": "y"}], via="copy")
        assert (sql("SELECT count(*) FROM tags"), sql("SELECT count(*) FROM tenant.tags")) == ([(0,)], [(2,)])
    finally:
        sql("DROP SCHEMA tenant CASCADE")


@pytest.mark.parametrize("rows", [[], iter(()), ()])
@pytest.mark.parametrize("returning", [False, True])
def test_no_rows(repo: type[Repo], rows: Any, returning: bool) -> None:
    """No rows, no statement; the result has the shape that was asked for."""
    assert repo.insert_all(User, rows, returning=returning) == BulkResult(0, [] if returning else None)


@pytest.mark.parametrize("via", ["insert", "copy"])
def test_all_rows_or_none(repo: type[Repo], sql: SQL, monkeypatch: pytest.MonkeyPatch, via: Any) -> None:
    """A row that is refused, in whatever chunk, leaves no other row behind."""
    monkeypatch.setattr(inserting, "CHUNK", 5)
    rows = [{"label": f"t{n}"} for n in range(20)] + [{"label": "t3"}]
    with pytest.raises(ConstraintError) as caught:
        repo.insert_all(Tag, rows, via=via)
    assert caught.value.constraint == "tags_label_key"
    with pytest.raises(ValueError, match="unknown column 'lable'; did you mean 'label'"):
        repo.insert_all(Tag, [*rows[:18], {"lable": "x"}], via=via)
    with pytest.raises(ZeroDivisionError):
        repo.insert_all(Tag, ({"label": f"{n}: {1 // (18 - n)}"} for n in range(20)), via=via)
    assert sql("SELECT count(*) FROM tags") == [(0,)]


BAD_INSERTS: dict[str, tuple[Callable[[type[Repo]], Any], type[Exception], str]] = {
    "an unknown column": (lambda repo: repo.insert_all(User, [{"nmae": "x"}]), ValueError, "did you mean 'name'"),
    "a relationship": (lambda repo: repo.insert_all(User, [{"posts": []}]), ValueError, "unknown column 'posts'"),
    "an object": (lambda repo: repo.insert_all(User, [User(name="x")]), TypeError, "mappings by column"),  # type: ignore[list-item]
    "no class": (lambda repo: repo.insert_all("users", [{"name": "x"}]), TypeError, "not a mapped class"),  # type: ignore[arg-type]
    "an unknown way": (lambda repo: repo.insert_all(User, [{"name": "x"}], via="ftp"), ValueError, "no way to send"),  # type: ignore[arg-type]
    "copy of a select": (lambda repo: repo.insert_all(User, select(Tag.label), via="copy"), ValueError, "select"),
    "copy that returns": (
        lambda repo: repo.insert_all(User, [{"name": "x"}], via="copy", returning=True), ValueError, "returning="
    ),
    "an unknown column to return": (
        lambda repo: repo.insert_all(User, [{"name": "x"}], returning="nmae"), ValueError, "did you mean 'name'"
    ),
    "a select of nameless columns": (
        lambda repo: repo.insert_all(User, select(func.now())), ValueError, "unknown column"
    ),
    "a select without what Python computes": (
        lambda repo: repo.insert_all(Note, select(Tag.label.label("heading"))), ValueError, "that Python computes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INSERTS)
def test_a_bad_insert_is_refused_with_its_remedy(repo: type[Repo], sql: SQL, case: str) -> None:
    """Each has an error of its own, and nothing is stored."""
    verb, error, message = BAD_INSERTS[case]
    with pytest.raises(error, match=message):
        verb(repo)
    assert sql("SELECT count(*) FROM users") == [(0,)]


# update_all


@pytest.fixture
def people(sql: SQL) -> None:
    sql("INSERT INTO users (name, age) VALUES ('Ada', 36), ('Bob', 40), ('Cy', 40), ('Di', 17)")
    sql("INSERT INTO posts (title, author_id) VALUES ('one', 1), ('two', 1), ('three', 2)")


def ages(sql: SQL) -> dict[str, int]:
    return dict(sql("SELECT name, age FROM users"))  # type: ignore[arg-type]


def test_update_of_every_row(repo: type[Repo], sql: SQL, people: None) -> None:
    """A class stands for all of its rows."""
    assert repo.update_all(User, {"city": "Bern"}) == BulkResult(4, None)
    assert sql("SELECT DISTINCT city FROM users") == [("Bern",)]


def test_update_of_what_a_query_selects(repo: type[Repo], sql: SQL, people: None) -> None:
    """By values, SQL and increments; columns by name or attribute."""
    found = repo.update_all(select(User).where(User.age >= 40), {User.name: func.upper(User.name)}, inc={"age": 2})
    assert found.count == 2
    assert ages(sql) == {"Ada": 36, "BOB": 42, "CY": 42, "Di": 17}


QUERIES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "another table and a limit": (
        lambda: select(User).where(User.id == Post.author_id).order_by(Post.id.desc()).limit(1),
        {"Bob"},
    ),
    "another table and a lock": (
        lambda: select(User).where(User.id == Post.author_id, Post.title == "one").with_for_update(),
        {"Ada"},
    ),
    "a join": (lambda: select(User).join(User.posts), {"Ada", "Bob"}),
    "another table": (lambda: select(User).where(User.id == Post.author_id, Post.title == "three"), {"Bob"}),
    "an order and a limit": (lambda: select(User).order_by(User.age.desc(), User.id).limit(1), {"Bob"}),
    "an offset": (lambda: select(User).order_by(User.id).offset(3), {"Di"}),
    "an alias": (lambda: (u := aliased(User), select(u).where(u.age == 17))[1], {"Di"}),
    "distinct": (lambda: select(User).distinct().where(User.age > 36), {"Bob", "Cy"}),
    "locked": (lambda: select(User).where(User.id == 3).with_for_update(skip_locked=True), {"Cy"}),
    "nothing": (lambda: select(User).where(User.id == 77), set()),
}


@pytest.mark.parametrize("query", QUERIES)
def test_exactly_what_a_query_selects_is_written(repo: type[Repo], sql: SQL, people: None, query: str) -> None:
    """Whatever the query consists of: the rows that it selects are updated, and deleted, and no others."""
    make, names = QUERIES[query]
    assert repo.update_all(make(), {"city": "X"}).count == len(names)
    assert {name for (name,) in sql("SELECT name FROM users WHERE city = 'X'")} == names
    sql("ALTER TABLE posts DROP CONSTRAINT posts_author_id_fkey")
    try:
        assert set(repo.delete_all(make(), returning=User.name).rows or ()) == names
        assert {name for (name,) in sql("SELECT name FROM users")} == {"Ada", "Bob", "Cy", "Di"} - names
    finally:
        sql("UPDATE posts SET author_id = NULL")
        sql("ALTER TABLE posts ADD CONSTRAINT posts_author_id_fkey FOREIGN KEY (author_id) REFERENCES users (id)")


def test_update_of_a_composite_key(repo: type[Repo], sql: SQL) -> None:
    """A query with a limit finds rows by all parts of their key."""
    sql("INSERT INTO places (row, seat) VALUES (1, 1), (1, 2), (2, 1)")
    assert repo.update_all(select(Place).order_by(Place.row, Place.seat).offset(1).limit(1), {"label": "x"}).count == 1
    assert sql("SELECT row, seat FROM places WHERE label = 'x'") == [(1, 2)]


def test_update_of_arrays(repo: type[Repo], sql: SQL) -> None:
    """Items are appended and removed where they are."""
    repo.insert_all(Note, [{"heading": "a", "words": ["x", "y", "x"]}, {"heading": "b", "words": None}])
    found = repo.update_all(Note, push={"words": "z"}, returning=Note.words)
    assert sorted(found.rows or ()) == [["x", "y", "x", "z"], ["z"]]
    assert repo.update_all(Note, pull={Note.words: "x"}).count == 2
    assert sql("SELECT words FROM notes ORDER BY id") == [(["y", "z"],), (["z"],)]


def test_update_returns_what_is_stored_now(repo: type[Repo], sql: SQL, people: None) -> None:
    """Objects with their home, values or rows."""
    (user,) = repo.update_all(select(User).where(User.id == 1), {"name": "Augusta"}, returning=True).rows or ()
    assert (user.name, user.name_length, repo.home(user)) == ("Augusta", 7, repo.get_database().home)
    assert inspect(user).detached
    assert repo.update_all(select(User).where(User.id == 2), inc={"age": 1}, returning=["id", "age"]).rows == [(2, 41)]
    assert repo.update_all(select(User).where(User.id == 77), {"age": 1}, returning=User.id) == BulkResult(0, [])


def test_update_and_delete_of_a_part_of_an_inheritance(repo: type[Repo], sql: SQL) -> None:
    """A subclass's own columns can be updated; what is stored in several tables is not deleted from one."""
    repo.insert_all(Dog, [{"breed": "pug"}, {"breed": "lab"}])
    assert repo.update_all(select(Dog).where(Dog.breed == "lab"), {"breed": "labrador"}).count == 1
    assert sql("SELECT breed FROM dogs ORDER BY id") == [("pug",), ("labrador",)]
    with pytest.raises(ValueError, match="update the class that it is of"):
        repo.update_all(Dog, {"kind": "cat"})
    with pytest.raises(ValueError, match="several tables"):
        repo.delete_all(Dog)
    with pytest.raises(ValueError, match="several tables"):
        repo.update_all(Dog, {"breed": "x"}, returning=True)
    assert sql("SELECT breed FROM dogs ORDER BY id") == [("pug",), ("labrador",)]
    assert repo.update_all(select(Dog).limit(1), {"breed": "x"}, returning=Dog.breed).rows == ["x"]


def test_a_parameterised_source(repo: type[Repo], sql: SQL) -> None:
    """A query may select from values of the caller's own."""
    given = values(column("label"), name="given").data([("x",), ("y",)])
    assert repo.insert_all(Tag, select(given.c.label)).count == 2
    assert repo.insert_all(Tag, select(literal("z").label("label")), returning=Tag.label).rows == ["z"]


BAD_UPDATES: dict[str, tuple[Callable[[type[Repo]], Any], type[Exception], str]] = {
    "no change": (lambda repo: repo.update_all(User), ValueError, "no change"),
    "an unknown column": (lambda repo: repo.update_all(User, {"nmae": "x"}), ValueError, "did you mean 'name'"),
    "a column twice": (lambda repo: repo.update_all(User, {"age": 1}, inc={"age": 1}), ValueError, "at once"),
    "no array": (lambda repo: repo.update_all(User, push={"age": 1}), ValueError, "change arrays"),
    "a column's query": (lambda repo: repo.update_all(select(User.name), {"age": 1}), TypeError, "select\\(\\) of one"),
    "a query of two": (lambda repo: repo.delete_all(select(User, Post)), TypeError, "select\\(\\) of one"),
    "a statement": (lambda repo: repo.delete_all(text("x")), TypeError, "not a statement"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_a_bad_update_is_refused_with_its_remedy(repo: type[Repo], sql: SQL, people: None, case: str) -> None:
    """Each has an error of its own, and nothing changes."""
    verb, error, message = BAD_UPDATES[case]
    before = sql("SELECT * FROM users ORDER BY id")
    with pytest.raises(error, match=message):
        verb(repo)
    assert sql("SELECT * FROM users ORDER BY id") == before


def test_delete_of_every_row(repo: type[Repo], sql: SQL) -> None:
    """A class stands for all of its rows; objects can be returned once more."""
    repo.insert_all(Tag, [{"label": "a"}, {"label": "b"}])
    gone = repo.delete_all(Tag, returning=True)
    assert sorted(tag.label for tag in gone.rows or ()) == ["a", "b"]
    assert repo.delete_all(Tag) == BulkResult(0, None)
    assert sql("SELECT count(*) FROM tags") == [(0,)]
