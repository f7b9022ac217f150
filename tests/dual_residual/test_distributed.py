"""Two processes: replicated and sharded parameters of a converted model, against one process on the whole batch."""

import sys

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from revbifpn.dual_residual import convert, set_coefficients
from tests import processes
from tests.dual_residual.networks import Encoder, loss_of, tokens
from tests.networks import difference

EXACT = {"float": False, "int32": True}


def model(exact):
    net = Encoder()
    convert(net, alpha=0.5, beta=0.5, exact=EXACT[exact])
    return net


def train(net, batches, accumulate=1):
    """Two steps, with other coefficients in the second one."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        for part in range(accumulate):
            sum(loss_of(net(x)) for x in batches(step, part)).backward()
        optimizer.step()
        set_coefficients(net, 0.75, 0.25)


def inputs(rank, step, part):
    return tokens(shape=(2, 5, 8), seed=100 * step + 10 * part + rank)


def replicated(rank, exact, accumulate):
    net = DistributedDataParallel(model(exact))
    train(net, lambda step, part: [inputs(rank, step, part)], accumulate)
    return dict(net.module.named_parameters())


def sharded(rank, exact, accumulate):
    net = model(exact)
    for layer in net.layers:
        fully_shard(layer)
    fully_shard(net)
    train(net, lambda step, part: [inputs(rank, step, part)], accumulate)
    return {name: p.full_tensor().detach() for name, p in net.named_parameters()}


SETUPS = {"replicated": replicated, "sharded": sharded}
CASES = [(exact, accumulate) for exact in EXACT for accumulate in (1, 2)]


def every_case(rank, setup):
    return {case: SETUPS[setup](rank, *case) for case in CASES}


@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_train_as_one_on_their_batches(setup, tmp_path):
    found = processes.run(__file__, tmp_path, setup)
    for exact, accumulate in CASES:
        alone = model(exact)
        optimizer = torch.optim.SGD(alone.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            for part in range(accumulate):
                (sum(loss_of(alone(inputs(rank, step, part))) for rank in range(2)) / 2).backward()
            optimizer.step()
            set_coefficients(alone, 0.75, 0.25)
        wanted = dict(alone.named_parameters())
        for of_rank in found:
            parameters = of_rank[exact, accumulate]
            assert parameters.keys() == wanted.keys()
            assert difference([parameters[name] for name in wanted], list(wanted.values())) < 1e-5


if __name__ == "__main__":
    processes.worker(every_case)
    sys.exit()
