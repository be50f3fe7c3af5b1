#!/usr/bin/env bash
# On a machine with a GPU: the cuda tests and the benchmarks, within ten minutes.
#
#     bash scripts/gpu_session.sh OUT [PYTHON]
#
# leaves OUT/session.tgz, packed again after every step (scripts/gpu). PYTHON (default: that of
# .venv, else python3) needs the packages of requirements.txt but wandb, and pytest; no data set.
set -euo pipefail
out=$(realpath -m "${1:?name a folder for the results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${2:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
exec "$python" -m scripts.gpu measure "$out" --seconds 600
