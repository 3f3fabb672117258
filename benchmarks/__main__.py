"""`python -m benchmarks [name …] [--json] [--write]`: half an hour for all of them; or `soak`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from signal import SIGINT
from typing import TypeAlias

from . import (
    checkout,
    cold,
    fleet,
    growth,
    load,
    memory,
    policy,
    preload,
    rows,
    sandbox,
    soak,
    startup,
    sweep,
    threads,
    verbs,
    warm,
)
from .ground import Ground, ground
from .measure import MissingError, Result, Skipped
from .report import FIGURES, Results, Section, as_json, as_page, as_table, surroundings, write

Benchmark: TypeAlias = Callable[[Ground], Iterator[Result]]

_MODULES = (
    warm,
    verbs,
    checkout,
    cold,
    startup,
    preload,
    rows,
    growth,
    memory,
    load,
    sweep,
    policy,
    fleet,
    threads,
    sandbox,
)

BENCHMARKS: dict[str, tuple[str, Benchmark]] = {
    module.__name__.rpartition(".")[2]: (module.__doc__ or "", module.run) for module in _MODULES
}


def main() -> None:
    if sys.argv[1:2] == ["soak"]:
        soak.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="benchmark", help=f"some of {', '.join(BENCHMARKS)}; all without")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--write", action="store_true", help=f"write docs/{FIGURES.name} and its pictures too, which needs all of them"
    )
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    if arguments.write and set(names) != set(BENCHMARKS):
        parser.error("--write writes the whole page: name no benchmark, or all of them")
    if arguments.write and find_spec("matplotlib") is None:
        parser.error("--write draws pictures, which needs matplotlib: pip install 'shardrepo[demo]'")
    try:
        results, about = measured(names)
        print(as_json(results, about) if arguments.json else "\n".join(as_table(results)))
        if arguments.write:
            before = FIGURES.read_text(encoding="utf-8") if FIGURES.exists() else ""
            write(as_page(results, about, before) + soak.kept_section(before), results)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(128 + SIGINT)


def measured(names: list[str]) -> tuple[Results, dict[str, str]]:
    """Run the benchmarks one after the other, on one server; what cannot run is skipped by name."""
    results: dict[str, Section] = {}
    with ExitStack() as stack:
        try:
            shared = stack.enter_context(ground())
        except MissingError as error:
            return {name: Section(BENCHMARKS[name][0], [Skipped(name, str(error))]) for name in names}, surroundings(
                None
            )
        about = surroundings(shared.server.version)
        for name in names:
            documented, run = BENCHMARKS[name]
            print(f"{name} …", file=sys.stderr, flush=True)
            lines: list[Result] = []
            try:
                lines.extend(run(shared))
            except MissingError as error:
                lines.append(Skipped(name, str(error)))
            results[name] = Section(documented, lines)
    return results, about


if __name__ == "__main__":
    main()
