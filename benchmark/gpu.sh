#!/usr/bin/env bash
# What this project measures on a machine with GPUs, in parts with a limit each. Results and logs lie in FOLDER as soon
# as they are there: a run that is cut keeps what it has.
#
#   benchmark/gpu.sh FOLDER                                 every part of one GPU, 80 minutes at most
#   benchmark/gpu.sh FOLDER resident drawn:240              these parts, the second for no more than 240 seconds
#   CUDA_VISIBLE_DEVICES=0,1 benchmark/gpu.sh FOLDER mesh   two GPUs, up to 10 minutes
#
# FOLDER/hardware.json is the machine's profile: measured first, unless it is there. Two parts at a time need a GPU, a
# folder and a share of the cores (taskset) each.
set -u
if [ $# -eq 0 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1"
O=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
HW=$O/hardware.json
CORES=$(env -u OMP_NUM_THREADS nproc)
ONE_GPU=(tests:300 codes:90 ceilings:90 layers:80 resident:480 reservation:250 loading:140 drawn:440 users:300 experts:300 experts-whole:770 experts-parts:440 rows-16:300 rows-4:270 row-70b:110 paired:330)

# A command's output goes to FOLDER/NAME.log and .err; it is ended by TERM, on which benchmarks write what they have.
step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    timeout -k 20 "$seconds" "$@" >"$O/$name.log" 2>"$O/$name.err"
    echo "$name: exit code $?, $((SECONDS - started)) s; $(tail -qn 1 "$O/$name.log" "$O/$name.err" | tr '\n' ' ' | cut -c1-300)"
}

bench() { # NAME SECONDS MODULE ARGUMENTS...
    local name=$1 seconds=$2 module=$3
    shift 3
    step "$name" "$seconds" python3 -m "benchmark.$module" --hardware "$HW" --output "$O/$name.json" "$@"
}

# Some count what is free on the GPU, which they must have to themselves.
tests() {
    step tests-alone 100 python3 -m pytest -v -rP --tb=short -n 0 -m "gpu and alone" tests/calibrate tests/engine
    step tests "$(($1 - 100))" python3 -m pytest -v --tb=short -n 8 --dist worksteal -m "gpu and not slow and not alone" tests/kernels tests/engine tests/memory tests/calibrate
}

codes() {
    step codes "$1" python3 -m benchmark.kernel_tuning --sections gemm shared coded --seconds "$(($1 * 2 / 3))" --output "$O/codes.jsonl"
}

# What a resident model is bound by: products at full power, and reading the cache of single tokens.
ceilings() {
    step layer-products "$(($1 / 2))" python3 -m benchmark.layer_products --output "$O/layer-products.json"
    step decode "$(($1 / 2))" python3 -m benchmark.kernel_tuning --sections short --seconds "$(($1 / 2))" --processes 12 --output "$O/decode.jsonl"
}

# What a plan's prices are for: attention and products of models that a profile has not measured.
layers() {
    step layers "$1" python3 -m benchmark.kernel_tuning --sections heads products --seconds "$(($1 - 15))" --processes 12 --output "$O/layers.jsonl"
}

# A model that lies on the GPU; all host; at equal memory with fewer bits; few sequences; long contexts; prompts that come
# while others decode.
resident() { # SECONDS
    local end=$((SECONDS + $1))
    job() { # NAME SECONDS MODULE ARGUMENTS...
        [ "$((SECONDS + $2 / 2))" -ge "$end" ] || bench "$@"
    }
    job llama-3-8b 100 gpu_busy --model llama-3-8b
    job qwen3-0.6b 40 gpu_busy --model qwen3-0.6b --lengths 20 60
    local bits=(gpu_busy --model llama-3-8b --prompts 500 --passes 0)
    job llama-3-8b-28-4-4 60 "${bits[@]}" --gpu-memory 28GiB --weight-bits 4 --cache-bits 4
    job llama-3-8b-28-4-16 60 "${bits[@]}" --gpu-memory 28GiB --weight-bits 4
    job llama-3-8b-28-16-16 50 "${bits[@]}" --gpu-memory 28GiB
    job llama-3-8b-16-4-16 60 "${bits[@]}" --gpu-memory 16GiB --weight-bits 4
    job opt-6.7b-4 30 gpu_busy --model opt-6.7b --prompts 4 --lengths 512 512 --weight-bits 4
    job opt-6.7b-16 30 gpu_busy --model opt-6.7b --prompts 4 --lengths 512 512
    job context-4096 50 gpu_busy --model llama-3.1-8b --prompts 31 --lengths 4096 4096 --passes 8
    job context-16384 50 gpu_busy --model llama-3.1-8b --prompts 7 --lengths 16384 16384 --passes 8
    job mixed 60 mixed_passes --model llama-3-8b --prompts 700 --block 400 --max-tokens 200 --piece-tokens 2048 0
}

reservation() {
    bench reservation "$1" reservation --model llama-3-8b --dtype bfloat16 --gpu-memory 20GiB --cpu-memory 4GiB --requests 4001 --sudden 67
}

loading() {
    bench loading "$1" loading --model llama-3-8b --formats bf16 --weight-bits 8 4 16 --starts new again cold --folder "$(mktemp -d)"
}

# The seed has never been used to fit anything. Plans and kernels first, in all cores, so that a setting takes its load,
# a warm-up and its job: 26 of them 70 s and then 13 s each on a host with 16 cores that does nothing else.
drawn() {
    local end=$((SECONDS + $1)) runs=(python3 -m benchmark.policy_runs "$O/drawn.jsonl" --hardware "$HW" --seed 11 --count 26)
    step drawn-plans 120 "${runs[@]}" --plan "$O/drawn-plans.json" --processes "$CORES"
    step drawn "$((end - SECONDS - 10))" "${runs[@]}" --plans "$O/drawn-plans.json" --seconds "$((end - SECONDS - 20))"
    step drawn-errors 20 python3 -m benchmark.pass_errors "$O/drawn.jsonl" --hardware "$HW"
}

# Models of a few layers: predicted against measured. Experts that are hit.
experts() {
    local end=$((SECONDS + $1)) runs=(python3 -m benchmark.policy_runs "$O/experts.jsonl" --hardware "$HW" --few-layers)
    step experts-plans 50 "${runs[@]}" --plan "$O/experts-plans.json" --processes 6
    step experts "$((end - SECONDS - 40))" "${runs[@]}" --plans "$O/experts-plans.json" --seconds "$((end - SECONDS - 52))" --limit 75
    step experts-errors 10 python3 -m benchmark.pass_errors "$O/experts.jsonl" --hardware "$HW"
    step hit-experts 25 python3 -m benchmark.hit_experts --hardware "$HW" --sequences 9 40 --output "$O/hit-experts.json"
}

# Jobs of public models in 24 GiB and 116 GiB, one block each. "MODEL/4": a fourth of the layers in a fourth of the host's
# memory and of the time; plans of all their layers are made at once before. With the seconds that each needs; what finds
# less than two thirds of them is left out.
expert-jobs() { # SECONDS MODEL[/SHARE]:SECONDS...
    local end=$((SECONDS + $1)) job name share seconds left parts
    parts=$(printf '%s\n' "${@:2}" | sed -n 's,/.*,,p')
    [ -z "$parts" ] || step expert-plans 60 python3 -m benchmark.expert_runs $parts --hardware "$HW" --plan "$O/plans.json"
    for job in "${@:2}"; do
        seconds=${job#*:} name=${job%:*} left=$((end - SECONDS))
        share=$([ "$name" = "${name#*/}" ] && echo 1 || echo "${name#*/}")
        [ "$left" -ge "$((seconds * 2 / 3))" ] || continue
        step "${name/\//-}" "$((left < seconds ? left : seconds))" python3 -m benchmark.expert_runs "${name%/*}" \
            --share "$share" --hardware "$HW" $([ -s "$O/plans.json" ] && echo --plans "$O/plans.json") \
            --output "$O/expert-runs.jsonl" --trace "$O/trace"
    done
}

experts-whole() {
    expert-jobs "$1" qwen3-30b-a3b:420 gpt-oss-120b:330 deepseek-v2-lite:60
}

# What no run has shown comes first. Half of gpt-oss's layers are windowed: its part has an even number. Of the seconds,
# 10 to 25 are for imports and loading, up to 15 for kernels and the block that warms up.
experts-parts() {
    expert-jobs "$1" qwen3-235b-a22b/8:85 deepseek-v2-lite:45 glm-4.5-air/6:80 gpt-oss-120b/3:120 qwen3-30b-a3b/4:80 mixtral-8x7b/8:50
}

# A published row, placed by hand and as the engine chooses, in one run: one SHARE-th of the layers, so that both load
# and run in 66 to 79 s (whole, OPT-30B loads in 27 s and runs in 45 to 95, Llama-3-70B in 104 and 117).
row() { # SCENARIO SHARE PROMPTS HOST_GIB SECONDS
    step "row-$1" "$5" python3 -m benchmark.suite --scenarios "$1" --chosen --share "$2" --num-prompts "$3" \
        --set "cpu_memory=\"$4GiB\"" "hardware=\"$HW\"" --output "$O/row-$1.json"
}

rows-16() {
    row opt-30b-16-16 2 92 118 "$(($1 / 2))"
    row opt-30b-16-4 3 300 118 "$(($1 / 2))"
}

rows-4() {
    row llama-3-70b-4-16 4 384 118 "$(($1 * 7 / 12))"
    row opt-30b-4-4 3 448 118 "$(($1 * 5 / 12))"
}

row-70b() { # chosen in any case
    row llama-3-70b-4-4 5 701 110 "$1"
}

# Jobs that plans were once wrong about, or these of them.
users() { # SECONDS NAME...
    local end=$((SECONDS + $1)) runs=(python3 -m benchmark.policy_runs "$O/users.jsonl" --hardware "$HW" --users)
    [ $# -eq 1 ] || runs+=(--only "${@:2}")
    step users-plans 90 "${runs[@]}" --plan "$O/users-plans.json" --processes "$CORES"
    step users "$((end - SECONDS - 10))" "${runs[@]}" --plans "$O/users-plans.json" --seconds "$((end - SECONDS - 20))"
    step users-errors 20 python3 -m benchmark.pass_errors "$O/users.jsonl" --hardware "$HW"
}

# The longest of them: 27 s of loading and 67 of the job.
opt-30b() {
    users "$1" "opt-30b 16/16 bit"
}

# Placed by hand, so that both do the same: offloaded jobs of this tree and of the one in the folder BEFORE, in turn. Short
# passes first: OPT-125M's weights cross in 5 ms, and one micro-batch has 12 ticks to launch. As the profile of one tree
# may be none of the other's, both count with a shipped one.
paired() { # SECONDS
    [ -n "${BEFORE:-}" ] || { echo "paired: left out, BEFORE is not the folder of another tree"; return; }
    local runs=(python3 -m benchmark.paired "$BEFORE" ${BEFORE_COMMIT:+--before-commit "$BEFORE_COMMIT"}
        --scenarios opt-30b-16-16 opt-30b-16-4 opt-30b-4-4) set=('cpu_memory="40GiB"' 'hardware="h200"')
    step paired-short "$(($1 * 2 / 5))" "${runs[@]}" --model opt-125m --num-prompts 17 --seconds "$(($1 * 2 / 5 - 10))" \
        --set "${set[@]}" num_gpu_batches=1 --output "$O/paired-short.json"
    step paired "$(($1 * 3 / 5))" "${runs[@]}" --model opt-1.3b --num-prompts 67 --seconds "$(($1 * 3 / 5 - 10))" \
        --set "${set[@]}" --output "$O/paired.json"
}

# Layers of a model in as large a share of memory, so that they load in seconds. Prompts of OPT-30B are so many that
# weights are what takes time: the cache of twice as many keeps the host's memory as busy with one GPU as with two. What
# no run has shown since the cost model was changed comes first: one GPU's runs take 23 s, those of two 28 to 40.
mesh() {
    local end=$((SECONDS + $1)) shapes=(--check-model= --of-gpus 2 --hardware "$O/hardware-all.json" --hardware-of-one "$O/hardware-one.json")
    local opt=(--models opt-30b --layers 24 --cpu-gib 128 --prompts 127 --prompt-tokens 256 --new-tokens 13 --limit 50 --trace "$O/trace" "${shapes[@]}")
    local large=(--models llama-3-70b --layers 16 --cpu-gib 51 --prompts 251 --prompt-tokens 256 --new-tokens 17 --limit 50 --trace "$O/trace" "${shapes[@]}")
    local small=(--models llama-3-8b --gpu-gib 60 --prompts 509 --prompt-tokens 256 --new-tokens 61 --warm-ups 2 --limit 45 "${shapes[@]}")
    local opt16=("${opt[@]}" --gpu-gib 16 --gib-of 1=10.8 tp2=10 pp2=10.65 dp2=10.8)
    local opt24=("${opt[@]}" --gpu-gib 24 --gib-of 1=14.3 tp2=13.15 pp2=13.15 dp2=14.3)
    local large16=("${large[@]}" --gpu-gib 16 --gib-of 1=7.68 tp2=6.56 pp2=8.42 dp2=7.68)
    local large24=("${large[@]}" --gpu-gib 24 --gib-of 1=9.28 tp2=8.16 pp2=10.02 dp2=9.28)
    step mesh-profile 60 python3 -m benchmark.mesh_profile "$HW" --whole "$O/hardware-all.json" --one "$O/hardware-one.json" --gpus 2
    step mesh "$((end - SECONDS))" python3 -m benchmark.parallel --output "$O/mesh.json" --total "$((end - SECONDS - 5))" \
        "${opt24[@]}" --meshes pp2 1 --then "${large24[@]}" --meshes pp2 1 tp2 dp2 --then "${opt24[@]}" --meshes dp2 tp2 \
        --then "${small[@]}" --meshes 1 dp2 tp2 --then "${large16[@]}" --meshes tp2 1 --then "${opt16[@]}" --meshes pp2 dp2 1 \
        --then "${large16[@]}" --meshes pp2 dp2 --then "${opt16[@]}" --meshes tp2
}

mesh-tests() {
    step mesh-tests "$1" python3 -m pytest -v -n 2 --tb=short -m gpu tests/parallel/test_cuda.py
}

if [ ! -s "$HW" ]; then
    visible=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${visible%%,*} step profile 90 python3 -m flexbatch profile --output "$HW"
fi
[ $# -gt 0 ] || set -- "${ONE_GPU[@]}"
for part in "$@"; do
    default=$(printf '%s\n' "${ONE_GPU[@]}" opt-30b:170 mesh:500 mesh-tests:90 | sed -n "s/^${part%:*}://p")
    if [ -z "$default" ]; then
        echo "no part ${part%:*}; there are ${ONE_GPU[*]} opt-30b:170 mesh:500 mesh-tests:90" >&2
        exit 2
    fi
    "${part%:*}" "$([ "$part" = "${part#*:}" ] && echo "$default" || echo "${part#*:}")"
done
