"""Instruments for memory: live bytes over a step, what each module keeps, and the peak of a GPU.

They watch every operation from outside, so they are right for any model and any method; they say what was there, and
the formulas of `activations` and `states` say why.
"""

from collections import Counter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, after each operation, the backward pass's and the optimizer's too.

        with LiveBytes(known=model.parameters()) as live:
            loss = model(**batch).loss
            live.mark("forward")
            loss.backward()
        live.now, live.peak, live.line, live.marks

    known: tensors that are there anyway and are not counted
    A storage counts whole, once, from the operation that made it until nothing refers to it any more.
    """

    def __init__(self, known=()):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive = {}  # address of a storage -> (weak reference to it, bytes)
        self.now = self.peak = 0
        self.line = []  # bytes after each operation
        self.marks = {}  # name -> how many operations had run

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch imports its whole compiler, seconds for a mode that nothing compiles

    def mark(self, name):
        """Name this moment. returns the bytes alive now"""
        self.sweep()
        self.marks[name] = len(self.line)
        return self.now

    def sweep(self):
        """Forget the storages that are gone."""
        for address, (reference, size) in list(self.alive.items()):
            if reference.expired():
                del self.alive[address]
                self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.sweep()
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.line.append(self.now)
        return output


def saved_by_module(model, fn, exclude=()):
    """What autograd keeps for the backward pass of fn(), by the module in whose forward it was kept: Counter of bytes.

    exclude: tensors that are there anyway; the model's own are excluded in any case
    A storage that several modules keep counts for the first.
    """
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *exclude)}
    stack, found, alive, handles = [""], Counter(), [], []

    def pack(tensor):
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            found[stack[-1]] += storage.nbytes()
        return tensor

    def come_out(*_):
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(come_out, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = fn()
    finally:
        for handle in handles:
            handle.remove()
    del output
    return found


def cuda_peak(fn):
    """(bytes allocated at the peak of fn(), bytes reserved from the driver). raises RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA GPU here; LiveBytes counts on a CPU")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
