"""The notebook runs; the sets in the repository can be read."""

import json
from pathlib import Path

import pytest
import torch

from utils.data import load_set
from utils.data.distilled import SyntheticSet
from utils.data.foreign.decide import open_set
from utils.options import ConvertOptions

ROOT = Path(__file__).parent.parent
SETS = ROOT / "docs" / "sets"
NOTHING = ConvertOptions().stated(data_path="data", model=None)  # said by flags


def test_the_notebook_trains_a_network_on_ten_images(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "docs" / "first_set.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"]
                exec(compile("".join(cell["source"]), "first_set.ipynb", "exec"), names)
    assert names["accuracy"] > 0.85 > names["baseline"] > 0.4
    assert "real digits" in capsys.readouterr().out


@pytest.mark.parametrize("folder", sorted(path.parent for path in SETS.glob("*/recipe.json")))
def test_bundles_in_the_repository_say_all_that_eval_asks(folder):
    images, labels, recipe, _ = load_set(folder)
    distilled = open_set(folder / "distilled.safetensors", NOTHING)
    assert torch.equal(distilled.images, images) and torch.equal(distilled.labels, labels)
    assert (distilled.dataset, distilled.model) == (recipe["dataset"], recipe["network"])
    assert distilled.syn_lr == pytest.approx(recipe["training"]["phases"][0][1])
    assert recipe["accuracy"]["n"] >= 3


@pytest.mark.parametrize("path", sorted(SETS.glob("*/distilled_*.pt")))
def test_files_in_the_repository_are_sets(path):
    distilled = SyntheticSet.load(path)
    assert distilled.images.shape == (10, 3, 32, 32) and distilled.normalisation.needs_fit
    assert distilled.config["data_path"] == distilled.data["path"] == "data"
