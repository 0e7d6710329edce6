#!/bin/sh
# Compiles crates/fst-gpu/kernels/*.cu to crates/fst-gpu/kernels/fatbin/: a fat binary for each source, with machine
# code for the architectures below and PTX for all others. Needs Python 3 and PyPI; no GPU, no CUDA installation.
#
#   tools/kernels/build.sh            rewrite the fat binaries
#   tools/kernels/build.sh --check    fail when those in the repository are not what the sources give
#
# KERNEL_VENV names the virtual environment to use or make (default target/kernel-venv); KERNEL_PTX a folder to leave
# the PTX in, for whoever wants to read it.
set -eu

NVRTC=nvidia-cuda-nvrtc-cu12==12.0.140 # PTX 8.0, which drivers from 525 up load
PTXAS=nvidia-cuda-nvcc-cu12==12.9.86   # knows sm_120; its code runs on every driver of CUDA 12
FATBINARY=nvidia-cuda-nvcc==13.0.88    # its ptxas makes code for drivers of CUDA 13 only
# Code for sm_80 runs on sm_86 and sm_89 too, that for sm_100 on sm_103, that for sm_120 on sm_121.
CUBINS="80 90 100 120"
# The PTX must assemble for these, too.
OTHERS="75 86 89"

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
"$venv/bin/pip" install --quiet --disable-pip-version-check "$NVRTC" "$PTXAS"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$FATBINARY"
# tool PACKAGE NAME: the path of a program that a package brought.
tool() { "$venv/bin/python" -c "import nvidia.$1 as m; print(list(m.__path__)[0] + '/bin/$2')"; }
ptxas=$(tool cuda_nvcc ptxas)
fatbinary=$(tool cu13 fatbinary)

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
mkdir "$new/fatbin"
"$venv/bin/python" "$root/tools/kernels/ptx.py" "$new/ptx"
cd "$new"

# pack NAME: the fat binary of one PTX text. Compressed as all drivers can read it (LZ4).
pack() {
    images=
    for architecture in $CUBINS $OTHERS; do
        "$ptxas" --warning-as-error --gpu-name "sm_$architecture" --output-file "$1.$architecture" "ptx/$1.ptx" || {
            echo "$1.ptx does not assemble for sm_$architecture" >&2
            exit 1
        }
    done
    for architecture in $CUBINS; do
        images="$images --image3=kind=elf,sm=$architecture,file=$1.$architecture"
    done
    # shellcheck disable=SC2086
    "$fatbinary" --64 --create="fatbin/$1.fatbin" --compress-all --compress-mode=speed $images \
        --image3=kind=ptx,sm=70,file="ptx/$1.ptx"
    rm -f "$1".*
}
for ptx in ptx/*.ptx; do
    pack "$(basename "$ptx" .ptx)"
done
[ -z "${KERNEL_PTX:-}" ] || cp ptx/*.ptx "$KERNEL_PTX/"
# Of what these were made, so that a test can tell stale ones without the tools.
{
    (cd "$kernels" && sha256sum -- *.cu *.cuh)
    sha256sum fatbin/*.fatbin
} >SHA256SUMS
echo "$(ls fatbin | wc -l) fat binaries, $(cat fatbin/*.fatbin | wc -c) bytes; the PTX assembles for sm_ $CUBINS $OTHERS"

if $check; then
    diff -r -q "$kernels/fatbin" fatbin && cmp "$kernels/SHA256SUMS" SHA256SUMS || {
        echo "the fat binaries in $kernels are stale: run tools/kernels/build.sh" >&2
        exit 1
    }
else
    rm -rf "$kernels/fatbin"
    cp -r fatbin "$kernels/fatbin"
    cp SHA256SUMS "$kernels/SHA256SUMS"
fi
