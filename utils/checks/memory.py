"""Chapter 01, memory: units and counting. The other exercises are in memory_*.py."""

import torch

from utils.checks import (
    memory_activations,
    memory_adamw,
    memory_checkpoint,
    memory_doctor,
    memory_shard,
    memory_states,
)
from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory import counts, states

# ------------------------------------------------------------------------------------------------- units


def unit_cases(rng):
    drawn = torch.randint(10**6, 10**11, (), generator=rng).item()
    return [Case({"size": size}) for size in (2 * 6_738_415_616, 24 * 2**30, pick(rng, 3, 7, 11) * 10**8, drawn)]


UNITS = Exercise(
    name="units",
    reference=states.units,
    cases=unit_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("swapped", lambda size: (size / 2**30, size / 1e9),
                "The two are swapped: GB, with 10^9 bytes, comes first. The larger unit gives the smaller number, so "
                "GiB is always the smaller of the two."),
        Mistake("both_decimal", lambda size: (size / 1e9, size / 1e9),
                "Both are GB. The i of GiB stands for binary: 2^30 bytes, 1024 three times over."),
        Mistake("both_binary", lambda size: (size / 2**30, size / 2**30),
                "Both are GiB. G alone is the metric giga: 10^9 bytes."),
        Mistake("mega", lambda size: (size / 1e6, size / 2**20),
                "Those are MB and MiB. Giga is a thousand times mega, and gibi 1024 times mebi."),
        Mistake("mixed", lambda size: (size / 1e9, size / (2**20 * 1000)),
                "Your second unit is 1000 MiB. A GiB has 1024 of them: 2^30 bytes."),
        Mistake("bits", lambda size: (8 * size / 1e9, 8 * size / 2**30),
                "Both are 8 times too large: those are bits. size is in bytes already, and B stands for byte."),
        Mistake("from_bits", lambda size: (size / 8e9, size / 2**33),
                "You divided by 8, as if size were in bits. It is in bytes already."),
        Mistake("upside_down", lambda size: (size * 1e9, size * 2**30),
                "You multiplied by the unit. How many of them size makes is a division."),
        Mistake("whole", lambda size: (size // 10**9, size // 2**30),
                "// drops the fraction: half a GB is where a model fits or does not. Use /."),
        Mistake("xor", lambda size: (size / (10 ^ 9), size / (2 ^ 30)),
                "^ is XOR in Python: 10 ^ 9 is 3, and 2 ^ 30 is 28. Powers are written 10**9 and 2**30."),
        Mistake("xor_of_a_quotient", lambda size: (size / 10 ^ 9, size / 2 ^ 30), None,
                "TypeError: unsupported operand type(s) for ^: 'float' and 'int'. ^ is XOR in Python"),
        Mistake("gibi_is_smaller", lambda size: (size / 1e9, size / 1e9 * (2**30 / 1e9)),
                "Your GB are right, and your GiB are GB times 1.074. A GiB is the larger unit, so fewer of them make "
                "size: divide by 1.074, or by 2^30 from the start."),
        Mistake("rough", lambda size: (size / 1e9, size / 1.074e9), None, "your second value is "),
        Mistake("rounded", lambda size: (round(size / 1e9, 2), round(size / 2**30, 2)),
                "You rounded. Keep all digits here, and round where you print."),
        Mistake("GB_alone", lambda size: size / 1e9, None, "a float, and a tuple of 2 is expected"),
        Mistake("words", lambda size: f"{size / 1e9} GB", None, "a str, and a tuple of 2 is expected"),
    ),
    alternatives=(
        lambda size: (size / 1000**3, size / 1024**3),
        lambda size: [size * 1e-9, size / (1 << 30)],
        lambda size: tuple(size / unit for unit in (10**9, 2**30)),
    ),
    explain={"for ^": "^ is XOR in Python; powers are written 10**9 and 2**30."},
    fact=f"They differ by {100 * (2**30 / 1e9 - 1):.1f} %: what is 80 GiB to one tool is {80 * 2**30 / 1e9:.1f} GB to "
    "another.",
)

# ------------------------------------------------------------------------------------------------- llama_parameters


NAMES = ("vocab", "d", "d_ff", "layers", "heads", "kv_heads")
LLAMA_2_7B = (32000, 4096, 11008, 32, 32, 32)
LLAMA_3_8B = (128256, 4096, 14336, 32, 32, 8)


def count_cases(rng):
    heads = pick(rng, 4, 6)
    d = heads * pick(rng, 16, 24)
    small = {"vocab": pick(rng, 500, 700), "d": d, "d_ff": 3 * d - pick(rng, 8, 16), "layers": pick(rng, 2, 3, 5),
             "heads": heads}  # fmt: skip
    drawn = [
        ((), dict(zip(NAMES, LLAMA_2_7B, strict=True))),
        (("grouped",), dict(zip(NAMES, LLAMA_3_8B, strict=True))),
        (("grouped",), small | {"kv_heads": heads // 2}),
        (("tied",), small | {"kv_heads": heads, "tied": True}),
        (("tied", "grouped"), small | {"kv_heads": 1, "tied": True}),
    ]
    return [
        Case(inputs, kinds, {key: inputs[key] for key in ("heads", "kv_heads", "layers", "d")})
        for kinds, inputs in drawn
    ]


def counting(qo=2, kv=2, parts=3, norms=2, last=1, head=1, tied_head=0, biases=0, all_heads=False):
    """A llama_parameters with other numbers of matrices in it."""

    def llama_parameters(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
        width = d if all_heads else d // heads * kv_heads
        block = qo * d * d + kv * d * width + parts * d * d_ff + norms * d + biases * (2 * d + 2 * width)
        return vocab * d * (1 + (tied_head if tied else head)) + layers * block + last * d

    return llama_parameters


def by_shapes(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    kv = kv_heads * (d // heads)
    block = [(d, d), (kv, d), (kv, d), (d, d), (d_ff, d), (d_ff, d), (d, d_ff), (d, 1), (d, 1)]
    ends = [(vocab, d), (d, 1)] + ([] if tied else [(vocab, d)])
    return sum(rows * columns for rows, columns in layers * block + ends)


def factored(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    block = 2 * d + 2 * d * kv_heads // heads + 3 * d_ff + 2
    return d * (vocab * (2 - tied) + layers * block + 1)


def per_head(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    total = vocab * d + d
    if not tied:
        total += vocab * d
    for _ in range(layers):
        total += 2 * (heads + kv_heads) * (d // heads) * d
        total += 3 * d * d_ff + 2 * d
    return total


def more(rule):
    """A llama_parameters that counts rule(d, d_ff, width of k and v) numbers too many in each block."""

    def llama_parameters(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
        extra = layers * rule(d, d_ff, d // heads * kv_heads)
        return by_shapes(vocab, d, d_ff, layers, heads, kv_heads, tied) + extra

    return llama_parameters


def four_d(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    return counting()(vocab, d, 4 * d, layers, heads, kv_heads, tied)


def only_one_block(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    return counting()(vocab, d, d_ff, 1, heads, kv_heads, tied)


def heads_as_width(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    block = 2 * d * d + 2 * d * kv_heads + 3 * d * d_ff + 2 * d
    return vocab * d * (2 - tied) + layers * block + d


def true_division(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    return factored(vocab, d, d_ff, layers, heads, kv_heads, tied) / 1


LLAMA_PARAMETERS = Exercise(
    name="llama_parameters",
    reference=counts.llama_parameters,
    cases=count_cases,
    mistakes=(
        Mistake("all_heads", counting(all_heads=True),
                "You gave keys and values all {heads} heads. They have {kv_heads}: k and v are (d, kv_heads * "
                "head_dim), which is what grouped-query attention saves."),
        Mistake("heads_as_width", heads_as_width,
                "Your k and v are (d, kv_heads), as if a head were one number wide. A head is d // heads wide."),
        Mistake("no_norms", counting(norms=0, last=0),
                "The norms are missing: two vectors of d per block, and one after the last. They are small, and an "
                "exact count has them."),
        Mistake("no_last_norm", counting(last=0),
                "You are d = {d} short. One more norm follows the last block."),
        Mistake("one_norm", counting(norms=1),
                "You counted one norm per block. There are two: one before attention, one before the feed-forward "
                "part."),
        Mistake("norms_with_bias", counting(norms=4, last=2),
                "Your norms have a bias. Llama's RMSNorm holds a weight alone, d numbers."),
        Mistake("no_gate", counting(parts=2),
                "You counted two matrices in the feed-forward part. Llama's has three: gate, up and down."),
        Mistake("no_o", counting(qo=1),
                "One d x d matrix per block is missing: after q, k and v comes the output projection o."),
        Mistake("k_or_v_missing", counting(kv=1), "You counted k or v, and not the other."),
        Mistake("tied_twice", counting(tied_head=1),
                "With tied=True you counted the head as well. Tied means that the output layer is the embedding's own "
                "matrix: count it once."),
        Mistake("no_head", counting(head=0),
                "The output layer is missing when it is not tied: another vocab x d matrix."),
        Mistake("tied_backwards", counting(head=0, tied_head=1),
                "tied is taken the wrong way round: tied=True means one vocab x d matrix, tied=False two."),
        Mistake("biases", counting(biases=1),
                "You counted biases for the attention layers. Llama has none (Qwen2 has them for q, k and v)."),
        Mistake("all_biases", more(lambda d, d_ff, kv: 3 * d + 2 * kv + 2 * d_ff),
                "You counted a bias for every linear layer. Llama has none."),
        Mistake("qkv_biases", more(lambda d, d_ff, kv: d + 2 * kv),
                "You counted biases for q, k and v. Qwen2 has them, Llama has none."),
        Mistake("last_norm_in_every_block", counting(norms=3, last=0),
                "You counted three norms per block. A block has two; the third follows the last block, once in the "
                "model."),
        Mistake("last_norm_too", counting(norms=3),
                "You counted three norms per block. A block has two: before attention, and before the feed-forward "
                "part."),
        Mistake("four_d", four_d, "You took 4 d for the feed-forward width. Here it is the argument d_ff."),
        Mistake("only_one_block", only_one_block, "You counted one block. There are {layers} of them."),
        Mistake("float", true_division, None, "a float, and an int is expected"),
        Mistake("bytes", lambda *args, **named: 2 * by_shapes(*args, **named), None, "exactly 2 times"),
    ),
    alternatives=(by_shapes, factored, per_head),
    kinds={
        "grouped": "Right when keys and values have as many heads as queries, and wrong when they have fewer. How wide "
        "are k and v then?",
        "tied": "Right for separate embeddings and wrong for tied ones, where the output layer is the embedding's own "
        "matrix.",
    },
    fact=f"Of Llama-2-7B's {counts.llama_parameters(*LLAMA_2_7B):,} numbers "
    f"{3 * 4096 * 11008 * 32 / 6_738_415_616:.0%} are in the feed-forward parts, "
    f"{4 * 4096**2 * 32 / 6_738_415_616:.0%} in attention, "
    f"{2 * 32000 * 4096 / 6_738_415_616:.0%} in the two embeddings, and {65 * 4096:,} in the norms.",
)

EXERCISES = (
    UNITS,
    LLAMA_PARAMETERS,
    *memory_states.EXERCISES,
    *memory_adamw.EXERCISES,
    *memory_activations.EXERCISES,
    *memory_checkpoint.EXERCISES,
    *memory_shard.EXERCISES,
    *memory_doctor.EXERCISES,
)
