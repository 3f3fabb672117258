"""Configuration: every setting, what contradicts, and what a choice is merged into."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from shardrepo import DEFAULT, Config, ConfigError, Database, NoDatabaseError, Repo
from shardrepo.database import ADDRESS_PARAMETERS, choose
from shardrepo.places import UNBOUNDED

URL = "postgresql+psycopg://ada:hunter2@db01:6000/app?sslmode=require"
SECRET = "hunter2"


def refused(**settings: Any) -> str:
    """The message that a config with these settings is refused with."""
    with pytest.raises(ConfigError) as caught:
        Config.of({"url": URL, **settings})
    return str(caught.value)


def located(source: Any, given: Any = None, **options: Any) -> Database:
    return Config.of(source).locate(choose(given, options))


# Settings


def test_the_defaults() -> None:
    """What a config is that gives an address only."""
    config = Config.of(URL)
    assert (config.pool_size, config.connect_timeout, config.require_database) == (20, 5.0, False)
    assert (config.application_name, config.connect_args, config.engine_options) == ("shardrepo", {}, {})
    assert (config.bounds, config.checkout_timeout, config.pgbouncer) == (UNBOUNDED, 30.0, False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pool_size", 1),
        ("pool_size", 10_000),
        ("connect_timeout", 0.001),
        ("connect_timeout", 3),
        ("require_database", True),
        ("pgbouncer", True),
        ("application_name", "reports"),
        ("connect_args", {"sslmode": "require", "prepare_threshold": None}),
        ("engine_options", {"echo": True}),
    ],
)
def test_a_setting_is_kept(setting: str, value: object) -> None:
    """Every setting arrives as it was given, a number of seconds as a float."""
    assert getattr(Config.of({"url": URL, setting: value}), setting) == value


@pytest.mark.parametrize("value", [0, -1])
def test_a_pool_that_keeps_nothing_is_refused(value: int) -> None:
    """The target is at least one connection."""
    assert f"pool_size={value} keeps no connection" in refused(pool_size=value)


@pytest.mark.parametrize("value", [True, "5", 5.0, None, [5]])
def test_a_pool_size_that_is_no_integer_is_refused(value: object) -> None:
    """Nothing is converted; True is not 1."""
    assert "pool_size must be an integer" in refused(pool_size=value)


@pytest.mark.parametrize("value", [0, -1, -0.5, math.inf, -math.inf, math.nan])
def test_a_timeout_that_cannot_be_kept_is_refused(value: float) -> None:
    """A connect ends after a positive, finite number of seconds."""
    assert "connect_timeout=" in refused(connect_timeout=value)


@pytest.mark.parametrize("value", [True, "5", None])
def test_a_timeout_that_is_no_number_is_refused(value: object) -> None:
    """Nothing is converted; True is not one second."""
    assert "connect_timeout must be a number" in refused(connect_timeout=value)


def test_a_timeout_too_large_for_a_float_is_refused() -> None:
    """It is a number, and no number of seconds."""
    assert "connect_timeout" in refused(connect_timeout=10**400)


AGES = ["idle_timeout", "max_lifetime", "check_after", "warn_after"]


@pytest.mark.parametrize("setting", AGES)
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, 10**6, True, "5"])
def test_an_age_that_is_no_duration_is_refused(setting: str, value: object) -> None:
    """The message names the setting and the value; None is how to have none."""
    message = refused(**{setting: value})
    assert setting in message
    assert repr(value) in message or str(value) in message


@pytest.mark.parametrize("setting", AGES)
def test_an_age_may_be_none(setting: str) -> None:
    """Nothing ever happens then, on that account."""
    config = Config.of({"url": URL, setting: None})
    assert getattr(config, setting) is None
    assert setting == "warn_after" or getattr(config.ages, setting) == math.inf


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("pool_size", "max_connections"),
        ("max_per_server", "max_connections"),
        ("max_per_database", "max_connections"),
        ("max_per_database", "max_per_server"),
    ],
)
def test_bounds_that_contradict_are_refused(inner: str, outer: str) -> None:
    """What could never be reached is a mistake, and both values are named; what is equal is none."""
    assert refused(**{inner: 6, outer: 5}) == f"{inner}=6 is above {outer}=5: lower the one, or raise the other"
    Config.of({"url": URL, inner: 5, outer: 5})


def test_a_pool_is_no_larger_than_all_that_there_may_be() -> None:
    """The default target gives way to a bound below it."""
    assert Config.of({"url": URL, "max_connections": 5}).pool_size == 5
    assert Config.of({"url": URL, "max_connections": 50}).pool_size == 20


@pytest.mark.parametrize("setting", ["require_database", "pgbouncer", "verify_database"])
@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_a_flag_that_is_no_bool_is_refused(setting: str, value: object) -> None:
    """`require_database="no"` would otherwise mean yes."""
    assert f"{setting} must be True or False" in refused(**{setting: value})


@pytest.mark.parametrize("value", ["", None, 7])
def test_an_application_name_that_is_no_text_is_refused(value: object) -> None:
    """The server shows it."""
    assert "application_name must be a non-empty string" in refused(application_name=value)


@pytest.mark.parametrize("value", ["", None, 7, "a\0b", "x" * 64])
def test_a_maintenance_database_that_cannot_be_is_refused(value: object) -> None:
    """PostgreSQL would cut a longer name to another one, which could then be dropped from itself."""
    assert "maintenance_database" in refused(maintenance_database=value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("rise", "did you mean 'raise'?"),
        ("Warn", "did you mean 'warn'?"),
        (True, "known: off, raise, warn"),
        (None, "known: off, raise, warn"),
    ],
)
def test_a_word_for_who_is_behind_that_is_unknown_is_refused(value: object, hint: str) -> None:
    """With the one that was probably meant, else with all there are."""
    assert refused(require_head=value, script_location="migrations") == f"unknown require_head {str(value)!r}; {hint}"


@pytest.mark.parametrize("value", ["warn", "raise"])
def test_a_head_of_nothing_is_refused(value: str) -> None:
    """Whoever requires it says where the migrations are."""
    assert f"require_head={value!r} needs to know where the migrations are" in refused(require_head=value)
    assert Config.of({"url": URL, "require_head": value, "script_location": "there"}).require_head == value
    assert Config.of({"url": URL, "require_head": "off"}).script_location is None


@pytest.mark.parametrize("value", ["", 7, b"migrations"])
def test_a_script_location_that_is_no_text_is_refused(value: object) -> None:
    """It is a folder's path, or a package's."""
    assert "script_location must be a non-empty string" in refused(script_location=value)


@pytest.mark.parametrize("value", ["", None, 7, ".", "a.", ".a", "a.b.c", "a\0b", "x" * 64, "a." + "x" * 64])
def test_a_version_table_that_cannot_be_is_refused(value: object) -> None:
    """It is a table's name, or a schema's and a table's."""
    assert "version_table" in refused(version_table=value)


@pytest.mark.parametrize("value", ["alembic_version", "audit.versions", 'Any "name" %s', "x" * 63])
def test_a_version_table_may_have_any_name(value: str) -> None:
    """Whatever PostgreSQL can call a table."""
    assert Config.of({"url": URL, "version_table": value}).version_table == value


@pytest.mark.parametrize("setting", ["connect_args", "engine_options"])
@pytest.mark.parametrize("value", [None, "a=b", [("a", "b")]])
def test_arguments_that_are_no_mapping_are_refused(setting: str, value: object) -> None:
    """They are keyword arguments for somebody else."""
    assert f"{setting} must be a mapping" in refused(**{setting: value})


@pytest.mark.parametrize(
    "name",
    [*sorted(ADDRESS_PARAMETERS), "connect_timeout", "application_name"],
)
def test_connect_arguments_that_lead_elsewhere_are_refused(name: str) -> None:
    """Where and how to connect is said once, and the message does not repeat a value."""
    message = refused(connect_args={name: SECRET})
    assert f"connect_args must not contain {name!r}" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "name", ["pool_size", "poolclass", "pool", "creator", "connect_args", "isolation_level", "pool_pre_ping", "module"]
)
def test_engine_options_that_the_cache_decides_on_are_refused(name: str) -> None:
    """No other pool, driver or dialect comes behind the cache's back."""
    assert f"engine_options must not contain {name!r}" in refused(engine_options={name: None})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("pool_sise", "pool_size"),
        ("conect_timeout", "connect_timeout"),
        ("databse", "database"),
        ("hots", "host"),
        ("require_databases", "require_database"),
        ("user_name", "username"),
        ("URL", None),
        ("max_overflow", "max_connections"),
        ("pool_recycle", "max_lifetime"),
        ("pool_pre_ping", "check_after"),
        ("pool_timeout", "checkout_timeout"),
    ],
)
def test_an_unknown_setting_is_refused(misspelt: str, meant: str | None) -> None:
    """With the one that was probably meant, else with all there are."""
    message = refused(**{misspelt: 5})
    assert f"unknown setting {misspelt!r}" in message
    assert (f"did you mean {meant!r}?" if meant else "known: ") in message


@pytest.mark.parametrize("key", [1, None, ("url",)])
def test_a_key_that_is_no_text_is_refused(key: object) -> None:
    """A mapping may come from a file."""
    with pytest.raises(ConfigError, match="unknown setting"):
        Config.of({"url": URL, key: 1})  # type: ignore[dict-item]  # that is the point


@pytest.mark.parametrize("source", [7, b"postgresql://db01/app", ["postgresql://db01/app"], None, lambda: None])
def test_something_else_is_no_config(source: Any) -> None:
    """It is a URL, a mapping, or a callable that returns one."""
    with pytest.raises(ConfigError):
        Config.of(source)


@pytest.mark.parametrize("url", ["", "db01/app", "postgresql", f"//ada:{SECRET}@db01", f"postgresql:ada:{SECRET}@db01"])
def test_a_url_that_cannot_be_read_is_refused_without_repeating_it(url: str) -> None:
    """It may hold a password in any place."""
    with pytest.raises(ConfigError, match="cannot be parsed") as caught:
        Config.of(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_url_with_a_port_that_is_no_number_is_refused() -> None:
    """It is a ConfigError like the rest, and shows no password."""
    with pytest.raises(ConfigError) as caught:
        Config.of(f"postgresql://ada:{SECRET}@db01:port/app")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("driver", ["mysql", "postgresql+asyncpg", "postgresql+psycopg2", "", 7])
def test_another_driver_is_refused(driver: object) -> None:
    """The cache speaks psycopg."""
    assert "driver" in refused(drivername=driver)


def test_a_config_is_frozen() -> None:
    """Neither its settings nor its mappings can be changed, also not by the mapping it was made of."""
    arguments = {"sslmode": "require"}
    config = Config.of({"url": URL, "connect_args": arguments})
    arguments["sslmode"] = "disable"
    assert config.connect_args == {"sslmode": "require"}
    with pytest.raises(TypeError):
        config.connect_args["sslmode"] = "disable"  # type: ignore[index]  # that is the point
    with pytest.raises(TypeError):
        config.address["host"] = "db02"  # type: ignore[index]  # that is the point
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pool_size = 1  # type: ignore[misc]  # that is the point


def test_the_mapping_that_a_config_is_made_of_stays_as_it_is() -> None:
    """Two repos may be made of one mapping."""
    source = {"url": URL, "database": "app", "pool_size": 3, "drivername": "postgresql"}
    before = dict(source)
    assert Config.of(source) == Config.of(source)
    assert source == before


def test_a_config_shows_no_password() -> None:
    """Nor what else it connects with."""
    config = Config.of({"url": URL, "connect_args": {"sslpassword": SECRET}})
    assert SECRET not in f"{config} {config!r}"


# Contradictions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "db02"),
        ("port", 5432),
        ("database", "other"),
        ("username", "eve"),
        ("password", "other"),
        ("query", {"sslmode": "disable"}),
    ],
)
def test_a_url_and_a_key_that_contradict_are_refused(name: str, value: object) -> None:
    """Neither wins, and two passwords are not shown."""
    message = refused(**{name: value})
    assert f"contradicts itself on {name}" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("prepare_threshold", 5, "remove it"),
        ("prepare_threshold", 0, "remove it"),
        ("options", "-c statement_timeout=1000", "ALTER ROLE"),
    ],
)
def test_what_a_pooler_cannot_keep_is_refused(name: str, value: Any, remedy: str) -> None:
    """Wherever it is said, with both values and what to do; without the pooler it is taken."""
    message = refused(pgbouncer=True, connect_args={name: value})
    assert f"pgbouncer=True contradicts {name}={value!r} in connect_args" in message
    assert remedy in message
    query = {name: str(value)}
    message = f"pgbouncer=True contradicts {name}={str(value)!r} in the query"
    pooled = {"url": "postgresql://db01/app", "pgbouncer": True}
    with pytest.raises(ConfigError, match=message):
        Config.of({**pooled, "query": query})
    for given in (choose(None, {"query": query}), choose(make_url("postgresql://db02/app").set(query=query), {})):
        with pytest.raises(ConfigError, match=message):
            Config.of(pooled).locate(given)
    assert located({**pooled, "pgbouncer": False, "query": query}).query == ((name, str(value)),)


def test_what_agrees_with_a_pooler_is_taken() -> None:
    """To say that nothing is prepared is to say the same twice."""
    settings = {"pgbouncer": True, "connect_args": {"prepare_threshold": None, "sslmode": "require"}}
    assert Config.of({"url": URL, **settings}).locate(None) == located(URL)


def test_a_url_and_keys_that_agree_or_add_are_taken() -> None:
    """A key may say what the URL says, and what it leaves open."""
    agreeing = {"url": URL, "host": "DB01", "port": 6000, "database": "app", "username": "ada", "password": SECRET}
    assert Config.of(agreeing) == Config.of(URL)
    adding = {"url": "postgresql://db01/app", "port": 6000, "username": "ada", "query": {"sslmode": "require"}}
    assert located(adding) == located(URL)


@pytest.mark.parametrize(
    "source",
    [
        URL,
        make_url(URL),
        {"url": URL},
        {"url": make_url(URL)},
        lambda: URL,
        lambda: {"url": URL},
        {
            "drivername": "postgresql+psycopg",
            "host": "db01",
            "port": 6000,
            "database": "app",
            "username": "ada",
            "password": SECRET,
            "query": {"sslmode": "require"},
        },
    ],
)
def test_one_config_has_many_forms(source: Any) -> None:
    """A URL as text or object, a mapping, or a callable that returns one of them."""
    assert Config.of(source) == Config.of(URL)


# The default and its lack


def test_nothing_chosen_is_the_default() -> None:
    """Nothing chosen and DEFAULT are the same database."""
    assert located(URL) == located(URL, DEFAULT) == Database("db01", 6000, "app", "ada", (("sslmode", "require"),))


def test_a_repo_that_requires_a_database_has_no_fallback() -> None:
    """Nothing chosen is an error; the default has to be named."""
    config = Config.of({"url": URL, "require_database": True})
    with pytest.raises(NoDatabaseError, match="require_database=True"):
        config.locate(None)
    assert config.locate(DEFAULT).name == "app"
    assert config.locate(choose("other", {})).name == "other"


@pytest.mark.parametrize("given", [None, DEFAULT, {"host": "db02"}])
def test_a_config_without_a_database_has_no_default(given: Any) -> None:
    """What names no database, names none."""
    with pytest.raises(NoDatabaseError, match="names no default"):
        located({"host": "db01"}, given)
    assert located({"host": "db01"}, "app").home == "db01:5432/app"


def test_a_database_without_a_host_is_refused() -> None:
    """Nothing is taken from the environment."""
    with pytest.raises(ConfigError, match="'app' has no host"):
        located({"database": "app"})
    assert located({"database": "app"}, host="db02").home == "db02:5432/app"


def test_the_environment_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's place does not depend on libpq's variables."""
    for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER"):
        monkeypatch.setenv(name, "7777")
    assert located("postgresql://db01/app") == Database("db01", 5432, "app")
    with pytest.raises(ConfigError, match="has no host"):
        located({"database": "app"})


# Merging


@pytest.mark.parametrize(
    ("options", "home", "username"),
    [
        ({"database": "shard02"}, "db01:6000/shard02", "ada"),
        ({"host": "db02"}, "db02:6000/app", "ada"),
        ({"port": 7000}, "db01:7000/app", "ada"),
        ({"host": "db02", "database": "shard201"}, "db02:6000/shard201", "ada"),
        ({"username": "eve", "password": "x"}, "db01:6000/app", "eve"),
    ],
)
def test_options_are_merged_into_the_default(options: dict[str, Any], home: str, username: str) -> None:
    """What is given replaces the default's, what is not given stays."""
    database = located(URL, **options)
    assert (database.home, database.username) == (home, username)
    assert database.query == (("sslmode", "require"),)
    assert database.password == options.get("password", SECRET)


def test_parameters_are_replaced_as_a_whole() -> None:
    """The query is one option."""
    assert located(URL, query={"keepalives": "0"}).query == (("keepalives", "0"),)
    assert located(URL, query={}).query == ()


@pytest.mark.parametrize("given", [make_url("postgresql://db02/other"), Database("db02", 5432, "other")], ids=type)
def test_a_url_or_a_database_is_complete(given: Any) -> None:
    """Nothing of the default comes in: its password does not travel to another server."""
    database = located(URL, given)
    assert database == Database("db02", 5432, "other")
    assert (database.username, database.password, database.query) == (None, None, ())


def test_a_complete_choice_needs_no_default() -> None:
    """A config without an address serves who brings one."""
    assert located({"pool_size": 3}, Database("db02", 5432, "other")).name == "other"
    config = Config.of({"require_database": True})
    assert config.locate(choose(make_url("postgresql://db02/other"), {})).name == "other"


def test_a_choice_is_never_merged_into_the_previous_one() -> None:
    """The same arguments always mean the same database."""

    class App(Repo, config=URL):
        pass

    App.set_database(host="db02", database="shard201")
    App.set_database("shard02")
    assert App.get_database().home == "db01:6000/shard02"
    App.set_database(port=7000)
    assert App.get_database().home == "db01:7000/app"
    with App.using(host="db03"):
        assert App.get_database().home == "db03:6000/app"


# Callables


def test_a_callable_config_is_called_once_when_a_database_is_needed() -> None:
    """Defining the repo and choosing do not call it, the first resolve does, and nothing later."""
    calls = []

    def config() -> str:
        calls.append("called")
        return URL

    class App(Repo, config=config):
        pass

    App.set_database("shard02")
    with App.using("shard03"):
        pass
    assert calls == []
    assert App.get_database().home == "db01:6000/shard02"
    App.set_database(None)
    assert App.get_database().home == "db01:6000/app"
    assert calls == ["called"]


def test_a_callable_config_that_fails_is_called_again() -> None:
    """A secret store that is down for a moment does not break the repo for good."""
    answers: list[Any] = [RuntimeError("down"), URL]

    def config() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    class App(Repo, config=config):
        pass

    with pytest.raises(RuntimeError, match="down"):
        App.get_database()
    assert App.get_database().name == "app"


def test_a_wrong_config_fails_where_it_is_written() -> None:
    """A class with a misspelt setting cannot be defined; a callable's is found when it is called."""
    with pytest.raises(ConfigError, match="did you mean 'pool_size'"):
        type("App", (Repo,), {}, config={"url": URL, "pool_sise": 3})
    app: Any = type("App", (Repo,), {}, config=lambda: {"url": URL, "pool_sise": 3})
    with pytest.raises(ConfigError, match="did you mean 'pool_size'"):
        app.get_database()


def test_a_repo_without_config_says_so() -> None:
    """Neither Repo itself nor a subclass without one can be asked."""

    class Bare(Repo):
        pass

    for repo in (Repo, Bare):
        with pytest.raises(ConfigError, match=f"{repo.__name__} has no config"):
            repo.get_database()
