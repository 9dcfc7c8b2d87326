"""A batch that is taken apart comes back as it was: nesting, types, dtypes, values to the bit."""

from __future__ import annotations

import collections
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trajrec.errors import RecordingError
from trajrec.inputs import STRUCTURE, arrays_of, batches_of, contents_of

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn),
]


def there_and_back(*batches):
    return batches_of(arrays_of([contents_of(batch) for batch in batches]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3, 1)])
def test_tensors_of_every_dtype_and_shape(dtype, shape):
    value = (torch.randn(shape) * 3).to(dtype)
    ((found,),) = there_and_back((value,))
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(value.reshape(-1).view(torch.uint8))


def test_nesting_and_plain_values():
    batch = [(1, 2.5, None), {"a": [True, "b\u00fc"], 3: ()}, {}, float("inf"), {"tensor": [0, "float32"]}]
    assert there_and_back(batch, "x") == [batch, "x"]


def test_arrays_and_tensors_as_they_lie_in_memory():
    tensor, array = torch.arange(12.0).reshape(3, 4).t()[1:], np.arange(6)[::2]
    (found,) = there_and_back({"t": tensor, "a": array, "c": torch.tensor([1 + 2j]).conj()})
    assert torch.equal(found["t"], tensor)
    assert isinstance(found["a"], np.ndarray)
    assert (found["a"] == array).all()
    assert found["c"].item() == 1 - 2j


def test_copies_are_made_at_once():
    x = torch.zeros(3)
    contents = contents_of([x])
    x += 1
    assert batches_of(arrays_of([contents]))[0][0].sum() == 0


def test_rows_of_a_batch():
    batch = (torch.arange(5), torch.arange(10).reshape(5, 2), torch.arange(3), "text")
    part = contents_of(batch).rows(slice(1, 3), 5)
    a, b, c, text = batches_of(arrays_of([part]))[0]
    assert (a.tolist(), b.tolist(), c.tolist(), text) == ([1, 2], [[2, 3], [4, 5]], [0, 1, 2], "text")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (SimpleNamespace(x=1), "this batch holds a types.SimpleNamespace"),
        (collections.OrderedDict(a=1), "this batch holds a collections.OrderedDict"),
        (collections.namedtuple("Pair", "x y")(1, 2), "Pair"),
        (np.array(["a"]), "numpy.ndarray"),
        ({(1, 2): 3}, r"the key \(1, 2\)"),
        (torch.zeros(3).to_sparse(), "a sparse or quantized one"),
    ],
)
def test_everything_else_is_an_error_that_says_so(value, message):
    with pytest.raises(RecordingError, match=message):
        contents_of([value])


@pytest.mark.parametrize(
    "structure",
    ['[{"tensor": [7, "float32"]}]', '[{"tensor": [0, "load"]}]', '[{"a": 1, "b": 2}]', '[{"set": []}]', "["],
)
def test_made_up_structures_are_refused(structure):
    arrays = {STRUCTURE: np.frombuffer(structure.encode(), np.uint8), "0/0": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"."):
        batches_of(arrays)


def test_the_structure_is_json():
    text = arrays_of([contents_of([torch.zeros(2), 1])])[STRUCTURE].tobytes()
    assert json.loads(text) == [{"list": [{"tensor": [0, "float32"]}, 1]}]
