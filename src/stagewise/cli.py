"""The command line: a table of commands and the functions behind them, nothing else.

Design choices:
- A command is a plain typed function in its room; its options, defaults and help come from its signature and docstring.
- Functions are imported when their command is chosen: `stagewise --help` loads neither torch nor transformers.
- What a user can mend (ValueError, OSError, RuntimeError, a missing extra) is one line on stderr and exit status 2;
  `--debug` shows the traceback. An int returned by a command is its exit status.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cyclopts import App, CycloptsError, Parameter

from stagewise import __version__


class Command(NamedTuple):
    """Where a command's function is (`module:function`) and its line in the list of commands."""

    target: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS: dict[str, Command] = {
    "quickstart": Command("stagewise.quickstart:quickstart", "Train a small model here and show what its experts do."),
    "train": Command("stagewise.training.commands:train", "Train a model from a recipe."),
    "generate": Command("stagewise.serving.commands:generate", "Continue a prompt, at any depth, in any mode."),
    "compare": Command("stagewise.serving.commands:compare", "Show modes and models side by side on one prompt."),
    "chat": Command("stagewise.serving.commands:chat", "Talk to a specialist."),
    "evaluate": Command(
        "stagewise.evaluation.commands:evaluate", "Measure BPB and accuracy of every stage and product."
    ),
    "probe": Command("stagewise.evaluation.commands:probe", "Run a set of prompts through every mode."),
    "inspect": Command("stagewise.evaluation.commands:inspect", "Show sizes, costs and heads of a model."),
    "calibrate": Command("stagewise.calibration.commands:calibrate", "Measure early-exit bounds and store them."),
    "audit": Command("stagewise.calibration.commands:audit", "Check that lossless modes lose nothing here."),
    "tune": Command("stagewise.calibration.commands:tune", "Find this machine's fastest lossless mode."),
    "specialise": Command("stagewise.specialist.commands:specialise", "Grow a specialist on a frozen model."),
    "convert-delta": Command("stagewise.specialist.commands:convert_delta", "Convert a stage checkpoint into a delta."),
    "fold": Command("stagewise.specialist.commands:fold", "Flatten a specialist and its parents into one model."),
    "trajectory": Command("stagewise.report.commands:trajectory", "Measure many checkpoints of one run."),
    "report": Command("stagewise.report.commands:report", "Write a self-contained HTML page about a run or model."),
    "card": Command("stagewise.hub.commands:card", "Write the model card from what was measured."),
    "export": Command("stagewise.hub.commands:export", "Write a folder that transformers alone can load."),
    "publish": Command("stagewise.hub.commands:publish", "Upload a model folder to a repository."),
    "tokenizer train": Command("stagewise.training.tokenizer_command:train", "Train a byte-level BPE tokenizer."),
    "data prepare": Command("stagewise.data.commands:prepare", "Tokenise a mixture into memory-mapped shards."),
    "recipe show": Command("stagewise.recipe:show", "Print a recipe and what its settings come to."),
    "recipe list": Command("stagewise.recipe:list_recipes", "List the shipped recipes."),
}
GROUPS = {
    "tokenizer": "Train tokenizers.",
    "data": "Prepare training data.",
    "recipe": "Show and list recipes.",
}


def build_app(chosen: str | None = None) -> App:
    """The command-line application. The function of the command `chosen` is imported, for its help; others are not."""
    app = App(
        name="stagewise",
        help="Language models whose every stage is an expert. Errors are one line; --debug shows where they come from.",
        help_format="plaintext",
        version=__version__,
        default_parameter=Parameter(negative_iterable=()),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    groups = {name: App(name=name, help=summary) for name, summary in GROUPS.items()}
    for name, command in COMMANDS.items():
        *group, leaf = name.split()
        parent = groups[group[0]] if group else app
        if name == chosen:
            function = command.load()
            parent.command(function, name=leaf, help_epilogue=_example(function))
        else:
            parent.command(command.target, name=leaf, help=command.summary)
    for group_app in groups.values():
        app.command(group_app)
    return app


def _example(function: Callable[..., Any]) -> str:
    """The `Example` part of a docstring, from its heading to the end of that paragraph."""
    found = re.search(r"^Examples?:.*?(?=\n\s*\n|\Z)", inspect.getdoc(function) or "", re.MULTILINE | re.DOTALL)
    return found.group() if found else ""


def _chosen(arguments: Sequence[str]) -> str | None:
    """The command that `arguments` begin with. Raises ValueError for a word that begins no command."""
    words = arguments[:2]
    for name in (" ".join(words), *words[:1]):
        if name in COMMANDS:
            return name
    group = words[0] if words and words[0] in GROUPS else None
    if words[1 if group else 0 :][:1] in ([], ["--help"], ["-h"], ["--version"]):
        return None
    known = [name for name in COMMANDS if name.startswith(f"{group} ")] if group else [*COMMANDS, *GROUPS]
    word = " ".join(words) if group else words[0]
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; see stagewise {group + ' ' if group else ''}--help"
    raise ValueError(f"unknown command {word!r}{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        app = build_app(_chosen(arguments))
        result = app(arguments, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 141
    except (ValueError, OSError, RuntimeError, ImportError, CycloptsError) as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"stagewise: error: {message}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) and not isinstance(result, bool) else 0
