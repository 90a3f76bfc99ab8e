"""Instruments: bytes kept for the backward pass, floating-point operations, the largest new tensor, CPU time.

The first three count and do not time, so their answers are the same on every machine and may be asserted.
"""

import math
import time
from collections import Counter

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def saved_by_shape(fn, exclude=()):
    """What autograd keeps for the backward pass of fn(), largest first: {(shape, dtype): bytes}.

    fn: runs a forward pass only, and returns its output
    exclude: tensors and modules that are there anyway (inputs, frozen weights), told by their storage
    A storage counts once, whole, however many views of it are kept: that is what stays in memory. Tensors that a
    custom Function hides on ctx instead of passing them to save_for_backward are not seen.
    """
    known = set()
    for item in exclude:
        tensors = [*item.parameters(), *item.buffers()] if isinstance(item, nn.Module) else [item]
        known.update(t.untyped_storage().data_ptr() for t in tensors)
    kept = []  # holds on to every tensor, so that no address is used twice

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = fn()
    found = Counter()
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            found[tuple(tensor.shape), tensor.dtype] += storage.nbytes()
    del output
    return dict(found.most_common())


def saved_bytes(fn, exclude=()):
    """How many bytes autograd keeps for the backward pass of fn(): see `saved_by_shape`."""
    return sum(saved_by_shape(fn, exclude).values())


def flops(fn):
    """Floating-point operations of the matrix products in fn(), forward and, if fn calls backward(), backward.

    A product of (n, k) and (k, m) counts 2 n k m. Elementwise work is not counted.
    """
    # torch's counter knows addmm but not its in-place form, and would give it for nothing
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        fn()
    return counter.get_total_flops()


def _addmm_flops(y, a, b, **_):
    """The shapes of y += a b, as torch's counter passes them."""
    return 2 * math.prod(a) * b[1]


class _Watch(TorchDispatchMode):
    """Sees every operation, the backward pass's too, and remembers the largest storage that one created."""

    def __init__(self):
        super().__init__()
        self.largest = (0, ())

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch imports its whole compiler, seconds for a mode that nothing compiles

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(output):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, (t.untyped_storage().nbytes(), tuple(t.shape)))
        return output


def peak_new_tensor(fn):
    """(bytes, shape) of the largest tensor that fn() creates; views and in-place results are not new."""
    with _Watch() as watch:
        fn()
    return watch.largest


def cpu_times(fns, repeats=15):
    """CPU seconds of every call of each function in {name: fn}: {name: `repeats` numbers}, on one thread.

    The functions take turns, so that a busy machine disturbs all of them alike, and the time is the thread's own, which
    other programs do not add to, though they do slow it down. Each is called once before, unmeasured.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {name: [] for name in fns}
    try:
        for turn in range(repeats + 1):
            for name, fn in fns.items():
                start = time.thread_time()
                fn()
                if turn > 0:
                    times[name].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return times


def cpu_seconds(fns, repeats=15):
    """The least of `cpu_times` for each function: the call that was disturbed least. Compare them as ratios."""
    return {name: min(times) for name, times in cpu_times(fns, repeats).items()}
