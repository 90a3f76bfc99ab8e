"""A simulation of paged optimizers: what QLoRA's (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3)
do for a GPU that is full now and then, in numbers that anyone can follow. Nothing here allocates memory or trains.

The real thing is `utils.optimizers.paged_adamw`: bitsandbytes puts the moments of tensors with 100,000 numbers or more
into CUDA's unified memory (cudaMallocManaged) and fetches each tensor's just before its update. Who else needs the
GPU's memory gets it: the driver writes pages to the CPU's memory, and a page that is used again comes back.

The lesson, with a GPU of 24 GB, 20 GB of weights and 2 GB of moments. Activations of 1 GB fit: nothing ever moves. One
long batch of 3 GB does not; without paging it ends the run, and paged, 1 GB of moments goes out and comes back, once.
But if every batch is long, every step waits for these 2 GB to cross the bus: paging handles spikes, not steady state.
Should the moments not fit beside the weights even then, all of them cross it in every step: the least recently used
page is the one needed next. And where weights and activations alone are too many, paging cannot help at all.

What is simpler here than in CUDA: pages have one size, the least recently used goes first, and what moves waits for
nothing else. The time it takes is not simulated: divide the bytes by those that the bus carries in a second.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from utils.methods.settings import whole

PAGE = 2 * 2**20  # bytes; the block in which the driver evicts
MIN_PAGED_NUMBERS = 100_000  # smaller tensors stay on the GPU (bitsandbytes/optim/optimizer.py, get_state_buffer)


class PagedMemorySimulator:
    """A GPU's memory with resident tensors, which stay, and paged ones, whose pages come and go. A simulation.

    gpu_bytes: what the GPU has   page: bytes of a page; a tensor's last one may be shorter
    faults     pages that were needed and had to come        bytes_in, bytes_out   what moved to the GPU, and from it
    peak       the most bytes ever in use on the GPU

    A paged tensor begins on the CPU. Making room evicts whole pages, the least recently touched first.
    Raises torch.OutOfMemoryError, with nothing changed, where evicting every page would not make room.
    """

    def __init__(self, gpu_bytes, page=PAGE):
        self.gpu_bytes = whole("gpu_bytes", gpu_bytes)
        self.page = whole("page", page)
        self.faults = self.bytes_in = self.bytes_out = self.peak = 0
        self.resident_bytes = self.paged_bytes = 0  # on the GPU
        self.resident = {}  # name -> bytes
        self.pages = {}  # name of a paged tensor -> bytes of each of its pages
        self._here = OrderedDict()  # (name, number of the page) -> bytes, of pages on the GPU; least recent first

    @property
    def used(self):
        """Bytes in use on the GPU."""
        return self.resident_bytes + self.paged_bytes

    def on_gpu(self, name):
        """How many bytes of a tensor are on the GPU now."""
        return self.resident.get(name, 0) + sum(size for (tensor, _), size in self._here.items() if tensor == name)

    def allocate(self, name, size, paged=False):
        """Make a tensor of so many bytes: on the GPU at once, or paged."""
        whole("size", size)
        if name in self.resident or name in self.pages:
            raise ValueError(f"There is a tensor named {name!r} already.")
        if paged:
            full, rest = divmod(size, self.page)
            self.pages[name] = [self.page] * full + [rest] * (rest > 0)
        else:
            self._make_room(size, name)
            self.resident[name] = size
            self.resident_bytes += size
            self.peak = max(self.peak, self.used)

    def free(self, name):
        """Give a tensor's memory back, wherever it is."""
        if name not in self.resident and name not in self.pages:
            raise ValueError(f"There is no tensor named {name!r}.")
        self.resident_bytes -= self.resident.pop(name, 0)
        for number in range(len(self.pages.pop(name, ()))):
            self.paged_bytes -= self._here.pop((name, number), 0)

    def touch(self, name):
        """Use a tensor from its first byte to its last; returns the faults. A resident one never has any."""
        if name in self.resident:
            return 0
        if name not in self.pages:
            raise ValueError(f"There is no tensor named {name!r}.")
        before = self.faults
        for number, size in enumerate(self.pages[name]):
            key = (name, number)
            if key not in self._here:
                self._make_room(size, name)
                self._here[key] = size
                self.paged_bytes += size
                self.faults += 1
                self.bytes_in += size
                self.peak = max(self.peak, self.used)
            self._here.move_to_end(key)
        return self.faults - before

    def _make_room(self, size, name):
        if self.resident_bytes + size > self.gpu_bytes:
            raise torch.OutOfMemoryError(
                f"{name} needs {size:,} bytes, and {self.resident_bytes:,} of the GPU's {self.gpu_bytes:,} cannot be "
                "paged out."
            )
        while self.used + size > self.gpu_bytes:
            _, gone = self._here.popitem(last=False)
            self.paged_bytes -= gone
            self.bytes_out += gone


@dataclass(frozen=True)
class Step:
    """What one training step needed: the most bytes on the GPU, faults, bytes moved each way, and whether it fitted.

    Where it did not fit (fits=False), peak is what it asked for, and it is the last step.
    """

    peak: int
    faults: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    fits: bool = True

    @property
    def moved(self):
        return self.bytes_in + self.bytes_out


def moment_tensors(numbers, bits=32):
    """{name: (bytes, may be paged)} of what AdamW keeps for tensors of so many trained numbers.

    numbers: {name: count}   bits: 32 or 8. With 8, tensors of fewer than 4096 numbers keep float32 moments, and others
    a float32 scale per 256 numbers, which bitsandbytes never pages
    """
    if bits not in (32, 8):
        raise ValueError(f"bits is {bits!r}; moments have 32 or 8 bits")
    tensors = {}
    for name, count in numbers.items():
        whole(f"the count of {name}", count)
        eight = bits == 8 and count >= 4096
        for moment in ("m", "v"):
            tensors[f"{name}.{moment}"] = (count if eight else 4 * count, count >= MIN_PAGED_NUMBERS)
            if eight:
                tensors[f"{name}.{moment}_absmax"] = (4 * -(-count // 256), False)
    return tensors


def simulate_training(gpu_bytes, fixed, moments, activations, paged=True, page=PAGE):
    """Play a training, step by step: activations come and go, then the optimizer uses each of its tensors once.

    gpu_bytes: what the GPU has   fixed: bytes of weights and gradients, always there
    moments: {name: (bytes, may be paged)}, as from `moment_tensors`   activations: bytes at the peak of each step
    paged: False keeps all moments on the GPU, as torch.optim.AdamW does
    returns a list of Step, which ends with the first that does not fit   raises torch.OutOfMemoryError where it cannot
    even begin. The moments are filled with zeros before the first step, as bitsandbytes does; this is not counted.
    """
    memory = PagedMemorySimulator(gpu_bytes, page)
    memory.allocate("weights and gradients", fixed)
    for name, (size, may_page) in moments.items():
        memory.allocate(name, size, paged and may_page)
        memory.touch(name)
    steps = []
    for size in activations:
        memory.faults = memory.bytes_in = memory.bytes_out = 0
        memory.peak = memory.used
        try:
            memory.allocate("activations", size)
        except torch.OutOfMemoryError:
            steps.append(Step(memory.resident_bytes + size, fits=False))
            break
        memory.free("activations")
        for name in moments:
            memory.touch(name)
        steps.append(Step(memory.peak, memory.faults, memory.bytes_in, memory.bytes_out))
    return steps
