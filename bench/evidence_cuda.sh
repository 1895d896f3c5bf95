#!/bin/bash
# What is shown of the CUDA lane, in one command, on a machine with an NVIDIA GPU:
#
#     bench/evidence_cuda.sh RESULTS
#
# It builds the lane for that GPU, as it is and again with the row variants of sweeps and the planted faults. Then it
# runs all tests of the lane; compute-sanitizer; the exact shapes, with sweeps of rows and threads; and, on a file of
# random weights with the shapes of Qwen3.6-35B-A3B, prefill and decode, every kernel against its roofline, and the
# verdicts on splits that win by themselves. Last come drafts, forced and by the block that drafts, on files that count
# with the shapes of that model and of half of Qwen3.8-27B. RESULTS gets summary.txt, shapes.json, roofline.json,
# roofline.svg, splits.txt, drafts.txt and logs.tar.gz. It needs nvcc, cmake, ninja, and a Python with pybind11, numpy, pytest and gguf (torch,
# pytest-xdist help). LLAMA_BENCH names a built llama-bench, which is then measured beside.
#
# Environment:
#   SKIP    steps to leave out, of: build tests sanitize shapes synthetic roofline splits drafts
#   PYTHON  the interpreter (python3)          WORK    folder for the build and the model (a temporary one)
#   ARCH    CUDA architecture (90)             LAYERS  of the model (40, 22.7 GB; 4 take 3.2 GB)
#   DEVICE  cuda, or cpu to try the script     SHAPES  cases of `zincmetal bench` (35b)
#   SPLITS  rows of the tuning table to try, as `--set` takes them
#   SHRINK  options for the files that count: "--tiny --layers 4" to try the script
#   PATIENCE  how many times longer than on 16 cores and an H100 a step may take (1)
set -u
results=$(realpath -m "${1:?usage: bench/evidence_cuda.sh RESULTS}")
root=$(realpath "$(dirname "$0")/..")
python=${PYTHON:-python3} device=${DEVICE:-cuda} layers=${LAYERS:-40} skip=" ${SKIP:-} "
work=$(realpath -m "${WORK:-$(mktemp -d)}")
logs=$work/logs model=$work/synthetic-$layers.gguf
mkdir -p "$results" "$logs"
rm -rf "$logs"/*
: > "$results/summary.txt"
cd "$root" || exit 1
export ZINCMETAL_DEVICE=$device PYTHONUNBUFFERED=1

say() { echo "$@" | tee -a "$results/summary.txt"; }

# step NAME SECONDS COMMAND...: runs it with a limit and a log, says how it ended.
step() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    case $skip in *" $name "*) say "$name: skipped" && return ;; esac
    timeout $((limit * ${PATIENCE:-1})) "$@" > "$logs/$name.log" 2>&1
    status=$?
    say "$name: $([ $status = 0 ] && echo passed || echo "FAILED with $status") in $((SECONDS - began)) s"
}

# show NAME LINES: the end of a step's log.
show() { [ -f "$logs/$1.log" ] && tail -n "$2" "$logs/$1.log" | tee -a "$results/summary.txt"; }

# configure FOLDER OPTION...: a build of both lanes.
configure() {
    local folder=$1
    shift
    cmake -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DPython_EXECUTABLE=$(command -v "$python")" \
        "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" "$@"
}

build() {
    local cuda=()
    [ "$device" = cuda ] && cuda=(-DZINCMETAL_CUDA=ON "-DZINCMETAL_CUDA_ARCHITECTURES=${ARCH:-90}")
    configure "$work/product" "${cuda[@]}" || return
    configure "$work/sweep" "${cuda[@]}" -DZINCMETAL_SWEEP=ON -DZINCMETAL_PROBES=ON || return
    ninja -C "$work/product" &
    ninja -C "$work/sweep" "_core_$device" && wait $! || return
    for kind in product sweep; do
        mkdir -p "$work/$kind-site" && cp -r python/zincmetal "$work/$kind-site/" || return
        cp "$work"/product/_host*.so "$work/$kind-site/zincmetal/" || return
        for from in product "$kind"; do  # of a sweep the device's module alone was built
            cp "$work/$from"/_core_*.so "$work/$kind-site/zincmetal/" || return
        done
    done
}

# on KIND COMMAND...: with that build's package, where there is one.
on() {
    local site=$work/$1-site
    shift
    [ -d "$site" ] && export PYTHONPATH=$site:$PYTHONPATH
    "$@"
}

tests() {
    local many=()
    "$python" -c 'import xdist' 2> /dev/null && many=(-n 8)
    on product "$python" -m pytest -q "${many[@]}" -k "$device" tests
}

sanitize() { on sweep "$python" bench/sanitize.py --out "$logs/sanitizer" --limit 150; }

# bench FILE OPTION...: measures, writes the report as JSON, and prints it.
bench() {
    local file=$1
    shift
    "$python" -m zincmetal bench "$@" -o json > "$file" || return
    "$python" -c 'import sys, pathlib; from zincmetal.measure import report as r
print(*r.lines(r.read(pathlib.Path(sys.argv[1]))), sep="\n")' "$file"
}

shapes() { on sweep bench "$results/shapes.json" --case "${SHAPES:-35b}" --sweep; }

synthetic() { [ -f "$model" ] || on product "$python" bench/synthetic.py "$model" --layers "$layers"; }

roofline() {
    local peer=()
    [ -n "${LLAMA_BENCH:-}" ] && peer=(--versus llama.cpp --llama-bench "$LLAMA_BENCH")
    on product bench "$results/roofline.json" "$model" -d 0,512,4096 --profile --svg "$results/roofline.svg" "${peer[@]}"
}

splits() {
    local row
    for row in ${SPLITS:-mul_mv_add_q8_0=rows:1 moe_mv_gated_q4_k=threads:128}; do
        on sweep "$python" -m zincmetal bench compare "$model" --set "$row" -- -p 0 -n 128
        [ $? -le 1 ] || return # 1 is the verdict revert
    done | tee "$results/splits.txt"
}

# Files of 22.7 and 9.4 GB, written at once, and gone afterwards.
drafts() {
    local mixture=$work/counting-35b.gguf dense=$work/counting-27b.gguf status=0
    local kind=(--model qwen3.8-27b --quant Q4_K_M --layers 32)
    # shellcheck disable=SC2086  # several options
    on product "$python" bench/synthetic.py "$mixture" --layers "$layers" --draft --counting ${SHRINK:-} &
    on product "$python" bench/synthetic.py "$dense" "${kind[@]}" --draft --counting ${SHRINK:-} && wait $! || return
    on product speculate "$mixture" 192 --rates 0,0.5,0.75,0.9 && on product speculate "$dense" 128 || status=1
    rm -f "$mixture" "$dense"
    return $status
}

# speculate FILE TOKENS OPTION...: measures its drafts, and appends the tables.
speculate() {
    local file=$1 tokens=$2
    shift 2
    set -o pipefail
    "$python" bench/speculate.py "$file" --mtp --lengths 1,3 --rounds 3 --tokens "$tokens" "$@" |
        sed "1i $(basename "$file" .gguf)" | tee -a "$results/drafts.txt"
}

export -f configure build on tests sanitize bench shapes synthetic roofline splits drafts speculate
export python device layers work logs model results PYTHONPATH=$root/tests${PYTHONPATH:+:$PYTHONPATH}

step build 300 bash -c build
step synthetic 200 bash -c synthetic & # one core, meanwhile
[ "$device" = cuda ] && step sanitize 200 bash -c sanitize &
step tests 240 bash -c tests
wait # nothing runs beside what is timed
step roofline 240 bash -c roofline
step shapes 150 bash -c shapes
step splits 300 bash -c splits
[ -n "${WORK:-}" ] || rm -f "$model" # the disk may not hold all
rm -f "$results/drafts.txt"
step drafts 300 bash -c drafts

tar -C "$work" -czf "$results/logs.tar.gz" logs
show tests 3
show sanitize 20
show shapes 70
show roofline 60
show splits 20
show drafts 80
[ -n "${WORK:-}" ] || rm -rf "$work"
! grep -q FAILED "$results/summary.txt"
