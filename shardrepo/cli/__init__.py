"""The command `shardrepo`. What it needs beyond the library is loaded when it runs."""

import json
import signal
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

if TYPE_CHECKING:
    import typer

    from ..demo.report import Report, Settings


def main() -> None:
    """Run the command with the arguments of this process, and exit."""
    try:
        import typer  # noqa: F401  # here, so that its absence is told and not a traceback
    except ModuleNotFoundError as error:
        _give_up(f"the command needs {error.name}, which is not installed: pip install 'shardrepo[cli]'")
    from sqlalchemy.exc import SQLAlchemyError

    from ..errors import ConfigError, NoDatabaseError, ReadOnlyError, ShardRepoError, UnknownDatabaseError
    from ..fleet.outcomes import Failure
    from ..fleet.report import FAILED, USAGE

    # What is begun is to be ended properly, whoever asks for it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        application()()
    except (ConfigError, NoDatabaseError, ReadOnlyError, UnknownDatabaseError) as error:
        _give_up(str(error), USAGE)
    except (ShardRepoError, SQLAlchemyError) as error:
        failure = Failure.of(error)
        _give_up(f"revision {failure.revision}: {failure}" if failure.revision else str(failure), FAILED)


# Annotations are evaluated where typer was imported, so this module cannot postpone them.
def application() -> "typer.Typer":
    """Make the command's parser; needs typer."""
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def shardrepo() -> None:
        """One Repo over hundreds or thousands of PostgreSQL databases."""

    @app.command()
    def demo(
        servers: Annotated[int, typer.Option(min=1, help="PostgreSQL servers to start.")] = 3,
        databases: Annotated[int, typer.Option(min=1, help="Databases on all of them together.")] = 60,
        threads: Annotated[int, typer.Option(min=1, help="Threads that read and write.")] = 32,
        think_ms: Annotated[float, typer.Option(min=0, help="Pause between two operations of a thread.")] = 50,
        seconds: Annotated[float, typer.Option(min=0.1, help="How long each of the two loads runs.")] = 10,
        pool_size: Annotated[int, typer.Option(min=1, help="The Repo's target.")] = 20,
        seed: Annotated[int, typer.Option(help="What the load's choices are drawn from.")] = 1,
        as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object, and nothing else.")] = False,
    ) -> None:
        """Run the same load through a Repo and by hand, on real servers, and compare.

        Exits with 1 if a row was wrong, or if the Repo failed an operation or went above its bound.
        """
        from ..demo.report import Settings

        settings = Settings(servers, databases, threads, think_ms, seconds, pool_size, seed)
        raise typer.Exit(0 if _demo(settings, as_json=as_json).passed else 1)

    from .fleet import add_commands

    add_commands(app)
    return app


def _demo(settings: "Settings", *, as_json: bool) -> "Report":
    from ..testing.postgres import ServerStartError

    try:
        from ..demo.run import run
        from ..demo.show import make_show, print_report

        report = run(settings, make_show(sys.stderr if as_json else sys.stdout))
    except ImportError as error:
        _give_up(f"the demo needs what is not installed ({error}): pip install 'shardrepo[demo]'")
    except ServerStartError as error:
        _give_up(str(error))
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report, sys.stdout)
    return report


def _give_up(message: str, code: int = 1) -> NoReturn:
    print(f"shardrepo: {message}", file=sys.stderr)
    sys.exit(code)
