#!/usr/bin/env bash
# A study: runs on digits that differ by what is compared, and a page about them under docs/. For
# two CPU cores; the same call again goes on where the last one stopped.
#
#     bash scripts/run_study.sh digits       every method, 8x8 and 32x32, IPC 1 and 10, three seeds
#     bash scripts/run_study.sh exactness    exact gradients beside truncated and approximate ones
#     bash scripts/run_study.sh lengths      ATT beside the fixed length at several N_S
#     bash scripts/run_study.sh --help       the other flags
#
# Exit status: 0 all runs are done, 1 some are not, 2 bad input.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
exec .venv/bin/python -m scripts.studies --run "$@"
