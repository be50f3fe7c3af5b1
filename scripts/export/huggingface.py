"""A data set for the Hugging Face Hub: Parquet, card, and the exact numbers beside it."""

import importlib.util
import io
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from scripts.export.bundle import write_tensors
from scripts.export.card import IN_TORCH, card
from scripts.export.contents import Contents
from utils.core.errors import UserError
from utils.core.files import write_text
from utils.core.pictures import visible

PARQUET = "data/train-00000-of-00001.parquet"
HOW_TO_USE = f"""## Use

`load_dataset("...")` gives rows of `image`, `label` and, where labels were learned, `soft_label`
(probabilities). Its images are pictures to look at, of 8 bits. To train, take the exact numbers:

{IN_TORCH}"""


def check(contents: Contents) -> None:
    """UserError where the library that writes is missing."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError("--format huggingface needs the package datasets: pip install datasets")


def write(contents: Contents, folder: Path) -> None:
    """Write Parquet with `image`, `label` and `soft_label`, README.md, distilled.safetensors."""
    from datasets import ClassLabel, Dataset, Features, Image, List, Value, disable_progress_bars

    disable_progress_bars()
    names = list(contents.distilled.class_names)
    columns = {
        "image": [{"bytes": png, "path": None} for png in _pngs(contents)],
        "label": contents.tensors["labels"].tolist(),
    }
    features = {"image": Image(), "label": ClassLabel(names=names)}
    if contents.recipe["labels"] != "classes":
        columns["soft_label"] = contents.logits.softmax(1).tolist()
        features["soft_label"] = List(Value("float32"), length=len(names))
    (folder / PARQUET).parent.mkdir()
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / PARQUET)
    write_tensors(contents, folder)
    write_text(card(contents, how_to_use=HOW_TO_USE, parquet=PARQUET), folder / "README.md")


def _pngs(contents: Contents) -> list[bytes]:
    files = []
    for image in visible(contents.images01):
        file = io.BytesIO()
        to_pil_image(image.mul(255).round().byte()).save(file, format="PNG")
        files.append(file.getvalue())
    return files
