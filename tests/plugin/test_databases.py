"""Fresh databases, and the template that they are copies of."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent

import pytest

from shardrepo.testing.servers import Server, Servers

from ..conftest import run_sql
from .conftest import INI, Project, url_of
from .test_servers import fails_with

pytestmark = pytest.mark.testing

BARE = """
    [pytest]
    pythonpath = .
    addopts = -p no:randomly -p no:faker -p no:hypothesispytest -p no:timeout -p no:pytest_alembic
    filterwarnings = error
"""


def test_fresh_databases(project: Project) -> None:
    """They have the schema and no rows, carry the worker's name, are new each time, and are dropped after the test."""
    result = project.run(
        """
        import re
        seen = []

        @pytest.mark.parametrize("n", [1, 2])
        def test_two(shardrepo_databases, shardrepo_repo, n):
            names = shardrepo_databases(2) + shardrepo_databases()
            for name in names:
                assert re.fullmatch("test_main_[0-9a-f]{12}_[0-9]{4}", name)
                with MyRepo.using(name):
                    MyRepo.insert(Note(text="x"))
                    assert MyRepo.count(Note) == 1
            assert not set(names) & set(seen)
            seen.extend(names)

        def test_dropped(shardrepo_servers):
            assert len(set(seen)) == 6
            assert not set(seen) & set(shardrepo_servers[0].databases())
        """
    )
    result.assert_outcomes(passed=3)


def test_a_fresh_database(project: Project) -> None:
    """One is named, with what a test has left open there or dropped itself."""
    result = project.run(
        """
        def test_left_open(shardrepo_database, shardrepo_servers):
            global open_connection
            open_connection = shardrepo_servers[0].connect(shardrepo_database)

        def test_dropped(shardrepo_database, shardrepo_servers):
            open_connection.close()
            shardrepo_servers[0].drop_database(shardrepo_database)
        """
    )
    result.assert_outcomes(passed=2)


def test_on_another_server(project: Project, servers: Servers) -> None:
    """They are made where the test wants them, from a template there."""
    before = servers[1].databases()
    result = project.run(
        """
        def test_on(shardrepo_databases, shardrepo_repo, shardrepo_servers):
            other = shardrepo_servers[1]
            (name,) = shardrepo_databases(on=other)
            assert name in other.databases()
            assert name not in shardrepo_servers[0].databases()
            with MyRepo.using(other.url(name)):
                assert MyRepo.count(Note) == 0
        """,
        f"--shardrepo-url={project.url} {url_of(servers[1])}",
        given=False,
    )
    result.assert_outcomes(passed=1)
    assert servers[1].databases() == before


def test_the_template_is_made_once(project: Project) -> None:
    """The schema is made once on each server that is used, in an empty database; what makes it can be overridden."""
    result = project.run(
        """
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool
        made = []

        @pytest.fixture(scope="session")
        def shardrepo_schema():
            def make(url):
                made.append(url.database)
                with create_engine(url, poolclass=NullPool).begin() as connection:
                    connection.exec_driver_sql("CREATE TABLE mine (n int)")
            return make

        def test_nothing_yet(shardrepo_servers, shardrepo_repo, shardrepo_databases):
            assert made == []

        @pytest.mark.parametrize("n", [1, 2])
        def test_mine(shardrepo_database, shardrepo_servers, n):
            with shardrepo_servers[0].connect(shardrepo_database) as connection:
                assert connection.execute("SELECT count(*) FROM mine").fetchone() == (0,)
            assert len(made) == 1
        """
    )
    result.assert_outcomes(passed=3)


def test_no_schema(project: Project) -> None:
    """Without a repo and metadata the databases are empty."""
    project.configure("", base=BARE)
    result = project.run(
        """
        def test_empty(shardrepo_database, shardrepo_servers):
            with shardrepo_servers[0].connect(shardrepo_database) as connection:
                assert connection.execute("SELECT to_regclass('notes')").fetchone() == (None,)
        """
    )
    result.assert_outcomes(passed=1)


# In a sandbox, in which nothing could be migrated any more.
MIGRATED = """
    def test_migrated(shardrepo_sandbox, shardrepo_database):
        with MyRepo.using(shardrepo_database):
            assert MyRepo.all(Note) == []
"""

ENV = """
    from app import Base, MyRepo
    from shardrepo.fleet import env

    env.run(MyRepo, Base.metadata)
"""

REVISION = """
    import sqlalchemy as sa
    from alembic import op

    revision = "0001"
    down_revision = None

    def upgrade():
        op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.Text))

    def downgrade():
        op.drop_table("notes")
"""


@pytest.fixture
def revisions(project: Project) -> None:
    """A folder of Alembic's, with one revision."""
    folder = project.pytester.mkdir("revisions")
    (folder / "env.py").write_text(dedent(ENV))
    (folder / "versions").mkdir()
    (folder / "versions" / "0001_notes.py").write_text(dedent(REVISION))


def test_a_migrated_template(project: Project, revisions: None) -> None:
    """Where the repo's config says where the revisions are, they make the schema."""
    project.configure("    shardrepo_repo = app:MyRepo", base=BARE)
    app = project.pytester.path / "app.py"
    app.write_text(
        app.read_text().replace(
            'os.environ["DATABASE_URL"]', '{"url": os.environ["DATABASE_URL"], "script_location": "revisions"}'
        )
    )
    project.run(MIGRATED).assert_outcomes(passed=1)


def test_a_template_migrated_by_option(project: Project, revisions: None) -> None:
    """The option says it in place of the config."""
    project.configure("    shardrepo_repo = app:MyRepo\n    shardrepo_script_location = revisions", base=BARE)
    project.run(MIGRATED).assert_outcomes(passed=1)


def test_revisions_without_a_repo(project: Project) -> None:
    """Revisions are run through a repo: without one the error says how to name it."""
    project.configure("    shardrepo_script_location = revisions", base=BARE)
    fails_with(
        project.run("def test_it(shardrepo_database): pass"), "no repo: name it by the ini option shardrepo_repo*"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("app:NoBase.metadata", "*'app:NoBase.metadata' cannot be imported: *has no attribute 'NoBase'"),
        ("app:Base", "the metadata 'app:Base' is *, no MetaData: name one, as myapp.models:Base.metadata"),
    ],
)
def test_metadata_that_is_none(project: Project, path: str, message: str) -> None:
    """A name that leads nowhere, or to something else, is an error that says so."""
    fails_with(project.run("def test_it(shardrepo_database): pass", f"--shardrepo-metadata={path}"), message)


def test_metadata_alone(project: Project) -> None:
    """Databases need no repo: the application is imported when its variable is set."""
    project.configure("", base=INI.replace("shardrepo_repo = app:MyRepo", ""))
    app = project.pytester.path / "app.py"
    app.write_text(app.read_text().replace("lambda: ", ""))
    project.pytester.makepyfile(
        test_app="""
        def test_it(shardrepo_database, shardrepo_servers):
            with shardrepo_servers[0].connect(shardrepo_database) as connection:
                connection.execute("SELECT * FROM notes")
        """
    )
    project.pytester.runpytest_inprocess(f"--shardrepo-url={project.url}").assert_outcomes(passed=1)


def test_a_schema_that_fails(project: Project) -> None:
    """What it raises is shown as it is, for each test; the next one tries again, and nothing stays behind."""
    result = project.run(
        """
        tries = []

        @pytest.fixture(scope="session")
        def shardrepo_schema():
            def make(url):
                tries.append(url)
                raise LookupError("no such schema")
            return make

        @pytest.mark.parametrize("n", [1, 2])
        def test_it(shardrepo_database, n):
            pass

        def test_twice(shardrepo_servers):
            assert len(tries) == 2
            assert not [name for name in shardrepo_servers[0].databases() if name.startswith("test_template")]
        """
    )
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["*LookupError: no such schema"])


def test_a_template_in_use(project: Project, server: Server) -> None:
    """The error says who is connected to the template, and what to do about what makes the schema."""
    result = project.run(
        """
        import psycopg

        @pytest.fixture(scope="session")
        def shardrepo_schema(shardrepo_servers):
            def make(url):
                global left_open
                left_open = shardrepo_servers[0].connect(url.database, application_name="forgetful")
            return make

        @pytest.fixture
        def closed():
            yield
            left_open.close()

        def test_it(closed, shardrepo_database):
            pass
        """
    )
    fails_with(
        result,
        "the template test_template_* on 127.0.0.1:* cannot be copied while somebody is connected to it "
        "(pid *, user shardrepo, forgetful, idle): close that session*NullPool*",
    )


@pytest.fixture
def alien(server: Server) -> Iterator[str]:
    """A database on the server that no test run has made."""
    server.create_database("alien")
    yield "alien"
    server.drop_database("alien")


def comment(server: Server, name: str, text: str) -> None:
    run_sql(server, "postgres", f"COMMENT ON DATABASE {name} IS '{text}'")


def test_leftovers_of_a_killed_run(project: Project, server: Server, alien: str) -> None:
    """What a run that was killed has left is dropped by the next; what goes on, and what is not ours, stays."""
    for name in ("left1", "left2", "theirs"):
        server.create_database(name)
    comment(server, "left1", "made by the shardrepo test run 0123abcd")
    comment(server, "left2", "made by the shardrepo test run 0123abcd, which has not finished it")
    comment(server, "theirs", "made by the shardrepo test run 4567ef")
    comment(server, alien, "not made by the shardrepo test run 0123abcd")
    from shardrepo.testing.stock import _key

    with server.connect() as other_run:
        other_run.execute("SELECT pg_advisory_lock_shared(%s)", [_key("4567ef")])
        project.run("def test_it(shardrepo_database): pass").assert_outcomes(passed=1)
        assert {"left1", "left2", "theirs", alien} & set(server.databases()) == {"theirs", alien}
    project.run("def test_it(shardrepo_database): pass").assert_outcomes(passed=1)
    assert {"theirs", alien} & set(server.databases()) == {alien}
