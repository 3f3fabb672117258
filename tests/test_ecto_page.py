"""The page for those who come from Ecto names what there is, and leaves out nothing that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardrepo import Repo

PAGE = (Path(__file__).parents[1] / "docs" / "ecto.md").read_text()
NAMED = re.findall(r"`Repo\.(\w+)`", PAGE)

# Ecto.Repo's callbacks as of 3.14, with what ecto_sql adds (https://hexdocs.pm/ecto/Ecto.Repo.html).
ECTO = """
    all all_by get get! get_by get_by! one one! exists? aggregate stream update_all delete_all
    insert insert! update update! insert_or_update insert_or_update! delete delete! insert_all
    load preload reload reload! transaction transact rollback in_transaction? checkout checked_out? prepare_transaction
    put_dynamic_repo get_dynamic_repo start_link stop child_spec config init __adapter__ all_running
    default_options prepare_query query query! query_many query_many! to_sql explain disconnect_all
"""


@pytest.mark.parametrize("name", sorted(set(NAMED)))
def test_each_name_on_the_page_exists(name: str) -> None:
    """What is promised there can be called."""
    assert callable(getattr(Repo, name))


def test_every_public_method_is_on_the_page() -> None:
    """A new one is told to those who look for its counterpart."""
    assert {name for name in dir(Repo) if not name.startswith("_")} == set(NAMED)


@pytest.mark.parametrize("name", ECTO.split())
def test_every_function_of_ectos_has_a_row(name: str) -> None:
    """With its form here, or the reason why there is none."""
    first_cells = [row.split("|")[1] for row in PAGE.splitlines() if row.startswith("| `")]
    assert any(re.search(rf"`{re.escape(name)}[`(]", cell) for cell in first_cells)
