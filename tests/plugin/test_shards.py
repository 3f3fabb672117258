"""The sandbox around a test, and the databases that last as long as the run."""

from __future__ import annotations

import pytest

from shardrepo.testing.servers import Server, Servers
from shardrepo.testing.stock import _key

from ..conftest import run_sql
from .conftest import Project, url_of
from .test_servers import fails_with

pytestmark = pytest.mark.testing

LISTED = "    shardrepo_databases =\n        shard_a\n        shard_b\n"


def test_a_marked_test_has_a_sandbox(project: Project) -> None:
    """The marker is enough: the databases are there, with the schema; what one test writes the next does not see."""
    project.configure(LISTED)
    result = project.run(
        """
        @pytest.mark.shards("shard_a", "shard_b")
        @pytest.mark.parametrize("n", [1, 2])
        def test_write(n):
            for name in ("shard_a", "shard_b"):
                with MyRepo.using(name):
                    assert MyRepo.count(Note) == 0
                    MyRepo.insert(Note(text="x"))

        @pytest.mark.shards("shard_b")
        class TestClass:
            def test_of_a_class(self, shardrepo_sandbox):
                with MyRepo.using("shard_b"):
                    assert MyRepo.count(Note) == 0
                assert [each.name for each in shardrepo_sandbox.databases] == ["shard_b"]
        """
    )
    result.assert_outcomes(passed=3)


def test_other_databases_are_refused(project: Project) -> None:
    """A marked test that uses a database which it does not name fails, though that exists."""
    project.configure(LISTED)
    result = project.run(
        """
        from shardrepo import ShardRepoError

        @pytest.mark.shards("shard_a", "shard_b")
        def test_both():
            with MyRepo.using("shard_b"):
                assert MyRepo.count(Note) == 0

        @pytest.mark.shards("shard_a")
        def test_one():
            with MyRepo.using("shard_b"), pytest.raises(ShardRepoError):
                MyRepo.count(Note)
        """
    )
    result.assert_outcomes(passed=2)


def test_a_sandbox_over_all(project: Project, server: Server) -> None:
    """Without the marker the fixture covers what the test uses, the listed databases and fresh ones."""
    project.configure(LISTED)
    result = project.run(
        """
        @pytest.mark.parametrize("n", [1, 2])
        def test_all(shardrepo_sandbox, shardrepo_database, n):
            for name in ("shard_a", "shard_b", shardrepo_database):
                with MyRepo.using(name):
                    assert MyRepo.count(Note) == 0
                    MyRepo.insert(Note(text="x"))
            assert len(shardrepo_sandbox.databases) == 3
        """
    )
    result.assert_outcomes(passed=2)


SHOWS_SANDBOX = """
    @classmethod
    def sandbox(cls, **options):
        print("sandbox:", sorted(options.items()))
        return super().sandbox(**options)
"""


def test_which_fixtures_are_in_the_sandbox(project: Project) -> None:
    """What a fixture of the test writes is inside, what one of the module writes is not."""
    project.configure(LISTED)
    with (project.pytester.path / "app.py").open("a") as app:
        app.write(SHOWS_SANDBOX)
    result = project.run(
        """
        @pytest.fixture(autouse=True)
        def of_the_test():
            print("inside")

        @pytest.fixture(scope="module", autouse=True)
        def of_the_module():
            print("before")

        @pytest.mark.shards("shard_a")
        def test_it():
            print("test")
        """,
        "-s",
    )
    result.stdout.fnmatch_lines(["*before", "sandbox: *", "inside", "test"])


@pytest.mark.parametrize("flags", [[], ["--shardrepo-shared"], ["--shardrepo-check-deferred"]])
def test_what_the_sandbox_is_told(project: Project, flags: list[str]) -> None:
    """The options shared and check_deferred reach the sandbox."""
    project.configure(LISTED)
    with (project.pytester.path / "app.py").open("a") as app:
        app.write(SHOWS_SANDBOX)
    result = project.run('@pytest.mark.shards("shard_a")\ndef test_it(): pass', "-s", *flags)
    shared, deferred = (flag in flags for flag in ("--shardrepo-shared", "--shardrepo-check-deferred"))
    asked = f"[('check_deferred', {deferred}), ('databases', ['shard_a']), ('shared', {shared})]"
    assert f"sandbox: {asked}" in result.stdout.str()


def test_a_database_on_the_second_server(project: Project, servers: Servers) -> None:
    """name@2 lasts on the second server, where a test chooses it by its address or through a directory."""
    project.configure("    shardrepo_databases = shard_a shard_b@2")
    before = servers[1].databases()
    app = project.pytester.path / "app.py"
    app.write_text(
        app.read_text()
        + f"""

class Located(Repo, config=lambda: {{
    "url": os.environ["DATABASE_URL"], "directory": {{"shard_a": {{}}, "shard_b": {{"port": {servers[1].port}}}}}
}}):
    pass
"""
    )
    flags = (f"--shardrepo-url={project.url} {url_of(servers[1])}",)
    tests = """
        @pytest.mark.shards("shard_a", "shard_b")
        def test_both(shardrepo_sandbox, shardrepo_repo, shardrepo_servers):
            other = shardrepo_servers[1].url("shard_b") if shardrepo_repo is MyRepo else "shard_b"
            for choice in ("shard_a", other):
                with shardrepo_repo.using(choice):
                    assert shardrepo_repo.count(Note) == 0
            assert [each.port for each in shardrepo_sandbox.databases] == [each.port for each in shardrepo_servers]
    """
    for repo in ("MyRepo", "Located"):
        project.run(tests, *flags, f"--shardrepo-repo=app:{repo}", given=False).assert_outcomes(passed=1)
    assert servers[1].databases() == before


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("", "shards() names no database: write @pytest.mark.shards(*"),
        ("1", "shards() takes names of databases, not int 1"),
        ("['shard_a']", "shards() takes names of databases, not list [[]'shard_a'[]]"),
        ("'shard_a', 'shard_a'", "shards() names the database 'shard_a' twice: once is enough"),
        (
            "'shard_aa'",
            "shards(): unknown database 'shard_aa'; did you mean 'shard_a'[?]; the ini option shardrepo_databases*",
        ),
        ("names='shard_a'", "shards() takes names alone, no keywords: names is one"),
    ],
)
def test_a_marker_that_is_wrong(project: Project, marker: str, message: str) -> None:
    """The error says what is wrong with it, and nothing is made."""
    project.configure(LISTED)
    fails_with(project.run(f"@pytest.mark.shards({marker})\ndef test_it(): pass"), message)


def test_a_marker_without_any_database(project: Project) -> None:
    """Where no databases are listed, the error says which option lists them."""
    result = project.run('@pytest.mark.shards("shard_a")\ndef test_it(): pass')
    fails_with(result, "shards(): no database 'shard_a'; the ini option shardrepo_databases lists*")


def test_a_database_that_is_not_ours(project: Project, server: Server) -> None:
    """A database of that name which no test run has made is neither used nor dropped."""
    project.configure(LISTED)
    server.create_database("shard_a")
    try:
        run_sql(server, "shard_a", "CREATE TABLE precious (n int)")
        result = project.run('@pytest.mark.shards("shard_a")\ndef test_it(): pass')
        fails_with(
            result, "the database 'shard_a' on 127.0.0.1:* was not made by a test run, and is neither used nor *"
        )
        assert run_sql(server, "shard_a", "SELECT * FROM precious") == []
    finally:
        server.drop_database("shard_a")


def test_a_database_of_another_run(project: Project, server: Server) -> None:
    """One that another run still uses is left to it; when that is over it is made anew."""
    project.configure(LISTED)
    server.create_database("shard_a")
    run_sql(server, "postgres", "COMMENT ON DATABASE shard_a IS 'made by the shardrepo test run 4567ef'")
    marked = """
        @pytest.mark.shards("shard_a")
        def test_it():
            with MyRepo.using("shard_a"):
                assert MyRepo.count(Note) == 0
    """
    with server.connect() as other_run:
        other_run.execute("SELECT pg_advisory_lock_shared(%s)", [_key("4567ef")])
        fails_with(
            project.run(marked), "the database 'shard_a' on * is used by another test run, which goes on: wait *"
        )
        assert "shard_a" in server.databases()
    project.run(marked).assert_outcomes(passed=1)
