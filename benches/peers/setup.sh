#!/bin/sh
# Makes the environment of the Python peers: one virtual environment with torch and numpy, and one
# folder per peer (site/NAME-VERSION), so that two versions of one package live side by side.
#
#   benches/peers/setup.sh              # torch from the package index, some 5 GB on disk
#   TORCH_PYTHON=/venv/bin/python benches/peers/setup.sh   # borrow torch and numpy from there
#
# FST_PEERS_VENV names another place than benches/peers/.venv; the harness reads the same variable.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${FST_PEERS_VENV:-$here/.venv}
python=${PYTHON:-python3}

if [ -n "${TORCH_PYTHON:-}" ]; then
    python=$TORCH_PYTHON
fi
if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
fi
if [ -n "${TORCH_PYTHON:-}" ]; then
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$TORCH_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/borrowed-torch.pth"
fi
"$venv/bin/python" -c 'import numpy, torch' 2>/dev/null ||
    "$venv/bin/pip" install --no-cache-dir 'torch==2.11.0' 'numpy==2.4.6'

# name==version, one folder each; --no-deps because torch and numpy are there already.
install() {
    folder=$venv/site/$(echo "$1" | sed 's/==/-/')
    shift_to=$folder.partial
    if [ -d "$folder" ]; then
        return
    fi
    rm -rf "$shift_to"
    "$venv/bin/pip" install --quiet --no-deps --target "$shift_to" "$@"
    mv "$shift_to" "$folder"
}
install safetensors==0.8.0
install safetensors==0.9.0rc1
install fastsafetensors==0.5.0
install runai-model-streamer==0.17.0 humanize==4.14.0

"$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
ls "$venv/site"
