#!/usr/bin/env bash
# Every row of the table, from the experts to the evaluation, queued over the visible GPUs. The same
# call again goes on where the last one stopped.
#
#     bash scripts/run_all.sh --dry-run             what would be run, and what it costs
#     bash scripts/run_all.sh --only CIFAR10/ipc1   some rows only; --help for the other flags
#     bash scripts/run_all.sh --smoke               all of it in miniature, minutes on a CPU
#
# Exit status: 0 all cells are done, 1 some are not, 2 bad input.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
exec .venv/bin/python -m scripts.plan --run "$@"
