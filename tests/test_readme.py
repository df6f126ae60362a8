"""The README's tree names every source file, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS_FROM = 37  # the column where the description begins
PACKAGES = ("vjepa", "data_pipeline", "evals", "launch")


def listed() -> set[str]:
    """The files of the tree: indented names are below the last package; several names may share a line."""
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree", 1)[1].split("```")[1]
    package, found = "", set()
    for line in tree.strip().splitlines():
        names = re.findall(r"\S+\.py\b", line[:WORDS_FROM])
        if match := re.match(r"(\w+)/\s", line):
            package = match[1]
        folder = ""
        for name in names:
            folder = str(Path(name).parent) if "/" in name else folder
            found.add(str(Path(package, folder, Path(name).name)))
    return found


def test_the_tree_names_every_source_file_and_no_other() -> None:
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed() == there
