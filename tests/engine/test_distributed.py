"""Two processes: gradients are the mean over what each computes alone, with replicated and with sharded parameters."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import revbifpn
from revbifpn import fast
from tests.networks import F64, TWO_LEVELS, narrow

MODULES = {"plain": revbifpn, "fast": fast}
WORLD = 2


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


SHARDED = {
    "blocks": lambda stack: stack.blocks,
    "blocks of levels": lambda stack: _of_levels(stack),
    "root": lambda _: [],
}


def _of_levels(stack):
    return [part for block in stack.blocks for part in getattr(block, "blocks", [block])]


def run_sharded(module, parts, reversible, rank):
    """Parameters of every part are gathered for its forward and for its backward, and let go of after each."""
    model = network(module, reversible=reversible)
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in SHARDED[parts](model.rev_stack):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        loss_of(model(images(rank, 10 * step))).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def worker(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    results = {}
    for module in MODULES:
        for scenario in SCENARIOS:
            results[module, scenario] = run_scenario(module, scenario, rank)
        results[module, "global batch"] = run_global_batch(module, rank)
        for parts in SHARDED:
            for reversible in (True, False):
                results[module, parts, reversible] = run_sharded(module, parts, reversible, rank)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Gradients of every scenario, as each process has them."""
    out = tmp_path_factory.mktemp("ddp")
    paths = [str(Path(revbifpn.__file__).parents[1]), os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(out / "store"), str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        logs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(logs)
    return [torch.load(out / f"{rank}.pt") for rank in range(WORLD)]


def assert_equal_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    floor = 1e-6 * max(g.norm().item() for g in wanted.values())
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= 1e-9 * max(g.norm().item(), floor), name


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


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("parts", SHARDED)
@pytest.mark.parametrize("module", MODULES)
def test_sharded_parameters_have_the_gradients_of_replicated_ones(results, module, parts, reversible):
    for of_rank in results:
        assert_equal_gradients(of_rank[module, parts, reversible], results[0]["plain", "plain"])


@pytest.mark.parametrize("module", MODULES)
def test_two_processes_with_running_statistics_are_one_process_on_the_batch(results, module):
    model = network("plain", reversible=False).eval()
    loss_of(model(torch.cat([images(rank) for rank in range(WORLD)]))).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for of_rank in results:
        assert_equal_gradients(of_rank[module, "global batch"], wanted)


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
    worker(int(sys.argv[1]), *sys.argv[2:])
