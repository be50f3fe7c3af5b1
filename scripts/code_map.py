"""Write docs/code.md: every file of the code in one line, the first sentence of its docstring.

python -m scripts.code_map
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "code.md"
CODE = (".py", ".sh", ".sbatch")
# The order of reading; other folders stand behind the one that holds them.
FOLDERS = (
    "", "utils", "utils/plan", "utils/run", "utils/methods", "utils/measure", "utils/experts",
    "utils/compute", "utils/data", "utils/config", "utils/core", "networks", "scripts",
)  # fmt: skip
HEAD = """# Code map

Written by `python -m scripts.code_map` from the first sentences of the docstrings. Packages stand
from the top down, and imports point down only (`tests/test_house.py`). Mathematics is in `utils/`,
wiring in the three scripts. Rows of the paper are `configs/<data set>/ipc<k>.yaml`, those of other
methods `ipc<k>_<method>.yaml`.
"""


def code_map() -> str:
    return "\n".join([HEAD, *map(section, folders())])


def folders() -> list[str]:
    """All folders with code, as paths from the root, in the order of reading."""
    tops = [ROOT / top for top in ("utils", "networks", "scripts")]
    files = [path for top in tops for path in top.rglob("*") if path.suffix in CODE]
    found = {path.parent.relative_to(ROOT).as_posix() for path in files} | {""}

    def place(folder: str) -> tuple[int, str]:
        holders = [f for f in FOLDERS if not f or f"{folder}/".startswith(f"{f}/")]
        return FOLDERS.index(max(holders, key=len)), folder

    return sorted(found, key=place)


def section(folder: str) -> str:
    """A heading, what the package is for, and a line for each file."""
    text = f"## `{folder}/`\n" if folder else "## The three commands\n"
    package = ROOT / folder / "__init__.py"
    if package.exists():
        text += f"\n{first_sentence(package)}\n"
    files = [path for path in sorted((ROOT / folder).glob("*")) if path.suffix in CODE]
    rows = [f"| `{f.name}` | {first_sentence(f)} |" for f in files if f != package]
    return "\n".join([text, "| file | |", "|---|---|", *rows, ""]) if rows else text


def first_sentence(path: Path) -> str:
    """Of the docstring, or of the comment that a shell script begins with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = [line for line in text.splitlines() if not re.match("#!|#SBATCH", line)]
        text = "\n".join(line.removeprefix("#").strip() for line in lines)
    sentences = re.split(r"(?<=\.) ", " ".join(text.strip().split("\n\n")[0].split()))
    return sentences[0].replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(code_map(), encoding="utf-8")
