# Sourced by run_all.sh and paper_figures.sh: let a module of Python plan cells, as scripts/plan
# does, and work on them. What the plan wrote lies in the folder $queue until the script ends. Where
# it has written nothing, since it was asked for a dry run, the script ends here.
#
#     source scripts/queue.sh scripts.plan [flags ...]

queue=$(mktemp -d)
trap 'rm -rf "$queue"' EXIT
trap 'echo "interrupted: the same command goes on from here"; exit 130' INT
trap 'echo "interrupted: the same command goes on from here"; exit 143' TERM

.venv/bin/python -m "$1" --queue "$queue" "${@:2}"
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
