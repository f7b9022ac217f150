"""Networks of which some levels are used."""

from __future__ import annotations

from collections.abc import Collection

from revbifpn.model import RevBiFPN


def freeze_unused(body: RevBiFPN, levels: Collection[int]) -> None:
    """Freeze what none of these levels of the pyramid depends on: every parameter that trains gets a gradient then.

    DistributedDataParallel, for one, waits for all of them.
    """
    if body.neck is not None:
        for level, transform in body.neck.transforms.items():
            if level not in levels:
                transform.requires_grad_(False)
    needed = set(levels)
    for coupling in reversed(list(body.rev_stack.couplings())):
        if coupling.target.level in needed:
            needed.update(source.level for source in coupling.sources)
        else:
            for transform in coupling.transforms:
                transform.requires_grad_(False)
