"""Exports: the bundle trains as eval.py does, others read what they know, nothing is half there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from short_runs import digits_set
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import eval as eval_script
from scripts.export import ddranking
from scripts.export.__main__ import FORMATS, main
from scripts.export.contents import Contents, without_places
from scripts.export.pictures import class_folders
from utils.compute.cohort import Cohort, Recipe
from utils.compute.flat import flatten
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data import load_set
from utils.data.augment import active_groups
from utils.data.dataset import load_dataset
from utils.data.decode import Decoding, decode
from utils.data.real_images import class_labels, random_real_images
from utils.measure import protocol
from utils.measure.protocol import SGD, Protocol
from utils.measure.sets import own_sets

IPC, EPOCHS, BATCH, DSA = 4, 5, 16, "color_crop_cutout_flip_scale_rotate"
CPU = torch.device("cpu")
SOFT = torch.randn(10 * IPC, 10, generator=torch.Generator().manual_seed(1))
# The kinds of sets: what is stored beside images and classes.
KINDS = {
    "classes": {},
    "whitened, logits": {"soft_labels": 3 * SOFT, "label_form": "logits"},
    "LD": {"soft_labels": SOFT.softmax(1), "label_form": "probabilities", "train_steps": 7},
    "DD": {"step_lrs": torch.tensor([0.1, 0.02, 0.05, 0.01])},
}
SETTINGS = {
    "batch_train": BATCH, "dsa_strategy": DSA, "method": "att", "length": "att", "flat": False,
    "start_epochs": None, "prune_threshold": None, "gradient": "exact",
    "data_path": "/home/somebody/data",
}  # fmt: skip
OF_METHOD = {"LD": {"lr_adam": 0.003, "batch_syn": 8}, "DD": {"distill_steps": 2}}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits"), load_dataset("digits", zca=True)


@pytest.fixture
def make(digits, tmp_path):
    """Save a set of one of the KINDS, of real images, and return its path."""

    def save(kind="classes", *, whitening=True, more=None, **values):
        data = digits["whitened" in kind]
        distilled = digits_set(
            data,
            random_real_images(data, IPC, stream(0, "test")),
            labels=class_labels(10, IPC, CPU),
            ipc=IPC,
            model="ConvNetD1",
            set="raw",
            config=SETTINGS | OF_METHOD.get(kind, {}) | (more or {}),
            **KINDS[kind],
            **values,
        )
        path = tmp_path / "run" / "distilled_best.pt"
        distilled.save(path, include_whitening=whitening)
        return path

    return save


def export(path, folder, *formats):
    assert main([str(path), "--to", str(folder), *(["--format", *formats] if formats else [])]) == 0
    return folder


def imported(bundle, monkeypatch):
    """The bundle's train.py in this process, in float64."""
    monkeypatch.syspath_prepend(str(bundle))
    monkeypatch.delitem(sys.modules, "augment", raising=False)
    spec = importlib.util.spec_from_file_location("train_of_bundle", bundle / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    new_network = module.new_network
    module.new_network = lambda seed=0: new_network(seed).double()
    module.DATA = {
        name: value.double() if value.is_floating_point() else value
        for name, value in module.DATA.items()
    }
    return module


def trained_here(distilled, seed):
    """A network that the protocol, or the set's own method, has trained on it, in float64."""
    own = next(
        own_sets(distilled, device=CPU, dtype=torch.float64, hard_labels=True, epochs=EPOCHS)
    )
    optimiser = SGD if own.own_training is None else own.own_training.optimiser
    shape = {"channels": 1, "num_classes": 10, "image_size": 8}
    recipe = Recipe("ConvNetD1", **shape, label_form=own.label_form, **optimiser)
    cohort = Cohort(recipe, [seed], device=CPU, dtype=torch.float64)
    draws = [torch.Generator().manual_seed(seed)]
    if own.own_training is None:
        how = Protocol(1, EPOCHS, BATCH, active_groups(dsa=True, strategy=DSA))
        protocol._train(cohort, own.images, own.labels, own.lr, how, draws)
    else:
        own.own_training.train(cohort, own.images, own.labels, draws)
    return cohort.networks[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundle_trains_as_the_protocol_does(kind, make, digits, tmp_path, monkeypatch):
    path = make(kind)
    bundle = export(path, tmp_path / "bundle")
    recipe_file = bundle / "recipe.json"
    recipe = json.loads(recipe_file.read_text())
    assert recipe["accuracy"] is None
    if recipe["training"]["kind"] == "epochs":
        recipe["training"]["phases"] = [[2, 0.02], [3, 0.002]]
        recipe_file.write_text(json.dumps(recipe))
    module, seed = imported(bundle, monkeypatch), 5
    theirs = module.train(seed)
    ours = trained_here(Contents.read(path).distilled, seed)
    start, after, here = (weights(net) for net in (module.new_network(seed), theirs, ours))
    # torch's Adam adds eps beside the root that it stands under here.
    assert (after - here).norm() < (5e-3 if kind == "LD" else 1e-9) * (here - start).norm()
    test = digits["whitened" in kind].test
    images01 = digits["whitened" in kind].normalisation.inverse(test.images)
    torch.testing.assert_close(
        module.prepare(images01.double()), test.images.double(), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(module.classify(theirs, images01.double()), answers(ours, test.images))


def weights(network):
    return flatten(network.parameters()).detach()


def answers(network, images):
    with torch.no_grad():
        return network.eval()(images.double()).argmax(1)


# The standard library, torch, safetensors, what torch itself needs, and what lies in the bundle.
ISOLATED = """
import runpy, sys
ALLOWED = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "safetensors", "filelock",
    "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
    "setuptools", "triton", "nvidia", "cuda", "__mp_main__", "train", "augment", "networks"}
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        is_allowed = top in ALLOWED or top.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if is_allowed else None
sys.meta_path[:] = map(Only, sys.meta_path)
sys.path.insert(0, ".")
for other in ("numpy", "PIL", "utils"):
    try:
        __import__(other)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{other} can be imported")
sys.argv = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
import train, torch
from safetensors.torch import load_file
test = load_file("../test.safetensors")
for seed in range(3):
    network = train.train(seed)
    print((train.classify(network, test["images"]) == test["labels"]).float().mean().item())
"""


def test_it_reaches_the_measured_accuracy_where_only_torch_and_safetensors_are(
    make, digits, tmp_path
):
    path = make()
    argv = ["--distilled", str(path), "--num_eval", "3", "--epoch_eval_train", "40"]
    assert eval_script.main(argv) == 0
    bundle = export(path, tmp_path / "elsewhere" / "bundle")
    test = digits[0].test
    images01 = digits[0].normalisation.inverse(test.images).clamp(0, 1)
    save_file({"images": images01, "labels": test.labels}, bundle.parent / "test.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED], cwd=bundle, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (bundle / "network.pt").exists()
    said, *accuracies = done.stdout.splitlines()
    assert said.startswith("trained on 40 images")
    recipe = json.loads((bundle / "recipe.json").read_text())
    measured = recipe["accuracy"]
    assert (measured["n"], recipe["training"]["phases"][0][0]) == (3, 20)
    assert measured["mean"] > 0.6  # chance is 0.1
    assert abs(np.mean(list(map(float, accuracies))) - measured["mean"]) < 0.05


def test_train_py_reads_pictures(make, tmp_path, monkeypatch, capsys):
    bundle = export(make(), tmp_path / "bundle")
    picture = next((bundle / "pictures" / "3_3").iterdir())
    wide = Image.new("L", (24, 16), 255)
    wide.paste(Image.open(picture).resize((16, 16)), (4, 0))
    wide.save(tmp_path / "three.png")
    module = imported(bundle, monkeypatch)
    for path in (picture, tmp_path / "three.png"):
        as_here = decode([path], Decoding(8, channels=1))[0] / 255
        torch.testing.assert_close(module.read_picture(path), as_here, atol=1.01 / 255, rtol=0)
    clear = Image.new("LA", (9, 9), (0, 0))
    clear.save(tmp_path / "clear.png")
    assert module.read_picture(tmp_path / "clear.png").min() == 1
    module.RECIPE["training"]["phases"] = [[30, 0.02]]
    capsys.readouterr()
    for said_before in (1, 0):  # the second call finds the network of the first
        module.main([picture, tmp_path / "three.png"])
        lines = capsys.readouterr().out.splitlines()[said_before:]
        assert lines == [f"{picture}: 3", f"{tmp_path / 'three.png'}: 3"]
    with pytest.raises(SystemExit, match=r"recipe.json cannot be read as a picture"):
        module.main([bundle / "recipe.json"])


def test_only_evaluations_of_exactly_this_set_are_told(make, tmp_path):
    path = make()
    argv = ["--distilled", str(path), "--num_eval", "2", "--model", "MLP", "ConvNetD1"]
    assert eval_script.main([*argv, "--epoch_eval_train", "2"]) == 0
    assert eval_script.main([*argv, "--epoch_eval_train", "4", "--no_dsa"]) == 0
    recipe = Contents.read(path).recipe
    assert len(recipe["measured"]) == 4
    # Augmented as the distillation comes before longer.
    assert recipe["training"]["phases"] == [[1, 0.02], [1, 0.002]]
    assert recipe["accuracy"]["model"] == "ConvNetD1"
    make("whitened, logits")  # another set under the same name
    recipe = Contents.read(path).recipe
    assert recipe["measured"] == []
    assert recipe["training"]["phases"][0][0] == 500


def test_a_set_for_a_kernel_says_so(make, tmp_path, capsys):
    kernel = {"kernel": "fc", "kernel_depth": 2, "reg": 1e-6}
    path = make(soft_labels=SOFT, label_form="centred", more=kernel)
    bundle = export(path, tmp_path / "bundle")
    _, labels, recipe, _ = load_set(bundle)
    assert torch.equal(labels, class_labels(10, IPC, CPU))
    assert torch.equal(load_file(bundle / "distilled.safetensors")["soft_labels"], SOFT)
    assert (recipe["kernel"], recipe["labels"]) == (kernel, "classes")
    said = "made for kernel regression"
    assert said in capsys.readouterr().out
    assert said in (bundle / "README.md").read_text()


def test_no_place_of_the_machine_is_told(make, tmp_path):
    bundle = export(make(), tmp_path / "bundle")
    for file in ("recipe.json", "README.md"):
        assert "somebody" not in (bundle / file).read_text()
    command = "python distill_att.py --data_path /home/somebody/pets --ipc 1"
    assert without_places(command) == "python distill_att.py --data_path pets --ipc 1"


@pytest.mark.parametrize("kind", KINDS)
def test_load_set_gives_the_same_from_a_file_and_from_a_bundle(kind, make, digits, tmp_path):
    path, data = make(kind), digits["whitened" in kind]
    images, labels, recipe, transform = load_set(path)
    bundle = load_set(export(path, tmp_path / "bundle"))
    assert torch.equal(images, bundle.images) and torch.equal(labels, bundle.labels)
    assert recipe.items() <= bundle.recipe.items()
    soft = KINDS[kind].get("soft_labels")
    if soft is None:
        assert torch.equal(labels, class_labels(10, IPC, CPU))
    else:
        torch.testing.assert_close(labels.sum(1), torch.ones(10 * IPC))
        assert torch.equal(labels.argmax(1), soft.argmax(1))
    pixels = data.normalisation.inverse(data.test.images[:9]).mul(255).round().byte()
    for each in (transform, bundle.transform):
        for given in (pixels, pixels / 255):
            torch.testing.assert_close(each(given), data.test.images[:9], atol=1e-4, rtol=1e-4)
        to_pil_image(pixels[0]).save(tmp_path / "scan.png")
        for given in (to_pil_image(pixels[0]), tmp_path / "scan.png", str(tmp_path / "scan.png")):
            torch.testing.assert_close(each(given), data.test.images[0], atol=1e-4, rtol=1e-4)


def test_the_transform_refuses_what_is_in_another_space(make, digits):
    transform = load_set(make()).transform
    for wrong, says in [
        (digits[0].test.images, r"floats in \[0, 1\]"),
        (torch.zeros(3, 8, 8), "do not fit"),
        (torch.zeros(8, 8), "do not fit"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "must be bytes"),
        (Image.new("RGB", (8, 8)), "has 3 channels, not 1"),
    ]:
        with pytest.raises(UserError, match=says):
            transform(wrong)


def test_a_bundle_that_is_damaged_is_refused(make, tmp_path):
    bundle = export(make(), tmp_path / "bundle")
    tensors, recipe = bundle / "distilled.safetensors", bundle / "recipe.json"
    whole = recipe.read_text()
    for damage, says in [
        (lambda: recipe.write_text("{"), "is damaged"),
        (lambda: recipe.write_text("{}"), "or of another version"),
        (lambda: recipe.unlink(), "no exported bundle: .*recipe.json is missing"),
        (lambda: (recipe.write_text(whole), tensors.write_bytes(b"damage")), "is damaged"),
    ]:
        damage()
        with pytest.raises(UserError, match=says):
            load_set(bundle)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_loads_it(kind, make, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    path = make(kind)
    folder = export(path, tmp_path / "hub", "huggingface")
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["label"].names == [*"0123456789"]
    contents = Contents.read(path)
    assert rows["label"] == contents.tensors["labels"].tolist()
    shown = torch.stack([pil_to_tensor(image) for image in rows["image"]]) / 255
    assert (shown - contents.images01).abs().max() <= 0.5 / 255 + 1e-6
    if contents.recipe["labels"] == "classes":
        assert "soft_label" not in rows.column_names
    else:
        torch.testing.assert_close(torch.tensor(rows["soft_label"][:]), load_set(path).labels)
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    assert "arxiv:2407.14245" in yaml.safe_load(head)["tags"]
    assert "# digits distilled by ATT, 4 images per class" in text
    exact = load_file(folder / "distilled.safetensors")["images"]
    assert torch.equal(exact, contents.tensors["images"])


def load(path):
    return torch.load(path, weights_only=True)


def test_mtt_and_datm(make, tmp_path):
    path = make()
    folder = export(path, tmp_path / "both", "mtt", "datm")
    stored = load(path)
    for name in ("mtt", "datm"):
        assert torch.equal(load(folder / name / "images_best.pt"), stored["images"])
    assert torch.equal(load(folder / "mtt" / "labels_best.pt"), stored["labels"])
    logits, rate = (load(folder / "datm" / f"{name}_best.pt") for name in ("labels", "lr"))
    assert (rate.shape, rate.item()) == ((), pytest.approx(0.02))
    one_hot = torch.nn.functional.one_hot(stored["labels"], 10).float()
    torch.testing.assert_close(logits.softmax(1), one_hot, atol=1e-9, rtol=0)
    assert {file.name for file in (folder / "mtt").iterdir()} == {
        "images_best.pt", "labels_best.pt", "recipe.json",
    }  # fmt: skip


def test_probabilities_become_logits(make, tmp_path):
    some = SOFT.softmax(1)
    some[0] = torch.eye(10)[3]
    path = make(soft_labels=some, label_form="probabilities")
    logits = load(export(path, tmp_path / "datm", "datm") / "labels_best.pt")
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1), some)


def test_the_folder_of_pictures_keeps_the_order_of_labels(make, tmp_path):
    path = make()
    found = ImageFolder(export(path, tmp_path / "png", "png"))
    assert found.targets == load(path)["labels"].tolist()
    contents = Contents.read(path)
    shown = torch.stack([pil_to_tensor(image.convert("L")) for image, _ in found]) / 255
    assert (shown - contents.images01).abs().max() <= 0.5 / 255 + 1e-6
    names = ("z/e b", "a", *map(str, range(10)))
    assert class_folders(names) == sorted(class_folders(names))
    assert class_folders(names)[0] == "00_z_e_b"


def test_npz(make, tmp_path):
    path = make("whitened, logits")
    arrays = np.load(export(path, tmp_path / "npz", "npz") / "distilled.npz", allow_pickle=False)
    names = {"images", "labels", "soft_labels", "mean", "std", "zca_mean", "zca_matrix"}
    assert {*arrays} == names
    assert np.array_equal(arrays["images"], load(path)["images"].numpy())


def as_cifar(contents, **values):
    """The contents as if they were of CIFAR-10: DD-Ranking does not know digits."""
    recipe = contents.recipe | values.pop("recipe", {})
    distilled = contents.distilled
    object.__setattr__(distilled, "dataset", "CIFAR10")
    for name, value in values.items():
        object.__setattr__(distilled, name, value)
    return Contents(distilled, contents.tensors, recipe)


@pytest.mark.parametrize("kind", ["classes", "whitened, logits"])
def test_dd_ranking(kind, make, tmp_path):
    path = make(kind)
    contents = as_cifar(Contents.read(path), model="ConvNet")
    ddranking.check(contents)
    ddranking.write(contents, tmp_path)
    images, labels, rate = (load(tmp_path / f"{name}.pt") for name in ("images", "labels", "lr"))
    assert torch.equal(images, load(path)["images"])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["dataset"], config["model_name"], config["ipc"]) == ("CIFAR10", "ConvNet-3", IPC)
    assert (config["num_epochs"], config["step_size"]) == (1000, 500)
    assert config["use_zca"] is ("whitened" in kind)
    assert rate.item() == pytest.approx(0.02)
    if kind == "classes":
        assert torch.equal(labels, load(path)["labels"])
    else:
        assert torch.equal(labels, load(path)["soft_labels"])
        assert config["loss_fn_kwargs"] == {"temperature": 1.0, "scale_loss": False}


def test_dd_ranking_refuses_what_it_does_not_know(make):
    contents = as_cifar(Contents.read(make()), model="VGG11")
    assert ddranking.network_of(contents) == "VGG-11"
    training = contents.recipe["training"] | {"augmentation": ["flip"]}
    with pytest.raises(UserError, match="all of DSA or not at all, this set by flip"):
        ddranking.check(as_cifar(contents, recipe={"training": training}))
    with pytest.raises(UserError, match="does not know ConvNetW32; it knows ConvNetD<depth>, "):
        ddranking.check(as_cifar(contents, model="ConvNetW32"))


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("DD", "mtt", "MTT's format can say one learning rate, and this set has learned steps"),
        ("DD", "datm", "DATM's format can say"),
        ("LD", "datm", "this set has adam of its own"),
        ("DD", "ddranking", "DD-Ranking's format can say"),
        ("classes", "ddranking", "DD-Ranking does not know digits; it knows CIFAR10, "),
        ("whitened, logits", "mtt", "MTT's format knows classes only.*choose datm"),
    ],
)
def test_formats_refuse_what_they_cannot_say(kind, name, says, make, tmp_path):
    with pytest.raises(UserError, match=says):
        main([str(make(kind)), "--to", str(tmp_path / "out"), "--format", "npz", name])
    assert {each.name for each in tmp_path.iterdir()} == {"run"}


def test_what_cannot_be_exported_is_one_line_before_any_work(make, tmp_path):
    path = make("whitened, logits", whitening=False)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(path.read_bytes()[:-100])
    out = str(tmp_path / "out")
    for argv, says in [
        ([str(tmp_path / "no.pt"), "--to", out], "no distilled set at"),
        ([str(damaged), "--to", out], "is damaged"),
        ([str(path), "--to", out], "holds no whitening, .*take distilled_last.pt"),
        ([str(path), "--to", str(full)], "full is there and not empty"),
        ([str(path), "--to", str(full / "mine.txt")], "no folder that may be written to"),
        ([str(path), "--to", out, "--format", "zip"], "invalid choice: 'zip' .*bundle.*npz"),
        ([str(path), "--to", out, "--format", "png", "png"], "png is given twice"),
        ([str(path)], "required: --to"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            main(argv)
        assert "\n" not in str(error.value)
    assert {each.name for each in tmp_path.iterdir()} == {"run", "full", "damaged.pt"}
    assert [each.name for each in full.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_half_written(name, make, tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    path, out = make(), tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    write = FORMATS[name].write

    def runs_out(contents, folder):
        write(as_cifar(contents), folder)
        fails()

    monkeypatch.setitem(FORMATS, name, FORMATS[name]._replace(check=id, write=runs_out))
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        main([str(path), "--to", str(out), "--format", name])
    assert {each.name for each in tmp_path.iterdir()} == {"run", "out"}
    assert list(out.iterdir()) == []
    monkeypatch.setitem(FORMATS, name, FORMATS[name]._replace(write=lambda contents, folder: None))
    export(path, out, name)
    assert [each.name for each in out.iterdir()] == ["recipe.json"]


def test_the_code_in_a_bundle_is_this_one(make, tmp_path):
    bundle, root = export(make(), tmp_path / "bundle"), Path(__file__).parent.parent
    for ours, theirs in [("utils/data/augment.py", "augment.py"), ("networks", "networks")]:
        files = [root / ours] if theirs.endswith(".py") else (root / ours).glob("*.py")
        for file in files:
            place = bundle / theirs if theirs.endswith(".py") else bundle / theirs / file.name
            assert place.read_bytes() == file.read_bytes()
