"""The README's example of a method of one's own runs as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys

from short_runs import ROOT, SHORT, records


def block(language, word):
    """The code block of the README that holds `word`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
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
    curves = records(tmp_path / "digits/ConvNetD2/ipc1/first_rise", "distances")
    assert len(curves) == 4
    for record in curves:
        length, distances = record["length"], record["l2"]
        assert distances[:length] == sorted(distances[:length], reverse=True)
        assert length == len(distances) or distances[length] > distances[length - 1]
