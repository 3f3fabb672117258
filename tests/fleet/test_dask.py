"""The same run on a Dask cluster: two worker processes on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]  # has no stubs of its own
import pytest
from distributed import LocalCluster

from shardrepo import fleet
from shardrepo.fleet import Rollout
from shardrepo.fleet.crew import executor_of

from .conftest import USERS, Project
from .test_upgrade import NOTED, NOTES, failed


@pytest.fixture
def cluster(project: Project) -> Iterator[LocalCluster]:
    """A scheduler and two worker processes, of two threads each, that can import the project."""
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def project(project: Project) -> Project:
    """A project whose first revision notes which process ran it, and where."""
    project.revise(
        "0001",
        None,
        f"""{USERS}
{NOTES}
{NOTED.format("0001")}
import os
op.execute(f"COMMENT ON TABLE noted IS '{{os.getpid()}}'")""",
    )
    return project


def address_of(cluster: LocalCluster) -> str:
    """What the command calls it."""
    return str(cluster.scheduler_address).replace("tcp://", "dask://")


def processes(project: Project) -> set[int]:
    """Who has migrated its databases."""
    return {int(project.sql(name, "SELECT obj_description('noted'::regclass)")[0][0]) for name in project.names}


def test_a_cluster_migrates_a_fleet(project: Project, cluster: LocalCluster) -> None:
    """Both of its processes do, each database once, though each has two threads."""
    project.add(18)
    with executor_of(address_of(cluster)) as executor:
        how = Rollout(jobs=4, per_server=4, executor=executor)
        assert fleet.upgrade(project.repo, how=how, source=project.source).changed == 24
    assert project.revisions() == project.all_at("0001")
    assert {tuple(project.sql(name, "SELECT * FROM noted")) for name in project.names} == {
        (("0001", name),) for name in project.names
    }
    assert processes(project) <= {child.pid for child in psutil.Process().children(recursive=True)}
    assert len(processes(project)) == 2


def test_the_command_on_a_cluster(project: Project, cluster: LocalCluster) -> None:
    """`--executor dask://host:port` migrates by the cluster's processes, and by none of its own."""
    project.configure()
    done = project.run("upgrade", "--executor", address_of(cluster))
    assert (done.returncode, done.stderr) == (0, "")
    assert processes(project) <= {child.pid for child in psutil.Process().children(recursive=True)}


def test_what_fails_on_a_cluster(project: Project, cluster: LocalCluster) -> None:
    """A failure comes back with its cause, as from a process of one's own."""
    project.revise("0001", None, 'op.execute("SELECT 1 / 0")')
    with executor_of(address_of(cluster)) as executor:
        report = failed(lambda: fleet.upgrade(project.repo, how=Rollout(executor=executor), source=project.source))
    (cause,) = report.causes
    assert (cause.count, cause.failure.sqlstate, cause.failure.revision) == (6, "22012", "0001")


def test_no_cluster_is_there(project: Project) -> None:
    """An executor of another kind, or one that does not answer, is named, and nothing is done."""
    project.configure()
    for address, said in (("ray://x", "'ray://x'"), ("dask://127.0.0.1:1", "no Dask scheduler answers at 127.0.0.1:1")):
        done = project.run("upgrade", "--executor", address)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert project.revisions() == project.all_at()
