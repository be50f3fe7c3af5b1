#!/usr/bin/env bash
# ATT beside the fixed length on digits, three seeds each. At 32x32 pixels: several N_S, and the
# four architectures at one of them. At 8x8: what else could explain a difference from the paper,
# the initial images and the number of experts, with the other settings of paper_figures.sh, and
# longer runs. For two CPU cores; the same call again goes on where the last one stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
export OMP_NUM_THREADS=1
python=.venv/bin/python
large="--dataset digits --res 32 --model ConvNetW32"
small="--dataset digits --syn_steps 20 --num_eval 2 --epoch_eval_train 100"
short="$small --Iteration 150 --eval_it 50"

# The command of a distillation called study_$1, with the flags behind it.
distil() {
    echo "$python distill_att.py --ipc 1 --log_distances 10 --run_name study_$*"
}

commands() {
    for seed in 0 1 2; do
        for length in att fixed; do
            same="--length $length --seed $seed"
            for syn_steps in 20 10 30; do
                run="${length}_NS${syn_steps}_seed$seed"
                command=$(distil "$run" "$large" --lr_img 300 --Iteration 60 --eval_it 30 \
                    --num_eval 3 --syn_steps "$syn_steps" "$same")
                if [ "$syn_steps" = 20 ]; then
                    set="results/digits/ConvNetW32/ipc1/study_$run/distilled_best.pt"
                    command+=" && $python eval.py --distilled $set --num_eval 1"
                    command+=" --epoch_eval_train 200 --model ConvNet ResNet18 VGG11 AlexNet"
                fi
                echo "$command"
            done
            distil "${length}_noise_seed$seed" "$short" --pix_init noise "$same"
            distil "${length}_experts2_seed$seed" "$short" --max_experts 2 "$same"
        done
    done
    for length in att fixed; do
        same="--Iteration 1000 --eval_it 250 --length $length"
        distil "${length}_long_seed0" "$small" "$same"
        distil "${length}_long_noise_seed0" "$small" --pix_init noise "$same"
    done
}

$python buffer.py --dataset digits
$python buffer.py $large
commands | xargs -d '\n' -P 2 -I {} bash -c '{}'
