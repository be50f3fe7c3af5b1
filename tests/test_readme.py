"""README and docs are true: commands parse, files and links exist, the worked example runs."""

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest
from short_runs import ROOT, SHORT, records

from scripts.code_map import PAGE, code_map
from utils.config.foreign import FOREIGN
from utils.config.resolve import packaged_yaml, resolve
from utils.core.errors import UserError
from utils.methods.registry import METHODS
from utils.options import DistillOptions
from utils.plan.distillation import count_work
from utils.plan.sizes import DataSize

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
# What reads the flags of a shell script; the others take no flags.
SHELL_SCRIPTS = {
    f"scripts/{name}.sh": "scripts.plan.__main__"
    for name in ("run_all", "run_table1", "run_table2", "run_table3")
} | {
    "scripts/paper_figures.sh": "scripts.figures.plan",
    "scripts/distil_folder.sh": "scripts.folder.__main__",
}
OTHERS = ("--nproc_per_node", "--signals_to_handle", "--signal", "--index-url")  # not ours
END = "--end_of_line"


def block(language, word):
    """The code block of docs/methods.md that holds `word`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGES["docs/methods.md"], re.DOTALL)
    (found,) = [text for text in blocks if word in text]
    return found


def copy_of_the_code(folder):
    for name in ("utils", "networks", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "distill_att.py", folder)


def test_a_length_policy_of_ones_own(experts, tmp_path):
    copy_of_the_code(tmp_path)
    new_file = block("python", "def first_rise")
    (tmp_path / new_file.split()[1]).write_text(new_file)
    registry = tmp_path / "utils/methods/trajectory/lengths.py"
    imported, entry = block("python", "import first_rise").strip().split("\n\n")
    text, count = re.subn(
        r"^LENGTH_POLICIES.*$", lambda match: entry, registry.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    registry.write_text(
        text.replace("from torch import Tensor", f"from torch import Tensor\n\n{imported}")
    )

    _, *argv = shlex.split(block("bash", "--length first_rise"))
    argv += [*SHORT, "--buffer_path", str(experts), "--save_path", str(tmp_path), "--eval_it", "0"]
    argv += ["--log_distances", "1"]
    done = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    curves = records(tmp_path / "digits/ConvNetD1/ipc1/first_rise", "distances")
    assert len(curves) == 4
    for record in curves:
        length, distances = record["length"], record["l2"]
        assert distances[:length] == sorted(distances[:length], reverse=True)
        assert length == len(distances) or distances[length] > distances[length - 1]


def commands():
    """(page, words) of every command line in a block or in a sentence."""
    begins = r"(?:python|bash|torchrun|\.venv/bin/python) "
    for page, text in PAGES.items():
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        loops = re.findall(r"for (\w+) in (\S+)", blocks)
        for name, value in loops:
            blocks = blocks.replace(f"${name}", value)
        lines = re.findall(rf"^ *({begins}.*)$", blocks, re.MULTILINE)
        outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines += [" ".join(line.split()) for line in re.findall(rf"`({begins}[^`]*)`", outside)]
        for line in lines:
            yield page, shlex.split(line, comments=True)


def target(words):
    """What reads the flags of a command line, as a module and its arguments; None: no flags."""
    if {"pytest", "scripts.code_map"} & {*words}:
        return None
    if words[1] == "-m":
        module, argv = words[2], words[3:]
        is_package = (ROOT / module.replace(".", "/")).is_dir()
        return f"{module}.__main__" if is_package else module, argv
    at = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    assert (ROOT / words[at]).exists(), words[at]
    if words[at].startswith("docs/"):
        return None
    if words[at].endswith(".py"):
        return words[at].removesuffix(".py").replace("/", "."), words[at + 1 :]
    return SHELL_SCRIPTS.get(words[at]) and (SHELL_SCRIPTS[words[at]], words[at + 1 :])


def call(module, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, *argv])
    main = importlib.import_module(module).main
    return main(argv) if inspect.signature(main).parameters else main()


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_parse(page, monkeypatch, capsys):
    """A parser that names one unknown flag, given first, has taken everything else."""
    for where, words in commands():
        found = target(words) if where == page else None
        if found is None or not found[1] or "--help" in found[1]:
            continue
        module, argv = found
        with pytest.raises((UserError, SystemExit)) as caught:
            call(module, [END, *argv], monkeypatch)
        said = f"{caught.value} {capsys.readouterr().err}"
        assert re.search(rf"unrecognized arguments: {END}(?: \(|;|\n| |$)", said), (words, said)


def test_every_flag_that_is_named_exists(monkeypatch, capsys):
    modules = {found[0] for _, words in commands() if (found := target(words))}
    flags = {*OTHERS, *(f"--{name}" for name in FOREIGN)}
    for module in modules:
        with pytest.raises(SystemExit):
            call(module, ["--help"], monkeypatch)
        flags |= set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    flags |= {flag.replace("--", "--no_", 1) for flag in flags}
    for page, text in PAGES.items():
        named = re.findall(r"(?<![\w-])--\w[\w-]*", " ".join(re.findall(r"`[^`\n]+`", text)))
        assert set(named) <= flags, f"{page}: {set(named) - flags}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            place = folder / path if path else ROOT / page
            assert place.exists(), link
            assert not anchor or anchor in headings(place.read_text(encoding="utf-8")), link
    places = r"`((?:utils|scripts|networks|configs|tests|docs)/[\w./-]*)`"
    for name in re.findall(places, text):
        assert (ROOT / name).exists(), name


def headings(text):
    """As the anchors that links to them have."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_readme_is_short_and_names_every_page():
    assert len(PAGES["README.md"].splitlines()) <= 210
    for page in PAGES.keys() - {"README.md"}:
        assert f"({page})" in PAGES["README.md"], page


def test_the_code_map_is_of_this_code():
    assert PAGE.read_text(encoding="utf-8") == code_map(), "run python -m scripts.code_map"


def test_the_cost_of_methods_is_what_is_counted():
    """TFLOP an outer step in README's table, to its digits: of CIFAR-10's row at IPC 1."""
    size, seen = DataSize(3, 10, 32, 50_000, 10_000), []
    for line in PAGES["README.md"].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 8 or not re.fullmatch(r"[\d.]+(, once)?", cells[5]):
            continue
        named = re.search(r"--method (\w+)", cells[2])
        method = named[1] if named else "att"
        ipc, row = ("10", "ipc10_dd") if method == "dd" else ("1", f"ipc1_{method}")
        yaml = packaged_yaml("CIFAR10", row.removesuffix("_att"))
        argv = ["--dataset", "CIFAR10", "--ipc", ipc, "--method", method]
        find = partial(lambda found, given: found, yaml)
        options = resolve(DistillOptions, argv, description="", find_yaml=find).options
        flop = count_work(options, size, 1).flop / 1e12
        digits = len(cells[5].removesuffix(", once").replace(".", "").strip("0"))
        assert float(cells[5].removesuffix(", once")) == float(f"{flop:.{digits}g}"), method
        seen.append(method)
    assert {*seen} == {*METHODS} - {"cafe_dsa"}  # which shares a line with CAFE
