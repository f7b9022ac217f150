"""What a process of :mod:`benchmarks.harness.scripts` begins with."""

import torch

from benchmarks.harness import rivals, scripts

torch.set_num_threads(1)
rivals.import_timm()
for name in ("train_classification", "train_segmentation"):
    scripts.load(name)
