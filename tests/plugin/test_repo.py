"""The application's repo: found, told where the servers are, and held to them."""

from __future__ import annotations

import pytest

from shardrepo.testing.servers import Servers

from .conftest import INI, Project, url_of
from .test_servers import fails_with

pytestmark = pytest.mark.testing


def test_the_repo_uses_the_first_server(project: Project) -> None:
    """The named repo is the application's own class; its config has read the URL of the first server."""
    result = project.run(
        """
        def test_repo(shardrepo_repo, shardrepo_servers, shardrepo_database):
            assert shardrepo_repo is MyRepo
            assert MyRepo.get_database().url == shardrepo_servers[0].url()._replace(password=None)
            with MyRepo.using(shardrepo_database):
                MyRepo.insert(Note(text="kept"))
                assert MyRepo.count(Note) == 1
        """
    )
    result.assert_outcomes(passed=1)


def test_another_variable(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that the option names is set for the tests alone, over what it was."""
    monkeypatch.setenv("APP_URL", "postgresql://db01/production")
    project.configure("    shardrepo_url_variable = APP_URL")
    app = project.pytester.path / "app.py"
    app.write_text(app.read_text().replace("DATABASE_URL", "APP_URL"))
    result = project.run(
        """
        import os

        def test_before():
            assert os.environ["APP_URL"] == "postgresql://db01/production"

        def test_repo(shardrepo_repo):
            assert os.environ["APP_URL"].endswith("/postgres")
            assert "DATABASE_URL" not in os.environ
            assert MyRepo.ping() > 0
        """
    )
    result.assert_outcomes(passed=2)
    import os

    assert os.environ["APP_URL"] == "postgresql://db01/production"


def test_the_repo_is_disposed_at_the_end(project: Project) -> None:
    """No connection of the repo outlives the run."""
    project.pytester.makeconftest(
        """
        import pytest
        from shardrepo import RepoDisposedError

        def pytest_sessionfinish():
            from app import MyRepo
            with pytest.raises(RepoDisposedError):
                MyRepo.ping()
            print("disposed, idle:", MyRepo.stats().idle)
        """
    )
    result = project.run("def test_repo(shardrepo_repo): assert MyRepo.execute('SELECT 1').scalar_one() == 1", "-s")
    result.stdout.fnmatch_lines(["*disposed, idle: 0*"])


def test_a_repo_of_ones_own(project: Project) -> None:
    """The fixture can be overridden."""
    project.configure("", base=INI.replace("shardrepo_repo = app:MyRepo", ""))
    result = project.run(
        """
        from shardrepo import Repo

        @pytest.fixture(scope="session")
        def shardrepo_repo(shardrepo_servers):
            class Mine(Repo, config={"url": shardrepo_servers[0].url()}):
                pass
            yield Mine
            Mine.dispose()

        def test_repo(shardrepo_repo, shardrepo_database):
            assert shardrepo_repo.__name__ == "Mine"
            with shardrepo_repo.using(shardrepo_database):
                assert shardrepo_repo.count(Note) == 0
        """
    )
    result.assert_outcomes(passed=1)


def test_the_variable_is_set_before_a_repo_of_ones_own(project: Project) -> None:
    """A test in a sandbox has the variable set before the fixture of its repo runs, whoever wrote that."""
    project.configure("", base=INI.replace("shardrepo_repo = app:MyRepo", ""))
    result = project.run(
        """
        @pytest.fixture(scope="session")
        def shardrepo_repo():
            yield MyRepo
            MyRepo.dispose()

        def test_repo(shardrepo_sandbox, shardrepo_servers):
            assert MyRepo.get_database().port == shardrepo_servers[0].port
        """
    )
    result.assert_outcomes(passed=1)


USES = "def test_repo(shardrepo_repo): pass"


def test_no_repo(project: Project) -> None:
    """Without one the error names the option and the fixture."""
    project.configure("", base=INI.replace("shardrepo_repo = app:MyRepo", ""))
    fails_with(
        project.run(USES), "no repo: name it by the ini option shardrepo_repo*override the fixture shardrepo_repo"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere:MyRepo", "*'nowhere:MyRepo' cannot be imported: No module named 'nowhere'"),
        ("app:NoRepo", "*'app:NoRepo' cannot be imported: *has no attribute 'NoRepo'"),
        ("app:Note", "*'app:Note' is *, not a repo*"),
    ],
)
def test_a_repo_that_is_none(project: Project, path: str, message: str) -> None:
    """A name that leads nowhere, or to something else, is an error that says so."""
    fails_with(project.run(USES, f"--shardrepo-repo={path}"), message)


def test_a_config_that_names_another_server(project: Project) -> None:
    """A repo with a config of its own never meets the tests: the error names the server, not the password."""
    app = project.pytester.path / "app.py"
    app.write_text(
        app.read_text().replace('lambda: os.environ["DATABASE_URL"]', '"postgresql://u:hushhush@db01:6432/production"')
    )
    result = project.run(USES)
    fails_with(result, "db01:6432 is none of the tests' servers (*a callable that reads*shardrepo_repo")
    assert "hushhush" not in result.stdout.str()


def test_no_choice_leads_to_another_server(project: Project, servers: Servers) -> None:
    """Nothing connects to a server that is not the tests', chosen by options, by a URL or by a directory."""
    app = project.pytester.path / "app.py"
    app.write_text(
        app.read_text().replace(
            'lambda: os.environ["DATABASE_URL"]',
            'lambda: {"url": os.environ["DATABASE_URL"], "directory": {"lost": {"host": "db01", "port": 6432}, '
            f'"other": {{"port": {servers[1].port}}}}}}}',
        )
    )
    result = project.run(
        """
        from sqlalchemy import make_url
        from shardrepo import ConfigError

        @pytest.mark.parametrize("choice", [
            "lost",
            dict(host="db01", port=6432, database="production"),
            make_url("postgresql://u:hushhush@db01:6432/production"),
        ])
        @pytest.mark.parametrize("verb", ["ping", "count", "create_database"])
        def test_refused(shardrepo_repo, choice, verb):
            with MyRepo.using(choice), pytest.raises(ConfigError, match="db01:6432 is none of the tests' servers"):
                getattr(MyRepo, verb)(**dict(ping={}, count=dict(query=Note), create_database=dict(
                    host="db01", port=6432, database="new"))[verb])
            assert MyRepo.stats().attempts == 0

        def test_allowed(shardrepo_repo):
            assert MyRepo.ping() > 0
            with MyRepo.using("other"), pytest.raises(Exception, match="does not exist"):
                MyRepo.ping()
        """,
        f"--shardrepo-url={project.url} {url_of(servers[1])}",
        given=False,
    )
    result.assert_outcomes(passed=10)
