#!/usr/bin/env bash
# A wheel, built and installed as a user does it, in two new environments: one has torch, the other gets it from the index
# with the wheel, and pip's build for itself. In each: one operator on the native kernels, presets, bench and doctor.
# Usage: tests/install.sh FOLDER REQUIREMENT, where the requirement is the torch to take; FOLDER is made anew.
set -euo pipefail
folder=$1 torch=$2 python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$folder" && mkdir -p "$folder/source" && cd "$folder"
echo "$torch" >torch.txt
# Also of the builds: one name for old versions of pip, one for new ones.
export PIP_CONSTRAINT=$PWD/torch.txt PIP_BUILD_CONSTRAINT=$PWD/torch.txt

for case in beside alone; do
  "$python" -m venv "$case"
  if [ "$case" = beside ]; then "$case/bin/pip" install --quiet "$torch"; fi
  rm -rf source && mkdir source # new each time: a build must not find objects of the one before
  tar -cf - -C "$root" --exclude='*.so' --exclude=_build.json csrc gptkernels model benchmarks setup.py pyproject.toml \
    README.md | tar -xf - -C source
  "$case/bin/pip" wheel --quiet --no-deps --wheel-dir "wheel-$case" ./source
  "$case/bin/pip" install --quiet "wheel-$case"/gptkernels-*.whl
  # In this folder lies no package of ours: what is imported is what was installed.
  "$case/bin/python" - <<'PYTHON'
import torch

import gptkernels

assert "site-packages" in gptkernels.__file__, gptkernels.__file__
x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
ours = gptkernels.layer_norm(x, backend="cpu")
torch.testing.assert_close(ours, torch.nn.functional.layer_norm(x, (64,)))
PYTHON
  "$case/bin/gptkernels" train tiny --print-config >/dev/null
  "$case/bin/gptkernels" bench --help >/dev/null
  "$case/bin/gptkernels" doctor
done
