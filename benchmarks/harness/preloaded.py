"""What a process of :mod:`benchmarks.harness.scripts` begins with."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The server begins with the working directory: an installed revbifpn comes first, this checkout after it.
sys.path[:] = [*(p for p in sys.path if p and Path(p).resolve() != ROOT), str(ROOT)]

import torch  # noqa: E402

from benchmarks.harness import rivals, scripts  # noqa: E402

torch.set_num_threads(1)
rivals.import_timm()
for name in ("train_classification", "train_segmentation"):
    scripts.load(name)
