"""Addresses: how they compare, what they keep to themselves, and what a choice may be made of."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import traceback
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import URL, make_url

from shardrepo import DEFAULT, Choice, Config, ConfigError, Database
from shardrepo.database import ADDRESS_PARAMETERS, checked, choose, database_from
from shardrepo.directory import Location

SECRET = "hunter2-s3cr3t"

quick = settings(max_examples=30, deadline=None, database=None)

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=63).filter(
    lambda name: len(name.encode()) <= 63
)
hosts = st.sampled_from(["db01", "db01.company.com", "127.0.0.1", "localhost", "::1", "2001:db8::7", "/run/postgresql"])
ports = st.integers(1, 65535)
queries = st.dictionaries(st.sampled_from(["sslmode", "options", "keepalives"]), st.text("abc=-, ", max_size=8))
complete = st.fixed_dictionaries(
    {"host": hosts, "database": names},
    optional={"port": ports, "username": names, "password": names, "query": queries},
)


def a_database(**options: Any) -> Database:
    return database_from(dict(checked({"host": "db01", "database": "app", **options})))


def refused(given: Any = None, **options: Any) -> str:
    """The message that a choice is refused with."""
    with pytest.raises(ConfigError) as caught:
        choose(given, options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# Equality


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"port": 5432}),
        ({"host": "DB01"}, {"host": "db01"}),
        ({"host": "Db01.Company.COM"}, {"host": "db01.company.com"}),
        ({"query": {"a": "1", "b": "2"}}, {"query": {"b": "2", "a": "1"}}),
        ({"query": {}}, {}),
        ({"password": "one"}, {"password": "other"}),
        ({"password": "one"}, {}),
        ({"host": "2001:DB8::7"}, {"host": "2001:db8::7"}),
    ],
)
def test_two_spellings_of_one_address_are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """A missing port, the case of a host, the order of parameters and the password make no difference."""
    assert a_database(**one) == a_database(**other)
    assert hash(a_database(**one)) == hash(a_database(**other))
    assert a_database(**one).home == a_database(**other).home


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"host": "localhost"}, {"host": "127.0.0.1"}),
        ({"port": 5433}, {}),
        ({"database": "App"}, {}),
        ({"database": "app "}, {}),
        ({"username": "ada"}, {}),
        ({"username": "ada"}, {"username": "Ada"}),
        ({"query": {"sslmode": "require"}}, {}),
        ({"host": "/Run"}, {"host": "/run"}),
    ],
)
def test_two_addresses_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Names are not resolved, and what has a case on the server keeps it."""
    assert a_database(**one) != a_database(**other)
    assert a_database(**one).key != a_database(**other).key


@pytest.mark.parametrize(
    ("host", "port", "server"),
    [
        ("db01", 5432, "db01:5432"),
        ("2001:db8::7", 6000, "[2001:db8::7]:6000"),
        ("/run/postgresql", 5432, "/run/postgresql:5432"),
    ],
)
def test_the_home_is_server_and_name(host: str, port: int, server: str) -> None:
    """An object remembers a plain string without user and password, an IPv6 address in brackets."""
    database = a_database(host=host, port=port, username="ada", password=SECRET)
    assert database.server == server
    assert database.home == f"{server}/app"
    assert type(database.home) is str


# The cache key


@pytest.mark.parametrize(
    "options", [{"password": SECRET}, {"password": "other"}, {"username": "ada"}, {"query": {"sslmode": "require"}}]
)
def test_whatever_makes_another_connection_makes_another_key(options: Mapping[str, Any]) -> None:
    """User, parameters and password tell keys apart, so that no one is lent what another authenticated."""
    assert a_database(**options).key != a_database().key
    assert a_database(**options).key == a_database(**options).key


def test_a_key_differs_by_password() -> None:
    """A wrong password never finds the connections of the right one, an empty one not those of none."""
    keys = {a_database(password=password).key for password in ("right", "wrong", "")} | {a_database().key}
    assert len(keys) == 4


def test_a_password_callable_is_its_own_identity() -> None:
    """Two callables are two keys, one callable is one, and making the key does not call it."""

    def password() -> str:
        raise AssertionError("called")

    def other() -> str:
        raise AssertionError("called")

    assert a_database(password=password).key == a_database(password=password).key
    assert a_database(password=password).key != a_database(password=other).key


@quick
@given(complete, complete)
def test_keys_are_equal_just_when_the_whole_address_is(one: dict[str, Any], other: dict[str, Any]) -> None:
    """No two addresses share a key, whatever their parts are made of."""
    first, second = a_database(**one), a_database(**other)
    same = first == second and first.password == second.password
    assert (first.key == second.key) == same


# The password


def test_the_key_does_not_contain_the_password() -> None:
    """Nor do the home and the server."""
    database = a_database(password=SECRET)
    assert SECRET not in database.key + database.home + database.server


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(repr, id="repr"),
        pytest.param(str, id="str"),
        pytest.param("{:}".format, id="format"),
        pytest.param(lambda database: f"{database} {database!r} {database!s}", id="f-string"),
        pytest.param(lambda database: str(database.url), id="url"),
        pytest.param(lambda database: database.url.render_as_string(hide_password=False), id="url in full"),
        pytest.param(lambda database: repr([database]), id="in a list"),
        pytest.param(lambda database: repr(pickle.dumps(database)), id="pickle"),
        pytest.param(lambda database: repr(dataclasses.asdict(database)), id="dataclasses.asdict"),
        pytest.param(lambda database: repr(dataclasses.astuple(database)), id="dataclasses.astuple"),
        pytest.param(lambda database: repr(Choice(database=database)), id="choice"),
    ],
)
def test_no_way_of_showing_a_database_shows_its_password(shown: Any) -> None:
    """Whatever prints, formats or stores one has the address only."""
    assert SECRET not in shown(a_database(password=SECRET, username="ada"))


def shown_with_locals(error: BaseException) -> str:
    """The traceback as the tools show it that print every local variable."""
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def test_a_traceback_with_local_variables_shows_no_password() -> None:
    """Databases and choices may stand in any frame of an error that is reported."""

    def fail(database: Database, choice: Choice) -> None:
        raise RuntimeError(f"{database} {choice}")

    database, choice = a_database(password=SECRET), Choice(checked({"password": SECRET}))
    with pytest.raises(RuntimeError) as caught:
        fail(database, choice)
    shown = shown_with_locals(caught.value)
    assert "database = <Database db01:5432/app>" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_is_the_same_database(deep: bool) -> None:
    """Copying makes no second holder of a password."""
    database = a_database(password=SECRET)
    assert (copy.deepcopy if deep else copy.copy)(database) is database
    assert dataclasses.replace(database, name="other") == a_database(database="other")


def test_pickling_keeps_the_address_and_leaves_the_password() -> None:
    """Another process gets an equal database and takes the credentials from its own configuration."""
    database = a_database(port=6000, username="ada", query={"sslmode": "require"}, password=SECRET)
    again = pickle.loads(pickle.dumps(database))
    assert again == database
    assert (again.home, again.username, again.query) == (database.home, "ada", (("sslmode", "require"),))
    assert again.password is None


def test_a_choice_shows_and_pickles_no_password() -> None:
    """It shows that there is one, and another process gets the rest of it."""
    choice = choose(None, {"host": "db02", "password": SECRET})
    assert repr(choice) == "<Choice host='db02', password=***>"
    stored = pickle.dumps(choice)
    assert SECRET.encode() not in stored
    assert pickle.loads(stored) == choose(None, {"host": "db02"})
    assert pickle.loads(pickle.dumps(DEFAULT)) == DEFAULT


def test_a_database_cannot_be_changed() -> None:
    """It is looked up by what it was made of."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_database().name = "other"  # type: ignore[misc]  # that is the point


@quick
@given(complete)
def test_a_database_survives_its_url_and_a_pickle(options: dict[str, Any]) -> None:
    """The URL of a database, written out and read again, is the same database."""
    database = a_database(**options)
    assert Database.from_url(database.url) == database
    assert pickle.loads(pickle.dumps(database)) == database


# Choosing


@quick
@given(names)
def test_any_accepted_name_stays_literally_the_name(name: str) -> None:
    """Nothing in a name is read as a server, a user or a parameter."""
    config = Config.of({"url": "postgresql://ada@db01:6000/app"})
    chosen = config.locate(choose(name, {}))
    assert (chosen.name, chosen.host, chosen.port, chosen.username) == (name, "db01", 6000, "ada")
    assert chosen.url.database == name
    assert chosen.query == ()


@pytest.mark.parametrize(
    "name",
    [
        "postgresql://eve@evil:1/other",
        "host=evil dbname=other",
        "service=evil",
        "app?host=evil",
        "app host='evil'",
        "../app",
        "a/b",
        'a"b; DROP DATABASE app; --',
        "%2e",
        " ",
        "app\n",
    ],
)
def test_a_name_that_looks_like_more_is_a_name(name: str) -> None:
    """User input in a database's name cannot lead to another server."""
    choice = choose(name, {})
    assert choice == Choice((("database", name),))
    assert Config.of("postgresql://db01/app").locate(choice).server == "db01:5432"


@pytest.mark.parametrize("name", ["a" * 63, "é" * 31 + "a", "日" * 21])
def test_a_name_of_63_bytes_is_accepted(name: str) -> None:
    """PostgreSQL takes 63 bytes of UTF-8."""
    assert len(name.encode()) == 63
    assert choose(name, {}) == Choice((("database", name),))


@pytest.mark.parametrize("name", ["a" * 64, "é" * 32, "日" * 21 + "a"])
def test_a_name_of_64_bytes_is_refused(name: str) -> None:
    """PostgreSQL would cut it off and reach another database."""
    assert "64 bytes" in refused(name)


@pytest.mark.parametrize("surrogate", ["\ud800", "app\udfff", "\udcffx"], ids=ascii)
def test_a_lone_surrogate_is_refused(surrogate: str) -> None:
    """What cannot be written in UTF-8 is no name, no host and no user."""
    for option in ("database", "host", "username"):
        assert "UTF-8" in refused(**{option: surrogate})


@pytest.mark.parametrize("option", ["database", "host", "username", "password"])
def test_a_nul_character_is_refused(option: str) -> None:
    """The server would see the text up to it only, and the message does not repeat a password."""
    message = refused(**{option: f"{SECRET}\0x"})
    assert "NUL" in message
    assert option == "password" or SECRET in message
    assert option != "password" or SECRET not in message


@pytest.mark.parametrize("option", ["database", "host", "username"])
def test_an_empty_text_is_refused(option: str) -> None:
    """An empty name would be libpq's default, somebody's own."""
    assert f"{option} is empty" in refused(**{option: ""})


def test_an_empty_name_is_refused() -> None:
    """The same for the positional form."""
    assert "database is empty" in refused("")


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("databse", "database"), ("pasword", "password"), ("user_name", "username"), ("hostt", "host"), ("Port", "port")],
)
def test_an_unknown_option_is_refused_with_the_one_meant(misspelt: str, meant: str) -> None:
    """A misspelt option is never ignored."""
    assert f"did you mean {meant!r}?" in refused(**{misspelt: "x"})
    assert f"did you mean {meant!r}?" in refused({misspelt: "x"})


def test_an_option_like_nothing_is_refused_with_all_known() -> None:
    """Without a near match the message lists the options."""
    assert "known: database, host, password, port, query, username" in refused(zzz=1)


@pytest.mark.parametrize("options", [{1: "x"}, {None: "x"}, {("host",): "x"}])
def test_a_key_that_is_no_text_is_refused(options: Mapping[Any, Any]) -> None:
    """A mapping may come from anywhere."""
    assert "unknown option" in refused(options)


@pytest.mark.parametrize(
    "options",
    [
        {"port": True},
        {"port": "5432"},
        {"port": 5432.0},
        {"port": None},
        {"host": None},
        {"host": b"db01"},
        {"database": 7},
        {"database": None},
        {"username": None},
        {"password": None},
        {"password": 7},
        {"password": SECRET.encode()},
        {"query": "sslmode=require"},
        {"query": ["sslmode"]},
        {"query": {"keepalives": 1}},
        {"query": {1: "x"}},
        {"query": ("sslmode",)},
        {"query": ((1, 2), (3, 4))},
    ],
)
def test_a_value_of_the_wrong_type_is_refused(options: dict[str, Any]) -> None:
    """Nothing is converted, and a wrong password is not repeated."""
    message = refused(options)
    assert "must be" in message
    assert SECRET not in message


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    """Ports go from 1 to 65535."""
    assert f"port {port} does not exist" in refused(port=port)


@pytest.mark.parametrize("port", [1, 65535])
def test_the_outermost_ports_are_accepted(port: int) -> None:
    """Both ends of the range are ports."""
    assert choose(None, {"port": port}) == Choice((("port", port),))


@pytest.mark.parametrize("name", sorted(ADDRESS_PARAMETERS))
def test_query_parameters_that_lead_elsewhere_are_refused(name: str) -> None:
    """Parameters are no way around host, user and password."""
    assert repr(name) in refused(query={name: "x"})
    assert repr(name) in refused(query=((name, "x"),))
    if name not in ("host", "port"):
        assert repr(name) in refused(make_url(f"postgresql://db01/app?{name}=x"))


@pytest.mark.parametrize("given", [b"app", 7, 1.5, ["app"], ("app",), {"app"}, object(), Database, True, ...])
def test_something_else_is_no_choice(given: Any) -> None:
    """Names, mappings, URLs, databases and choices choose; nothing else is guessed at."""
    assert f"cannot choose a database by {type(given).__name__}" in refused(given)


def test_a_mapping_without_options_is_refused() -> None:
    """It would be the default by accident."""
    assert "no option given" in refused({})


@pytest.mark.parametrize(
    "given", ["app", {"host": "db02"}, make_url("postgresql://db01/app"), a_database(), DEFAULT], ids=type
)
def test_an_argument_and_keywords_together_are_refused(given: Any) -> None:
    """It is one or the other, and keywords are not silently dropped."""
    message = refused(given, password=SECRET)
    assert "not by both" in message
    assert SECRET not in message


def test_a_password_in_an_argument_beside_keywords_is_not_repeated() -> None:
    """The message names what was given, without secrets."""
    assert SECRET not in refused({"password": SECRET}, host="db02")
    assert SECRET not in refused(make_url(f"postgresql://ada:{SECRET}@db01/app"), host="db02")


def test_what_chooses() -> None:
    """Each form becomes a choice: options to merge, or a complete database."""
    database = a_database()
    assert choose(None, {}) is None
    assert choose(DEFAULT, {}) is DEFAULT
    assert choose("app", {}) == choose({"database": "app"}, {}) == choose(None, {"database": "app"})
    assert choose(database, {}) == choose(database.url, {}) == Choice(database=database)
    assert choose({"port": 1, "host": "DB02"}, {}) == Choice((("host", "db02"), ("port", 1)))


def test_a_password_callable_is_taken_and_not_called() -> None:
    """It is asked at every connect."""

    def password() -> str:
        raise AssertionError("called")

    assert choose(None, {"password": password}) == Choice((("password", password),))


@quick
@given(complete, st.randoms(use_true_random=False))
def test_the_order_of_options_makes_no_difference(options: dict[str, Any], chance: Any) -> None:
    """The same options are the same choice and the same database, in whatever order they are written."""
    shuffled = list(options.items())
    chance.shuffle(shuffled)
    config = Config.of("postgresql://db09:7000/other")
    one, other = choose(options, {}), choose(dict(shuffled), {})
    assert one == other
    assert hash(one) == hash(other)
    assert config.locate(one).key == config.locate(other).key


# URLs


@pytest.mark.parametrize(
    ("url", "home", "rest"),
    [
        ("postgresql://db01/app", "db01:5432/app", (None, (), None)),
        ("postgresql+psycopg://ada@DB01:6000/app", "db01:6000/app", ("ada", (), None)),
        (f"postgresql://ada:{SECRET}@db01/app", "db01:5432/app", ("ada", (), SECRET)),
        ("postgresql://[2001:db8::7]:6000/app", "[2001:db8::7]:6000/app", (None, (), None)),
        ("postgresql://ada@/app?host=/run/postgresql", "/run/postgresql:5432/app", ("ada", (), None)),
        ("postgresql:///app?host=/run/postgresql&port=6000", "/run/postgresql:6000/app", (None, (), None)),
        ("postgresql://db01/app?sslmode=require", "db01:5432/app", (None, (("sslmode", "require"),), None)),
        ("postgresql://db01/a%2Fb%20c", "db01:5432/a/b c", (None, (), None)),
    ],
)
def test_a_url_is_a_complete_address(url: str, home: str, rest: tuple[Any, ...]) -> None:
    """Server, name, user, parameters and password are read from it, a socket's folder from its query."""
    database = Database.from_url(make_url(url))
    assert database.home == home
    assert (database.username, database.query, database.password) == rest
    assert choose(make_url(url), {}) == Choice(database=database)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql:///app", "names no host"),
        ("postgresql://db01", "names no database"),
        ("postgresql://db01/", "database is empty"),
        ("postgresql://", "names no host"),
        ("mysql://db01/app", "cannot use the driver 'mysql'"),
        ("postgresql+asyncpg://db01/app", "cannot use the driver 'postgresql+asyncpg'"),
        ("postgresql+psycopg2://db01/app", "cannot use the driver 'postgresql+psycopg2'"),
        ("sqlite://", "cannot use the driver 'sqlite'"),
        ("postgresql://db01/app?host=db02", "'host'"),
        ("postgresql://db01:1/app?port=2", "'port'"),
        ("postgresql:///app?host=/run&port=x", "port must be an integer"),
        ("postgresql:///app?host=db01&host=db02", "host must be a string"),
        ("postgresql://db01/app?sslmode=require&sslmode=disable", "must be a string"),
        (f"postgresql://db01/{'a' * 64}", "64 bytes"),
    ],
)
def test_a_url_that_says_too_little_or_too_much_is_refused(url: str, why: str) -> None:
    """A part that is missing, foreign or said twice is an error, never a default."""
    assert why in refused(make_url(url))


def test_a_url_is_no_host() -> None:
    """A directory that answers with one is refused, and what is in it is not repeated."""
    with pytest.raises(ConfigError, match="not as a URL") as caught:
        Location.of("shard01", "postgresql://app:sesame@db01/shard01")
    assert "sesame" not in str(caught.value)


def test_a_refused_url_shows_no_password() -> None:
    """Whatever is wrong with it."""
    for url in ("mysql://ada:{}@db01/app", "postgresql://ada:{}@db01", "postgresql://ada:{}@db01/app?service=x"):
        assert SECRET not in refused(make_url(url.format(SECRET)))


def test_a_port_of_zero_in_a_url_is_refused() -> None:
    """It is not read as a missing one."""
    assert "port 0 does not exist" in refused(URL.create("postgresql", host="db01", port=0, database="app"))


# Connecting


def test_a_failed_connect_shows_no_password() -> None:
    """Neither its message nor the local variables of the driver's frames hold one."""
    from shardrepo.driver import Target, connect

    database = a_database(host="/nonexistent", password=SECRET)
    try:
        connect(Target.of(database, Config.of({})), None)
    except Exception as error:
        shown = shown_with_locals(error)
        stored = pickle.dumps(error)
    assert "cannot connect to /nonexistent:5432/app" in shown
    assert SECRET not in shown
    assert SECRET.encode() not in stored
