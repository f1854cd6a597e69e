#!/usr/bin/env bash
# What a CPU cannot show, in under eight minutes on one GPU of 80 GB without a network: what the machine offers, the tests
# marked cuda, and steps at LLaVA-1.5-7B's shapes. README.md says what is measured. Results are written as they come to
# $OUT (default: results/ beside this file). `--dry` runs each part at tiny shapes on the CPU.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
out="${OUT:-$here/results}"
dry="${1:-}"
case "$dry" in "" | --dry) ;; *) echo "usage: OUT=FOLDER $0 [--dry]" >&2; exit 2 ;; esac
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3

export PYTHONPATH="$root" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline MMPRUNE_CACHE="$scratch/cache"
if compgen -G "$here/wheels/*.whl" >/dev/null; then
    echo "installs from $here/wheels:" && ls "$here/wheels"
    "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/packages" "$here"/wheels/*.whl || exit 2
    export PYTHONPATH="$root:$scratch/packages"
else
    echo "uses what is installed for $python"
fi
"$python" -m pip list --format=freeze 2>/dev/null >"$out/packages.txt"

failed=0
slack=1
part() { # NAME SECONDS COMMAND...: within so many seconds, its output to NAME.txt; what comes after runs all the same
    local name="$1" limit="$(($2 * slack))" began="$SECONDS" code=0
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt" || code="${PIPESTATUS[0]}"
    [ "$code" = 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$out/parts.txt"
}

: >"$out/parts.txt"
if [ -n "$dry" ]; then
    slack=3 # a CPU may have other work
    export MMPRUNE_TEST_DEVICE=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    only=(-k "not strategy") # each of these runs starts Python anew; the slow tests have them, on two processes
    doctor=(trainer.accelerator=cpu)
else
    only=()
    doctor=(trainer.accelerator=cuda)
    "$python" -c "import xdist" 2>/dev/null && only=(-n 4)
fi
part doctor 60 "$python" -m mmprune_train task=doctor "runs_dir=$out/runs" run_id=gpu "${doctor[@]}"
part tests 190 "$python" -m pytest -v -m cuda -p no:cacheprovider "--junitxml=$out/tests.xml" "$root/tests/gpu" "${only[@]}"
part bench 200 "$python" "$here/measure.py" --out "$out" ${dry:+--dry --repeats 1}

echo
cat "$out/parts.txt"
[ -f "$out/bench.md" ] && cat "$out/bench.md"
exit "$failed"
