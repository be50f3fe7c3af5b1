#!/usr/bin/env bash
# On a machine with a GPU: the cuda tests and the benchmarks, within ten minutes.
#
#     bash scripts/gpu_session.sh OUT [PYTHON]
#
# leaves OUT/session.tgz, packed again after every step: logs, JSON and nvidia-smi. What does not end
# in its time is cut off and the rest goes on, the most important first. PYTHON (default: that of
# .venv, else python3) needs the packages of requirements.txt but wandb, and pytest; no data set.
set -uo pipefail
out=$(realpath -m "${1:?name a folder for the results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${2:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
logs=$(mktemp -d)
mkdir -p "$out"

step() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$logs/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || echo "== $name failed or ran out of its $seconds s"
    tar -C "$logs" -czf "$out/session.tgz" .
}

bench() {
    local name=$1 seconds=$2
    shift 2
    step "$name" "$seconds" "$python" scripts/bench.py "$@" --out "$logs/$name.json"
}

step nvidia-smi 10 nvidia-smi
bench unroll_cifar10_ipc1 130 unroll --ipc 1 --syn_steps 80 --repeats 5
bench evaluation_ipc1 80 evaluation --ipc 1 --epochs 100 --repeats 3
step tests 110 "$python" -m pytest -v --tb=short -m cuda \
    tests/test_unroll.py tests/test_training.py tests/test_batches.py
# The twin's graph of 20 steps on 1,000 images may not fit: then it drops out.
bench unroll_cifar100_ipc10 100 unroll --classes 100 --ipc 10 --syn_steps 20 --repeats 3 \
    --variants twin short long
bench peak_cifar100_ipc10 50 unroll --classes 100 --ipc 10 --syn_steps 20 --micro_batch 100 \
    --variants long --peak_only
bench experts 90 experts --networks 4 --steps 50 --repeats 3
