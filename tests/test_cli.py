"""The command line: every command answers, wrong input is one line, nothing heavy loads before it is needed."""

import subprocess
import sys

import pytest

from stagewise import cli
from stagewise.cli import COMMANDS, GROUPS, Command, main


@pytest.fixture
def command(monkeypatch):
    """Put a function behind a command named `trial`."""

    def put(function):
        monkeypatch.setitem(sys.modules, "trial_room", type(sys)("trial_room"))
        sys.modules["trial_room"].trial = function
        monkeypatch.setitem(COMMANDS, "trial", Command("trial_room:trial", "A trial."))

    return put


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_shows_an_example(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: stagewise {name}" in shown
    assert "Example" in shown
    assert f"stagewise {name}" in shown.partition("Example")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line_and_status_2(name, capsys):
    assert main([*name.split(), "--no-such-option", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stagewise: error: ")
    assert error.count("\n") == 1


def test_the_unknown_option_is_named(capsys):
    assert main(["recipe", "show", "quickstart", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_list_of_commands_has_one_line_for_each(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        if " " not in name:
            assert any(name in line and entry.summary in line for line in shown.splitlines()), name
    assert all(any(group in line and text in line for line in shown.splitlines()) for group, text in GROUPS.items())


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_commands(group, capsys):
    assert main([group]) == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        if name.startswith(f"{group} "):
            assert entry.summary in shown


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipe", "list"], ["nonsense"], ["--nonsense"]])
def test_torch_is_not_imported_before_a_command_needs_it(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stagewise", *arguments], capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "stagewise.cli" in loaded
    assert not {"torch", "transformers", "numpy"} & loaded


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "'train'"),
        (["recipe", "shw"], "'recipe show'"),
        (["zzzz"], "--help"),
        (["recipe", "--nope"], "recipe"),
        (["--nope"], "--help"),
    ],
)
def test_an_unknown_command_points_to_a_known_one(arguments, hint, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, OSError, RuntimeError, ModuleNotFoundError])
def test_what_a_user_can_mend_is_one_line_and_status_2(kind, command, capsys):
    def trial():
        raise kind("first line\n  second line")

    command(trial)
    assert main(["trial"]) == 2
    assert capsys.readouterr().err == "stagewise: error: first line second line\n"


def test_debug_shows_where_an_error_comes_from(command):
    def trial():
        raise ValueError("deep down")

    command(trial)
    with pytest.raises(ValueError, match="deep down"):
        main(["trial", "--debug"])


def test_a_defect_is_not_disguised_as_a_users_error(command):
    def trial():
        raise AssertionError("invariant")

    command(trial)
    with pytest.raises(AssertionError, match="invariant"):
        main(["trial"])


@pytest.mark.parametrize(("result", "status"), [(None, 0), (1, 1), (True, 0), ("text", 0)])
def test_an_int_returned_by_a_command_is_its_exit_status(result, status, command, capsys):
    command(lambda: result)
    assert main(["trial"]) == status
    assert capsys.readouterr().out == ""


def test_options_reach_the_function_by_name_and_may_repeat(command):
    seen = {}

    def trial(model: str, *, set: list[str] | None = None, steps: int = 3):
        seen.update(model=model, set=set, steps=steps)

    command(trial)
    assert main(["trial", "m", "--set", "a.b=1", "--set", "c=2", "--steps", "5"]) == 0
    assert seen == {"model": "m", "set": ["a.b=1", "c=2"], "steps": 5}


def test_an_interrupt_ends_with_the_shells_status_for_it(command):
    def trial():
        raise KeyboardInterrupt

    command(trial)
    assert main(["trial"]) == 130


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cli.__version__
