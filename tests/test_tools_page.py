"""The recipes of docs/tools.md are lines of the scripts that made the table of consumers."""

from __future__ import annotations

import textwrap

import pytest
from test_docs import REPOSITORY, blocks

CLIENTS = sorted((REPOSITORY / "experiments" / "consumers" / "clients").glob("*.py"))
RECIPES = [content for language, content in blocks(REPOSITORY / "docs" / "tools.md") if language == ""]


def stands_in(recipe: str, script: str) -> bool:
    """Whether the lines of a recipe follow one another in a script, with one indentation for all."""
    lines = textwrap.dedent(recipe).strip("\n").splitlines()
    whole = script.splitlines()
    windows = (whole[start : start + len(lines)] for start in range(len(whole)))
    return any(textwrap.dedent("\n".join(window)).splitlines() == lines for window in windows)


def test_there_are_recipes() -> None:
    assert RECIPES and CLIENTS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.split("(")[0].strip())
def test_a_recipe_has_been_run(recipe: str) -> None:
    assert any(stands_in(recipe, client.read_text(encoding="utf-8")) for client in CLIENTS), recipe


def test_a_changed_recipe_is_found() -> None:
    script = "def f():\n    model = load(path)\n    run(model)\n"
    assert stands_in("model = load(path)\nrun(model)\n", script)
    assert not stands_in("model = load(path)\nrun(models)\n", script)
    assert not stands_in("model = load(path)\n    run(model)\n", script)
