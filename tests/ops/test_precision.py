"""Products of float32 take the precision of convolutions, and leave PyTorch's setting as it was."""

import threading

import pytest
import torch

from revkernels.precision import convolution_precision, with_products_in

CUDA = torch.device("cuda")


def matmul():
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def restored():
    before = matmul(), torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def test_convolutions_of_float32_maps_on_cuda_have_a_precision():
    assert convolution_precision(CUDA, torch.float32) == "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert convolution_precision(CUDA, torch.float32) != "tf32"
    assert convolution_precision(CUDA, torch.bfloat16) is None
    assert convolution_precision(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("wanted", ["none", "ieee", "tf32"])
def test_products_have_it_within_and_what_was_before_afterwards(before, wanted):
    torch.backends.cuda.matmul.fp32_precision = before
    assert with_products_in(wanted, with_products_in, wanted, matmul) == wanted
    assert matmul() == before
    with pytest.raises(KeyError):
        with_products_in(wanted, {}.__getitem__, "nothing")
    assert matmul() == before


def test_none_changes_nothing():
    before = matmul()
    assert with_products_in(None, matmul) == before


def test_the_last_thread_to_leave_restores():
    before = matmul()
    inside, leave = threading.Event(), threading.Event()

    def first():
        inside.set()
        leave.wait()

    def second():
        leave.set()
        thread.join()
        return matmul()

    thread = threading.Thread(target=with_products_in, args=("tf32", first))
    thread.start()
    inside.wait()
    assert with_products_in("tf32", second) == "tf32"
    assert matmul() == before
