#!/bin/sh
# Sets up an environment for HELM beside the project's own: crfm-helm 0.5.16 pins datasets 3.x, the project does not.
#   apps/helm_env.sh [FOLDER]      FOLDER defaults to .venv-helm; PYTHON names the interpreter (default: python3)
# Running it again on a finished environment does nothing but reinstall the project.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.venv-helm}
python=${PYTHON:-python3}
torch=${TORCH_VERSION:-$("$python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null || echo 2.13.0)}

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
hold=$folder/hold.txt
echo "torch==$torch" >"$hold"
if ! "$folder/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("crfm-helm") != "0.5.16")' 2>/dev/null; then
    # torch first and held: crfm-helm takes any torch, and would replace the version that the project is tested with
    "$folder/bin/python" -m pip install --quiet --constraint "$hold" "torch==$torch"
    "$folder/bin/python" -m pip install --quiet --constraint "$hold" "crfm-helm==0.5.16" pytest
fi
if ! "$folder/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # transformers imports torchvision where it finds it, and a torchvision for CUDA beside a torch for CPU fails with
    # "operator torchvision::nms does not exist" on the import of any model
    "$folder/bin/python" -m pip uninstall --quiet --yes torchvision
fi
"$folder/bin/python" -m pip install --quiet --constraint "$hold" --editable "$root"
"$folder/bin/python" -c '
import importlib.metadata as metadata
import flexbatch, helm.benchmark.run
print("crfm-helm", metadata.version("crfm-helm"), "torch", metadata.version("torch"), "ready")'
