"""Every op and every tensor argument, of schemas as registered: memory that was freed, and arguments that share it."""

import itertools

import pytest
import torch

from revkernels import storage
from revkernels.registry import OPS
from revkernels.testing import implementations
from tests.ops import test_dual_residual, test_mbconv
from tests.ops.test_registry import fixed_point_samples, samples


def arguments_of(op):
    """Arguments of a call that gives every optional tensor."""
    if op.startswith("mbconv"):
        return list(test_mbconv.samples()[op])
    if op == "couple_":
        return list(fixed_point_samples()["int16, counted"])
    if op == "dual_residual_":
        return list(test_dual_residual.integer_sample())
    return list(samples()[op])


def tensors_of(op):
    """``(name, position, index in a list or None, written)`` of every tensor among ``arguments_of(op)``."""
    schema = OPS[op].overload._schema
    for position, (argument, value) in enumerate(zip(schema.arguments, arguments_of(op), strict=False)):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(value, torch.Tensor):
            yield argument.name, position, None, written
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield rf"{argument.name}\[{index}\]", position, index, written


def get(arguments, position, index):
    return arguments[position] if index is None else arguments[position][index]


def put(arguments, position, index, tensor):
    if index is None:
        arguments[position] = tensor
    else:
        arguments[position] = [*arguments[position][:index], tensor, *arguments[position][index + 1 :]]


EVERY_TENSOR = [(op, *where) for op in OPS for where in tensors_of(op)]
# An MBConv's planes may be one another's memory, chunk by chunk.
EVERY_PAIR = [
    (op, written, other)
    for op in samples()
    for written, other in itertools.permutations(tensors_of(op), 2)
    if written[3]
]


def name_of(value):
    return value[0].replace("\\", "") if isinstance(value, tuple) else str(value).replace("\\", "")


def test_every_tensor_of_every_schema_is_walked():
    for op in OPS:
        wanted = {a.name for a in OPS[op].overload._schema.arguments if "Tensor" in str(a.type)}
        assert {name.split("\\")[0] for name, *_ in tensors_of(op)} == wanted, op


@pytest.mark.parametrize("left", [0, 1], ids=["freed", "too short"])
@pytest.mark.parametrize(("op", "name", "position", "index", "written"), EVERY_TENSOR, ids=name_of)
def test_a_tensor_without_its_storage_is_refused_by_name(op, name, position, index, written, left):
    for _, call in implementations(op):
        arguments = arguments_of(op)
        tensor = get(arguments, position, index).clone()
        storage = tensor.untyped_storage()
        storage.resize_(left * (storage.nbytes() - 1))
        put(arguments, position, index, tensor)
        with pytest.raises(RuntimeError, match=rf"\b{name}: expected a storage of at least"):
            call(*arguments)


@pytest.mark.parametrize("op", ["couple_", "couple_adjoint"])
def test_storage_and_sharing_are_checked_again_in_later_calls(op):
    """Launches that are remembered skip what their shapes decide, and this is not among it."""
    for _, call in implementations(op):
        arguments = arguments_of(op)
        call(*arguments)
        call(*arguments)
        name, position, index, _ = next(where for where in tensors_of(op) if where[0].startswith("p"))
        freed = list(arguments)
        put(freed, position, index, get(arguments, position, index).clone())
        get(freed, position, index).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=rf"{name}: expected a storage"):
            call(*freed)
        if op == "couple_":
            p = get(arguments, position, index)
            put(freed, position, index, p.new_empty(0).set_(arguments[0].untyped_storage(), 0, p.shape))
            with pytest.raises(RuntimeError, match="y: expected memory of its own"):
                call(*freed)


@pytest.mark.parametrize("op", [op for op in samples() if samples()[op][0].dim() == 4])
def test_an_empty_tensor_needs_no_storage(op):
    for _, call in implementations(op):
        arguments = arguments_of(op)
        for _, position, index, _ in tensors_of(op):
            tensor = get(arguments, position, index)
            if tensor.dim() and tensor.shape[0] == 2:  # samples
                empty = tensor[:0].clone()
                empty.untyped_storage().resize_(0)
                put(arguments, position, index, empty)
        call(*arguments)


def with_one_buffer(op, first, second, offset):
    """Arguments of which two are in one buffer, the second one ``offset`` bytes behind the first one's end."""
    arguments = arguments_of(op)
    a, b = (get(arguments, *where[1:3]) for where in (first, second))
    start = -(-a.nbytes // b.itemsize) * b.itemsize + offset
    buffer = torch.zeros(start + b.nbytes, dtype=torch.uint8)
    put(arguments, *first[1:3], buffer[: a.nbytes].view(a.dtype).view(a.shape).copy_(a))
    put(arguments, *second[1:3], buffer[start:].view(b.dtype).view(b.shape).copy_(b))
    return arguments


@pytest.mark.parametrize(("op", "written", "other"), EVERY_PAIR, ids=name_of)
def test_what_an_op_writes_shares_memory_with_nothing_else(op, written, other):
    itemsize = max(get(arguments_of(op), *w[1:3]).itemsize for w in (written, other))
    both = "|".join((rf"\b{written[0]}: .* with {other[0]}$", rf"\b{other[0]}: .* with {written[0]}$"))
    for _, call in implementations(op):
        with pytest.raises(RuntimeError, match=both):
            call(*with_one_buffer(op, written, other, -itemsize))
    OPS[op].overload(*with_one_buffer(op, written, other, 0))


def bytes_of(t):
    """The addresses of every byte of every element."""
    elements = torch.as_strided(torch.arange(t.untyped_storage().nbytes()), t.shape, t.stride(), t.storage_offset())
    return {t.itemsize * int(e) + byte for e in elements.flatten() for byte in range(t.itemsize)}


def refuses(x, y):
    try:
        torch.ops.revkernels.dequantize_(x, y, 8)
    except RuntimeError as error:
        assert "x: expected memory of its own" in str(error)
        return True
    return False


def test_memory_is_shared_where_a_byte_is():
    generator = torch.Generator().manual_seed(0)

    def pick(*values):
        return values[torch.randint(len(values), (), generator=generator)]

    answers = []
    for _ in range(400):
        shape = [pick(1, 1, 2, 3) for _ in range(4)]
        buffer = torch.zeros(2048, dtype=torch.int16)
        views = []
        for dtype in (torch.float32, torch.int16):
            strides, step = [0] * 4, 1
            for d in torch.randperm(4, generator=generator).tolist():
                strides[d] = step * pick(1, 1, 2)
                step = strides[d] * (shape[d] + pick(0, 0, 1))
            views.append(buffer.view(dtype).as_strided(shape, strides, pick(*range(12))))
        x, y = views
        expected = not bytes_of(x).isdisjoint(bytes_of(y))
        assert storage.share_memory(x, y) == storage.share_memory(y, x) == refuses(x, y) == expected
        answers.append(expected)
    assert 100 < sum(answers) < 300


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_halves_of_one_map_along_any_dimension_are_apart(dim, layout):
    whole = torch.randn(64, 32, 48, 40).to(memory_format=layout)
    y, p = whole.chunk(2, dim)
    expected = y + p
    torch.ops.revkernels.couple_(y, [p], [None], [None], [1], "bilinear", False)
    assert torch.equal(y, expected)
    overlapping = whole.narrow(dim, 1, y.shape[dim])
    with pytest.raises(RuntimeError, match="y: expected memory of its own"):
        torch.ops.revkernels.couple_(y, [overlapping], [None], [None], [1], "bilinear", False)


def test_every_second_column_of_one_map_is_apart_from_the_others():
    whole = torch.randn(3, 4, 6, 10)
    y, p = whole[..., ::2], whole[..., 1::2]
    expected = y + p
    torch.ops.revkernels.couple_(y, [p], [None], [None], [1], "bilinear", False)
    assert torch.equal(y, expected)


def test_meta_tensors_share_no_memory():
    """All of them are at address 0."""
    a, b = (torch.empty(4, device="meta") for _ in range(2))
    assert not storage.share_memory(a, b)
