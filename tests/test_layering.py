"""The order of the folders: imports only go down, there is no import cycle, and libraries stay in their folders.

Every import counts: at the top, inside functions and under TYPE_CHECKING. docs/architecture.md explains the order.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"slicer": ROOT / "slicer", "slicer.serve": ROOT / "serve", "slicer.benchmarks": ROOT / "benchmarks"}

# The order, lowest first. A folder imports itself and lower ones; folders on one line do not import each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "progress"),
    ("plan",),
    ("runtime",),
    ("checkpoint",),
    ("data", "model"),
    ("measure",),
    ("heal",),
    ("evaluate",),
    ("figures",),
    ("jobs",),
    ("sweep",),
    ("report",),
    ("serve",),
    ("benchmarks",),
    ("demo",),
    ("cli",),
)
# Imports that the order would allow, but that are forbidden.
FORBIDDEN = (("heal", "measure"), ("figures", "evaluate"))
# Which modules may import a library, at the top or inside functions.
USERS = {
    "click": ("slicer.cli",),
    "rich": ("slicer.cli",),
    "torch": (
        "slicer.runtime",
        "slicer.checkpoint",
        "slicer.data",
        "slicer.model",
        "slicer.measure",
        "slicer.heal",
        "slicer.evaluate",
        "slicer.jobs",
        "slicer.sweep",
        "slicer.serve",
        "slicer.benchmarks",
        "slicer.demo",
    ),
    "datasets": ("slicer.data",),
    "vllm": ("slicer.serve", "slicer.benchmarks"),
    "peft": ("slicer.heal.finetune", "slicer.model.adapter", "slicer.runtime.compat"),
    "lm_eval": ("slicer.runtime.compat", "slicer.data.sources"),
    "jinja2": ("slicer.report.page",),
    "matplotlib": ("slicer.figures",),
}
# Need only the standard library when they are imported.
STDLIB_ONLY = ("slicer.errors", "slicer.progress", "slicer.plan", "slicer.runtime", "slicer.checkpoint")
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "peft", "bitsandbytes", "vllm", "lm_eval", "numpy"}
# Come with a declared dependency for good, and may be imported without being declared.
TRANSITIVE = {
    "numpy": "transformers",
    "tokenizers": "transformers",
    "pyarrow": "datasets",
    "yaml": "transformers",
    "psutil": "accelerate",
}
# The only places that build a transformers model: everything else asks these, or works on the files.
BUILDERS = ("slicer.model.load", "slicer.model.verify", "slicer.model.blockwise", "slicer.benchmarks")


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [part for part in file.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = file
    return found


def parsed(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    """(imported module, does it run when `module` is imported?) of every import statement, wherever it stands."""
    found: list[tuple[str, bool]] = []
    is_package = modules()[module].name == "__init__.py"

    def visit(node: ast.AST, top: bool) -> None:
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
                (f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base, top) for alias in node.names
            )
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not typing_only and not function)

    visit(parsed(module), True)
    return tuple(found)


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def folder_of(module: str) -> str:
    """The folder that a module lies in; of a file at the root its own name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def position(folder: str) -> int | None:
    return next((level for level, folders in enumerate(ORDER) if folder in folders), None)


def arrows() -> list[tuple[str, str]]:
    """(module, module it imports), both of the package."""
    return [
        (module, target)
        for module in modules()
        for target, _ in imports(module)
        if target in modules() and target != module
    ]


def test_every_folder_is_in_the_order() -> None:
    missing = {folder_of(m) for m in modules() if position(folder_of(m)) is None} - {"", "__main__"}
    assert not missing, f"add these to ORDER, or move them into a folder: {sorted(missing)}"


def test_imports_point_down() -> None:
    upward = [
        f"{a} -> {b}"
        for a, b in arrows()
        if (own := position(folder_of(a))) is not None
        and folder_of(a) != folder_of(b)
        and ((other := position(folder_of(b))) is None or other >= own)
    ]
    assert not upward, "imports of a later stage:\n" + "\n".join(upward)
    sideways = [f"{a} -> {b}" for a, b in arrows() if (folder_of(a), folder_of(b)) in FORBIDDEN]
    assert not sideways, "forbidden imports:\n" + "\n".join(sideways)


def test_nobody_imports_the_package_itself() -> None:
    """`slicer/__init__.py` hands names out to users; the package imports its modules."""
    users = [module for module in modules() if any(target == "slicer" for target, _ in imports(module))]
    assert not users, f"import from the module that has the name, not from slicer: {users}"


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for a, b in arrows():
        graph[a].add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_imports_inside_functions_and_for_types_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself: an upward import is found wherever it hides."""
    for hidden in (
        "def f():\n    from slicer.cli import main\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from slicer.cli.main import main\n",
        "class A:\n    def f(self):\n        import slicer.cli.main\n",
        "try:\n    from slicer.cli import main\nexcept ImportError: pass\n",
    ):
        (tmp_path / "hidden.py").write_text(hidden)
        monkeypatch.setitem(modules(), "slicer.plan.hidden", tmp_path / "hidden.py")
        imports.cache_clear()
        try:
            with pytest.raises(AssertionError, match=r"slicer\.plan\.hidden -> slicer\.cli\.main"):
                test_imports_point_down()
        finally:
            del modules()["slicer.plan.hidden"]
            imports.cache_clear()


def test_no_name_in_these_lists_is_stale() -> None:
    folders = {folder_of(module) for module in modules()}
    listed = {folder for folders_ in ORDER for folder in folders_} | {f for pair in FORBIDDEN for f in pair}
    assert listed <= folders, f"no such folder: {sorted(listed - folders)}"
    for library, allowed in USERS.items():
        for place in allowed:
            users = [m for m in modules() if within(m, place) and any(within(t, library) for t, _ in imports(m))]
            assert users, f"USERS[{library!r}] names {place}, where nothing imports it"
    named = {*STDLIB_ONLY, *BUILDERS}
    assert all(any(within(module, name) for module in modules()) for name in named), named


@pytest.mark.parametrize("library", sorted(USERS))
def test_a_library_stays_in_its_folders(library: str) -> None:
    strays = [
        module
        for module in modules()
        if any(within(target, library) for target, _ in imports(module))
        and not any(within(module, place) for place in USERS[library])
    ]
    assert not strays, f"{library} belongs in {', '.join(USERS[library])}, and these import it: {strays}"


def test_the_lower_folders_need_only_the_standard_library() -> None:
    foreign = [
        f"{module}: {target}"
        for module in modules()
        if any(within(module, place) for place in STDLIB_ONLY)
        for target, top in imports(module)
        if top and not within(target, "slicer") and target.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not foreign, f"import these inside the functions that need them: {foreign}"


def test_the_core_imports_only_what_it_declares() -> None:
    """A library that merely happens to be installed here is missing on someone else's machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    known = declared | TRANSITIVE.keys() | USERS.keys() | sys.stdlib_module_names | {"slicer"}
    undeclared = {
        f"{module}: {target}"
        for module in modules()
        if not module.startswith(("slicer.benchmarks", "slicer.serve", "slicer.heal"))
        for target, _ in imports(module)
        if target.split(".")[0] not in known
    }
    assert not undeclared, f"not a dependency of slicer-llm: {sorted(undeclared)}"


def test_models_are_built_in_one_place() -> None:
    def names(module: str) -> set[str]:
        return {
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(parsed(module))
            if isinstance(node, ast.Name | ast.Attribute)
        }

    strays = [
        module
        for module in modules()
        if any(name.startswith("AutoModel") for name in names(module))
        and not any(within(module, place) for place in BUILDERS)
    ]
    assert not strays, f"load models with slicer.model.load.load_model, not by hand: {strays}"


@pytest.mark.parametrize("name", ["serve", "benchmarks"])
def test_top_level_folders_are_imported_as_part_of_the_package(name: str) -> None:
    strays = [module for module in modules() if any(within(target, name) for target, _ in imports(module))]
    assert not strays, f"import slicer.{name}, not {name}: {strays}"


def test_no_private_name_crosses_files() -> None:
    strays = [
        f"{module}: {alias.name}"
        for module in modules()
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slicer")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not strays, f"a helper of one file is private to it: {strays}"


def test_no_file_is_too_long_to_be_read_alone() -> None:
    long = {m: n for m, file in modules().items() if (n := len(file.read_text("utf-8").splitlines())) > 450}
    assert not long, f"more than 450 lines: {long}"


def test_light_modules_load_nothing_heavy() -> None:
    """In one fresh interpreter, import by import, so that the culprit is named."""
    light = [m for m in modules() if any(within(m, place) for place in STDLIB_ONLY)] + ["slicer", "slicer.cli.main"]
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "    if heavy: sys.exit(f'importing {name} loads {heavy}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_loads_nothing_heavy() -> None:
    """What keeps `slicer --help` instant."""
    code = (
        "import sys; sys.argv = ['slicer', '--help']\n"
        "from slicer.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r}); assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: slicer" in result.stdout
