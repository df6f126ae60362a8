"""Who may import whom (DESIGN section 3), read off the source of every file."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOORS_FOR_EVALS = ("decode", "clips", "transforms", "shards")
ALLOWED = {
    "vjepa": ("vjepa",),
    "data_pipeline": ("data_pipeline",),
    "evals": ("evals", "vjepa", *(f"data_pipeline.{door}" for door in DOORS_FOR_EVALS)),
    "launch": ("launch", "evals", "vjepa", "data_pipeline"),
}


def source_files(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported_names(source: str, parents: tuple[str, ...]) -> Iterator[str]:
    """Every dotted name that a file imports, inside functions too; `parents` is the package the file lies in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parents[: len(parents) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden_imports(package: str, source: str, parents: tuple[str, ...]) -> list[str]:
    """The names of ours that a file of `package` imports and may not."""
    ours = [name for name in imported_names(source, parents) if name.split(".")[0] in ALLOWED | {"tests": ()}]
    return [name for name in ours if not any(f"{name}.".startswith(f"{door}.") for door in ALLOWED[package])]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_its_room_allows(package: str) -> None:
    files = source_files(package)
    assert files, f"{package}/ holds no Python file: the test would check nothing"
    wrong = {}
    for path in files:
        parents = path.relative_to(REPOSITORY).parent.parts
        if found := forbidden_imports(package, path.read_text(), parents):
            wrong[str(path.relative_to(REPOSITORY))] = found
    assert not wrong, f"{package} may import of ours only {ALLOWED[package]}: {wrong}"


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("vjepa", "import data_pipeline"),
        ("vjepa", "def late():\n    from launch.report import build_report"),
        ("data_pipeline", "from vjepa.batch import Batch"),
        ("evals", "from data_pipeline.loader import build_loader"),
        ("evals", "from data_pipeline import loader"),
        ("evals", "from ..launch import train"),
        ("launch", "import tests.conftest"),
    ],
)
def test_a_forbidden_import_is_found(package: str, source: str) -> None:
    assert forbidden_imports(package, source, (package,))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("evals", "from data_pipeline.decode import open_video"),
        ("evals", "from data_pipeline import decode"),
        ("vjepa", "from .nn import rope\nimport torch"),
        ("launch", "import evals.visualize, data_pipeline.loader"),
    ],
)
def test_an_allowed_import_passes(package: str, source: str) -> None:
    assert not forbidden_imports(package, source, (package,))


def test_no_name_in_launch_hides_another_module() -> None:
    """`python launch/submit.py` puts launch/ first on sys.path: launch/types.py would break the whole process."""
    names = {path.stem for path in (REPOSITORY / "launch").iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__"}
    others = set(sys.stdlib_module_names) | set(packages_distributions()) | (set(ALLOWED) - {"launch"})
    assert names, "launch/ holds nothing: the test would check nothing"
    assert not names & others, f"rename these in launch/: {sorted(names & others)}"
