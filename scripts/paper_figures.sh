#!/usr/bin/env bash
# The runs behind the paper's figures, queued as those of run_all.sh, and the figures. The same call
# again goes on where the last one stopped.
#
#     bash scripts/paper_figures.sh --dataset digits    on two CPU cores: 8 minutes
#     bash scripts/paper_figures.sh --dataset CIFAR10   as in the paper; --dry-run shows the cost
#
# Exit status: 0 all runs are done and drawn, 1 some are not, 2 bad input.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
exec .venv/bin/python -m scripts.figures.plan --run "$@"
