"""What the benchmarks share.

=================  ============================================================================================
``command``        the command line: one-line errors, exit codes, choosing by wildcards
``networks``       what is measured and how it is made: RevBiFPN in every variant, rivals, the published code
``rivals``         the networks of timm, their published accuracy, and their checkpointing
``timing``         the clock, turns, quantiles
``steps``          a training step and inference: run, captured, metered
``capacity``       the largest batch that fits
``agreement``      nothing is timed before it was found to compute the same
``cases``          every call of an op in a training step, recorded with its shapes
``compositions``   the ops in PyTorch's own, which kernels are held against
``results``        versions and machine beside every number; files that appear together or not at all
``terminal``       tables and progress, on a terminal or in a file
``plots``          panels, colours and legends
``processes``      measuring in several processes
=================  ============================================================================================
"""
