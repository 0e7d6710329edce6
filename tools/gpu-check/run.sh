#!/usr/bin/env bash
# Checks and measures fst on a machine with an NVIDIA GPU. Needs a driver (525 or later) and glibc 2.36 or later,
# no toolchain and no network. Peers take part when wheels/ lies beside this script and Python has torch.
#
#   run.sh OUT_DIR [--quick]
#
# Results go to OUT_DIR: runs.jsonl (a line of JSON for each run), tests.jsonl (for each test), targets.json, the
# tests' logs, table.txt. The table is also the last thing printed, and its file is made anew after each part, so that it
# is there if the rest is cut off. It ends within 8 minutes: each part has its own limit, and one that fails, hangs or is
# cut off does not stop the rest. What decides the design comes first: what the driver takes, loads from the page cache
# beside the link's rate, sizes. --quick does the same on a few megabytes.
#
#   FST_CHECK_DATA    folder on the drive to read cold from [OUT_DIR/data]; 12 GB are written there and removed
#   FST_CHECK_TMPFS   a tmpfs [/dev/shm]; left out where it has too little room
#   FST_CHECK_PYTHON  the interpreter that has torch [python3]
#   FST_CHECK_TORCH_DEVICE  [cuda:0]; "cpu" only tries the peers' script
#   FST_CHECK_SECONDS  all of it [480]
#   FST_CHECK_SANITIZER  NVIDIA's compute-sanitizer [from the path or /usr/local/cuda]; left out where there is none
set -u
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
quick=; [ "${2:-}" = --quick ] && quick=1
total=${FST_CHECK_SECONDS:-480}
data=${FST_CHECK_DATA:-$out/data}
shm=${FST_CHECK_TMPFS:-/dev/shm}
python=${FST_CHECK_PYTHON:-python3}
torch_device=${FST_CHECK_TORCH_DEVICE:-cuda:0}
tmpfs=$shm/fst-gpu-check.$$
rm -f "$out"/runs.jsonl "$out"/tests.txt "$out"/tests.jsonl "$out"/targets.json "$out"/peers.log "$out"/probe.txt "$out"/table.txt
mkdir -p "$data"
data=$(cd "$data" && mktemp -d "$PWD/fst-gpu-check.XXXXXX")
trap 'rm -rf "$tmpfs" "$data"' EXIT
# Libraries leave their logs where they are started.
cd "$out" || exit 2

# A driver to use instead of the machine's: the simulated one, to try this script.
driver=(); [ -n "${FST_CHECK_PRELOAD:-}" ] && driver=(LD_PRELOAD="$FST_CHECK_PRELOAD")

# left MOST: seconds that a part may take, 1 at least (timeout takes 0 for none). The table needs a few at the end.
left() { local rest=$((total - 10 - SECONDS)); rest=$((rest < $1 ? rest : $1)); echo $((rest < 1 ? 1 : rest)); }

# table: the summary of what there is by now.
table() {
    timeout -k 2 20 "$here/fst-gpu-check" table "$out" >"$out/table.new" 2>&1
    mv "$out/table.new" "$out/table.txt"
}

# tell NAME VERDICT [SECONDS [COUNT]]: what came of a part, for people and as JSON.
tell() {
    echo "$1: $2${3:+ in $3 s}${4:+: $4}" | tee -a "$out/tests.txt"
    printf '{"part": "%s", "verdict": "%s", "seconds": %s, "count": "%s"}\n' "$1" "$2" "${3:-0}" "${4:-}" >>"$out/tests.jsonl"
}

# part NAME SECONDS COMMAND...: runs it within its time; its output goes to NAME.log.
part() {
    local name=$1 limit began=$SECONDS status; limit=$(left "$2"); shift 2
    if [ "$limit" -lt 2 ]; then
        tell "$name" "left out, no time"
        return 1
    fi
    timeout -k 5 "$limit" env "${driver[@]}" "$@" >"$out/$name.log" 2>&1
    status=$?
    local verdict="ok"
    [ $status -eq 0 ] || verdict="FAILED (status $status)"
    [ $status -eq 124 ] && verdict="cut off after $limit s"
    local count; count=$(sed -n 's/^test result: [a-zA-Z]*\. //p' "$out/$name.log" | tail -n 1)
    local skipped; skipped=$(grep -c 'SKIPPED: ' "$out/$name.log")
    [ "$skipped" -gt 0 ] && count="$count $skipped of the passed were skipped here"
    tell "$name" "$verdict" $((SECONDS - began)) "$count"
    table
    return $status
}

# bench NAME SECONDS PART ROUNDS FOLDER...: one part of the benchmark, told as it goes.
bench() {
    local name=$1 limit what=$3 rounds=$4; limit=$(left "$2"); shift 4
    local folders=() folder
    for folder; do [ -d "$folder" ] && folders+=("$folder"); done
    [ "${#folders[@]}" -gt 0 ] || { tell "$name" "left out, no data"; return; }
    [ "$limit" -ge 5 ] || { tell "$name" "left out, no time"; return; }
    echo "$name (at most $limit s)"
    timeout -k 5 "$limit" env "${driver[@]}" "$here/fst-gpu-check" run "$what" "${folders[@]}" --out "$out/runs.jsonl" \
        --rounds "$rounds" --seconds $((limit - 2)) "${with_peers[@]}" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || tell "$name" "FAILED (status $status)"
    table
}

# sums: the same bytes on the device as in host memory, through every engine.
sums() {
    local model=$1 engine
    "$here/fst" sum "$model" --json >"$out/sum-host.json" || return 1
    for engine in auto uring pread mmap; do
        if ! "$here/fst" sum "$model" --json --device cuda:0 --engine $engine >"$out/sum-cuda.json"; then
            [ $engine = uring ] && { echo "SKIPPED: uring"; continue; }
            return 1
        fi
        cmp "$out/sum-host.json" "$out/sum-cuda.json" || return 1
        echo "$engine: the sums agree"
    done
}

# gds: the same through cuFile, in whichever mode it runs here.
gds() {
    "$here/fst" sum "$1" --json >"$out/sum-host.json" || return 1
    if ! "$here/fst" sum "$1" --json --device cuda:0 --engine gds >"$out/sum-gds.json" 2>"$out/gds.err"; then
        cat "$out/gds.err"
        # There is no cuFile, or it does not start on this platform.
        grep -q 'engine gds' "$out/gds.err" && echo "SKIPPED: gds" && return 0
        return 1
    fi
    cmp "$out/sum-host.json" "$out/sum-gds.json" && echo "gds: the sums agree"
}

# wheel_libs NAME: the folder of a library that came with torch.
wheel_libs() {
    timeout -k 5 30 "$python" - "$1" 2>/dev/null <<'END'
import glob, os, sys, nvidia
found = [path for base in nvidia.__path__ for path in glob.glob(base + "/**/" + sys.argv[1], recursive=True)]
print(os.path.dirname(found[0]) if found else "")
END
}

synth() { timeout -k 5 "$(left "$1")" "$here/fst" synth "$2" "${@:3}" --no-progress >>"$out/synth.log" 2>&1 || rm -rf "$2"; }

{
    date -u +'%Y-%m-%d %H:%M UTC'
    cat "$here/revision.txt" 2>/dev/null
    [ "${#driver[@]}" -eq 0 ] || echo "SIMULATED DRIVER: this shows that everything runs; the figures mean nothing"
    timeout -k 5 20 nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current \
        --format=csv,noheader 2>/dev/null || echo "nvidia-smi is not there"
    echo "$(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(free -g 2>/dev/null | awk '/^Mem/ {print $2 " GiB"}')"
    echo "Linux $(uname -r); data on $(df -T "$data" | awk 'NR == 2 {print $2 " (" $1 ")"}'); $(df -h "$shm" 2>/dev/null | awk 'NR == 2 {print "tmpfs with " $4 " free"}')"
} >"$out/machine.txt"
cat "$out/machine.txt"
timeout -k 5 30 env "${driver[@]}" "$here/fst" doctor >"$out/doctor.txt" 2>&1 || tell doctor "FAILED (status $?)"

# What decides the design. Each line is there as soon as its question is answered.
echo "probe (at most $(left 40) s)"
timeout -k 5 "$(left 40)" env "${driver[@]}" "$here/fst-gpu-check" probe "$data" 2>&1 | tee "$out/probe.txt"
# Without the code that we ship, and without what the driver keeps of earlier runs.
timeout -k 5 "$(left 30)" env "${driver[@]}" CUDA_FORCE_PTX_JIT=1 CUDA_CACHE_DISABLE=1 \
    "$here/fst-gpu-check" probe "$data" 2>&1 | grep '^kernel' | tee -a "$out/probe.txt"
table

rounds=3; [ -n "$quick" ] && rounds=1
free_gb() { df --output=avail -B 1000000000 "$1" 2>/dev/null | tail -n 1 | tr -d ' '; }
memory_gb=$(awk '/^MemAvailable/ {print int($2 / 1e6)}' /proc/meminfo)
# 20 layers of Llama 2 7B in bf16 are 8.6 GB.
layers=20; [ "$(free_gb "$data")" -lt 16 ] && layers=6
[ "$memory_gb" -lt 40 ] && layers=6
big=(--model llama-2-7b --dtype BF16 --layers $layers --shards 4)
small=(--model qwen3-30b-a3b --shrink 8)
gpt2=(--model gpt2)
if [ -n "$quick" ]; then
    big=(--model llama-2-7b --dtype BF16 --layers 1 --shrink 16 --shards 2)
    small=(--model qwen3-30b-a3b --shrink 64 --layers 2)
    gpt2=(--model gpt2 --layers 1 --shrink 4)
fi
room=; [ "$(free_gb "$shm")" -gt 14 ] && mkdir "$tmpfs" 2>/dev/null && room=$tmpfs
with_peers=()
[ -n "$room" ] && synth 40 "$tmpfs/big-tmpfs" "${big[@]}" && bench warm-tmpfs 40 warm $rounds "$tmpfs/big-tmpfs"
synth 60 "$data/big-disk" "${big[@]}"
bench warm-disk 40 warm $rounds "$data/big-disk"
sweep_on=$data/big-disk; [ -n "$room" ] && sweep_on=$tmpfs/big-tmpfs
bench sweep 45 sweep 1 "$sweep_on"

# Peers are unpacked while the tests run.
with_peers=()
if [ -d "$here/wheels" ] && timeout -k 5 90 "$python" -c 'import torch' 2>/dev/null; then
    site=$out/peers/site
    mkdir -p "$site"
    cp "$here/gpu_load.py" "$out/peers/"
    (
        unpack() {
            local to=$site/$1; shift
            [ -d "$to" ] && return
            timeout -k 5 60 "$python" -m pip install -q --no-index --no-deps --find-links "$here/wheels" --target "$to.partial" "$@" && mv "$to.partial" "$to"
        }
        unpack safetensors-0.8.0 safetensors==0.8.0
        unpack safetensors-0.9.0rc1 safetensors==0.9.0rc1
        unpack fastsafetensors-0.5.0 fastsafetensors==0.5.0
        unpack instanttensor-0.2.2 instanttensor==0.2.2
        unpack runai-model-streamer-0.17.0 runai-model-streamer==0.17.0 humanize==4.14.0
    ) >"$out/unpack.log" 2>&1 &
    unpacking=$!
    with_peers=(--peers "$out/peers" --python "$python" --torch-device "$torch_device")
fi

# Is it right? FST_TEST_REAL_CUDA: the tests' own simulated driver stays out of the way.
export FST_TEST_REAL_CUDA=1
part test-pipeline 60 "$here/tests/gpu_sim" --test-threads 1 --nocapture
part test-loads 40 "$here/tests/gpu_load" --test-threads 1 --nocapture
part test-cached 30 "$here/tests/gpu_cached" --test-threads 1 --nocapture
part test-into 30 "$here/tests/gpu_into" --test-threads 1 --nocapture
part test-kernels 60 "$here/tests/kernels_on_device" --ignored --test-threads 1 --nocapture --skip speed
shrink=2; [ -n "$quick" ] && shrink=16
synth 20 "$data/sums" --model llama-2-7b --layers 2 --shrink $shrink --shards 2
export -f sums; export here out
part test-sums 30 bash -c 'sums "$1"' sums "$data/sums"
export -f gds
# Libraries are opened by their names; those that torch brought will do.
libs=
for library in libnccl.so.2 libcufile.so.0; do
    folder=$(wheel_libs $library)
    [ -z "$folder" ] || libs=$libs$folder:
done
libs=$libs${LD_LIBRARY_PATH:-}
part test-ranks 40 LD_LIBRARY_PATH="${libs%:}" RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
    FST_MASTER_PORT=29517 "$here/fst-gpu-check" ranks "$data/sums"
part test-gds 30 LD_LIBRARY_PATH="${libs%:}" bash -c 'gds "$1"' gds "$data/sums"
rm -rf "$data/sums"
FST_KERNEL_BENCH_MIB=${FST_KERNEL_BENCH_MIB:-${quick:+2}}
[ -n "$FST_KERNEL_BENCH_MIB" ] && export FST_KERNEL_BENCH_MIB || unset FST_KERNEL_BENCH_MIB
part kernel-speed 30 "$here/tests/kernels_on_device" --ignored --exact speed --nocapture

# Beside peers, and from storage.
# They are left out rather than waited for.
if [ -n "${unpacking:-}" ]; then
    for ((waited = 0; waited < 60; waited++)); do
        kill -0 "$unpacking" 2>/dev/null || break
        sleep 1
    done
fi
bench peers 90 warm $rounds "$tmpfs/big-tmpfs" "$data/big-disk"
bench cold 60 cold $rounds "$data/big-disk"
synth 25 "${room:-$data}/small" "${small[@]}"
bench small 45 warm $rounds "${room:-$data}/small"
synth 10 "${room:-$data}/gpt2" "${gpt2[@]}"
bench start 50 start $rounds "${room:-$data}/gpt2"
rm -rf "${room:-$data}/small" "${room:-$data}/gpt2"
with_peers=()
synth 20 "${room:-$data}/f8" "${big[@]/BF16/F8_E4M3}"
cast_from=$data/big-disk; [ -n "$room" ] && cast_from=$tmpfs/big-tmpfs
bench cast 40 cast $rounds "$cast_from" "${room:-$data}/f8"
sanitizer=${FST_CHECK_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [ -x "$sanitizer" ]; then
    part test-sanitizer 60 "$sanitizer" --tool memcheck --error-exitcode 9 "$here/tests/kernels_on_device" \
        --ignored --test-threads 1 --nocapture --skip speed
fi

table
cat "$out/table.txt"
