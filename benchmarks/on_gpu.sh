#!/usr/bin/env bash
# The GPU figures of docs/performance.md on the machine at hand, stage by stage.
#
#   benchmarks/on_gpu.sh OUT                      all stages; the last one alone takes half an hour of one GPU
#   benchmarks/on_gpu.sh OUT kernels step serve   some
#
# Each stage writes OUT/<stage>.log and JSON beside it; what a stage found outlives the next one's failure. Stages that time
# something want the machine for themselves. `quality` and `serve` take build/demo (qdit-export --bits w4a8 --output build/demo),
# `serve` wants `pip install 'qdit[serve]' locust`, `peers` torchao. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give a folder for logs and figures}
shift
known="tests kernels step peers quality serve plugin cpu search curves"
stages=${*:-$known}
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 NO_COLOR=1 COLUMNS=${COLUMNS:-180}
export QDIT_CACHE=${QDIT_CACHE:-$out/cache}

command_of() { echo "import sys; sys.argv[0] = 'qdit-$1'; from qdit.cli import $1_command as run; run()"; }
qdit() { local name=$1; shift; $python -c "$(command_of "$name")" "$@"; }
xl() { qdit bench random:DiT-XL/2 --device cuda --batch 16,64 --runs 5 --seconds 3 "$@"; }
integer=(--bits w4a8 --activation-group-size token --scale-format integer)
judged=(--images 10000 --batch 800 --device cuda --fast --uniform "")

tests() { # the kernels compile in about a second a variant: pytest-xdist's `-n` helps
    $python -m pytest -m gpu tests/engines tests/calibrate tests/serve -rf --timeout 200 ${PYTEST_OPTIONS:-}
}
kernels() {
    $python benchmarks/kernels.py --rows 512,4096,16384 --tune --parts --table "$out/sm_90a.json" --json "$out/kernels.json" &&
        mkdir -p "$QDIT_CACHE/tiles" && gpu=$($python -c 'from qdit.engines.kernels.driver import gpu
from qdit.engines.kernels.tuning import own_table
print(own_table(gpu(0)))') && cp "$out/sm_90a.json" "$gpu" # the stages to come run on these tiles
}
step() {
    xl "${integer[@]}" --targets torch-compile,torch-bf16,torch-quantized --json "$out/step-token.json"
    xl --bits w4a8 --targets torch-compile,torch-quantized --json "$out/step-g128.json"
}
peers() { # torchao compiles for minutes: of 28 blocks, the first four
    xl --blocks 4 "${integer[@]}" --targets torch-compile,torch-quantized,torchao-int8 --json "$out/peers.json"
}
quality() { $python benchmarks/engine_quality.py build/demo --json "$out/quality.json"; }
serve() { # one request at a time serves a tenth of the rows: its window ends by the clock
    $python benchmarks/serve_load.py build/demo --engine torch --device cuda --max-batch 64 --users 64 --rounds 1 \
        --policies step-mixed,single --warmup 4000 --rows 60000 --seconds 12 --seconds-alone 2 --json "$out/serve.json"
}
plugin() { $python benchmarks/tensorrt_plugin.py --rows 512,4096,16384 --json "$out/plugin.json"; }
export_found() { # bits, budget
    qdit export --bits "$1" --search sensitivity --budget "effective-bits=$2" --device cuda --fid-samples 0 --output "$out/found-$1-$2"
}
search() {
    for bits in w4a8 w3a8; do
        for budget in g128 g64; do export_found $bits $budget; done
        $python benchmarks/search_quality.py --bits $bits "${judged[@]}" --uniform 128,64 \
            --plans "$out/found-$bits-g128/plan.json,$out/found-$bits-g64/plan.json" --json "$out/search-$bits.json"
    done
}
cpu() { # ONNX Runtime on two cores, CORES of them: no GPU is used, but such machines have AMX
    pinned() { taskset -c "${CORES:-0,1}" "$python" -c "$(command_of bench)" random:DiT-XL/2 --device cpu --threads 2 "$@"; }
    pinned --blocks 4 --batch 1,8 "${integer[@]}" --targets fp32,onnxruntime,ort-dynamic --json "$out/cpu-integer.json"
    pinned --blocks 4 --batch 1,8 --bits w8a8 --group-size channel --activation-group-size token --targets fp32,onnxruntime \
        --json "$out/cpu-w8.json"
    for bits in w4a8 w8a8; do
        pinned --blocks 4 --batch 1,8 --bits $bits --targets fp32,onnxruntime --json "$out/cpu-g128-$bits.json"
    done
    pinned --blocks 4 --batch 1,8 --bits w4a8 --targets fp32,onnxruntime --cpu-kernels onnxruntime --json "$out/cpu-g128-theirs.json"
    pinned --batch 1 --bits w4a8 --targets fp32,onnxruntime --json "$out/cpu-whole-g128.json"
    taskset -c "${CORES:-0,1}" $python benchmarks/cpu_products.py --json "$out/cpu-products.json"
    pinned --batch 1 "${integer[@]}" --targets fp32,onnxruntime --json "$out/cpu-whole.json"
}
curves() { # a process on each GPU that there is
    qdit export --bits w4a8 --search evolutionary --device cuda --fid-samples 0 --output "$out/evolutionary"
    qdit export --bits w4a8 --search sensitivity --search-refine 1 --device cuda --fid-samples 0 --output "$out/sensitivity"
    $python benchmarks/search_curves.py --evolutionary "$out/evolutionary" --sensitivity "$out/sensitivity" --device cuda \
        --json "$out/curves.json" --plot "$out/search-curves.svg"
}

for stage in $stages; do
    declare -F "$stage" > /dev/null || { echo "no stage $stage; there are $known"; exit 2; }
done
for stage in $stages; do
    started=$SECONDS
    "$stage" > "$out/$stage.log" 2>&1
    echo "$stage: exit code $?, $((SECONDS - started)) s, $out/$stage.log"
done
