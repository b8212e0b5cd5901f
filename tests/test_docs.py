"""The prose says what is true: commands and options it names exist, its Python compiles, its links lead somewhere."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from stagewise.cli import COMMANDS
from stagewise.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands() -> list[tuple[str, str]]:
    """(page, line) of every stagewise command in a plain block."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                words = line.split("  #")[0].strip()
                if words.startswith("stagewise "):
                    found.append((page.name, words))
    return found


@pytest.mark.parametrize("page, line", commands(), ids=lambda value: value)
def test_commands_and_options_in_the_documentation_exist(page, line):
    words = shlex.split(line)[1:]
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    assert name is not None or words[0] in ("--help", "COMMAND"), f"no command {line!r}"
    if name is None:
        return
    known = inspect.signature(COMMANDS[name].load()).parameters
    for word in words:
        if word.startswith("--"):
            option = word[2:].replace("-", "_")
            assert option in known or option.removeprefix("no_") in known, f"{name} has no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_compiles(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_to_files(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_complete_recipes_in_the_documentation_are_valid(page, tmp_path):
    for code in blocks(page, "yaml"):
        file = tmp_path / "recipe.yaml"
        file.write_text(code, encoding="utf-8")
        assert load_recipe(file, []).name
