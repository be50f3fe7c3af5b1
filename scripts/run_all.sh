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
queue=$(mktemp -d)
trap 'rm -rf "$queue"' EXIT
trap 'echo "interrupted: the same command goes on from here"; exit 130' INT
trap 'echo "interrupted: the same command goes on from here"; exit 143' TERM

.venv/bin/python -m scripts.plan --queue "$queue" "$@"
if [ ! -e "$queue/rows.tsv" ]; then
    exit 0 # --dry-run, --list or --help
fi

workers=$(find "$queue/slots" -type f | wc -l)
threads=$(($(nproc) / workers))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# Rows follow when no experts are under way any more: with several GPUs an expert cell has them all.
for cells in experts rows; do
    xargs -r -d '\n' -n 1 -P "$workers" bash scripts/run_cell.sh "$queue" <"$queue/$cells.tsv"
done
status=0
.venv/bin/python -m scripts.summary "$queue" || status=$?
if [ -e "$queue/report" ]; then
    mapfile -t report <"$queue/report"
    .venv/bin/python -m scripts.report "${report[0]}" --out "${report[1]}"
fi
exit "$status"
