"""The house: imports point down only, and every package says what lives in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; those on one floor do not see each other.
FLOORS = (
    ("networks", "utils.core"),
    ("utils.data", "utils.config"),
    ("utils.compute",),
    ("utils.experts",),
    ("utils.methods", "utils.measure"),
    ("utils.options", "utils.run"),
    ("utils.plan",),
    ("buffer", "distill_att", "eval"),
    ("scripts",),
)
PLACES = {place: floor for floor, places in enumerate(FLOORS) for place in places}


def sources() -> list[Path]:
    folders = ("networks", "utils", "scripts")
    files = [ROOT / f"{script}.py" for script in FLOORS[-2]]
    return files + [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def place_of(module: str) -> str | None:
    """The package or script that `module` belongs to; None where it is not of this repository."""
    found = [place for place in PLACES if module == place or module.startswith(f"{place}.")]
    return max(found, key=len, default=None)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also within its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = place_of(module_of(path))
    if own is None:  # utils/__init__.py itself
        return
    for module in imported(path):
        place = place_of(module)
        if place not in (None, own):
            assert PLACES[place] < PLACES[own], f"{module_of(path)} imports {module}"


def test_only_ranks_knows_torch_distributed():
    users = [
        module_of(path)
        for path in sources()
        if any(module.startswith("torch.distributed") for module in imported(path))
    ]
    assert users == ["utils.core.ranks"]


def test_packages_say_what_lives_in_them():
    for path in [*(ROOT / "utils").rglob("__init__.py"), *(ROOT / "scripts").rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_utils_holds_packages_and_options_alone():
    loose = {path.name for path in (ROOT / "utils").glob("*.py")}
    assert loose == {"__init__.py", "options.py"}


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module_of(path): {module for module in imported(path) if place_of(module)}
        for path in sources()
    }

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        for module in graph.get(start, ()):
            if module == goal:
                return True
            if module not in seen:
                seen.add(module)
                if reaches(module, goal, seen):
                    return True
        return False

    assert [module for module in graph if reaches(module, module, set())] == []
