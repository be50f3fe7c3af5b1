"""Load a distilled set ready for training: images, labels, recipe, and how test pictures enter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.core.errors import UserError
from utils.data.decode import Decoding, decode, fitted
from utils.data.distilled import SyntheticSet
from utils.data.label_forms import LABEL_FORMS
from utils.data.normalisation import Normalisation, in_unit_range
from utils.data.recipe import recipe_of

TENSORS, RECIPE = "distilled.safetensors", "recipe.json"  # the files of a bundle


@dataclass(frozen=True, eq=False)
class PictureTransform:
    """Bring real pictures into the space of the distilled images.

    Takes the path of a picture or a Pillow image, of any size, and tensors (C, H, W) or (N, C, H,
    W) of the images' size: bytes, or floats in [0, 1]. Returns float32, (C, H, W) or (N, C, H, W).
    UserError for what cannot be brought there.
    """

    shape: tuple[int, int, int]
    decoding: Decoding
    normalisation: Normalisation

    def __call__(self, picture: str | Path | Image.Image | Tensor) -> Tensor:
        if isinstance(picture, Tensor):
            pixels = self._checked(picture)
        elif isinstance(picture, Image.Image):
            try:
                pixels = torch.from_numpy(fitted(picture, self.decoding)).permute(2, 0, 1)
            except ValueError as error:
                raise UserError(f"the picture does not fit the set: {error}") from None
        else:
            pixels = decode([Path(picture)], self.decoding)[0]
        batch = in_unit_range(pixels.contiguous()).float().view(-1, *self.shape)
        return self.normalisation.forward(batch).view(pixels.shape)

    def _checked(self, images: Tensor) -> Tensor:
        if images.shape[-3:] != self.shape or images.ndim not in (3, 4):
            raise UserError(
                f"images of shape {[*images.shape]} do not fit the set's {[*self.shape]}: give "
                "(C, H, W) or (N, C, H, W)"
            )
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
            raise UserError("images must be bytes, or floats in [0, 1] that are not normalised yet")
        return images


class LoadedSet(NamedTuple):
    """What training on a distilled set needs.

    `images` (N, C, H, W) are in the space that networks see. `labels` are what
    `F.cross_entropy(network(images), labels)` takes: classes (N,), or where they were learned
    probabilities (N, classes). `recipe` says how to train; `transform` is for test pictures.
    """

    images: Tensor
    labels: Tensor
    recipe: Mapping[str, Any]
    transform: PictureTransform


def load_set(path: str | Path) -> LoadedSet:
    """Load a file `distilled_<tag>.pt`, or the folder of an exported bundle.

    UserError where it is not there or damaged, and for a whitened set without its whitening.
    """
    path = Path(path)
    tensors, recipe = _of_bundle(path) if path.is_dir() else _of_file(path)
    try:
        form = recipe["labels"]
        is_hard = form == "classes"
        labels = tensors["labels"] if is_hard else LABEL_FORMS[form](tensors["soft_labels"])
        channels, side, _ = shape = tuple(recipe["image_shape"])
        decoding = Decoding.from_dict(side, {"channels": channels, **recipe["pixels"]})
        normalisation = Normalisation.from_dict({"zca": "zca_matrix" in tensors, **tensors})
        transform = PictureTransform(shape, decoding, normalisation)
        return LoadedSet(tensors["images"], labels, recipe, transform)
    except (LookupError, TypeError, ValueError) as error:  # of a bundle that somebody has edited
        raise UserError(f"{path} is damaged, or of another version: {error!r}") from None


def tensors_of(distilled: SyntheticSet) -> dict[str, Tensor]:
    """All numbers of a set: images, labels, soft_labels if any, mean, std, whitening if any.

    UserError for a whitened set without its whitening.
    """
    normalisation = distilled.normalisation
    if normalisation.needs_fit:
        raise UserError(
            "the set is whitened and its file holds no whitening, as those of single iterations: "
            "take distilled_last.pt or distilled_best.pt of the same run"
        )
    found = {
        "images": distilled.images.float(),
        "labels": distilled.labels,
        "soft_labels": distilled.soft_labels,
        "mean": torch.tensor(normalisation.mean),
        "std": torch.tensor(normalisation.std),
        "zca_mean": normalisation.zca_mean,
        "zca_matrix": normalisation.zca_matrix,
    }
    return {name: value.contiguous() for name, value in found.items() if value is not None}


def _of_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    distilled = SyntheticSet.load(path)
    return tensors_of(distilled), recipe_of(distilled)


def _of_bundle(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        return load_file(folder / TENSORS), recipe
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no exported bundle: {error.filename} is missing") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the bundle {folder} is damaged: {error}") from None
