"""The engine of reversible passes: couplings, how they are run, and the autograd nodes that run them backwards.

=================  ====================================================================================
``coupling``       what a coupling is: a target, transforms of sources, coefficients
``lowered``        how it is run on given streams: branches, the update in place, its adjoint
``branch``         the protocol of a branch, and the branch of any module
``capture``        what a CUDA graph cannot hold, found without a GPU
``graphs``         which calls get a CUDA graph, and what it reads from the device
``record``         what a call depended on besides its inputs, and its replay
``state``          streams, gradients and position of one pass; a coupling's advance and retreat
``nodes``          the autograd functions: nothing but a state's methods in autograd's order
``tape``           what forward writes on
``anomaly``        which module's result is not finite
=================  ====================================================================================

Each file imports only from those above it in this order: anomaly, coupling, capture, graphs, record, branch, lowered,
state, nodes, tape.
"""
