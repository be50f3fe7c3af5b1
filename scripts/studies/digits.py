"""The study of all methods: digits at 8x8 and 32x32 pixels, one image a class and ten.

What is common to all is cheap enough for two CPU cores: 100 outer steps, small networks, students of
20 steps. Rates are those of the rows in configs/digits where a method has one, else the ones that
were found to work; nothing else is tuned.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scripts.studies.trials import Trial

STEPS = "--Iteration 100 --eval_it 0 --compile off --dataset digits"
REAL = "--random --herding --k_center --forgetting --lowest_loss"
MATCHING = "--syn_steps 20 --expert_epochs 2 --lr_lr 1e-7 --lr_teacher 0.01"
EARLY = "--max_start_epoch 2"


@dataclass(frozen=True)
class Size:
    """Images of a side: the network, the rate of matched images, how results are measured."""

    side: int
    network: str
    lr_img: str
    evaluations: tuple[str, ...]


# At 32x32 the paper's four architectures train on the images as well, for fewer epochs.
SIZES = (
    Size(8, "--model ConvNetD2", "--lr_img 3", ("--num_eval 2 --epoch_eval_train 300",)),
    Size(
        32,
        "--res 32 --model ConvNetW32",
        "--lr_img 300",
        (
            "--num_eval 2 --epoch_eval_train 300",
            "--num_eval 1 --epoch_eval_train 60 --model ConvNet ResNet18 VGG11 AlexNet",
        ),
    ),
)
IPCS = (1, 10)


def trials() -> Iterator[Trial]:
    """Every method at every size and IPC; ATT's sets are measured beside real images."""
    for size in SIZES:
        for ipc in IPCS:
            common = f"{STEPS} {size.network} --ipc {ipc}"
            for line, (row, flags) in methods(size, ipc).items():
                real = f" {REAL}" if line == "ATT" else ""
                yield Trial(
                    line,
                    f"{size.side}x{size.side}, IPC {ipc}",
                    row,
                    f"{common} {flags}",
                    tuple(each + real for each in size.evaluations),
                )


def methods(size: Size, ipc: int) -> dict[str, tuple[str, str]]:
    """By its line in the table, the row that a method starts from, and its flags."""
    batch = "" if ipc == 1 else "--batch_syn 20"
    matching = f"{MATCHING} {size.lr_img} {batch}"
    early, late = f"{matching} {EARLY}", f"{matching} --start_epochs 0 2"
    real_loss = "--lr_img 0.01 --batch_target 256"
    found = {
        "ATT": f"--method att {early}",
        "MTT": f"--method mtt {early}",
        "FTD": f"--method ftd {early}",
        "PP": f"--method pp {early}",
        "TESLA": f"--method tesla {early}",
        "ATT + soft labels": f"--method att --soft_labels {early}",
        "DATM": f"--method datm {late}",
        "BPTT": f"--method bptt --syn_steps 20 {real_loss} {batch}",
        "DD": f"--method dd --distill_steps {ipc} {real_loss}",
        "DM": "--method dm --lr_img 10",
    }
    rows = {"BPTT": "ipc1_bptt", "DM": "ipc1_dm", "DD": ""}
    return {line: (rows.get(line, "ipc1"), flags) for line, flags in found.items()}
