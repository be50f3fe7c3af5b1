"""The networks are the field's, for any image size that they fit."""

import ast
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import networks
from networks import NETWORKS, UnfitSizeError, build_network, canonical_name

# Below these sides instance norm would see 1x1 maps; the others fit from 8 up.
SMALLEST = {"ResNet18": 9, "ResNet18BN": 9, "ResNet18_AP": 16, "ResNet18BN_AP": 16}
SMALLEST |= {"VGG11": 32, "VGG11BN": 32} | {f"ConvNetD{d}": 2**d for d in range(4, 9)}
LARGE = ["MLP", "LeNet", "AlexNet", "VGG11", "ResNet18", "ConvNetD4", "ConvNetD5"]
LARGE += ["VGG11BN", "ResNet18BN", "ResNet18_AP", "ResNet18BN_AP"]
SIZES = [
    *((model, size) for size in (8, 9, 16, 32) for model in NETWORKS),
    *((model, size) for size in (64, 128) for model in LARGE),
    *SMALLEST.items(),
]


def build(model: str, size: int = 32, channels: int = 3, seed: int = 0) -> nn.Module:
    return build_network(model, channels=channels, num_classes=10, image_size=size, seed=seed)


def skeleton(model: str, size: int = 32) -> nn.Module:
    """The network without storage, for questions about structure alone."""
    with torch.device("meta"):
        return build_network(model, channels=3, num_classes=10, image_size=size)


def shapes(model: str) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in skeleton(model).parameters()]


def count(model: str) -> int:
    return sum(param.numel() for param in skeleton(model).parameters())


@pytest.mark.parametrize(
    ("model", "size"), [(model, size) for model, size in SIZES if size >= SMALLEST.get(model, 8)]
)
def test_logits_for_any_size_that_fits(model, size):
    with torch.device("meta"):
        for channels in (1, 3):
            network = build_network(model, channels=channels, num_classes=7, image_size=size)
            assert network(torch.empty(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (name, SMALLEST.get(name, 8))
        for name in NETWORKS
        if "W" not in name and SMALLEST.get(name, 8) <= 32
    ],
)
def test_logits_depend_on_the_image_at_the_smallest_size(model, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    network = build(model, size).eval()
    with torch.no_grad():
        first, second = network(images)
        alone = network(images[:1])[0]
    assert (first - second).abs().max() > 1e-4
    torch.testing.assert_close(alone, first)


@pytest.mark.parametrize(("model", "smallest"), SMALLEST.items())
def test_a_network_that_would_normalise_single_values_is_refused(model, smallest):
    for size in (8, smallest - 1):
        with pytest.raises(UnfitSizeError, match=f"{model} at {size}x{size} pixels") as refusal:
            skeleton(model, size)
        assert refusal.value.smallest == smallest


def test_convnet_has_the_parameters_of_the_field():
    block = [(128,), (128,), (128,)]  # conv bias, norm weight, norm bias
    assert shapes("ConvNetD3") == [
        *[(128, 3, 3, 3), *block],
        *[(128, 128, 3, 3), *block],
        *[(128, 128, 3, 3), *block],
        *[(10, 128 * 4 * 4), (10,)],
    ]
    assert count("ConvNetD3") == 320_010


def test_alexnet_has_the_parameters_of_the_field():
    assert shapes("AlexNet") == [
        *[(128, 3, 5, 5), (128,)],
        *[(192, 128, 5, 5), (192,)],
        *[(256, 192, 3, 3), (256,)],
        *[(192, 256, 3, 3), (192,)],
        *[(192, 192, 3, 3), (192,)],
        *[(10, 192 * 4 * 4), (10,)],
    ]
    assert count("AlexNet") == 1_872_202


def test_vgg11_has_the_parameters_of_the_field():
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    expected: list[tuple[int, ...]] = []
    for width, out in pairwise(widths):
        expected += [(out, width, 3, 3), (out,), (out,), (out,)]
    assert shapes("VGG11") == [*expected, (10, 512), (10,)]
    assert count("VGG11") == 9_231_114


def test_resnet18_has_the_parameters_of_the_field():
    def conv_norm(width: int, out: int, kernel: int) -> list[tuple[int, ...]]:
        return [(out, width, kernel, kernel), (out,), (out,)]

    expected = conv_norm(3, 64, 3)
    for width, out in [(64, 64), (64, 128), (128, 256), (256, 512)]:
        expected += conv_norm(width, out, 3) + conv_norm(out, out, 3)
        expected += conv_norm(width, out, 1) if width != out else []
        expected += conv_norm(out, out, 3) + conv_norm(out, out, 3)
    assert shapes("ResNet18") == [*expected, (10, 512), (10,)]
    assert count("ResNet18") == 11_173_962
    # The field's variants: strides become poolings, whose map the linear layer sees whole.
    assert shapes("ResNet18BN") == shapes("ResNet18")
    assert shapes("ResNet18_AP") == [*shapes("ResNet18")[:-2], (10, 512 * 4 * 4), (10,)]
    assert shapes("ResNet18BN_AP") == shapes("ResNet18_AP")


@pytest.mark.parametrize("model", ["VGG11BN", "ResNet18BN", "ResNet18BN_AP"])
def test_bn_stands_for_batch_norm_everywhere(model):
    kinds = [type(layer) for layer in skeleton(model).modules()]
    plain = [type(layer) for layer in skeleton(model.replace("BN", "")).modules()]
    assert nn.GroupNorm not in kinds
    assert [nn.GroupNorm if kind is nn.BatchNorm2d else kind for kind in kinds] == plain


def test_ap_pools_where_the_others_take_strides():
    layers = list(skeleton("ResNet18_AP").modules())
    assert {layer.stride for layer in layers if isinstance(layer, nn.Conv2d)} == {(1, 1)}
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in layers) == 2 * 3  # and in shortcuts


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("MLP", [(128, 3 * 32 * 32), (128,), (128, 128), (128,), (10, 128), (10,)]),
        (
            "LeNet",
            [
                *[(6, 3, 5, 5), (6,), (16, 6, 5, 5), (16,)],
                *[(120, 16 * 5 * 5), (120,), (84, 120), (84,), (10, 84), (10,)],
            ],
        ),
    ],
)
def test_small_networks_have_the_parameters_of_the_field(model, expected):
    assert shapes(model) == expected


@pytest.mark.parametrize(("model", "plan"), [("AlexNet", "CMCMCCCM"), ("VGG11", "CMCMCCMCCMCCM")])
def test_pooling_stands_where_the_field_has_it(model, plan):
    letters = {nn.Conv2d: "C", nn.MaxPool2d: "M"}
    assert "".join(letters.get(type(layer), "") for layer in skeleton(model).features) == plan


def test_the_shortcuts_of_resnet18_carry_the_image_alone():
    network = build("ResNet18", size=16)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, param in network.named_parameters():
            if ".bn2." in name:
                param.zero_()
        first, second = network(images)
    assert (first - second).abs().max() > 1e-3


def test_convnet_has_the_names_of_the_field():
    names = [f"features.{n}.{kind}" for n in (0, 1, 4, 5, 8, 9) for kind in ("weight", "bias")]
    assert list(skeleton("ConvNet").state_dict()) == [
        *names,
        "classifier.weight",
        "classifier.bias",
    ]


@pytest.mark.parametrize(
    ("suffix", "block"),
    [
        ("", "Conv2d GroupNorm ReLU AvgPool2d"),
        ("AS", "Conv2d GroupNorm Sigmoid AvgPool2d"),
        ("AR", "Conv2d GroupNorm ReLU AvgPool2d"),
        ("AL", "Conv2d GroupNorm LeakyReLU AvgPool2d"),
        ("NN", "Conv2d ReLU AvgPool2d"),
        ("BN", "Conv2d BatchNorm2d ReLU AvgPool2d"),
        ("LN", "Conv2d LayerNorm ReLU AvgPool2d"),
        ("IN", "Conv2d GroupNorm ReLU AvgPool2d"),
        ("GN", "Conv2d GroupNorm ReLU AvgPool2d"),
        ("NP", "Conv2d GroupNorm ReLU"),
        ("MP", "Conv2d GroupNorm ReLU MaxPool2d"),
        ("AP", "Conv2d GroupNorm ReLU AvgPool2d"),
    ],
)
def test_a_variant_has_its_modules(suffix, block):
    found = [type(layer).__name__ for layer in skeleton(f"ConvNet{suffix}").features]
    assert found == block.split() * 3


def test_width_depth_and_groups_are_those_of_the_name():
    for width in (32, 64, 128, 256, 512, 1024):
        assert skeleton(f"ConvNetW{width}").features[0].out_channels == width
    for depth in range(1, 9):
        layers = skeleton(f"ConvNetD{depth}", size=256).features
        assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == depth
    assert skeleton("ConvNetIN").features[1].num_groups == 128
    assert skeleton("ConvNetGN").features[1].num_groups == 4


def test_convnetkip_is_wide_without_norm_behind_a_convolution():
    layers = skeleton("ConvNetKIP").features
    block = "Conv2d ReLU AvgPool2d".split()
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "ReLU", *block * 3]
    widths = [layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    assert widths == [3, 1024, 1024, 1024]
    assert skeleton("ConvNetKIPW64").features[2].in_channels == 64


def test_pooling_stops_at_1x1():
    layers = skeleton("ConvNetNN", size=4).features
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in layers) == 2


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'ConvNetD9'.*MLP.*ResNet18.*ConvNetD8"):
        build("ConvNetD9")


@pytest.mark.parametrize("model", ["ConvNet", "ResNet18"])
def test_weights_come_from_the_seed_alone(model):
    def weights(seed: int) -> Tensor:
        return torch.cat([param.flatten() for param in build(model, 9, seed=seed).parameters()])

    state = torch.random.get_rng_state()
    once = weights(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(once, weights(seed=3))
    assert not torch.equal(once, weights(seed=4))


def test_one_canonical_name_per_architecture():
    printed: dict[str, set[str]] = {}
    for model in NETWORKS:
        printed.setdefault(canonical_name(model), set()).add(str(skeleton(model, size=256)))
    assert all(len(architectures) == 1 for architectures in printed.values())
    assert len(set.union(*printed.values())) == len(printed)
    assert canonical_name("ConvNet") == "ConvNetD3" in NETWORKS


def test_networks_import_nothing_of_the_project():
    allowed = {*sys.stdlib_module_names, "torch", "networks"}
    for path in Path(networks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: relative import"
                modules = [str(node.module)]
            else:
                continue
            assert {module.partition(".")[0] for module in modules} <= allowed, path.name
