"""Imports point one way: from the command line down to the errors. The table below is the architecture."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import layer_surgery

ROOT = Path(layer_surgery.__file__).parent

#: Each module may import only from rows below its own. A package name stands for everything in it.
LAYERS: list[tuple[str, ...]] = [
    ("cli",),
    ("cli_sweep",),
    ("cli_evaluation", "cli_export", "cli_options", "cli_report"),
    ("cli_common",),
    ("__init__",),
    ("api",),
    ("options", "sweeping"),
    ("export", "pipeline", "standalone"),
    ("compression", "publishing"),
    ("run_records",),
    ("evaluator",),
    ("operation",),
    ("session",),
    # The stages. They do not import each other, save for the exceptions below.
    ("scoring", "surgeon", "evaluation", "data", "reporting", "saving", "operated"),
    ("statistics_cache",),
    ("statistics",),
    ("couplings",),
    ("selfcheck", "walk"),
    ("rehearsal",),
    ("streaming",),
    ("checkpoint",),
    ("factors", "moments"),
    ("admission", "low_rank", "recognition", "skeleton"),
    ("conversion",),
    (
        "architectures",
        "boundaries",
        "gradients",
        "least_squares",
        "layer_config",
        "modeling_layer_surgery",
        "origin",
        "registry",
        "spectra",
        "stored_report",
        "stored_sweep",
        "tensors",
        "tokens",
    ),
    ("allocator", "config", "provenance", "stored", "sweep_records"),
    ("records",),
    ("errors",),
]
STAGES = next(names for names in LAYERS if "scoring" in names)

#: (importer, imported) within one row: saving reads the nested configuration.
EXCEPTIONS = {("saving", "operated")}

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


def internal(path: Path) -> list[str]:
    return [rest for top, rest in imported(path) if top == "layer_surgery"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    for other in internal(path):
        same_package = other.partition(".")[0] == module.partition(".")[0]
        if same_package or (module, other) in EXCEPTIONS:
            continue
        assert row(other) > row(module), f"{module} must not import {other}"


def test_every_module_is_in_the_table() -> None:
    for path in FILES:
        row(module_of(path))


def test_the_table_names_nothing_that_is_gone() -> None:
    units = {module_of(path).partition(".")[0] for path in FILES}
    assert {name for names in LAYERS for name in names} == units


def test_stages_do_not_import_each_other() -> None:
    crossings = {
        (module_of(path), other)
        for path in FILES
        for other in internal(path)
        if module_of(path).partition(".")[0] in STAGES
        and other.partition(".")[0] in STAGES
        and module_of(path).partition(".")[0] != other.partition(".")[0]
    }
    assert crossings <= EXCEPTIONS


def test_there_are_no_import_cycles() -> None:
    # At the top of files only: what is imported inside a function is imported after both are there.
    graph = {
        module_of(path): {
            f"{other}.__init__" if (ROOT.joinpath(*other.split(".")) / "__init__.py").is_file() else other
            for top, other in imported(path, at_the_top_only=True)
            if top == "layer_surgery"
        }
        for path in FILES
    }
    assert graph["surgeon.grasp"] >= {"gradients", "low_rank", "factors"}
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
    if module_of(path).partition(".")[0] not in ("cli", "reporting") and not module_of(path).startswith("cli_"):
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
    tops = {top for top, _ in imported(ROOT / "modeling_layer_surgery.py")}
    assert tops == {"__future__", "functools", "typing", "torch", "transformers"}


@pytest.mark.parametrize("name", ["low_rank.py", "boundaries.py", "gradients.py", "moments.py"])
def test_the_pure_core_does_not_know_transformers(name: str) -> None:
    assert "transformers" not in {top for top, _ in imported(ROOT / name)}
