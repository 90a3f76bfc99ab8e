"""What a model costs before the first token: weights, gradients, optimizer state, master copies; and shards of them.

    bytes = trained (weight + gradient + master + moments) + frozen weight

by recipe. "16 bytes per parameter" is one recipe among several; each has a name here.
"""

from dataclasses import dataclass

from utils.quantization.blocks import bits_per_number

# absmax of a block of 256 8-bit numbers, in float32, for each of the two moments
EIGHT_BIT_MOMENT = 1 + 4 / 256


@dataclass(frozen=True)
class Recipe:
    """Bytes per trained number, and per frozen one.

    weight     the weight that the forward pass multiplies       gradient   what backward leaves on it
    master     a second copy of the weight, in float32           moments    of the optimizer: two for Adam
    frozen     bytes of a frozen number                          e          bytes of an activation
    temporary  what AdamW's step works with: one more tensor like each one it updates (its lists, `foreach`), which is
               the master copy where there is one; bitsandbytes updates in one kernel and SGD in place, without any
    why        the recipe in words
    """

    weight: float
    gradient: float
    master: float
    moments: float
    frozen: float
    e: int
    temporary: float
    why: str

    @property
    def per_trained(self):
        """Bytes per trained number."""
        return self.weight + self.gradient + self.master + self.moments


RECIPES = {
    "fp32": Recipe(4, 4, 0, 8, 4, 4, 4, "everything in float32"),
    "autocast": Recipe(4, 4, 0, 8, 4, 2, 4, "float32 weights, which autocast casts for each product"),
    "bf16 + master": Recipe(2, 2, 4, 8, 2, 2, 4, "bf16 weights and gradients, the rest float32 (ZeRO's 2 + 2 + 12)"),
    "bf16 + master, fp32 gradients": Recipe(2, 4, 4, 8, 2, 2, 4, "the same, gradients summed in float32 (Megatron)"),
    "pure bf16": Recipe(2, 2, 0, 4, 2, 2, 2, "everything in bf16: small updates are lost in rounding"),
    "bf16, fp32 moments": Recipe(2, 2, 0, 8, 2, 2, 2, "bf16 weights without a copy, float32 moments"),
    "8-bit Adam": Recipe(2, 2, 0, 2 * EIGHT_BIT_MOMENT, 2, 2, 0, "bf16 weights, 8-bit moments with a scale per 256"),
    "adapters in fp32": Recipe(4, 4, 0, 8, 2, 2, 4, "float32 adapters over a frozen bf16 base: PEFT's and ours"),
    "SGD": Recipe(4, 4, 0, 0, 4, 4, 0, "float32 without momentum"),
}


def nf4_bytes(numbers, block=64, double_quant=True, group=256):
    """Bytes of a weight in 4 bits: half a byte each, and one scale per block.

    The scale is float32; double quantization makes it 8 bits, with one float32 for each `group` of scales.
    numbers: how many, int   returns a float: 4.5 bits per number without double quantization, 4.127 with it
    """
    return numbers * bits_per_number(4, block, double_quant, group) / 8


def quantized_base(linear, rest, block=64, double_quant=True, e=2):
    """Bytes of a base whose linear layers are in NF4 and whose other weights are not.

    linear: numbers in the linear layers that are quantized   rest: all others: embeddings, norms, the output embedding
    block: numbers per scale   double_quant: the scales in 8 bits   e: bytes of one of the others
    returns a float
    """
    return nf4_bytes(linear, block, double_quant) + rest * e


def units(size):
    """(GB, GiB) of so many bytes. A GB is 10^9 bytes, a GiB 2^30; memory of GPUs is sold in GiB and labelled GB."""
    return size / 1e9, size / 2**30


def model_states(trained, frozen, recipe):
    """Bytes by term for so many trained and frozen numbers.

    trained, frozen: how many numbers, ints   recipe: a Recipe
    returns a dict of "weights, frozen", "weights, trained", "master copy", "gradients" and "optimizer". Bytes may be
    fractions, as 8-bit moments have one scale for 256 numbers: they are not rounded.
    """
    return {
        "weights, frozen": frozen * recipe.frozen,
        "weights, trained": trained * recipe.weight,
        "master copy": trained * recipe.master,
        "gradients": trained * recipe.gradient,
        "optimizer": trained * recipe.moments,
    }


STAGES = {  # what each stage of ZeRO spreads over the devices
    0: (),
    1: ("optimizer", "master copy"),
    2: ("optimizer", "master copy", "gradients"),
    3: ("optimizer", "master copy", "gradients", "weights, frozen", "weights, trained", "weights, 4 bits"),
}


def shard(terms, devices, stage):
    """The same terms per device under ZeRO stage 0 to 3 (3 is FSDP's full sharding), Rajbhandari et al. 2019.

    terms: name -> bytes, as from `model_states`; other names may occur, such as "activations", and stay whole
    devices: how many, int   returns a new dict with the same names
    Stage 1 spreads "optimizer" and "master copy" evenly over the devices, stage 2 the "gradients" too, stage 3 also
    every term of "weights, ...". Whatever a stage does not spread is whole on each device.
    What stage 3 gathers to compute one block is not in it.   raises ValueError for another stage
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; ZeRO has the stages 0, 1, 2 and 3 (FSDP's full sharding is 3)")
    return {name: b / devices if name in STAGES[stage] else b for name, b in terms.items()}


def kv_cache(layers, kv_heads, head_dim, batch, length, e=2):
    """Bytes of the keys and values of generation: two tensors per layer, for every token so far.

    kv_heads: of the keys, and of the values   head_dim: width of a head   batch: rows   length: tokens per row
    e: bytes per number   Llama-2-7B, 32 layers of 32 heads of 128: 512 KiB per token in half precision
    """
    return 2 * layers * kv_heads * head_dim * batch * length * e
