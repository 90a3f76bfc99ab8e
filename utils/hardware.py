"""Which device, dtype, attention and batch size to use here, and why.

`settings()` looks at this machine; `settings("T4")` answers for a machine you do not have. Both go through the same
rules, so the rules are tested for a T4, an L4, an A100, an H100, a CPU and an Apple GPU without owning one.
"""

import math
from dataclasses import dataclass

import torch

GB = 1e9


@dataclass(frozen=True)
class Device:
    """What the rules need to know about a machine.

    kind: "cuda", "mps" or "cpu"; memory_gb and free_gb in GB (1e9 bytes), free_gb None means all of it;
    capability: (major, minor) of an NVIDIA GPU, None elsewhere.
    """

    kind: str
    name: str
    memory_gb: float
    capability: tuple[int, int] | None = None
    free_gb: float | None = None

    @property
    def native_bf16(self):
        """Whether bfloat16 runs in hardware. Emulated bfloat16 does not count: it is slow and takes memory."""
        return self.kind == "cuda" and self.capability >= (8, 0)


@dataclass(frozen=True)
class ModelSize:
    """What the batch size depends on. The default is a 1.5-billion decoder (Qwen2.5-1.5B's published config)."""

    parameters: float = 1.54e9
    layers: int = 28
    width: int = 1536
    vocabulary: int = 151_936

    @classmethod
    def of(cls, model):
        """The size of a transformers model."""
        config, count = model.config, sum(p.numel() for p in model.parameters())
        return cls(count, config.num_hidden_layers, config.hidden_size, config.vocab_size)


@dataclass(frozen=True)
class Settings:
    """The answer. print() gives it as sentences."""

    device: Device
    dtype: torch.dtype
    attention: str
    batch_size: int
    reasons: tuple[str, ...]

    @property
    def precision(self):
        """The word that accelerate (and utils.training) uses for this dtype."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[self.dtype]

    def __str__(self):
        head = f"{self.device.name} ({self.device.memory_gb:.0f} GB): {_name(self.dtype)}, {self.attention} attention"
        return "\n- ".join((f"{head}, batch size {self.batch_size}", *self.reasons))


KNOWN = {
    "T4": Device("cuda", "T4", 16, (7, 5)),
    "L4": Device("cuda", "L4", 24, (8, 9)),
    "A100": Device("cuda", "A100", 40, (8, 0)),
    "A100-80GB": Device("cuda", "A100-80GB", 80, (8, 0)),
    "H100": Device("cuda", "H100", 80, (9, 0)),
    "cpu": Device("cpu", "cpu", 16),
    "mps": Device("mps", "mps", 16),
}


def tensor_bytes(shape, dtype):
    """Bytes that a tensor of this shape and dtype takes: one itemsize per number, and () is one number."""
    return math.prod(shape) * dtype.itemsize


def describe(kind=None):
    """The Device here: the GPU if torch sees one, else the CPU. kind ("cuda", "mps", "cpu") asks for one.

    Raises RuntimeError when the kind asked for is not here.
    """
    if kind is None:
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "A CUDA GPU was asked for, but torch sees none: on Colab choose Runtime > Change runtime type > GPU; "
                "elsewhere use profile 'tiny', which needs no GPU."
            )
        free, total = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return Device("cuda", name, total / GB, capability, free / GB)
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise RuntimeError("An Apple GPU (mps) was asked for, but torch sees none: use 'cpu' here.")
        total = torch.mps.recommended_max_memory()
        return Device("mps", "mps", total / GB, None, (total - torch.mps.driver_allocated_memory()) / GB)
    if kind == "cpu":
        import psutil  # comes with accelerate; only this branch needs it

        memory = psutil.virtual_memory()
        return Device("cpu", "cpu", memory.total / GB, None, memory.available / GB)
    raise ValueError(f"kind must be 'cuda', 'mps' or 'cpu', not {kind!r}.")


def settings(device=None, *, model=ModelSize(), length=512):
    """Device, dtype, attention and batch size for training an adapter on a frozen base, each with its reason.

    device: None (this machine), "cuda" (the GPU here), a name in KNOWN such as "T4", or a Device.
    model: the base's ModelSize; length: tokens per row.
    """
    if device is None or device == "cuda":
        device = describe(device)
    elif isinstance(device, str):
        if device not in KNOWN:
            known = ", ".join(KNOWN)
            raise ValueError(f"Unknown device {device!r}: known are {known}, 'cuda' and None (this machine).")
        device = KNOWN[device]
    dtype, why_dtype = _dtype(device)
    batch_size, why_batch = _batch_size(device, dtype, model, length)
    return Settings(device, dtype, "sdpa", batch_size, (why_dtype, _why_sdpa(device), why_batch))


def _dtype(device):
    """The dtype of the frozen base, and why. Adapter weights stay float32 everywhere."""
    if device.kind == "cpu":
        return torch.float32, "float32: few CPUs multiply 16-bit numbers natively, and the tiny models fit anyway."
    if device.kind == "mps":
        return torch.float32, (
            "float32: float16 training needs a GradScaler, which torch has on Apple GPUs only since 2.8; "
            "for inference alone, float16 halves the memory."
        )
    number = f"{device.capability[0]}.{device.capability[1]}"
    if device.native_bf16:
        return torch.bfloat16, (
            f"bfloat16: native from capability 8.0 on ({device.name} has {number}). It has float32's range, so no "
            "GradScaler is needed; adapter weights stay float32."
        )
    if device.capability < (7, 0):
        return torch.float32, f"float32: capability {number} has no tensor cores, and recent torch builds leave it out."
    return torch.float16, (
        f"float16 with a GradScaler and float32 adapter weights: {device.name} (capability {number}) has no bfloat16 "
        "hardware. torch.cuda.is_bf16_supported() says True all the same, because it counts emulation; "
        "ask with including_emulation=False."
    )


def _why_sdpa(device):
    """torch's own scaled_dot_product_attention everywhere: nothing to install; which kernel it takes differs."""
    if device.native_bf16:
        return "sdpa: torch's own attention; its flash kernel runs here and never stores the score matrix."
    if device.kind == "cuda":
        return (
            "sdpa: flash attention needs capability 8.0; torch's own attention falls back to its "
            "memory-efficient kernel, which does not store the score matrix either."
        )
    return "sdpa: torch's own attention; the flash-attn package is for NVIDIA GPUs only."


def _batch_size(device, dtype, model, length):
    """The largest power of two that fits, at most 32 (CPU: 16), and the arithmetic as a sentence.

    Fixed: the frozen weights, and an adapter of 1 % of them with gradient and two Adam moments in fp32 (16 bytes each).
    Per token: 17 numbers per layer and unit of width (34 bytes in 16 bits: Korthikanti et al. 2022, arXiv 2205.05198,
    attention scores not kept), and the logits once in dtype, once in fp32, and their gradient in fp32.
    A tenth of the memory stays free for the allocator. No gradient checkpointing. An estimate, on the careful side.
    """
    free = 0.9 * (device.memory_gb if device.free_gb is None else device.free_gb) * GB
    fixed = model.parameters * dtype.itemsize + 0.01 * model.parameters * 16
    token = 17 * model.layers * model.width * dtype.itemsize + model.vocabulary * (dtype.itemsize + 8)
    fits = int((free - fixed) // (token * length))
    if fits < 1:
        need = (fixed + token * length) / 0.9 / GB
        return 1, (
            f"batch size 1, and expect to run out of memory: one row of {length} tokens needs about {need:.1f} GB, "
            f"{free / 0.9 / GB:.1f} GB are free. A 4-bit base, gradient checkpointing or a smaller model will fit."
        )
    batch = min(2 ** int(math.log2(fits)), 16 if device.kind == "cpu" else 32)
    return batch, (
        f"batch size {batch}: {free / GB:.1f} GB usable - {fixed / GB:.1f} GB for weights and optimizer, divided by "
        f"{token * length / GB:.2f} GB for a row of {length} tokens, allows {fits}; rounded down to a power of two."
    )


def _name(dtype):
    return str(dtype).removeprefix("torch.")
