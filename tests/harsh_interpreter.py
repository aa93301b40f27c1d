"""Triton's interpreter, as unforgiving as a GPU, and right about bf16.

`install` makes every kernel that is interpreted from then on run under these rules; whatever breaks one raises an error
that names kernel, program and tensor.

    bounds      A pointer belongs to the tensor it came from: a load or store beyond that tensor's elements is an error,
                even where another tensor lies. Addresses are made up, so nothing is read by luck.
    masks       A lane that is masked off and has no ``other=`` holds NaN, or the largest integer: on a GPU it holds
                what was in the register, here it would be 0.
    programs    They run in a shuffled order. What one stores no other may load, nor store with another value: on a GPU
                nothing says which comes first.
    threads     What a program stores it loads, or stores anew with another value, only behind a barrier, since another
                thread may do it; so does a lane that stores what another lane loaded. Two lanes do not store different
                values to one address.
    integers    An overflow of 32 bits is an error. The variable of a loop is such an integer, whose division truncates;
                here it would be one of Python's.
    maximum     ``tl.maximum`` and ``tl.minimum`` drop a NaN unless told to propagate it, as the GPU's instructions do.
    sums        ``tl.sum`` of 16-bit floats is an error: a GPU adds them in 16 bits, the interpreter in 32.
    bf16        is kept as bits; arithmetic, comparisons and products on it run in fp32, and results are rounded to the
                nearest, ties to even. (As it comes, the interpreter computes with the bits as integers, and truncates.)
    tf32x3      is three products of operands rounded to TF32.

What it does not show: the layout of a tile among threads, asynchronous copies, approximate division and square root,
rounding inside of tensor cores, and plain TF32 (fp32 operands stay what they are).
"""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from far import Far
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Made-up addresses: the number of the argument above this bit, and terabytes of room for it on either side.
_TENSOR_SHIFT = np.uint64(48)


class _Tensor:
    """An argument of the launch: its elements as bits, and the log of the storage it lies in."""

    def __init__(self, name: str, argument, number: int, logs: dict) -> None:
        tensor, ahead = (argument.tensor, argument.elements) if isinstance(argument, Far) else (argument, 0)
        self.name, size = name, tensor.element_size()
        extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
        self.bits = tensor.detach().as_strided((extent,), (1,)).view(_BITS[size]).numpy()
        # Alignment as in memory: tensor descriptors insist on it.
        self.address = np.uint64((2 * number + 1 << int(_TENSOR_SHIFT) - 1) + tensor.data_ptr() % 16)
        self.first, self.itemsize = self.address + np.uint64(ahead * size), size
        self.offset = tensor.storage_offset()
        self.log = logs.setdefault((tensor.untyped_storage().data_ptr(), size), _Log())
        self.log.elements = max(self.log.elements, self.offset + extent)


class _Log:
    """Who stored each element of a storage, and when; and what each program loaded."""

    def __init__(self) -> None:
        self.elements, self.stored_at, self.loads = 0, None, []


class _Builder(interpreter.InterpreterBuilder):
    def __init__(self) -> None:
        super().__init__()
        self.options = replace(self.options, debug=True)  # asserts that integers do not overflow

    # Launches, programs and barriers.

    def begin(self, kernel: str, names) -> None:
        self.kernel, self.names, self.tensors, self.logs = kernel, iter(names), [], {}
        self.program_at = [-1]  # of each period between barriers; period 0 lies before the launch

    def argument(self, value, converted) -> None:
        """Note the next argument of the launch, and give the pointer that a tensor became a made-up address."""
        name = next(self.names)
        if hasattr(value, "data_ptr"):
            self.tensors.append(_Tensor(name, value, len(self.tensors), self.logs))
            converted.handle.data = np.array([self.tensors[-1].address])

    def set_grid_dim(self, *extents) -> None:
        super().set_grid_dim(*extents)
        self.order = np.random.default_rng(0).permutation(int(np.prod(extents)))

    def set_grid_idx(self, *index) -> None:
        self.program = int(self.order[np.ravel_multi_index(index, self.grid_dim)])
        super().set_grid_idx(*(int(i) for i in np.unravel_index(self.program, self.grid_dim)))
        self.create_barrier()

    def create_barrier(self) -> None:
        self.program_at.append(self.program)

    def finish(self) -> None:
        """No program loaded what another stored."""
        program_at = np.array(self.program_at)
        for log in self.logs.values():
            for tensor, period, slots, _ in log.loads if log.stored_at is not None else ():
                writer, program = program_at[log.stored_at[slots]], self.program_at[period]
                if ((writer >= 0) & (writer != program)).any():
                    raise self._error(tensor, "loads", f"what program {writer.max()} stores", program)

    def _error(self, tensor: _Tensor, does: str, what: str, program: int | None = None) -> Exception:
        program = self.program if program is None else program
        return RuntimeError(f"{self.kernel}: program {program} {does} {what}, in {tensor.name}")

    # Memory.

    def _locate(self, pointers, mask, does: str):
        """(tensor, indices of its elements, their places in its storage's log, lanes) of the lanes that are on."""
        lanes = np.broadcast_to(np.asarray(getattr(mask, "data", mask)).astype(bool), pointers.data.shape)
        addresses = pointers.data[lanes]
        if not addresses.size:
            return None, None, None, lanes
        tensor = self.tensors[int(addresses[0] >> _TENSOR_SHIFT)]
        index = (addresses - tensor.first).view(np.int64) // tensor.itemsize
        outside = index.view(np.uint64) >= tensor.bits.size  # negative ones are large then
        if outside.any():
            raise self._error(tensor, does, f"{outside.sum()} elements out of bounds, one of them {index[outside][0]}")
        return tensor, index, index + tensor.offset, lanes

    def create_load(self, ptr, cache_modifier, eviction_policy, is_volatile):
        return self.create_masked_load(ptr, True, None, cache_modifier, eviction_policy, is_volatile)

    def create_store(self, ptr, value, cache_modifier, eviction_policy):
        return self.create_masked_store(ptr, value, True, cache_modifier, eviction_policy)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        element = ptrs.get_element_ty()
        tensor, index, slots, lanes = self._locate(ptrs, mask, "loads")
        if other is not None:
            values = np.array(np.broadcast_to(other.data, ptrs.data.shape))
        else:
            # Of a single value an ``other`` of 0 does not get here.
            values = np.full(ptrs.data.shape, _garbage(element) if lanes.size > 1 else 0, _get_np_dtype(element))
        if tensor is not None:
            log, period = tensor.log, len(self.program_at) - 1
            if log.stored_at is not None and (log.stored_at[slots] == period).any():
                raise self._error(tensor, "loads", "what it stored, without a barrier in between")
            log.loads.append((tensor, period, slots, lanes))
            values[lanes] = tensor.bits.view(values.dtype)[index]
        return TensorHandle(values, element)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        tensor, index, slots, lanes = self._locate(ptrs, mask, "stores")
        if tensor is None:
            return
        values = np.ascontiguousarray(np.broadcast_to(value.data, lanes.shape)[lanes]).view(tensor.bits.dtype)
        log, period = tensor.log, len(self.program_at) - 1
        if log.stored_at is None:
            log.stored_at = np.zeros(log.elements, np.int32)
        before = log.stored_at[slots]
        again = (before > 0) & (tensor.bits[index] != values)
        if again.any():
            writer = np.array(self.program_at)[before]
            if (again & (writer != self.program)).any():
                raise self._error(tensor, "stores", "another value than another program before it")
            if (again & (before == period)).any():
                raise self._error(tensor, "stores", "a second value without a barrier in between")
        for *_, loaded_at, loaded, loading in reversed(log.loads):
            if loaded_at != period:
                break
            _, loads, stores = np.intersect1d(loaded, slots, return_indices=True)
            if (np.flatnonzero(loading)[loads] != np.flatnonzero(lanes)[stores]).any():
                raise self._error(tensor, "stores", "what another lane loaded, without a barrier in between")
        tensor.bits[index] = values
        log.stored_at[slots] = period
        if (tensor.bits[index] != values).any():
            raise self._error(tensor, "stores", "two values to one address at once")

    def create_atomic_rmw(self, *args):
        raise NotImplementedError("atomics on made-up addresses")

    create_atomic_cas = create_atomic_rmw

    # Arithmetic.

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def binary_op(self, lhs, rhs, op):
        return _like(lhs, super().binary_op(_wide(lhs), _wide(rhs), op))

    def ternary_op(self, lhs, rhs, other, op):
        return _like(other, super().ternary_op(_wide(lhs), _wide(rhs), _wide(other), op))

    def unary_op(self, arg, op):
        return _like(arg, super().unary_op(_wide(arg), op))

    def create_fma(self, x, y, z):
        return _like(z, super().create_fma(_wide(x), _wide(y), _wide(z)))

    def get_bf16(self, value):
        return _round(self.get_fp32(value))

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return _round(super().cast_impl(src, tl.float32))
        return super().cast_impl(_wide(src), dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = _wide(a), _wide(b)
        if input_precision.name != "TF32x3" or a.data.dtype != np.float32:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        (a, a_rest), (b, b_rest) = _tf32(a), _tf32(b)
        for pair in ((a_rest, b), (a, b_rest), (a, b)):
            d = super().create_dot(*pair, d, input_precision, max_num_imprecise_acc)
        return d


def _garbage(element):
    if element.is_floating():
        return 0x7FFF if element == tl.bfloat16 else np.nan
    return True if element == tl.int1 else np.iinfo(_get_np_dtype(element)).max


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(handle):
    """bf16 as fp32; anything else as it is."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(handle):
    """fp32 as bf16, to the nearest, ties to even; a NaN becomes the GPU's."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(handle.data), 0x7FFF, rounded).astype(np.uint16), tl.bfloat16)


def _like(operand, result):
    """The result of an operation on `_wide` operands in the type of ``operand``; truth values stay such."""
    return _round(result) if _is_bf16(operand) and result.data.dtype == np.float32 else result


def _tf32(handle):
    """fp32 as a TF32 value and a TF32 rest, each rounded to the nearest, ties away from zero."""
    parts = []
    rest = np.ascontiguousarray(handle.data)
    for _ in range(2):
        part = ((rest.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        parts.append(TensorHandle(part, tl.float32))
        rest = rest - part
    return parts


class _Reduction(interpreter.ReduceOps):
    def sum(self, input):
        if input.dtype.is_floating() and input.dtype.primitive_bitwidth < 32:
            raise TypeError(f"sum of {input.dtype}: convert to fp32 first")
        return super().sum(input)


class _Loops(interpreter.ASTTransformer):
    """Makes the variable of a loop a tensor, as every other assignment does; that of a `tl.static_range` is none."""

    def visit_For(self, node):
        self.generic_visit(node)
        if "static_range" not in ast.unparse(node.iter):
            name = ast.unparse(node.target)
            node.body.insert(0, self.visit(ast.parse(f"{name} = {name}").body[0]))
        return node


class _Executor(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs):
        builder = interpreter.interpreter_builder
        builder.begin(self.fn.__name__, [name for name in self.arg_names if name not in self.constexprs])
        super().__call__(*args, **kwargs)
        builder.finish()


def install() -> None:
    """Interpret all kernels that were not interpreted yet under the rules above."""
    convert = interpreter._implicit_cvt

    builder = interpreter.interpreter_builder = _Builder()
    interpreter.interpreter_semantic = interpreter.TritonSemantic(builder)

    def note_and_convert(value):
        converted = convert(value)
        builder.argument(value, converted)
        return converted

    interpreter._implicit_cvt = note_and_convert
    interpreter.GridExecutor, interpreter.ReduceOps = _Executor, _Reduction
    interpreter.FunctionRewriter.ast_transformer = _Loops()
