"""Function descriptions taken from the installed Python's standard library: schemas from signatures, texts from
docstrings.

Design choices:
- Only signatures and docstrings are read; no function found here is called.
- A parameter's type comes from its annotation or default, else from what its name means in that module. A function with
  a required parameter that none of these can type is left out, so every schema is one a caller could satisfy.
- Train and held-out functions are told apart by a hash of the unqualified name: twins stay together, adding modules
  moves none across.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import platform
import re
from dataclasses import dataclass
from typing import Any

MODULES = (
    "math", "statistics", "textwrap", "posixpath", "fnmatch", "calendar", "html", "urllib.parse", "base64",
    "binascii", "difflib", "bisect", "heapq", "colorsys", "random", "json", "re", "cmath", "operator", "keyword",
    "unicodedata", "zlib", "hashlib", "secrets", "time", "locale", "glob", "tempfile", "shutil", "os", "string",
    "shlex", "quopri", "mimetypes", "uuid", "platform", "socket", "filecmp", "linecache", "codecs", "email.utils",
    "xml.sax.saxutils", "ast", "importlib.util", "pkgutil", "bz2", "lzma", "gzip", "stat", "struct", "webbrowser",
    "zipfile", "tarfile", "getpass", "gettext", "sysconfig", "tokenize", "py_compile", "compileall", "ipaddress",
    "netrc", "nturl2path", "ntpath", "runpy", "plistlib", "pprint", "reprlib", "token", "sqlite3", "ssl", "imaplib",
    "ftplib",
)  # fmt: skip
CLASSES = ("str", "bytes", "float", "int")  # of builtins: their methods, the instance as a parameter

NUMBER, INTEGER, STRING, BOOLEAN = "number", "integer", "string", "boolean"
NUMBERS, STRINGS = "array of number", "array of string"
NAME_TYPES = {
    STRING: "s string text path filename file name src dst url prefix suffix pattern pat pathname encoding format chr"
    " line source message header cmd dir dirname host hostname root base_name word chars sep separator cs"
    " charset package fullname title fillchar old new unistr form from_file to_file top extract_dir netloc"
    " key_name value_name mode algorithm fmt scheme module_name attr locale category_name user group address qs"
    " quote_via safe lineterm input",
    INTEGER: "n k width count indent length size nbytes year month day hour minute second y1 y2 depth port start stop"
    " step maxsplit tabsize bits limit number fd pid status wbits level repeat lo hi index position offset"
    " bufsize timeout_ms compresslevel bytes_count randbelow exclusive_upper_bound",
    NUMBER: "x y z r g b h l v mu sigma alpha beta lambd kappa low high mode_value seconds secs timeout interval"
    " rel_tol abs_tol angle",
    NUMBERS: "data seq iterable values numbers weights",
    STRINGS: "paths names words lines possibilities filenames split_command list",
    BOOLEAN: "verbose strict recursive casefold keepends validate follow_symlinks exist_ok ignore_errors",
}
MODULE_TYPES = {
    "math": {"a": NUMBER, "b": NUMBER, "p": NUMBERS, "q": NUMBERS, "i": INTEGER},
    "cmath": {"a": NUMBER, "b": NUMBER, "phi": NUMBER},
    "random": {"a": INTEGER, "b": INTEGER, "population": STRINGS},
    "operator": {"a": NUMBER, "b": NUMBER},
    "statistics": {"x": NUMBERS, "y": NUMBERS, "xbar": NUMBER},
    "posixpath": {"p": STRING, "a": STRING, "m": STRINGS, "f1": STRING, "f2": STRING},
    "ntpath": {"p": STRING, "f1": STRING, "f2": STRING, "m": STRINGS},
    "base64": {"b": STRING},
    "binascii": {"data": STRING, "hexstr": STRING},
    "zlib": {"data": STRING},
    "bz2": {"data": STRING},
    "lzma": {"data": STRING},
    "gzip": {"data": STRING},
    "bisect": {"a": NUMBERS, "x": NUMBER},
    "heapq": {"heap": NUMBERS, "item": NUMBER},
    "secrets": {"sequence": STRINGS},
    "filecmp": {"f1": STRING, "f2": STRING, "a": STRING, "b": STRING},
    "email.utils": {"addr": STRING, "value": STRING, "data": STRING},
    "xml.sax.saxutils": {"data": STRING},
    "urllib.parse": {"base": STRING, "fragment": STRING},
    "shlex": {"s": STRING},
    "mimetypes": {"type": STRING},
    "difflib": {"a": STRINGS, "b": STRINGS, "word": STRING},
    "unicodedata": {"form": STRING},
    "ast": {"node_or_string": STRING},
    "os": {"mode": INTEGER, "file": STRING},
    "shutil": {"mode": INTEGER},
    "stat": {"mode": INTEGER},
    "str": {"text": STRING, "iterable": STRINGS, "mode": STRING},
}
VERBS = {
    "add", "adds", "apply", "base64", "build", "calculate", "calculates", "capitalize", "center", "change", "check",
    "choose", "collapse", "combine", "compare", "compile", "compress", "compute", "computes", "construct", "convert",
    "copy", "count", "create", "decode", "decompress", "delete", "determine", "determines", "divide", "encode",
    "escape", "estimate", "estimates", "evaluate", "expand", "extract", "fill", "find", "format", "generate", "get",
    "give", "guess", "insert", "join", "list", "locate", "look", "make", "map", "match", "move", "normalize", "open",
    "pad", "parse", "perform", "produce", "push", "put", "quote", "read", "recursively", "remove", "rename",
    "replace", "report", "retrieve", "return", "returns", "reverse", "round", "run", "safely", "scan", "search",
    "send", "set", "shuffle", "sort", "split", "strip", "swap", "take", "test", "tests", "transform", "translate",
    "try", "turn", "unescape", "unpack", "unquote", "validate", "wrap", "write", "yield",
}  # fmt: skip
HELD_OUT_PERCENT = 15


@dataclass(frozen=True)
class Parameter:
    """One parameter: `kind` is a type name of NAME_TYPES."""

    name: str
    kind: str
    required: bool

    @property
    def schema(self) -> dict[str, Any]:
        outer, _, inner = self.kind.partition(" of ")
        return {"type": outer, "items": {"type": inner}} if inner else {"type": outer}


@dataclass(frozen=True)
class Function:
    """A described function. `task` is its first sentence as an imperative, such as "return the sine of x"."""

    name: str
    module: str
    task: str
    parameters: tuple[Parameter, ...]

    @property
    def held_out(self) -> bool:
        short = self.name.rpartition(".")[2]  # math.sin and cmath.sin stand on one side
        return int(hashlib.sha256(short.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT

    @property
    def tool(self) -> dict[str, Any]:
        """The function as it is shown to a model."""
        return {
            "name": self.name,
            "description": self.task[0].upper() + self.task[1:],
            "parameters": {
                "type": "object",
                "properties": {p.name: p.schema for p in self.parameters},
                "required": [p.name for p in self.parameters if p.required],
            },
        }


def _named_types() -> dict[str, str]:
    return {name: kind for kind, names in NAME_TYPES.items() for name in names.split()}


def _kind(module: str, parameter: inspect.Parameter, named: dict[str, str]) -> str | None:
    annotation, default = parameter.annotation, parameter.default
    plain = {bool: BOOLEAN, int: INTEGER, float: NUMBER, str: STRING}
    annotated = {"bool": BOOLEAN, "int": INTEGER, "float": NUMBER, "str": STRING}
    if annotation is not inspect.Parameter.empty:
        return plain.get(annotation) or annotated.get(str(annotation))
    if type(default) in plain:
        return plain[type(default)]
    own = MODULE_TYPES.get(module, {}).get(parameter.name)
    return own or named.get(parameter.name)


def _task(text: str) -> str | None:
    """The first sentence of a docstring as an imperative, or None when it is none."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    paragraph = re.sub(r"^\w+\([^)]*\)\s*(->\s*[\w\s]+?)?\s*[.:-]+\s*", "", paragraph)
    paragraph = re.sub(r"\s*\((?:e\.g|i\.e)\.[^)]*\)", "", paragraph)
    sentence = re.split(r"(?<=[a-z)\]'])[.;:](?:\s|$)", paragraph)[0].strip(" .").replace("``", "").replace("`", "")
    words = sentence.split(" ")
    if not 3 <= len(words) or len(sentence) > 110 or not sentence.isascii() or words[0].lower() not in VERBS:
        return None
    verb = words[0].lower()
    if verb.endswith("s") and verb[:-1] in VERBS and not verb.endswith("ss"):
        verb = verb[:-1]
    return " ".join([verb, *words[1:]])


def _describe(module: str, name: str, function: Any, named: dict[str, str], method: bool) -> Function | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    task = _task(inspect.getdoc(function) or "")
    if task is None:
        return None
    parameters = []
    for index, parameter in enumerate(signature.parameters.values()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        required = parameter.default is inspect.Parameter.empty
        if method and index == 0:
            parameters.append(Parameter("value", {"float": NUMBER, "int": INTEGER}.get(module, STRING), True))
            continue
        kind = _kind(module, parameter, named)
        if kind is None and required:
            return None
        if kind is not None and (required or len(parameters) < 3) and not parameter.name.startswith("_"):
            parameters.append(Parameter(parameter.name, kind, required))
    if not parameters or len(parameters) > 4 or not any(p.required for p in parameters):
        return None
    return Function(f"{module}.{name}", module, task, tuple(parameters))


@functools.cache
def library_functions() -> tuple[Function, ...]:
    """Every usable function of the standard library, sorted by name."""
    named = _named_types()
    found: dict[str, Function] = {}
    seen: set[Any] = set()
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            function = getattr(module, name, None)
            foreign = getattr(function, "__module__", module_name) not in (module_name, "_" + module_name, None)
            if name.startswith("_") or not inspect.isroutine(function) or (foreign and not hasattr(module, "__all__")):
                continue
            if function in seen:
                continue
            described = _describe(module_name, name, function, named, method=False)
            if described is not None:
                seen.add(function)
                found[described.name] = described
    for class_name in CLASSES:
        owner = vars(importlib.import_module("builtins"))[class_name]
        for name in sorted(vars(owner)):
            method = getattr(owner, name)
            if (
                name.startswith("_")
                or not inspect.ismethoddescriptor(vars(owner)[name])
                or hasattr(method, "__self__")  # a class method
            ):
                continue
            described = _describe(class_name, name, method, named, method=True)
            if described is not None:
                found[described.name] = described
    return tuple(found[name] for name in sorted(found))


def functions(split: str) -> tuple[Function, ...]:
    """The functions of a split: train, held_out or all."""
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split {split!r} must be train, held_out or all")
    return tuple(f for f in library_functions() if split == "all" or f.held_out == (split == "held_out"))


def functions_manifest() -> dict[str, Any]:
    """Python version, counts and content hash: belongs to every figure made with these functions."""
    text = json.dumps([function.tool for function in library_functions()], sort_keys=True)
    return {
        "python": platform.python_version(),
        "functions": len(library_functions()),
        "held_out": len(functions("held_out")),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
