#!/usr/bin/env bash
# Table 1 of the paper, cross-architecture generalisation on CIFAR-10: experts, distillation,
# evaluation, and docs/results.md. Estimated at some 410 GPU hours of an A100, nearly all of them
# for IPC 50; --dry-run says how much here. Further flags are those of run_all.sh: --rivals adds
# the other methods where they have rows. The same call again goes on where the last one
# stopped.
#
#     bash scripts/run_table1.sh --dry-run
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --report \
    --only CIFAR10/ipc10 --only CIFAR10/ipc50 "$@"
