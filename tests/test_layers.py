"""Imports run downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import mapet

SOURCE = Path(mapet.__file__).parent

# A package may import from the ones below its line, never from its own line's others or from above.
LAYERS = [
    {"cli"},
    {"jobs"},
    {"targets", "probes", "report"},
    {"inference"},
    {"engine"},
    {"objectives"},
    {"tokenizers", "tokenstore"},
    {"data", "models"},
    {"config"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_packages(file: Path) -> set[str]:
    """Names of the packages of ours that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules = [node.module or ""]
            if node.module == "mapet":
                modules = [f"mapet.{alias.name}" for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found |= {module.split(".")[1] for module in modules if module.startswith("mapet.")}
    return found


def test_every_package_has_a_layer() -> None:
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert packages == set(LEVEL) - {"errors"}


def test_imports_run_downwards() -> None:
    wrong = []
    for file in SOURCE.rglob("*.py"):
        package = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package not in LEVEL:
            continue  # the package's own __init__ and __main__ gather from everywhere
        for other in imported_packages(file) - {package}:
            if LEVEL[other] <= LEVEL[package]:
                wrong.append(f"{file.relative_to(SOURCE)} imports {other}")
    assert not wrong
