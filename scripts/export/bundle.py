"""The bundle: exact numbers, recipe, pictures, card, and a script that trains on torch alone."""

import shutil
from pathlib import Path

from safetensors.torch import save

from scripts.export import pictures
from scripts.export.card import IN_TORCH, card
from scripts.export.contents import Contents
from utils.core.files import write_text
from utils.data.ready import TENSORS

ROOT = Path(__file__).parents[2]
# What train.py needs of this repository: the augmentation and the networks, which need torch alone.
CODE = {
    "scripts/export/train.py": "train.py",
    "utils/data/augment.py": "augment.py",
    "LICENSE": "LICENSE",
}
HOW_TO_USE = f"""## Use

```bash
pip install torch safetensors
python train.py               # trains by recipe.json, keeps network.pt
python train.py picture.png   # says what the picture shows (needs Pillow)
```

In Python, in this folder: `from train import classify, train`; `classify(train(seed=0), images01)`
gives the classes of images (N, C, H, W) in [0, 1]. Without the script:

{IN_TORCH}

`train.py`, `augment.py` and `networks/` are under the MIT licence in `LICENSE`, which says nothing
about the images."""


def check(contents: Contents) -> None:
    """Every set can be written."""


def write(contents: Contents, folder: Path) -> None:
    """Write distilled.safetensors, pictures/, README.md, train.py and what that needs."""
    write_tensors(contents, folder)
    pictures.write(contents, folder / "pictures")
    write_text(card(contents, how_to_use=HOW_TO_USE), folder / "README.md")
    for source, target in CODE.items():
        shutil.copyfile(ROOT / source, folder / target)
    (folder / "networks").mkdir()
    for module in (ROOT / "networks").glob("*.py"):
        shutil.copyfile(module, folder / "networks" / module.name)


def write_tensors(contents: Contents, folder: Path) -> None:
    """Write the numbers that `tensors_of` names, with what eval.py asks of such a file."""
    distilled = contents.distilled
    said = {
        "dataset": distilled.dataset,
        "subset": distilled.subset,
        "space": "zca" if distilled.normalisation.zca else "normalised",
        "syn_lr": repr(distilled.syn_lr),
        "network": distilled.model,
        "label_form": distilled.label_form,
    }
    metadata = {name: value for name, value in said.items() if value is not None}
    (folder / TENSORS).write_bytes(save(dict(contents.tensors), metadata))
