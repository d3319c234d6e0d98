"""The floors of the package: imports run downwards only."""

import ast
from pathlib import Path

import mapet

SOURCE = Path(mapet.__file__).parent

# From the top. A package imports from floors below its own, not from its neighbours.
FLOORS = """
cli
jobs-made-of-jobs
jobs
targets probes
report
inference
engine
objectives
tokenizers tokenstore
data models
config
errors
"""
FLOOR_OF = {name: number for number, names in enumerate(FLOORS.strip().splitlines()) for name in names.split()}
MADE_OF_JOBS = {"compare", "demo"}


def place_of(module: str) -> tuple[str, str]:
    """Return the floor's package of a module ``mapet.A.B.C``, and the folder that may import from itself."""
    package, job, *_ = [*module.split(".")[1:], "", ""]
    if package != "jobs":
        return package, package
    return "jobs-made-of-jobs" if job in MADE_OF_JOBS else "jobs", f"jobs/{job}"


def imported_modules(file: Path) -> set[str]:
    """Return the modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names - {"mapet.__version__"}
    return {module for module in found if module.startswith("mapet.")}


def test_every_package_has_a_floor() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(FLOOR_OF) - {"errors", "jobs-made-of-jobs"}


def test_imports_run_downwards() -> None:
    wrong = []
    for file in SOURCE.glob("*/**/*.py"):
        module = ".".join(["mapet", *file.relative_to(SOURCE).with_suffix("").parts])
        package, folder = place_of(module)
        for other in imported_modules(file):
            its_package, its_folder = place_of(other)
            if its_folder != folder and FLOOR_OF[its_package] <= FLOOR_OF[package]:
                wrong.append(f"{module} imports {other}")
    assert not wrong
