"""Several processes of pytest-xdist in one run."""

from __future__ import annotations

import pytest

from shardrepo.testing.servers import Server

from .conftest import Project

pytestmark = pytest.mark.testing

# Each waits for the others to begin, so that each is in a process of its own.
TESTS = """
    import os, time
    from pathlib import Path

    @pytest.fixture(scope="session")
    def shardrepo_schema(shardrepo_schema, worker_id):
        def make(url):
            Path(f"made-{worker_id}-{url.port}-{url.database}").touch()
            shardrepo_schema(url)
        return make

    @pytest.mark.shards("shard_a")
    @pytest.mark.parametrize("n", [1, 2])
    def test_both(n, worker_id, shardrepo_servers, shardrepo_databases):
        (fresh,) = shardrepo_databases()
        assert fresh.startswith(f"test_{worker_id}_")
        Path(f"begun-{n}-{worker_id}").touch()
        while len(list(Path().glob("begun-*"))) < 2:
            os.sched_yield()
        assert len({path.name.split("-")[2] for path in Path().glob("begun-*")}) == 2
        with MyRepo.using("shard_a"):
            assert MyRepo.count(Note) == 0
            MyRepo.insert(Note(text=str(n)))
            assert MyRepo.count(Note) == 1
        Path(f"on-{shardrepo_servers[0].port}-{worker_id}").touch()
"""


def made(project: Project, what: str) -> list[list[str]]:
    """The parts of the names of the files that the tests have made."""
    return [path.name.split("-") for path in project.pytester.path.glob(f"{what}-*")]


def test_workers_share_given_servers(project: Project, server: Server) -> None:
    """The template and the lasting databases are made once, used by both, and dropped by the last; clones are apart."""
    project.configure("    shardrepo_databases = shard_a")
    result = project.run(TESTS, "-n2", process=True)
    result.assert_outcomes(passed=2)
    assert {port for _, port, _ in made(project, "on")} == {str(server.port)}
    assert len(made(project, "made")) == 1


def test_workers_have_embedded_servers_of_their_own(project: Project) -> None:
    """Without a URL each process starts its own, with a template there."""
    project.configure("    shardrepo_databases = shard_a")
    result = project.run(TESTS, "-n2", given=False, process=True)
    result.assert_outcomes(passed=2)
    assert len({port for _, port, _ in made(project, "on")}) == 2
    assert len(made(project, "made")) == 2


def test_errors_in_workers(project: Project) -> None:
    """A marker that is wrong is the same clear error in a worker."""
    project.configure("    shardrepo_databases = shard_a")
    result = project.run('@pytest.mark.shards("shard_b")\ndef test_it(): pass', "-n1", process=True)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["shards(): unknown database 'shard_b'; did you mean 'shard_a'[?]*"])
