"""Published command lines of the field, and what becomes of flags that are not here."""

import shlex

import pytest

import buffer
import distill_att
import eval as evaluation
from utils.core.errors import UserError
from utils.methods.registry import check_own_flags
from utils.plan.prepare import check_flags

# From the READMEs and scripts of MTT (GeorgeCazenavette/mtt-distillation), FTD
# (AngusDujw/FTD-distillation), TESLA (justincui03/tesla), DATM (NUS-HPC-AI-Lab/DATM) and ATT
# (NiaLiu/ATT), their paths filled in.
MTT = "--syn_steps=20 --lr_img=1000 --lr_teacher=0.01 --buffer_path=b --data_path=d"
MTT_IMAGENET = f"{MTT} --dataset=ImageNet --model=ConvNetD5 --ipc=1 --expert_epochs=2 "
MTT_IMAGENET += "--max_start_epoch=10 --lr_lr=1e-06"
FTD = "--expert_epochs=2 --zca --lr_lr=1e-05 --ema_decay=0.9995 --Iteration=5000 --ipc=10"
ATT = "--lr_teacher=1e-2 --buffer_path=buffer --data_path=data"
PAD = (
    "--sort_method=CIFAR10_GraNd --init_ratio=0.75 --add_end_epoch=20 --rm_epoch_first=40 "
    "--rm_epoch_second=60 --rm_easy_ratio_first=0.1 --rm_easy_ratio_second=0.2"
)
EXPERTS = "--train_epochs=50 --num_experts=100"
DATM = "--train_epochs=100 --num_experts=100 --zca --alpha=0.3 --lr_teacher=0.01 --mom=0."
PUBLISHED = {
    buffer: [
        f"--dataset=CIFAR100 --model=ConvNet {EXPERTS} --zca --buffer_path=b --data_path=d",
        f"--dataset=CIFAR100 --model=ConvNet {EXPERTS} --zca --buffer_path=b --rho 0.01",
        f"--dataset=CIFAR10 --model=ConvNet {EXPERTS} --zca --rho_max=0.01 --rho_min=0.01",
        f"--dataset=CIFAR10 --model=ConvNet {EXPERTS} --zca",
        "--dataset=ImageNet --model=ConvNetD4 --train_epochs=50 --num_experts=50",
        f"--dataset=CIFAR10 --model=ConvNet {DATM} --batch_train=256 --rho_max=0.01 --rho_min=0.01",
        f"--dataset=CIFAR10 --model=ConvNet {DATM} --rho_max=0.01 --rho_min=0.01 {PAD}",
        f"--dataset=CIFAR10 --model=ConvNetD3 {EXPERTS} --zca --data_path=data",
        f"--dataset=Tiny --model=ConvNetD4 {EXPERTS} --data_path=data --buffer_path=buffer",
        f"--dataset=ImageNet --subset=imagenette --model=ConvNetD5 {EXPERTS} "
        "--data_path=--data_path=data --buffer_path=buffer",
    ],
    distill_att: [
        f"--dataset=CIFAR100 --ipc=1 {MTT} --expert_epochs=3 --max_start_epoch=20 --zca "
        "--lr_lr=1e-05",
        f"{MTT_IMAGENET} --subset=imagefruit --res=128",
        f"--dataset=CIFAR100 {FTD} --syn_steps=20 --max_start_epoch=40 --lr_img=1000 "
        "--lr_teacher=0.01",
        f"--dataset=CIFAR10 {FTD} --syn_steps=30 --max_start_epoch=20 --lr_img=100 "
        "--lr_teacher=0.001 --buffer_path=../buffer_storage/ --data_path=../dataset/",
        "--dataset=CIFAR10 --ipc=1 --syn_steps=50 --expert_epochs=2 --max_start_epoch=5 "
        "--lr_img=1000 --lr_lr=1e-07 --lr_teacher=0.01",
        "--dataset=CIFAR100 --ipc=50 --syn_steps=80 --expert_epochs=2 --max_start_epoch=40 "
        "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --batch_syn=125 --zca",
        "--dataset=CIFAR10 --ipc=1000 --syn_steps=30 --expert_epochs=2 --max_start_epoch=40 --zca "
        "--lr_img=1000 --lr_lr=1e-05 --lr_teacher=0.01 --ema_decay=0.999 --Iteration=5000 "
        "--project=DD_Test --record_loss=True --num_eval=1 --batch_syn=1000 --eval_mode=M",
        f"--dataset=CIFAR10 --model=ConvNetD3 --ipc=1 --zca --syn_steps=80 --expert_epochs=4 {ATT} "
        "--max_start_epoch=2 --lr_img=1e2 --lr_lr=1e-07 --ema_decay=0.9999 --eval_it=100 "
        "--Iteration=6000",
        f"--dataset=CIFAR100 --model=ConvNetD3 --ipc=50 --zca --syn_steps=80 --expert_epochs=2 "
        f"--max_start_epoch=40 --lr_img=1e3 --lr_lr=1e-05 --ema_decay=0.999 --eval_it=100000 {ATT} "
        "--Iteration=100000 --batch_syn=1200",
        f"--dataset=CIFAR10 --model=ConvNetD3 --ipc=10 --zca --syn_steps=30 --expert_epochs=2 "
        f"{ATT} --max_start_epoch=20 --lr_img=1e04 --lr_lr=1e-04 "
        "--ema_decay=0.9999 --eval_mode='M'",
    ],
}
REFUSED = {
    f"--texture {MTT_IMAGENET} --subset=imagesquawk --res=256": "--texture: distilling textures",
    "--dataset=ImageNet --ipc=1 --syn_steps=10 --expert_epochs=3 --max_start_epoch=10 "
    "--lr_img=10000 --lr_lr=1e-04 --batch_syn=100 --model=ConvNetD4 --teacher_label": (
        "--teacher_label: labels by the expert"
    ),
    "--dataset=CIFAR100 --ipc=50 --lr_y=2. --Momentum_y=0.9 --project=CIFAR100_ipc50 "
    "--threshold=1. --Initial_Step=20": "--Initial_Step: a number of student steps that grows",
}
# Every flag of the argparse of these codes that no published command line above has.
OTHERS = {
    buffer: "--subset --batch_real --dsa --dsa_strategy --decay --l2 --save_interval --alpha "
    "--adaptive --loss_type",
    distill_att: "--num_eval --epoch_eval_train --lr_init --batch_real --batch_train --pix_init "
    "--dsa --dsa_strategy --load_all --no_aug --canvas_size --canvas_samples --max_files "
    "--max_experts --force_save --random_trajectory --cfg --min_start_epoch --device "
    "--skip_first_eva --parall_eva --current_max_start_epoch --expansion_end_epoch "
    "--Initialize_Label_With_Another_Model --Initialize_Label_Model --Initialize_Label_Model_Dir "
    "--Label_Model_Timestamp",
    evaluation: "--dataset --subset --model --eval_mode --epoch_eval_train --batch_real --dsa "
    "--dsa_strategy --data_path --zca --lr_teacher --no_aug --data_dir --label_dir --lr_dir",
}


@pytest.mark.parametrize(
    ("script", "line"), [(script, line) for script, lines in PUBLISHED.items() for line in lines]
)
def test_a_published_command_line_is_taken(script, line):
    resolved = script.parse(shlex.split(line))
    if script is distill_att:
        check_flags(resolved)
    else:
        buffer.check_flags(resolved)
        assert resolved.options.flat == ("rho" in line)
        assert resolved.options.rho == 0.01
    for word in shlex.split(line):
        name, _, value = word.removeprefix("--").partition("=")
        if hasattr(resolved.options, name) and value.isalnum() and not value[0].isdigit():
            assert str(getattr(resolved.options, name)) == value


@pytest.mark.parametrize(("line", "reason"), REFUSED.items())
def test_a_feature_that_is_not_here_is_refused_by_name(line, reason):
    with pytest.raises(UserError, match=f"^{reason}.* is not here; leave it out$"):
        distill_att.parse(shlex.split(line))


@pytest.mark.parametrize(
    ("script", "flag"),
    [(script, flag) for script, flags in OTHERS.items() for flag in flags.split()],
)
def test_every_flag_of_their_scripts_is_known(script, flag):
    """It may want another value, but nobody is told that it does not exist."""
    try:
        script.parse([flag, "1"])
    except UserError as error:
        assert "unrecognized" not in str(error)


def test_what_has_no_effect_gets_a_line_each(capsys):
    resolved = distill_att.parse("--batch_real 512 --lr_init 0.1 --force_save --ipc 1".split())
    check_flags(resolved)
    said = capsys.readouterr().out.splitlines()
    flags = {line.split(":")[0] for line in said if ": no effect here, " in line}
    assert flags == {"--batch_real", "--lr_init", "--force_save"}
    plain = distill_att.parse(["--ipc", "1"])
    check_own_flags("dm", distill_att.parse(["--batch_real", "9", "--method", "dm"]).sources)
    assert "no effect" not in capsys.readouterr().out  # DM's own
    assert {**vars(resolved.options), "batch_real": 0} == {**vars(plain.options), "batch_real": 0}


def test_other_names_are_translated(capsys):
    options = buffer.parse("--rho_max=0.05 --rho_min=0.05".split()).options
    assert (options.flat, options.rho) == (True, 0.05)
    assert "--rho_max: taken as --flat true --rho 0.05" in capsys.readouterr().out
    options = buffer.parse(PAD.split()).options
    assert str(options.by_difficulty).startswith("of each class the easiest 75% at first, all from")
    assert (options.easy_share, options.all_from, options.train_epochs) == (0.75, 20, 100)
    assert (options.drop_after, options.drop_easiest) == ([40, 60], [0.1, 0.2])
    with pytest.raises(UserError, match=r"^--rm_epoch_first: give --rm_epoch_first and --"):
        buffer.parse(["--rm_epoch_first", "3"])
    options = distill_att.parse("--min_start_epoch 5 --max_start_epoch 30".split()).options
    assert options.start_epochs == [5, 30]
    assert evaluation.parse(["--dsa_strategy", "none"]).dsa is False
    options = buffer.parse(["--adaptive", "True", "--loss_type=ce"]).options
    assert options == buffer.parse([]).options


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        (buffer, "--rho_max 0.1 --rho_min 0.2", "rho stays the same"),
        (buffer, "--rho_max 0.1 --rho 0.2", "--rho is given twice, as 0.2 and as 0.1"),
        (buffer, "--rho_max 0.1 --no_flat", "--flat is given twice"),
        (buffer, "--rho_max high", "--rho: 'high' is not a finite number"),
        (buffer, "--rho_max", "--rho takes one value, not 0"),
        (buffer, "--adaptive False", "--adaptive: GSAM that is not adaptive is not here"),
        (buffer, "--loss_type mse", "--loss_type: training experts by another loss"),
        (distill_att, "--min_start_epoch 3", "give --max_start_epoch too"),
        (evaluation, "--dsa_strategy flip", "--no_dsa goes without"),
        (evaluation, "--rho_max 0.1", "--rho_max: flat is not a setting of this script"),
        (distill_att, "--dsa_strategy no", "unknown DSA group 'no'; choices: .*, none"),
    ],
)
def test_what_does_not_go_together_is_one_line(script, line, words):
    with pytest.raises(UserError, match=words):
        script.parse(line.split())


def test_a_configuration_of_datm_is_read_the_same_way(tmp_path, capsys):
    path = tmp_path / "IPC10.yaml"
    path.write_text(
        "dataset: CIFAR10\ndevice: [3]\nipc: 10\nproject: x\nskip_first_eva: True\nzca: True\n"
        "min_start_epoch: 0\nmax_start_epoch: 20\ncurrent_max_start_epoch: 10\n"
        "expansion_end_epoch: 1000\n"
    )
    options = distill_att.parse(["--cfg", str(path), "--method", "datm"]).options
    assert (options.start_epochs, options.ipc, options.flat) == ([0, 20], 10, True)
    assert f"{path}: device: no effect here" in capsys.readouterr().out
    path.write_text("lr_y: 2.0\nMomentum_y: 0.8\nthreshold: 0.9\n")
    options = distill_att.parse(["--cfg", str(path), "--method", "datm"]).options
    assert (options.lr_y, options.mom_y, options.skip_above) == (2.0, 0.8, 0.9)
    path.write_text("Initial_Step: 20\n")
    with pytest.raises(UserError, match=r"IPC10\.yaml: Initial_Step: a number of student steps"):
        distill_att.parse(["--cfg", str(path)])
