"""The documentation: links that resolve, a list of files that is complete, options that exist, dated experiments."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from slicer.cli.groups import OLD_NAMES
from slicer.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md", ROOT / "slicer" / "demo" / "README.md"]
)
GUIDES = [ROOT / "README.md", *sorted((DOCS / "guide").glob("*.md"))]
# Options in the guides that belong to other programs: pip, accelerate, torchrun, vLLM, lm_eval.
FOREIGN = {
    "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port",
    "--config_file", "--nproc-per-node", "--include_path", "--max-model-len", "--tensor-parallel-size", "--start",
}  # fmt: skip


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub names the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken, f"{named(page)} has links to nothing: {broken}"


def test_code_names_pages_that_exist() -> None:
    files = [f for folder in ("slicer", "serve", "benchmarks", "tests") for f in (ROOT / folder).rglob("*.py")]
    broken = {
        f"{named(file)}: {name}"
        for file in files
        for name in re.findall(r"docs/[\w/]+\.md", file.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert not broken, f"these name pages that do not exist: {sorted(broken)}"


@pytest.mark.parametrize("page", sorted((DOCS / "experiments").glob("*.md")), ids=named)
def test_experiments_are_dated(page: Path) -> None:
    """Each section with a table of figures gives the day, the commit and the command, or the lack of one."""
    if page.name == "README.md":
        return
    text = page.read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:] or [text]
    missing = [
        section.splitlines()[0]
        for section in sections
        if not re.search(r"^Recorded \d{4}-\d\d-\d\d, commits? `[0-9a-f]{7}`", section, flags=re.MULTILINE)
        or not re.search(r"Commands?\b|\$ slicer|[Nn]ot\s+reproducible|Read from", section)
    ]
    assert not missing, f"{named(page)}: no date, commit or command in {missing}"


def test_the_list_of_files_is_complete() -> None:
    listed, folders = set(), [""]
    tree = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Files\n\n```\n")[2].partition("```")[0]
    for line in tree.splitlines():
        level, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[level + 1 :] = [folders[level] + name]
        if name.endswith(".py"):
            listed.add(folders[level] + name)
    found = {
        named(file)
        for folder in ("slicer", "serve", "benchmarks", "examples")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "__init__.py" or file.parent == ROOT / "slicer"
    }
    assert listed == found, f"docs/architecture.md lacks {found - listed} and lists {listed - found}"


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_options_exist(page: Path) -> None:
    known = set(re.findall(r"--[a-z][\w-]+", (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")))
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8")))
    assert not used - known - FOREIGN, f"{named(page)} uses options that no command has: {used - known - FOREIGN}"


def commands(page: Path) -> list[str]:
    """The command lines of slicer in the code blocks of a page; "..." stands for what is left out."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\$ |-m )slicer ((?!-).+)", line) for line in lines if not line.startswith("#")]
    return [match[1] for match in found if match and "..." not in match[1]]


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_commands_are_understood(page: Path) -> None:
    """Every command in a code block is one that the command line takes, by present names."""
    for line in commands(page):
        name, *words = shlex.split(line, comments=True)
        found = main.commands[name]
        old = [word for word in words if word in OLD_NAMES and word not in {o for p in found.params for o in p.opts}]
        assert not old, f"{named(page)}: slicer {line}"
        try:
            found.make_context(name, words)
        except click.UsageError as error:
            pytest.fail(f"{named(page)}: slicer {line}: {error.format_message()}")


def test_the_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in GUIDES) > 40
