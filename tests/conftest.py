"""Before anything imports revkernels: without a GPU, Triton's kernels run under its interpreter on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the tests' maps are tiny, and runners are shared
