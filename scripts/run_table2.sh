#!/usr/bin/env bash
# Table 2 of the paper, CIFAR-10, CIFAR-100 and Tiny ImageNet: experts, distillation, evaluation,
# and docs/results.md. Estimated at some 930 GPU hours of an A100; CIFAR10/ipc1 alone takes 1.4;
# --dry-run says how much here. Further flags are those of run_all.sh: --rivals adds the
# other methods where they have rows. The same call again goes on where the last one stopped.
#
#     bash scripts/run_table2.sh --dry-run
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --report \
    --only CIFAR10 --only CIFAR100 --only Tiny "$@"
