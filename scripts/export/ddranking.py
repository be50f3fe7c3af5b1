"""DD-Ranking's three files, and the YAML that measures them (ddranking 0.2.0)."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from networks import canonical_name
from scripts.export.contents import Contents
from utils.core.errors import UserError
from utils.core.files import torch_save, write_text
from utils.data.augment import DSA_STRATEGY, parse_strategy

DATASETS = {
    "CIFAR10": "CIFAR10",
    "CIFAR100": "CIFAR100",
    "Tiny": "TinyImageNet",
    "imagenette": "ImageNette",
    "imagewoof": "ImageWoof",
    "imagefruit": "ImageFruit",
    "imageyellow": "ImageYellow",
    "imagemeow": "ImageMeow",
    "imagesquawk": "ImageSquawk",
}  # their classes have the same labels, and their images the same normalisation, as ours
NETWORKS = {
    "ConvNetBN": "ConvNet-3-BN",
    "ResNet18": "ResNet-18",
    "ResNet18BN": "ResNet-18-BN",
    "VGG11": "VGG-11",
    "VGG11BN": "VGG-11-BN",
    "AlexNet": "AlexNet",
    "LeNet": "LeNet",
    "MLP": "MLP",
}
# Under the names that its DSA reads; the six kinds of augmentation with the field's magnitudes.
DSA = {
    "flip": 0.5,
    "rotate": 15.0,
    "saturation": 2.0,
    "brightness": 1.0,
    "contrast": 0.5,
    "scale": 1.2,
    "crop": 0.125,
    "cutout": 0.5,
}
NUM_EVAL = 5


def check(contents: Contents) -> None:
    """UserError for what DD-Ranking does not know."""
    contents.check_protocol("DD-Ranking's format")
    dataset_of(contents)
    network_of(contents)
    groups = contents.recipe["training"]["augmentation"]
    if groups and {*groups} != {*parse_strategy(DSA_STRATEGY)}:
        raise UserError(
            f"DD-Ranking augments by all of DSA or not at all, this set by {'_'.join(groups)}: "
            "choose another format"
        )


def write(contents: Contents, folder: Path) -> None:
    """Write images.pt, labels.pt (classes or logits), lr.pt and config.yaml."""
    is_soft = contents.recipe["labels"] != "classes"
    torch_save(contents.tensors["images"], folder / "images.pt")
    torch_save(contents.logits if is_soft else contents.tensors["labels"], folder / "labels.pt")
    torch_save(torch.tensor(contents.distilled.syn_lr), folder / "lr.pt")
    kind = "Soft" if is_soft else "Hard"
    head = (
        f"# ddranking 0.2.0: LabelRobustScore{kind}(Config.from_file(...)).compute_metrics(\n"
        f"#     image_tensor=images, {kind.lower()}_labels=labels, syn_lr=lr)\n"
        "# Set real_data_path and device for your machine.\n"
    )
    write_text(head + yaml.safe_dump(config_of(contents), sort_keys=False), folder / "config.yaml")


def dataset_of(contents: Contents) -> str:
    """Its name for the data set."""
    ours = contents.distilled.subset or contents.distilled.dataset
    if ours not in DATASETS:
        raise UserError(f"DD-Ranking does not know {ours}; it knows {', '.join(DATASETS)}")
    return DATASETS[ours]


def network_of(contents: Contents) -> str:
    """Its name for the network."""
    model = canonical_name(contents.distilled.model)
    if depth := re.fullmatch(r"ConvNetD(\d)", model):
        return f"ConvNet-{depth[1]}"
    if model not in NETWORKS:
        raise UserError(
            f"DD-Ranking does not know {model}; it knows ConvNetD<depth>, {', '.join(NETWORKS)}"
        )
    return NETWORKS[model]


def config_of(contents: Contents) -> dict[str, Any]:
    """The settings of LabelRobustScoreHard, or for soft labels of LabelRobustScoreSoft."""
    recipe, dataset = contents.recipe, dataset_of(contents)
    training, (_, side, _) = recipe["training"], recipe["image_shape"]
    (epochs, _), *rest = training["phases"]
    common = {
        "dataset": dataset,
        "real_data_path": "./dataset/",
        "ipc": recipe["ipc"],
        "im_size": [side, side],
        "model_name": network_of(contents),
        "data_aug_func": "dsa" if training["augmentation"] else None,
        "aug_params": DSA if training["augmentation"] else None,
        "use_zca": recipe["space"] == "whitened",
        "custom_train_trans": None,
        "custom_val_trans": None,
        "optimizer": "sgd",
        "lr_scheduler": "step",
        "step_size": epochs,
        "weight_decay": training["weight_decay"],
        "momentum": training["momentum"],
        "num_eval": NUM_EVAL,
        "num_epochs": epochs + sum(count for count, _ in rest),
        "syn_batch_size": training["batch_size"],
        "real_batch_size": 256,
        "random_data_format": "tensor",
        "random_data_path": None,
        "eval_full_data": True,
        "num_workers": 4,
        "device": "cuda",
        "dist": False,
        "save_path": f"./results/{dataset}_ipc{recipe['ipc']}.csv",
    }
    if recipe["labels"] == "classes":
        return common | {"use_torchvision": False}
    return common | {
        "soft_label_mode": "S",
        "soft_label_criterion": "sce",
        "loss_fn_kwargs": {"temperature": 1.0, "scale_loss": False},
        "use_aug_for_hard": bool(training["augmentation"]),
        "stu_use_torchvision": False,
        "tea_use_torchvision": False,
        "teacher_dir": "./teacher_models",
        "teacher_model_names": [],
    }
