"""A pretended GPU: "meta" tensors, which have a shape and no values, stand for those on the device;
CPU tensors are real.

    with PretendedGPU() as gpu:
        smt.main("--device meta ...".split())       # whole: objective, evaluation, checkpoint
    gpu.launches, gpu.copies, gpu.questions, gpu.peak, gpu.flops, gpu.shapes, gpu.seconds

A kernel of CUDA refuses tensors of two devices, and so does this. What is read back from the device
is zero, or yes ("is all of it finite?"). Kernels, copies, operations and bytes are counted; the
seconds are an estimate from them.
"""
import sys
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# A CPU tensor may index a tensor of the device, and CUDA copies it there first, while all wait.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._unsafe_index.Tensor}
FREE = {aten.detach.default, aten.empty.memory_format, aten.empty_like.default,
        aten._unsafe_view.default, aten.empty_strided.default, aten.new_empty.default}
# Where rows are picked from a tensor or put into it: what moves is as large as the rows.
PICKED = INDEXED | {aten.gather.default, aten.embedding.default,
                    aten.embedding_dense_backward.default}
# An estimate's machine: an H100's peak in bf16 and its memory, as far as plain kernels get; and
# the shortest kernel; and what eager PyTorch takes to start one, while the GPU waits.
PEAK, RATE, BANDWIDTH, SHORTEST, START = 989e12, 0.4 * 989e12, 2.5e12, 2e-6, 10e-6


class WrongDevice(RuntimeError):
    """An operation that CUDA would refuse."""


class PretendedGPU(TorchDispatchMode):
    """Counts, of what happens inside: launches (kernels), copies (from the host, each of which the
    host waits for unless it was pinned), questions (values that the host waits for), bytes that
    live on the device and their peak, flops of products, shapes that attention meets. seconds: each
    kernel takes as long as its start, its bytes or its flops, whichever is longest; busy: without
    the starts."""

    def __init__(self):
        super().__init__()
        self.launches = self.copies = self.questions = self.live = self.peak = self.flops = 0
        self.seconds, self.busy, self.start, self.shapes = 0.0, 0.0, START, set()
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        on_gpu = any(t.is_meta for t in tensors)
        wanted = kwargs.get("device")
        if not on_gpu and not (wanted and torch.device(wanted).type == "meta"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.questions += 1
            # zero; but yes, all is finite
            return tensors[0].dtype is torch.bool or torch.zeros((), dtype=tensors[0].dtype).item()
        if func in (aten._to_copy.default, aten.copy_.default):
            return self.copy(func, tensors, args, kwargs)
        self.demand_one_device(func, args, tensors)
        for t in tensors:
            self.count_bytes(t)
        out = aten_fused(func, args, kwargs)
        if not (func.is_view or func in FREE):
            self.count_kernel(func, args, kwargs, tensors, out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_meta:
                self.count_bytes(t)
        return out

    def copy(self, func, tensors: list, args: tuple, kwargs: dict):
        """Between the devices, either way, or on the device."""
        to = tensors[0] if func is aten.copy_.default else None
        source = tensors[-1]
        target = to.device if to is not None else torch.device(kwargs.get("device", source.device))
        if source.is_meta and target.type != "meta":        # back to the host, which waits
            self.questions += 1
            if to is not None:
                return to.zero_()
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not source.is_meta:
            self.copies += 1
        else:
            self.launches += 1
            self.spend(2 * size_of(source) / BANDWIDTH)
        if to is None:
            to = torch.empty_strided(source.shape, source.stride(), device="meta",
                                     dtype=kwargs.get("dtype") or source.dtype)
        self.count_bytes(to)
        return to

    def demand_one_device(self, func, args: tuple, tensors: list) -> None:
        """As CUDA does: numbers (tensors without dimensions) may stay on the CPU."""
        if func in INDEXED:
            if not args[0].is_meta:
                raise WrongDevice(f"{func}: a CPU tensor, indexed by one of the device")
            self.copies += sum(not t.is_meta for t in tensors)
            return
        if any(not t.is_meta and t.ndim for t in tensors):
            where = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
            raise WrongDevice(f"{func}: {where}")

    def count_kernel(self, func, args: tuple, kwargs: dict, tensors: list, out) -> None:
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        moved = 2 * sum(map(size_of, made)) if func in PICKED else sum(map(size_of, tensors + made))
        rule = flop_registry.get(func._overloadpacket)
        flops = rule(*args, **kwargs, out_val=out) if rule else 0
        self.launches, self.flops = self.launches + 1, self.flops + flops
        self.spend(max(moved / BANDWIDTH, flops / RATE))
        if "scaled_dot_product" in str(func):
            self.shapes.add((str(func), *(tuple(t.shape) for t in tensors[:4])))

    def spend(self, seconds: float) -> None:
        busy = max(SHORTEST, seconds)
        self.busy, self.seconds = self.busy + busy, self.seconds + max(self.start, busy)

    def count_bytes(self, t: Tensor) -> None:
        """A storage is counted when it is first seen, until the last tensor of it is gone. CUDA
        hands out multiples of 512 bytes."""
        if not t.is_meta:
            return
        storage = t.untyped_storage()
        if storage in self.known:
            return
        size = -(-storage.nbytes() // 512) * 512
        self.known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.live -= size


def size_of(t: Tensor) -> int:
    """Bytes."""
    return t.numel() * t.element_size()


def aten_fused(func, args: tuple, kwargs: dict):
    """The call itself; fused AdamW has no kernel for tensors without values and changes them in
    place."""
    return None if func is aten._fused_adamw_.default else func(*args, **kwargs)


def allow_fused_adamw(monkeypatch) -> None:
    """AdamW asks a list whether a device has a fused kernel; the pretended GPU has one."""
    for module in [m for name, m in sys.modules.items() if name.startswith("torch.")]:
        if "_get_fused_kernels_supported_devices" in vars(module):
            monkeypatch.setattr(module, "_get_fused_kernels_supported_devices",
                                lambda: ["cuda", "cpu", "meta"])
