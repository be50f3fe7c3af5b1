#!/usr/bin/env bash
# The whole method in some minutes on two CPU cores: experts, distillation at one image per class
# and evaluation on the digits that come with scikit-learn. A second call re-uses what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
run=results/digits/ConvNetD2/ipc1/quickstart

.venv/bin/python buffer.py --dataset digits
.venv/bin/python distill_att.py --dataset digits --ipc 1 --run_name quickstart
.venv/bin/python eval.py --distilled "$run/distilled_best.pt" --random --full \
    --epoch_eval_train 300 --epoch_full_train 15
echo
echo "pictures: $run/images_0.png (before) and $run/images_best.png (distilled)"
echo "files:    $run/, experts in buffers/digits/ConvNetD2/"
