"""The house's rules about imports, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "stagewise"
FLOORS = (
    ("modeling", "recipe"),
    ("tokenizer", "data"),
    ("evaluation",),
    ("calibration",),
    ("training",),
    ("specialist",),
    ("hub",),
    ("report",),
    ("serving",),
    ("quickstart",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
EXTRAS = (
    "accelerate datasets datatrove fastapi jiter jsonschema llguidance lm_eval matplotlib pandas prometheus_client "
    "pyarrow ray scipy sklearn sse_starlette tensorboard trackio uvicorn wandb zstandard"
).split()
MODULES = sorted(SOURCE.rglob("*.py"))


def dotted_name(path: Path) -> str:
    """The import name of a source file."""
    parts = ("stagewise", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path, nodes=None) -> set[str]:
    """Absolute names of the modules (and of names that may be modules) that a file imports, anywhere in it."""
    package = dotted_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    names: set[str] = set()
    for node in nodes if nodes is not None else ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return names


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "stagewise" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=dotted_name)
def test_a_room_imports_only_rooms_on_lower_floors(path):
    room = room_of(dotted_name(path))
    if room is None:  # the package itself: its public names are those of modeling
        rooms = {room_of(name) for name in imported_by(path)} - {None, "__version__"}
        assert rooms <= {"modeling"}
        return
    assert room in FLOOR, f"{room} has no floor"
    for name in imported_by(path):
        other = room_of(name)
        if other in FLOOR and other != room:
            assert FLOOR[other] < FLOOR[room], f"{path.name} imports {name}, which is not below {room}"


def test_no_room_is_called_utils():
    assert not [path for path in MODULES if "util" in path.stem]


def test_modules_of_a_room_import_each_other_without_circles():
    graph = {}
    for path in MODULES:
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        graph[dotted_name(path)] = imported_by(path, top_level)
    names = set(graph)
    edges = {
        name: {other for other in imported & names if other != name and not name.startswith(f"{other}.")}
        for name, imported in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("path", sorted((SOURCE / "modeling").glob("*.py")), ids=lambda path: path.name)
def test_modeling_files_can_travel_alone(path):
    """transformers refuses remote code whose imports are not installed, those inside functions included."""
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "tiktoken", "tokenizers"}
    allowed |= set(sys.stdlib_module_names)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"line {node.lineno}: a sibling is imported as `from .name`"
            assert not node.level or "." not in (node.module or ""), f"line {node.lineno}: no folders below modeling"
            roots = set() if node.level else {str(node.module).split(".")[0]}
        else:
            continue
        assert roots <= allowed, f"line {node.lineno} imports {sorted(roots - allowed)}"


@pytest.fixture(scope="module")
def bare_process():
    """A process with every optional library hidden: imports stagewise, then each module; says what AutoModel knows."""
    names = [dotted_name(path) for path in MODULES if path.stem != "__main__"]
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
        "import stagewise, transformers\n"
        "config = transformers.AutoConfig.for_model('cognica_poe')\n"
        "print(type(config) is stagewise.PoEConfig)\n"
        "print(transformers.AutoModelForCausalLM._model_mapping[type(config)] is stagewise.PoEForCausalLM)\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_auto_classes_know_the_model_once_stagewise_is_imported(bare_process):
    assert bare_process.stdout.split()[:2] == ["True", "True"], bare_process.stderr[-2000:]


def test_every_module_imports_without_any_extra(bare_process):
    assert bare_process.returncode == 0, bare_process.stderr[-2000:]


def test_public_names_are_those_promised():
    import stagewise

    assert set(stagewise.__all__) == {"PoEConfig", "PoEForCausalLM", "PoETokenizer", "load", "load_tokenizer"}
    assert all(getattr(stagewise, name) is not None for name in stagewise.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = stagewise.no_such_name
