"""Which methods fit a GPU, with which batch, and what to change when one does not.

    print(plan("Llama-3-8B", "T4", length=1024))
    python -m utils.memory plan --model llama-3-8b --gpu T4 --length 1024

The ways are tried as people would set them up; the largest batch that fits is found from the estimate. What the GPU
itself takes is set aside first: a context, and some memory lost between blocks of the allocator.
"""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from utils import LoRA
from utils.architectures import architecture, known
from utils.memory.estimate import facts_of, predict
from utils.paths import DATA

CONTEXT_GIB = 0.75  # CUDA's context and kernels; 0.3 to 0.9 is usual
LOST = 0.04  # of the memory, between the blocks of torch's allocator
ADAPTER = LoRA(r=16, targets="all-linear")
NO_BF16 = (
    "This GPU has no bfloat16: float16 takes as many bytes but needs a loss scaler, and full fine-tuning in it a "
    "float32 master copy."
)
GOALS = ("quality", "speed", "tasks")


@dataclass(frozen=True)
class Way:
    """One way to train. why: what one gets and gives up"""

    name: str
    recipe: str
    method: object
    why: str
    quantized: bool = False


WAYS = (
    Way("full, float32 master", "bf16 + master", None, "all weights, no compromise"),
    Way("full, 8-bit Adam", "8-bit Adam", None, "all weights; small updates are lost"),
    Way("LoRA r=16", "adapters in fp32", ADAPTER, "one small file per task"),
    Way("QLoRA r=16", "adapters in fp32", ADAPTER, "slower steps, a slightly worse base", True),
)


@dataclass(frozen=True)
class Row:
    """What came out for one way. batch: the largest that fits, 0 for none   peak: bytes with it, or with 1 if none"""

    way: Way
    checkpointing: bool
    batch: int
    peak: float
    remedy: str


@dataclass(frozen=True)
class Plan:
    """The answer. rows: in the order of the goal   room: bytes that a step may take   note: what else to know, or ''

    largest: no larger batch was tried
    """

    title: str
    room: float
    rows: tuple
    largest: int
    note: str = ""

    @property
    def best(self):
        """The first row that fits, or None."""
        return next((row for row in self.rows if row.batch), None)

    def __str__(self):
        lines = [f"{self.title}: {self.room / 2**30:.1f} GiB for a step",
                 f"{'way':<24}{'checkpointing':<15}{'batch':>6}{'GiB':>8}   remark"]  # fmt: skip
        for row in self.rows:
            batch = "-" if not row.batch else f"{row.batch}+" if row.batch == self.largest else row.batch
            remark = row.way.why if row.batch else f"does not fit; next: {row.remedy}"
            again = "yes" if row.checkpointing else "no"
            lines.append(f"{row.way.name:<24}{again:<15}{batch:>6}{row.peak / 2**30:>8.1f}   {remark}")
        return "\n".join([*lines, self.note] if self.note else lines)


@cache
def gpus():
    """name -> {"memory_gib", "capability", "bf16", ...}, as in data/gpus.json."""
    return json.loads((DATA / "gpus.json").read_text())["gpus"]


def find(name, names, what):
    """The one of the names that is meant, whatever its case; ValueError lists the near ones."""
    simple = {n.lower().replace("_", "-").replace(" ", "-"): n for n in names}
    asked = str(name).lower().replace("_", "-").replace(" ", "-")
    if asked in simple:
        return simple[asked]
    within = [n for n in simple if asked and asked in n]
    near = [simple[n] for n in dict.fromkeys(within + difflib.get_close_matches(asked, simple, 5, 0.4))]
    raise ValueError(f"no {what} is called {name!r}; near: {', '.join(near or names)}")


def skeleton(model):
    """A model on the meta device from a name of the table, a folder or file with a config, or a name on the hub."""
    if not isinstance(model, str):
        return model
    try:
        return architecture(find(model, known(), "model"))
    except ValueError as unknown:
        if not Path(model).exists() and "/" not in model:
            raise unknown from None
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        raise ValueError(f"no config could be read from {model!r}, here or on the hub") from None
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return named._from_config(config) if named else transformers.AutoModelForCausalLM.from_config(config)


def plan(model, gpu, *, length=1024, goal="quality", accumulate_to=16):
    """The Plan for training a model on a GPU.

    model: a name such as "Llama-2-7B", a folder with config.json, a hub name, or a model   gpu: one of data/gpus.json
    length: tokens per row   goal: "quality" (more weights first), "speed" (no recomputation first), or "tasks" (small
    files first)   accumulate_to: batches beyond this many rows are not looked for
    raises ValueError for unknown names, with the near ones
    """
    if goal not in GOALS:
        raise ValueError(f"goal is {goal!r}; it can be {', '.join(map(repr, GOALS))}")
    name = find(gpu, gpus(), "GPU")
    base = skeleton(model)
    memory = gpus()[name]["memory_gib"] * 2**30
    room = memory * (1 - LOST) - CONTEXT_GIB * 2**30
    facts = {bool(method): facts_of(base, method) for method in (None, ADAPTER)}
    rows = [
        try_way(facts[bool(way.method)], way, checkpointing, room, length, accumulate_to)
        for way in WAYS
        for checkpointing in (False, True)
    ]
    if goal == "speed":
        rows.sort(key=lambda row: (row.checkpointing, row.way.quantized))
    if goal == "tasks":
        rows.sort(key=lambda row: row.way.method is None)
    title = f"{model if isinstance(model, str) else type(base).__name__}, {length} tokens, on a {name}"
    return Plan(title, room, tuple(rows), accumulate_to, "" if gpus()[name]["bf16"] else NO_BF16)


def try_way(facts, way, checkpointing, room, length, largest):
    """The Row for one way of training: the largest batch up to `largest` that fits into `room` bytes.

    facts: utils.memory.estimate.Facts of the model with the way's method
    """

    def step(batch):
        return predict(facts, way.recipe, batch, length, checkpointing=checkpointing, quantized=way.quantized)

    one = step(1)
    if one.peak > room:
        return Row(way, checkpointing, 0, one.peak, next_remedy(way, checkpointing, one, room))
    fits, too_many = 1, largest + 1
    while too_many - fits > 1:  # the peak grows with the batch
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if step(middle).peak <= room else (fits, middle)
    return Row(way, checkpointing, fits, step(fits).peak, "")


def next_remedy(way, checkpointing, estimate, room):
    """What to change first when a batch of one does not fit: what costs least of what can help at all.

    way: a Way   estimate: of a batch of one   room: bytes
    If weights, gradients and moments alone are too much, nothing about activations can help.
    returns a sentence without a full stop
    """
    states = sum(estimate.states.values()) + estimate.gradients
    if states <= room and not checkpointing:
        return "gradient checkpointing"
    if states <= room and max(estimate.moments, key=estimate.moments.get) == "loss":
        return "the loss in chunks, or shorter rows"
    if states <= room and estimate.moments["optimizer step"] + states - estimate.gradients > room:
        return "AdamW(foreach=False)"
    if states <= room:
        return "shorter rows"
    if way.method is None and way.recipe != "8-bit Adam":
        return "8-bit moments, or an adapter"
    if way.method is None:
        return "an adapter"
    if not way.quantized:
        return "the base in 4 bits (QLoRA)"
    return "FSDP, or a smaller base"
