"""Two processes with sharded parameters (``fully_shard``): the gradients of replicated ones, whatever the units."""

import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from revbifpn.mbconv import MBConv
from tests import processes
from tests.engine.test_distributed import MODULES, loss_of, network
from tests.engine.test_distributed import images as large_images
from tests.marks import product
from tests.networks import difference, error
from tests.processes import WORLD


def images(rank, step=0):
    return large_images(rank, step)[..., :32, :32]


def of_levels(model):
    return [part for block in model.rev_stack.blocks for part in getattr(block, "blocks", [block])]


def of_class(cls):
    return lambda model: [m for m in model.modules() if isinstance(m, cls)]


# The units besides the model itself, from the inside out.
UNITS = {
    "root": lambda model: [],
    "stack": lambda model: [model.rev_stack],
    "blocks": lambda model: model.rev_stack.blocks,
    "blocks of levels": of_levels,
    "MBConvs": of_class(MBConv),
    "convolutions": of_class(nn.Conv2d),
    "neck": lambda model: [model.neck],
    "neck, head, blocks": lambda model: [model.neck, model.head, *model.rev_stack.blocks],
    "all": lambda model: [
        *of_class(MBConv)(model),
        *dict.fromkeys([*of_levels(model), *model.rev_stack.blocks]),
        *(model.neck, model.head, model.rev_stack),
    ],
}
STORED = {
    "reversible": {},
    "stored": {"reversible": False},
}
MIXED = ["root", "MBConvs", "neck, head, blocks"]
OF_DEFAULT_RUN = ["plain-blocks-reversible", "fast-stack-reversible", "fast-MBConvs-reversible", "fast-stack-stored"]


def shard(model, units, **arguments):
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in [*UNITS[units](model), model]:
        fully_shard(part, mesh=mesh, **arguments)
    return model


def whole_gradients(model):
    return [p.grad.full_tensor() for p in model.parameters()]


def step(model, x):
    model.zero_grad(set_to_none=True)
    loss_of(model(x)).backward()
    return whole_gradients(model)


def run_units(module, units, options, rank):
    """The second step: parameters are gathered, let go of, and gathered again."""
    model = shard(network(module, **options), units)
    step(model, images(rank, 1))
    return step(model, images(rank))


def run_accumulation(module, rank):
    """Two micro-batches, of which the first sends nothing."""
    model = shard(network(module), "MBConvs" if module == "plain" else "blocks")
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        loss_of(model(images(rank, int(last)))).backward()
    return whole_gradients(model)


def run_from_meta(module, rank, folder):
    """A model made without memory, sharded, and filled from a checkpoint that another sharding saved."""
    saved = shard(network(module), "blocks")
    wanted = step(saved, images(rank))
    dcp.save(get_model_state_dict(saved), checkpoint_id=f"{folder}/{module}")
    with torch.device("meta"):
        model = network(module, seed=1)
    model = shard(model, "stack").to_empty(device="cpu")
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=f"{folder}/{module}")
    set_model_state_dict(model, state)
    for norm in of_class(nn.BatchNorm2d)(model):
        norm.reset_running_stats()
    return wanted, step(model, images(rank))


def two_losses_of(outputs):
    return outputs.square().sum(), outputs.sin().sum()


def run_two_backwards(module, units, rank):
    """Two losses of one forward, a backward for each."""
    model = shard(network(module, retain_graph=True), units)
    first, second = two_losses_of(model(images(rank)))
    first.backward(retain_graph=True)
    second.backward()
    return whole_gradients(model)


def run_mixed(module, units, rank):
    """Parameters gathered in 16 bits, statistics and gradients in 32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(network(module).float(), units, mp_policy=policy)
    out = model(images(rank).float())
    loss_of(out).backward()
    return out.dtype, whole_gradients(model), {b.dtype for b in model.buffers()}


def results_of(rank, everything):
    model = DistributedDataParallel(network("plain", reversible=False))
    results = {}
    for i in (0, 1):
        loss_of(model(images(rank, i))).backward()  # accumulates
        results["replicated", i] = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    sum(two_losses_of(model(images(rank)))).backward()
    results["replicated", "two losses"] = [p.grad.clone() for p in model.parameters()]
    for module in MODULES:
        for units in UNITS:
            for stored, options in STORED.items():
                case = f"{module}-{units}-{stored}"
                if (case in OF_DEFAULT_RUN) != (everything == "rest"):
                    results[case] = run_units(module, units, options, rank)
        if everything == "default":
            results[module, "accumulation"] = run_accumulation(module, rank)
            results[module, "meta"] = run_from_meta(module, rank, sys.argv[2])
            results[module, "two backwards"] = run_two_backwards(
                module, "MBConvs" if module == "fast" else "blocks", rank
            )
            results[module, "mixed"] = run_mixed(module, "blocks" if module == "plain" else "stack", rank)
        else:
            for units in MIXED:
                results[module, "mixed", units] = run_mixed(module, units, rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run(__file__, tmp_path_factory.mktemp("sharded"), "default")


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return processes.run(__file__, tmp_path_factory.mktemp("sharded"), "rest")


def assert_equal_to_replicated(results, case, step=0):
    for of_rank in results:
        assert difference(of_rank[case], of_rank["replicated", step]) <= 1e-9


@product(*OF_DEFAULT_RUN, module={m: m for m in MODULES}, units={u: u for u in UNITS}, stored={s: s for s in STORED})
def test_sharded_parameters_have_the_gradients_of_replicated_ones(request, module, units, stored):
    case = f"{module}-{units}-{stored}"
    assert_equal_to_replicated(request.getfixturevalue("results" if case in OF_DEFAULT_RUN else "rest"), case)


@pytest.mark.parametrize("module", MODULES)
def test_gradients_accumulate_without_being_sent(results, module):
    assert_equal_to_replicated(results, (module, "accumulation"), 1)


@pytest.mark.parametrize("module", MODULES)
def test_two_backwards_through_one_forward_add_up(results, module):
    for of_rank in results:
        assert difference(of_rank[module, "two backwards"], of_rank["replicated", "two losses"]) <= 1e-9


@pytest.mark.parametrize("module", MODULES)
def test_a_model_made_on_meta_trains_from_a_checkpoint_of_another_sharding(results, module):
    for of_rank in results:
        wanted, found = of_rank[module, "meta"]
        assert difference(found, wanted) <= 1e-9


def assert_near(results, case):
    for of_rank in results:
        dtype, gradients, buffers = of_rank[case]
        assert dtype == torch.bfloat16 and {torch.float32} == {g.dtype for g in gradients}
        assert buffers == {torch.float32, torch.int64}
        assert error(gradients, of_rank["replicated", 0]) < 0.04


@pytest.mark.parametrize("module", MODULES)
def test_parameters_gathered_in_16_bits_train_on_float32_statistics(results, module):
    assert_near(results, (module, "mixed"))


@pytest.mark.slow
@pytest.mark.parametrize("units", MIXED)
@pytest.mark.parametrize("module", MODULES)
def test_units_of_any_kind_gather_parameters_in_16_bits(rest, module, units):
    assert_near(rest, (module, "mixed", units))


if __name__ == "__main__":
    processes.worker(results_of)
