"""Run one program of a kernel, in Triton's interpreter, on tensors that would fill terabytes.

Its tensors are small, but lie behind addresses and indices as large as those of a grid with billions of elements; an
index that overflows 32 bits raises an error.
"""

import numpy as np
import triton.language as tl


class Far:
    """A tensor whose elements lie ``elements`` behind the address that the interpreter is given for it."""

    def __init__(self, tensor, elements):
        self.tensor, self.elements, self.dtype = tensor, elements, tensor.dtype

    def data_ptr(self):
        return self.tensor.data_ptr() - self.elements * self.tensor.element_size()

    def _self(self, *args, **kwargs):
        return self

    # The interpreter copies arguments to the host and back. These are there.
    untyped_storage = cpu = new_empty = set_ = copy_ = _self

    def storage_offset(self):
        return 0

    size = stride = storage_offset


def run_program(program, kernel, monkeypatch, **arguments):
    """Run program number ``program``; tensors not named are absent, and the tile is small."""
    from triton.runtime import interpreter

    handle = interpreter.TensorHandle(np.array([program], dtype=np.int32), tl.int32)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda self, axis: handle)
    tensors = dict.fromkeys(name for name in kernel.arg_names if name.endswith("_ptr"))
    tile = {"INPUT_PRECISION": "ieee", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
    tile = {name: value for name, value in tile.items() if name in kernel.arg_names}
    kernel[(1,)](**(tensors | tile | arguments))
