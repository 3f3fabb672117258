"""Each option as a flag and in the ini file, and what is said of values that cannot be."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from shardrepo.database import Database
from shardrepo.testing.options import OPTIONS, Lasting, Settings

pytestmark = pytest.mark.testing

SET = {
    "url": (
        ["postgresql://u:secret@db01", "postgresql://u@db02:5433/x"],
        "postgresql://u:secret@db01 postgresql://u@db02:5433/x",
    ),
    "servers": ("3", "3"),
    "repo": ("app:MyRepo", "app:MyRepo"),
    "url_variable": ("APP_URL", "APP_URL"),
    "metadata": ("app.models:Base.metadata", "app.models:Base.metadata"),
    "script_location": ("app:migrations", "app:migrations"),
    "databases": (["one", "two"], "one two"),
    "shared": ("true", True),
    "check_deferred": ("true", True),
}
MEANT: dict[str, Any] = {
    "url": (Database("db01", 5432, "postgres", "u"), Database("db02", 5433, "x", "u")),
    "servers": 3,
    "repo": "app:MyRepo",
    "url_variable": "APP_URL",
    "metadata": "app.models:Base.metadata",
    "script_location": "app:migrations",
    "databases": {"one": Lasting("one"), "two": Lasting("two")},
    "shared": True,
    "check_deferred": True,
}

# Without what takes longer to load than these tests to run.
QUICKLY = [f"-pno:{name}" for name in ("randomly", "faker", "hypothesispytest", "timeout", "pytest_alembic")]

DEFAULTS = Settings((), 1, None, "DATABASE_URL", None, None, {}, False, False)

WRONG = [
    ("servers", "0", "must be a number of at least 1, not '0'"),
    ("servers", "x", "must be a number of at least 1, not 'x'"),
    ("servers", "-1", "must be a number of at least 1, not '-1'"),
    ("url", "postgresql://u:secret@db01:x", "URL 1 cannot be parsed: write postgresql://user@host"),
    ("url", "mysql://u:secret@db01", "cannot use the driver 'mysql'"),
    ("url", "postgresql:///x", "names no host"),
    ("url", "postgresql://u:secret@db01/x postgresql://db01/y", "db01:5432 is named twice"),
    ("repo", "app.MyRepo", "must be module:name, like myapp.db:MyRepo, not 'app.MyRepo'"),
    ("metadata", "app:", "must be module:name, like myapp.models:Base.metadata, not 'app:'"),
    ("url_variable", "A=B", "must be the name of an environment variable, like DATABASE_URL, not 'A=B'"),
    ("databases", "one one", "the database 'one' is listed twice"),
    ("databases", "one@2", "one@2 is on none of the 1 servers: name one from 1 to 1, or raise shardrepo_servers"),
    ("databases", "one@0", "must be a number of at least 1, not '0'"),
    ("databases", "n" * 64, "is 64 bytes long"),
]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDREPO_URL", raising=False)


def flag_of(name: str, value: object = None) -> str:
    flag = "--shardrepo-" + name.replace("_", "-")
    return flag if value is None else f"{flag}={value}"


def read(pytester: pytest.Pytester, *flags: str) -> Settings:
    """What a run with these flags, and the ini file that is there, has set."""
    return Settings.of(pytester.parseconfig(*QUICKLY, *flags))


def test_every_option_is_tested() -> None:
    """The tables of these tests have all options, as the plugin's has."""
    assert [option.name for option in OPTIONS] == list(SET) == list(MEANT)


def test_nothing_is_set_by_default(pytester: pytest.Pytester) -> None:
    """Without options, there is one embedded server, no repo, no schema and no lasting database."""
    assert read(pytester) == DEFAULTS


@pytest.mark.parametrize("name", SET)
def test_in_the_ini_file(pytester: pytest.Pytester, name: str) -> None:
    """Each option can be set in the ini file, a list by one line for each."""
    given = SET[name][0]
    lines = "\n".join(f"    {line}" for line in ([given] if isinstance(given, str) else given))
    pytester.makeini(
        f"[pytest]\nshardrepo_{name} =\n{lines}" if isinstance(given, list) else f"[pytest]\nshardrepo_{name} = {given}"
    )
    assert getattr(read(pytester), name) == MEANT[name]


@pytest.mark.parametrize("name", SET)
def test_in_pyproject(pytester: pytest.Pytester, name: str) -> None:
    """Each option can be set in pyproject.toml, a list as a list."""
    pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\nshardrepo_{name} = {SET[name][0]!r}")
    assert getattr(read(pytester), name) == MEANT[name]


@pytest.mark.parametrize("name", SET)
def test_by_a_flag(pytester: pytest.Pytester, name: str) -> None:
    """Each option can be set by a flag, which wins over the ini file."""
    other = {"shared": "false", "check_deferred": "false", "servers": "7", "url": "postgresql://db09"}
    pytester.makeini(f"[pytest]\nshardrepo_{name} = {other.get(name, 'other:other')}")
    given = SET[name][1]
    assert getattr(read(pytester, flag_of(name, None if given is True else given)), name) == MEANT[name]


@pytest.mark.parametrize("name", ["shared", "check_deferred"])
def test_a_switch_is_turned_off(pytester: pytest.Pytester, name: str) -> None:
    """What the ini file turns on, a flag turns off."""
    pytester.makeini(f"[pytest]\nshardrepo_{name} = true")
    assert getattr(read(pytester, flag_of(name).replace("--", "--no-")), name) is False


def test_urls_in_the_environment(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHARDREPO_URL wins over the ini file, a flag over both; an empty variable is none."""
    pytester.makeini("[pytest]\nshardrepo_url = postgresql://ini")
    monkeypatch.setenv("SHARDREPO_URL", "postgresql://env1 postgresql://env2")
    assert [each.host for each in read(pytester).url] == ["env1", "env2"]
    assert [each.host for each in read(pytester, "--shardrepo-url=postgresql://flag").url] == ["flag"]
    monkeypatch.setenv("SHARDREPO_URL", "")
    assert [each.host for each in read(pytester).url] == ["ini"]


def test_a_database_on_the_second_server(pytester: pytest.Pytester) -> None:
    """name@2 is on the second server, given or embedded."""
    pytester.makeini("[pytest]\nshardrepo_databases = one two@2")
    for flag in ("--shardrepo-servers=2", "--shardrepo-url=postgresql://db01 postgresql://db02"):
        assert read(pytester, flag).databases == {"one": Lasting("one", 1), "two": Lasting("two", 2)}


@pytest.mark.parametrize(
    ("by", "name", "value", "message"),
    [("flag", *each) for each in WRONG] + [("ini", *each) for each in WRONG if each[0] in ("servers", "url")],
)
def test_a_value_that_cannot_be(pytester: pytest.Pytester, by: str, name: str, value: str, message: str) -> None:
    """A run with a wrong value ends before it begins, and says where it stands and what it has to be; no password."""
    flags = [flag_of(name, value)] if by == "flag" else []
    if by == "ini":
        pytester.makeini(f"[pytest]\nshardrepo_{name} = {value}")
    result = pytester.runpytest_inprocess(*QUICKLY, *flags)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    where = flag_of(name) if by == "flag" else f"shardrepo_{name}"
    (line,) = (each for each in result.stderr.lines if each.startswith("ERROR"))
    assert message in line
    assert where in line or "shardrepo_databases" in line
    assert "secret" not in line
    assert "Traceback" not in result.stderr.str()


def test_an_empty_flag_is_no_server(pytester: pytest.Pytester) -> None:
    """A flag without a value, of a variable that is not set, say, does not start other servers than were meant."""
    result = pytester.runpytest_inprocess(*QUICKLY, "--shardrepo-url=")
    result.stderr.fnmatch_lines(["ERROR: --shardrepo-url: names no server*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_options_explain_themselves(pytester: pytest.Pytester) -> None:
    """--help lists each option as a flag and as an ini option, and --markers the marker."""
    shown = pytester.runpytest_inprocess(*QUICKLY, "--help").stdout.str()
    for name in SET:
        assert flag_of(name) in shown
        assert f"shardrepo_{name} (" in shown
    pytester.runpytest_inprocess(*QUICKLY, "--markers").stdout.fnmatch_lines(["@pytest.mark.shards(*names): *"])


LATER = ("psycopg", "alembic", "factory", "shardrepo.testing.servers", "shardrepo.fleet")


def test_importing_the_plugin_loads_little() -> None:
    """What every run of every project imports loads no driver, no migrations, no factories and no servers."""
    program = f"import sys, shardrepo.pytest_plugin; print(*[name for name in {LATER!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr, done.returncode) == ([], "", 0)


def test_a_run_that_asks_for_nothing(pytester: pytest.Pytester) -> None:
    """The plugin, found by its entry point, loads nothing more for tests that use none of it, whatever is set."""
    pytester.makeini(
        "[pytest]\nshardrepo_url = postgresql://nowhere\nshardrepo_repo = no:Repo\nshardrepo_databases = one"
    )
    pytester.makepyfile(
        f"""
        import sys

        def test_nothing_is_loaded(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("shardrepo")
            assert [name for name in {LATER!r} if name in sys.modules] == []
        """
    )
    pytester.runpytest_subprocess(*QUICKLY).assert_outcomes(passed=1)
