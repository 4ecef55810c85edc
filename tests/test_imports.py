"""Imports point one way: from the command line down to the errors. The table below is the architecture."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import layer_surgery

ROOT = Path(layer_surgery.__file__).parent

#: Each package or module at the top may import only from rows below its own: this is the architecture.
LAYERS: list[tuple[str, ...]] = [
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("api",),
    ("runs",),
    ("reporting", "evaluation", "healing", "surgeon", "scoring"),  # the stages: they do not import each other
    ("calibration",),
    ("walk",),
    ("checkpoint",),
    ("data",),
    ("config",),
    ("linalg", "records", "vectors"),
    ("journal",),
    ("parallel",),
    ("disk", "machine", "progress", "registry"),
    ("devices",),
    ("errors",),
]
STAGES = next(names for names in LAYERS if "scoring" in names)
#: What knows torch and the standard library only, itself and all that it imports.
PURE = (
    "devices",
    "linalg.low_rank",
    "linalg.leading",
    "linalg.blockwise_nystrom",
    "linalg.least_squares",
    "linalg.nested_map",
    "linalg.symmetric",
    "vectors.losses",
    "vectors.relative",
    "vectors.storage",
    "vectors.unit",
    "walk.boundaries",
    "walk.gradients",
    "walk.moments",
)
#: What not even knows torch: the command line reads it before anything is imported that takes seconds.
LIGHT = (
    "config.__init__",
    "errors",
    "linalg.decomposition",
    "records.plan",
    "records.shown",
    "records.embedding",
    "records.surgery",
    "records.sweep",
    "registry",
    "progress",
    "cli.main",
)

FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """Return `walk`, `scoring.taylor`, `scoring.__init__`, `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def row(module: str) -> int:
    unit = module.partition(".")[0]
    rows = [number for number, names in enumerate(LAYERS) if unit in names]
    assert len(rows) == 1, f"'{unit}' is not in the table of layers; say where it belongs"
    return rows[0]


def imported(path: Path, *, at_the_top_only: bool = False) -> list[tuple[str, str]]:
    """Return (top-level package, dotted rest) of every import in a file, also those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in tree.body if at_the_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.partition(".")[::2]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; the package's style is absolute"
            top, _, rest = (node.module or "").partition(".")
            if top != "layer_surgery":
                found.append((top, rest))
                continue
            for alias in node.names:
                # `from layer_surgery.x import y`: y may be a module or a name in x.
                dotted = f"{rest}.{alias.name}" if rest else alias.name
                parts = dotted.split(".")
                is_module = (ROOT.joinpath(*parts).with_suffix(".py")).is_file() or ROOT.joinpath(*parts).is_dir()
                found.append((top, dotted if is_module else rest or "__init__"))
    return [(top, rest) for top, rest in found]


def import_graph() -> dict[str, set[str]]:
    """Return which modules each module imports when it is imported itself, packages as their `__init__`."""
    return {
        module_of(path): {
            f"{other}.__init__" if (ROOT.joinpath(*other.split(".")) / "__init__.py").is_file() else other
            for top, other in imported(path, at_the_top_only=True)
            if top == "layer_surgery"
        }
        for path in FILES
    }


def reached(module: str) -> set[str]:
    """Return the packages outside of ours that importing a module imports, directly or not."""
    graph, seen, todo = import_graph(), set[str](), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            # Importing a.b imports the package a first.
            packages = [f"{'.'.join(name.split('.')[:depth])}.__init__" for depth in range(1, name.count(".") + 1)]
            todo += [*graph[name], *(package for package in packages if package in graph)]
    paths = {module_of(path): path for path in FILES}
    return {top for name in seen for top, _ in imported(paths[name], at_the_top_only=True)} - {"layer_surgery"}


def internal(path: Path) -> list[str]:
    return [rest for top, rest in imported(path) if top == "layer_surgery"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    for other in internal(path):
        if other.partition(".")[0] != module.partition(".")[0]:
            assert row(other) > row(module), f"{module} must not import {other}"


def test_the_table_names_what_is_there() -> None:
    assert {name for names in LAYERS for name in names} == {module_of(path).partition(".")[0] for path in FILES}


def test_few_modules_are_at_the_top() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_there_are_no_import_cycles() -> None:
    # At the top of files only: what is imported inside a function is imported after both are there.
    graph = import_graph()
    assert graph["surgeon.grasp"] >= {"walk.gradients", "linalg.low_rank"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_command_line_and_reporting_know_the_terminal(path: Path) -> None:
    tops = {top for top, _ in imported(path)}
    if module_of(path).partition(".")[0] not in ("cli", "reporting"):
        assert not tops & {"click", "rich", "tqdm"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_reads_pickles(path: Path) -> None:
    assert not {top for top, _ in imported(path)} & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == "load":
            assert not (isinstance(node.value, ast.Name) and node.value.id in ("torch", "pickle")), "torch.load"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            assert not keywords & {"weights_only", "allow_pickle"}, f"line {node.lineno}"


def test_the_modelling_file_needs_torch_and_transformers_only() -> None:
    """It is copied beside checkpoints and must run where this package is not installed."""
    tops = {top for top, _ in imported(ROOT / "checkpoint" / "modeling_layer_surgery.py")}
    assert tops == {"__future__", "functools", "re", "typing", "torch", "transformers"}


@pytest.mark.parametrize("module", PURE)
def test_the_pure_core_reaches_torch_only(module: str) -> None:
    assert reached(module) - set(sys.stdlib_module_names) <= {"torch", "einops"}


@pytest.mark.parametrize("module", LIGHT)
def test_what_the_command_line_reads_first_does_not_reach_torch(module: str) -> None:
    assert not reached(module) & {"torch", "transformers", "lm_eval", "datasets", "pydantic", "matplotlib"}
