"""Two processes with replicated parameters: gradients are the mean over what each computes alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import revbifpn
from revbifpn import fast
from revbifpn.memory import PeakMemory
from tests import processes, sync_norm
from tests.networks import F64, TWO_LEVELS, difference, error, narrow
from tests.processes import WORLD

MODULES = {"plain": revbifpn, "fast": fast}


def network(module, **options):
    return narrow(MODULES[module], **(TWO_LEVELS | options))


def images(rank, step=0):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 3, 64, 64, dtype=F64, generator=generator)


def loss_of(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs.square().sum()
    return outputs[0].square().sum()  # level 1 of the neck is not used


# Each scenario: options of the model, arguments of DDP, and how many micro-batches a step accumulates.
SCENARIOS = {
    "plain": ({}, {}, 1),
    "without neck": ({"head_channels": None}, {}, 1),
    "static graph": ({}, {"static_graph": True}, 1),
    "unused parameters": ({"classes": None}, {"find_unused_parameters": True}, 1),
    "all used, looked for unused": ({}, {"find_unused_parameters": True}, 1),
    "accumulation": ({}, {}, 3),
    "small buckets": ({}, {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True}, 1),
}
STEPS = 2


def run_scenario(module, scenario, rank):
    options, arguments, micro_batches = SCENARIOS[scenario]
    model = DistributedDataParallel(network(module, **options), **arguments)
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        with model.no_sync():
            for i in range(micro_batches - 1):
                loss_of(model(images(rank, 10 * step + i))).backward()
        loss_of(model(images(rank, 10 * step + micro_batches - 1))).backward()
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


def run_global_batch(module, rank):
    """With running statistics, two processes on halves of a batch are one process on the batch."""
    model = DistributedDataParallel(network(module).eval())
    (loss_of(model(images(rank))) * WORLD).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


# Options of a model whose norms reduce their statistics over processes.
SYNCHRONISED = {
    "reversible": {},
    "stored": {"reversible": False},
    "exact": {"stream": "fixed32"},
    "exact, stored": {"stream": "fixed32", "reversible": False},
}


class Sent(TorchDispatchMode):
    """The collectives that reach the process group."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


def run_synchronised(module, case, rank):
    """One step: gradients, buffers, what was sent forward and backward, and how many norms there are."""
    options = SYNCHRONISED[case]
    model = network(module, **options).to(torch.float32 if "stream" in options else F64)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    replicated = DistributedDataParallel(model)
    x = images(rank).to(next(model.parameters()).dtype)
    with Sent() as forward:
        loss = loss_of(replicated(x)) * WORLD
    with Sent() as backward:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, dict(model.named_buffers()), forward.ops, backward.ops, norms


def kept_after_forward(module, convert, rank):
    """Bytes that a forward of a reversible model leaves for its backward."""
    model = network(module)
    model, x = nn.SyncBatchNorm.convert_sync_batchnorm(model) if convert else model, images(rank)
    with PeakMemory() as meter:
        loss = loss_of(model(x))
        kept = meter.live_bytes
    del loss
    return kept


def results_of(rank):
    results = {}
    for module in MODULES:
        for scenario in SCENARIOS:
            results[module, scenario] = run_scenario(module, scenario, rank)
        results[module, "global batch"] = run_global_batch(module, rank)
    sync_norm.put(setattr)
    for module in MODULES:
        for case in SYNCHRONISED:
            results[module, case] = run_synchronised(module, case, rank)
        results[module, "kept"] = kept_after_forward(module, True, rank), kept_after_forward("plain", False, rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process has after every scenario."""
    return processes.run(__file__, tmp_path_factory.mktemp("ddp"))


def assert_equal_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    assert difference([found[name] for name in wanted], list(wanted.values())) <= 1e-9


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("module", MODULES)
def test_gradients_are_the_mean_of_what_stored_models_compute_alone(results, module, scenario):
    options, _, micro_batches = SCENARIOS[scenario]
    wanted = {}
    for rank in range(WORLD):
        model = network("plain", reversible=False, **options)
        for i in range(micro_batches):
            loss_of(model(images(rank, 10 * (STEPS - 1) + i))).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                wanted[name] = wanted.get(name, 0) + p.grad / WORLD
    for of_rank in results:
        found = of_rank[module, scenario]
        assert_equal_gradients({name: g for name, g in found.items() if name in wanted}, wanted)
        assert not any(g.any() for name, g in found.items() if name not in wanted)


@pytest.mark.parametrize("module", MODULES)
def test_two_processes_with_running_statistics_are_one_process_on_the_batch(results, module):
    model = network("plain", reversible=False).eval()
    loss_of(model(torch.cat([images(rank) for rank in range(WORLD)]))).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for of_rank in results:
        assert_equal_gradients(of_rank[module, "global batch"], wanted)


@pytest.mark.parametrize("case", SYNCHRONISED)
@pytest.mark.parametrize("module", MODULES)
def test_two_processes_with_synchronised_norms_are_one_process_on_the_batch(results, module, case):
    model = network("plain", reversible=False)
    loss_of(model(torch.cat([images(rank) for rank in range(WORLD)]))).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for of_rank in results:
        gradients, buffers, *_ = of_rank[module, case]
        if "exact" in case:  # the streams' grid, in float32
            assert error([gradients[name] for name in wanted], list(wanted.values())) < 2e-3
            assert all(torch.allclose(buffers[name].to(b.dtype), b, atol=1e-3) for name, b in model.named_buffers())
        else:
            assert_equal_gradients(gradients, wanted)
            assert all(torch.allclose(buffers[name], b, rtol=1e-9) for name, b in model.named_buffers())


@pytest.mark.parametrize("case", SYNCHRONISED)
@pytest.mark.parametrize("module", MODULES)
def test_statistics_are_sent_once_in_forward_and_their_gradients_once_in_backward(results, module, case):
    for of_rank in results:
        _, _, forward, backward, norms = of_rank[module, case]
        assert [op for op in forward if "allgather" in op] == ["c10d::allgather_"] * norms
        assert not any("allgather" in op for op in backward)
        # Beside them the buckets of DDP.
        assert norms <= backward.count("c10d::allreduce_") <= norms + 2
    assert results[0][module, case][2:] == results[1][module, case][2:]


@pytest.mark.parametrize("module", MODULES)
def test_synchronised_norms_on_an_exact_stream_are_those_of_the_stored_run(results, module):
    reversible, stored = (results[0][module, case][0] for case in ("exact", "exact, stored"))
    assert all(torch.equal(g, stored[name]) for name, g in reversible.items())


@pytest.mark.parametrize("module", MODULES)
def test_what_processes_told_one_another_is_all_that_synchronised_norms_keep(results, module):
    kept, without = results[0][module, "kept"]
    channels = sum(m.num_features for m in network("plain").modules() if isinstance(m, nn.BatchNorm2d))
    assert kept - without <= 2 * (WORLD + 1) * 8 * (2 * channels + 16)  # means, deviations, counts; buffers before


@pytest.mark.parametrize("module", MODULES)
def test_replicas_of_data_parallel_use_their_own_parameters(module):
    """``nn.DataParallel`` replicates by shallow copies of modules: nothing may point back to the original's blocks."""
    model = network(module)
    twin = copy.copy(model.rev_stack)
    twin._modules = dict(model.rev_stack._modules)
    replaced = network(module).rev_stack.blocks[0]
    twin._modules["1"] = replaced
    assert twin.blocks[0] is replaced and model.rev_stack.blocks[0] is not replaced


if __name__ == "__main__":
    processes.worker(results_of)
