"""Training, from a folder of images to a model: what ``examples/train_*.py`` have in common.

Lightning runs the loop, timm has transforms, optimizers, schedules, mixup and the average of weights, torchmetrics the
metrics, torchdata the loader that knows its position. Here is what is between them:

- ``options``: the command line;
- ``data``, ``shards``, ``loaders``: images and targets, from disk to batches, the same however often a run is stopped;
- ``task``: one step;
- ``checkpoints``, ``logs``: files that survive a kill;
- ``report``: memory, plots, export;
- ``run``: all of that in order;
- ``errors``: what can go wrong, and exit codes.

``pip install 'revbifpn-fast[train]'`` installs what they need.
"""

from __future__ import annotations

import importlib.util

_NEEDED = ("lightning", "timm", "torchvision", "torchmetrics", "torchdata", "tensorboard", "matplotlib")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ImportError(f"revbifpn.training needs {', '.join(_missing)}: pip install 'revbifpn-fast[train]'")
