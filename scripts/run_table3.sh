#!/usr/bin/env bash
# Table 3 of the paper, the ImageNet subsets: experts, distillation, evaluation, and
# docs/results.md. Estimated at some 270 GPU hours of an A100; the IPC 1 rows alone take 25;
# --dry-run says how much here. Further flags are those of run_all.sh: --rivals adds the
# other methods where they have rows. The same call again goes on where the last one stopped.
#
#     bash scripts/run_table3.sh --dry-run
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --report \
    --only ImageNet/imagenette --only ImageNet/imagewoof \
    --only ImageNet/imagefruit --only ImageNet/imagemeow "$@"
