#!/usr/bin/env bash
# ATT beside the fixed length on digits at 32x32 pixels: three N_S with three seeds each; at N_S 20
# the four architectures too. An hour on two CPU cores. The same call again goes on where the last
# one stopped; `python -m scripts.report` makes the tables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
export OMP_NUM_THREADS=1
python=.venv/bin/python
data="--dataset digits --res 32 --model ConvNetW32"

$python buffer.py $data
for seed in 0 1 2; do
    for syn_steps in 20 10 40; do
        for length in att fixed; do
            run="study_${length}_NS${syn_steps}_seed$seed"
            flags="--length $length --syn_steps $syn_steps --seed $seed --run_name $run"
            command="$python distill_att.py $data --ipc 1 --lr_img 300 --Iteration 100"
            command+=" --eval_it 50 --num_eval 3 --log_distances 10 $flags"
            if [ "$syn_steps" = 20 ]; then
                set="results/digits/ConvNetW32/ipc1/$run/distilled_best.pt"
                command+=" && $python eval.py --distilled $set --num_eval 1"
                command+=" --epoch_eval_train 300 --model ConvNet ResNet18 VGG11 AlexNet"
            fi
            echo "$command"
        done
    done
done | xargs -d '\n' -P 2 -I {} bash -c '{}'
