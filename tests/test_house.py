"""The house rules that a machine can check: layers, names, docstrings, what the README says, what the import costs."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import DEADLINE, ROOT, Child, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

# Arrows point down only. A module that is not here fails: give it its place first.
LAYERS = (
    ("errors", "states", "clock"),
    (
        *("serialization", "exceptions", "bell", "marks", "liveness", "termination"),
        *("filesystem", "schema", "forking", "groupcommit", "connection", "manyrows"),
        *("backend", "waiting", "futures", "results", "groups"),
    ),
    ("core", "tasks", "grouprows", "upkeep", "store"),
    ("worker", "fingerprints", "batch", "runner"),
    ("__init__",),
    ("cli", "commands", "doctor", "tables", "celery_backend", "testing", "report"),
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}

SLOW_IMPORTS = ("celery", "click", "hypothesis", "rich", "sqlite_utils")


def package_directory() -> Path:
    """Return where `liteerresult` is imported from: the checkout, or where a wheel was installed."""
    spec = importlib.util.find_spec("liteerresult")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


PACKAGE = package_directory()
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
each_module = pytest.mark.parametrize("module", sorted(FILES))


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"), str(FILES[module]))


def own_module(dotted: str, names: list[str]) -> Iterator[str]:
    """Yield the modules meant by ``from liteerresult.<dotted> import <names>``."""
    if dotted:
        yield dotted
    else:
        yield from (name if name in FILES else "__init__" for name in names)


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of this package that *tree* imports: at the top, inside functions, for types, by name."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(level=1, module=module, names=names):
                yield from own_module(module or "", [alias.name for alias in names])
            case ast.ImportFrom(level=0, module=str(module), names=names) if module.split(".")[0] == "liteerresult":
                yield from own_module(module.partition(".")[2], [alias.name for alias in names])
            case ast.Import(names=names):
                for alias in names:
                    root, _, rest = alias.name.partition(".")
                    if root == "liteerresult":
                        yield rest or "__init__"
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ) if name.lstrip(".").removeprefix("liteerresult.") in FILES:
                yield name.lstrip(".").removeprefix("liteerresult.")


@each_module
def test_a_module_has_a_place_and_imports_nothing_above_it(module: str) -> None:
    assert module in LEVEL, f"{module} has no place in LAYERS"
    above = {name for name in imports_of(tree_of(module)) if LEVEL.get(name, len(LAYERS)) > LEVEL[module]}
    assert not above, f"{module} imports upward: {sorted(above)}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: set(imports_of(tree_of(module))) - {module} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from liteerresult.store import ResultStore", ["store"]),
        ("from .store import ResultStore", ["store"]),
        ("import liteerresult.store as x", ["store"]),
        ("def f():\n    from liteerresult.store import ResultStore", ["store"]),
        ("if TYPE_CHECKING:\n    from .store import ResultStore", ["store"]),
        ("from liteerresult import errors, ResultStore", ["errors", "__init__"]),
        ("importlib.import_module('liteerresult.errors')", ["errors"]),
        ("import store", []),
    ],
)
def test_imports_are_seen_in_every_form(source: str, found: list[str]) -> None:
    assert list(imports_of(ast.parse(source))) == found


def public_definitions(
    tree: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Yield the public functions and classes of a module, and the public methods of those classes."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if not name.startswith("_"):
                yield prefix + name, node
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield prefix + name, node
                yield from public_definitions(node, f"{prefix}{name}.")


def has_no_place_for_a_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Tell whether *node* is an overload or the setter of a property: the other half has the docstring."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(text.split(".")[-1] in {"overload", "setter", "deleter"} for text in decorators)


@each_module
def test_every_public_definition_has_a_docstring(module: str) -> None:
    tree = tree_of(module)
    missing = [
        name
        for name, node in public_definitions(tree)
        if ast.get_docstring(node) is None and not has_no_place_for_a_docstring(node)
    ]
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert not missing


def bound_names(tree: ast.Module) -> set[str]:
    """Return the names that a module binds at its top level."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=asname):
                found.add(asname or name)
    return found


def exported(tree: ast.Module) -> list[str] | None:
    """Return the module's ``__all__``, or None."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return [str(name) for name in ast.literal_eval(value)]
    return None


@each_module
def test_a_module_with_public_names_lists_them(module: str) -> None:
    tree = tree_of(module)
    names = exported(tree)
    if names is None:
        assert not list(public_definitions(tree)), f"{module} has public names and no __all__"
    else:
        assert len(names) == len(set(names))
        assert set(names) <= bound_names(tree)


def test_every_name_of_the_package_exists() -> None:
    package = importlib.import_module("liteerresult")
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_the_import_loads_nothing_slow() -> None:
    loaded = run_python("import sys, liteerresult; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "liteerresult" in loaded
    assert sorted(set(SLOW_IMPORTS) & set(loaded)) == []


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.import_module("liteerresult").__version__ == project["version"]


def test_the_schema_at_the_top_is_the_one_in_the_package() -> None:
    assert (ROOT / "schema.sql").read_bytes() == (PACKAGE / "schema.sql").read_bytes()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """Return the README's code blocks in *language*."""
    return re.findall(rf"^```{language}\n(.*?)^```$", readme(), re.DOTALL | re.MULTILINE)


def test_the_first_python_block_of_the_readme_runs(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(fenced("python")[0], encoding="utf-8")
    with Child(script, cwd=tmp_path) as child:
        assert child.wait(DEADLINE) == 0, child.report()


def test_every_python_block_of_the_readme_is_python() -> None:
    for block in fenced("python"):
        compile(block, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_the_readme_gives_one_command(heading: str) -> None:
    assert re.search(rf"^## {heading}\n\n?```sh\n[^\n]+\n```$", readme(), re.MULTILINE)


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command under *group* with the words that call it."""
    import click

    for name, command in group.commands.items():
        words = f"{path} {name}"
        yield words, command
        if isinstance(command, click.Group):
            yield from commands(command, words)


def all_commands() -> list[tuple[str, click.Command]]:
    import click

    main = importlib.import_module("liteerresult.cli").main
    assert isinstance(main, click.Group)
    found = list(commands(main, "liteerresult"))
    assert found
    return found


def mentions(words: str, text: str) -> bool:
    return re.search(rf"{re.escape(words)}(?![\w-])", text) is not None


def test_every_command_has_help_with_an_example() -> None:
    lacking = [words for words, command in all_commands() if not mentions(words, f"{command.help}\n{command.epilog}")]
    assert lacking == [], "their help shows no call of theirs"


def test_every_command_is_documented() -> None:
    page = ROOT / "docs" / "cli.md"
    text = readme() + (page.read_text(encoding="utf-8") if page.exists() else "")
    assert [words for words, _ in all_commands() if not mentions(words, text)] == []


def repository_files() -> list[Path]:
    """Return the files that are, or without further ado would be, committed."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip(f"git can't read the checkout: {listing.stderr}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


# In pieces, so that this file does not match.
MACHINE_PATH = re.compile(rb"(?<![\w.])/(?:ro" + rb"ot|wo" + rb"rk)/|/tmp/" + rb"v\d")


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = {
        str(path.relative_to(ROOT)): match.group().decode()
        for path in repository_files()
        if (match := MACHINE_PATH.search(path.read_bytes()))
    }
    assert found == {}


@pytest.mark.parametrize("text", [b"cd /ro" + b"ot/x", b"'/wo" + b"rk/y'", b"/tmp/" + b"v3.11/bin"])
def test_a_machine_path_is_seen(text: bytes) -> None:
    assert MACHINE_PATH.search(text)
