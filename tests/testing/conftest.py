"""Projects as their users have them."""

from __future__ import annotations

from ..fleet.conftest import make_project as make_project
