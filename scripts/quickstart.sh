#!/usr/bin/env bash
# The whole method in some minutes on two CPU cores: experts, distillation at one image per class
# and evaluation on the digits that come with scikit-learn. A second call re-uses what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
run=results/digits/ConvNetD2/ipc1/quickstart

.venv/bin/python buffer.py --dataset digits
# On the way one short network each says which set is the better one, the first or the last: the
# evaluation that counts is that of eval.py.
.venv/bin/python distill_att.py --dataset digits --ipc 1 --run_name quickstart \
    --eval_it 200 --num_eval 1 --epoch_eval_train 100
.venv/bin/python eval.py --distilled "$run/distilled_best.pt" --random --full \
    --num_eval 3 --epoch_eval_train 300 --epoch_full_train 15
echo
echo "pictures: $run/images_0.png (before) and $run/images_best.png (distilled)"
echo "files:    $run/, experts in buffers/digits/ConvNetD2/"
