"""Imports point one way: what is light stays light, and no stage knows the stages after it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "slicer": ROOT / "slicer",
    "slicer.serve": ROOT / "serve",
    "slicer.benchmarks": ROOT / "benchmarks",
}

# Need nothing but the standard library, and nothing of slicer that does.
STDLIB_ONLY = {
    "slicer.errors",
    "slicer.progress",
    "slicer.plan",
    "slicer.plan.plan",
    "slicer.plan.records",
    "slicer.plan.amounts",
    "slicer.plan.blocks",
    "slicer.plan.choose",
    "slicer.checkpoint.architectures.rules",
    "slicer.checkpoint.architectures.vllm",
    "slicer.checkpoint.architectures.table",
    "slicer.checkpoint.config",
    "slicer.checkpoint.reader",
    "slicer.runtime.compat",
    "slicer.runtime.compute",
    "slicer.runtime.distributed",
    "slicer.runtime.files",
    "slicer.runtime.memory",
    "slicer.runtime.versions",
    "slicer.runtime.workdir",
    "slicer.checkpoint.blockwise",
    "slicer.checkpoint.sublayers",
}
# Importing these must stay instant: the heavy libraries come when a command needs them.
LIGHT = STDLIB_ONLY | {"slicer", "slicer.cli.main", "slicer.checkpoint.writer"}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "matplotlib",
    "peft",
    "bitsandbytes",
    "vllm",
    "lm_eval",
    "numpy",
}

# Which modules may import a library at all, now or later in a function (prefixes of module names).
ALLOWED = {
    "click": (
        "slicer.cli.main",
        "slicer.cli.heal",
        "slicer.cli.analyze",
        "slicer.cli.eval",
        "slicer.cli.sweep",
        "slicer.cli.serve",
        "slicer.cli.bench",
    ),
    "vllm": ("slicer.serve", "slicer.benchmarks"),
    "peft": ("slicer.heal", "slicer.model.adapter", "slicer.runtime.compat"),
    "bitsandbytes": ("slicer.heal", "slicer.model.adapter"),
    "lm_eval": ("slicer.runtime.compat", "slicer.data.sources"),
    "jinja2": ("slicer.report.page",),
    "matplotlib": ("slicer.judge", "slicer.benchmarks"),
}

# Come with a declared dependency for good, and may be imported without being declared.
TRANSITIVE = {
    "numpy": "transformers",
    "tokenizers": "transformers",
    "pyarrow": "datasets",
    "yaml": "transformers",
    "psutil": "accelerate",
}

# The rooms of the house, lowest floor first: a module imports its own floor and those below, never above.
FLOORS = (
    ("slicer.errors", "slicer.progress"),
    ("slicer.runtime",),
    (
        "slicer.plan",
        "slicer.checkpoint.architectures.rules",
        "slicer.checkpoint.architectures.vllm",
        "slicer.checkpoint.architectures.table",
        "slicer.checkpoint.config",
    ),
    ("slicer.checkpoint", "slicer.demo"),
    ("slicer.measure",),
    ("slicer.heal", "slicer.judge"),
    (
        "slicer.jobs.options",
        "slicer.jobs.materials",
        "slicer.jobs.repair",
        "slicer.jobs.trained",
        "slicer.jobs.output",
        "slicer.jobs.convert",
        "slicer.checkpoint.sizes",
        "slicer.serve",
    ),
    ("slicer.jobs.analyze", "slicer.jobs.analyze", "slicer.jobs.analyze"),
    ("slicer.benchmarks", "slicer.demo.show", "slicer.demo.train"),
    ("slicer.cli.render.written",),
    ("slicer.cli.render.layers", "slicer.cli.render.scores"),
    (
        "slicer.cli.heal",
        "slicer.cli.analyze",
        "slicer.cli.eval",
        "slicer.cli.sweep",
        "slicer.cli.serve",
        "slicer.cli.bench",
    ),
    ("slicer.cli.main",),
    ("slicer.__main__",),
)
# The only places that build a transformers model: everything else asks these, or works on the files.
BUILDERS = (
    "slicer.model.layers",
    "slicer.model.verify",
    "slicer.model.blockwise",
    "slicer.demo.train",
    "slicer.benchmarks",
)


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [part for part in file.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = file
    return found


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    """(imported module, at module level?) of every import statement; those for type checkers only left out."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    is_package = modules()[module].name == "__init__.py"
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child, top)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # a relative import: count the dots back from the package
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from slicer.checkpoint import reader` imports the module slicer.checkpoint.reader
            found.extend(
                (f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base, top)
                for alias in node.names
            )
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, True)
    return tuple(found)


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def floor(module: str) -> int | None:
    """Number of the floor the module lives on: that of the longest prefix listed; None for the bare package."""
    best = max(
        ((len(room), level) for level, rooms in enumerate(FLOORS) for room in rooms if within(module, room)),
        default=None,
    )
    return best[1] if best else None


def listed(names: set[str]) -> list[str]:
    return sorted(name for name in names if name in modules())


def test_every_module_has_a_floor() -> None:
    homeless = [module for module in modules() if module != "slicer" and floor(module) is None]
    assert not homeless, f"give these a floor in FLOORS: {homeless}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    own = floor(module)
    upward = [
        target
        for target, _ in imports(module)
        if own is not None
        and within(target, "slicer")
        and (above := floor(target)) is not None
        and above > own
    ]
    assert not upward, f"{module} imports from a later stage: {upward}"


def test_no_import_circles() -> None:
    """Also within a floor: no module reaches itself through module-level imports."""
    graph = {
        module: {
            target for target, top in imports(module) if top and target in modules() and target != module
        }
        for module in modules()
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for target in sorted(graph[module]):
                walk(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())


@pytest.mark.parametrize("module", listed(STDLIB_ONLY))
def test_stdlib_only(module: str) -> None:
    """At module level only; `reader` may reach for torch inside a function that needs it."""
    foreign = [
        target
        for target, top in imports(module)
        if top and not within(target, "slicer") and target.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not foreign, f"{module} must need only the standard library, and imports {foreign}"


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_library_stays_in_its_room(library: str) -> None:
    strays = [
        module
        for module in modules()
        if any(within(target, library) for target, _ in imports(module))
        and not any(within(module, room) for room in ALLOWED[library])
    ]
    assert not strays, f"{library} belongs in {', '.join(ALLOWED[library])}, and these import it: {strays}"


def test_the_core_imports_only_what_it_declares() -> None:
    """A library that merely happens to be installed here is missing on someone else's machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    known = declared | TRANSITIVE.keys() | ALLOWED.keys() | sys.stdlib_module_names | {"slicer"}
    undeclared = {
        f"{module}: {target}"
        for module in modules()
        if not module.startswith(("slicer.benchmarks", "slicer.serve", "slicer.heal", "slicer.demo.train"))
        for target, _ in imports(module)
        if target.split(".")[0] not in known
    }
    assert not undeclared, f"not a dependency of slicer-llm: {sorted(undeclared)}"


def test_models_are_built_in_one_place() -> None:
    def names(module: str) -> set[str]:
        nodes = ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8")))
        return {
            node.id if isinstance(node, ast.Name) else node.attr
            for node in nodes
            if isinstance(node, ast.Name | ast.Attribute)
        }

    strays = [
        module
        for module in modules()
        if any(name.startswith("AutoModel") for name in names(module))
        and not any(within(module, room) for room in BUILDERS)
    ]
    assert not strays, f"load models with slicer.model.load.load_model, not by hand: {strays}"


@pytest.mark.parametrize("name", ["serve", "benchmarks"])
def test_top_level_folders_are_imported_as_part_of_the_package(name: str) -> None:
    strays = [module for module in modules() if any(within(target, name) for target, _ in imports(module))]
    assert not strays, f"import slicer.{name}, not {name}: {strays}"


def test_light_modules_load_nothing_heavy() -> None:
    """In one fresh interpreter, import by import, so that the culprit is named."""
    code = (
        "import importlib, sys\n"
        f"for name in {listed(LIGHT)!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "    if heavy: sys.exit(f'importing {name} loads {heavy}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_loads_nothing_heavy() -> None:
    """What keeps `slicer --help` under a second."""
    code = (
        "import sys; sys.argv = ['slicer', '--help']\n"
        "from slicer.cli.main.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r}); assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: slicer" in result.stdout
