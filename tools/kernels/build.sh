#!/bin/sh
# Compiles crates/fst-gpu/kernels/*.cu to crates/fst-gpu/kernels/ptx/ and assembles the result for
# every architecture we promise. Needs Python 3 and PyPI; no GPU, no CUDA installation.
#
#   tools/kernels/build.sh            rewrite the PTX
#   tools/kernels/build.sh --check    fail when the PTX in the repository is not what the sources give
#
# KERNEL_VENV names the virtual environment to use or make (default target/kernel-venv).
set -eu

NVRTC=nvidia-cuda-nvrtc-cu12==12.0.140 # PTX 8.0, which drivers from 525 up load
NVCC=nvidia-cuda-nvcc-cu12==12.9.86    # its ptxas knows sm_120
ARCHITECTURES="sm_75 sm_80 sm_90 sm_100 sm_120"

root=$(cd "$(dirname "$0")/../.." && pwd)
kernels=$root/crates/fst-gpu/kernels
venv=${KERNEL_VENV:-$root/target/kernel-venv}
check=false
case "${1-}" in
"") ;;
--check) check=true ;;
*) echo "usage: $0 [--check]" >&2; exit 2 ;;
esac

# What an interrupted run left of one is no environment.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "$NVRTC" "$NVCC"

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
"$venv/bin/python" "$root/tools/kernels/ptx.py" "$new/ptx"

ptxas=$("$venv/bin/python" -c 'import nvidia.cuda_nvcc as m; print(list(m.__path__)[0] + "/bin/ptxas")')
for architecture in $ARCHITECTURES; do
    for ptx in "$new"/ptx/*.ptx; do
        "$ptxas" --warning-as-error --gpu-name "$architecture" --output-file "$new/out" "$ptx" || {
            echo "$ptx does not assemble for $architecture" >&2
            exit 1
        }
    done
done
echo "$(ls "$new/ptx" | wc -l) PTX files assemble for $ARCHITECTURES"

if $check; then
    diff -r -q "$kernels/ptx" "$new/ptx" || {
        echo "the PTX in $kernels/ptx is stale: run tools/kernels/build.sh" >&2
        exit 1
    }
else
    rm -rf "$kernels/ptx"
    cp -r "$new/ptx" "$kernels/ptx"
fi
