"""Chapter 03, the bytes of a base in 4 bits."""



from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory import states
from utils.memory.states import nf4_bytes
from utils.quantization.blocks import bits_per_number


def base_cases(rng):
    """Whole blocks and whole groups of scales, so that nothing has to be rounded."""
    found = []
    for block, double, e in ((None, None, None), (64, False, 2), (pick(rng, 32, 128), True, 2),
                             (pick(rng, 128, 256), False, 4), (pick(rng, 16, 32), True, 4)):  # fmt: skip
        linear, rest = 256 * 256 * pick(rng, 50, 70, 90), 1000 * pick(rng, 311, 457, 823)
        options = {} if block is None else {"block": block, "double_quant": double, "e": e}
        kinds = () if block in (None, 64) else ("block",)
        numbers = {"linear": linear, "rest": rest, "block": block or 64, "e": e or 2}
        found.append(Case({"linear": linear, "rest": rest} | options, kinds, numbers))
    return found


def base_of(rule):
    """A quantized_base with another formula."""
    return lambda linear, rest, block=64, double_quant=True, e=2: rule(linear, rest, block, double_quant, e)


def by_hand(linear, rest, block=64, double_quant=True, e=2):
    blocks = linear / block
    scales = blocks * 1 + blocks / 256 * 4 if double_quant else blocks * 4
    return linear // 2 + scales + e * rest


def with_bits(bits):
    """bits(block, double_quant) per number."""
    return base_of(lambda linear, rest, block, double, e: linear * bits(block, double) / 8 + rest * e)


NO_BLOCK = (
    "You took blocks of 64 whatever block says. It says {block} here, so there are other numbers of scales: nf4_bytes "
    "takes it too."
)
TYPED = (
    "You took 4.127 bits per number, or 4.5, whatever block says: these are for blocks of 64, and 4.127 is rounded. "
    "nf4_bytes computes them."
)

QUANTIZED_BASE = Exercise(
    name="quantized_base",
    reference=states.quantized_base,
    cases=base_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("all_in_4_bits", base_of(lambda n, rest, block, dq, e: nf4_bytes(n + rest, block, dq)),
                "You put all numbers into 4 bits. Embeddings, norms and the output embedding stay as they are, e bytes "
                "each."),
        Mistake("rest_forgotten", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq)),
                "The others are missing: {rest} numbers that are not quantized, e bytes each."),
        Mistake("no_scales", base_of(lambda n, rest, block, dq, e: n / 2 + rest * e),
                "You counted 4 bits and no scales. Each block of {block} numbers has one."),
        Mistake("swapped", base_of(lambda n, rest, block, dq, e: nf4_bytes(rest, block, dq) + n * e),
                "linear and rest are swapped: it is the linear layers that are quantized."),
        Mistake("never_double", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, False) + rest * e),
                "Your scales take 32 bits whatever double_quant says."),
        Mistake("always_double", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block) + rest * e),
                "Your scales take 8 bits whatever double_quant says."),
        Mistake("double_reversed", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, not dq) + rest * e),
                "double_quant is taken the wrong way round."),
        Mistake("blocks_of_64", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, 64, dq) + rest * e), NO_BLOCK),
        Mistake("flag_as_block", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, dq or 1) + rest * e),
                "nf4_bytes takes the block size second and double_quant third: you gave it double_quant as the block "
                "size."),
        Mistake("typed", with_bits(lambda block, double: 4.127 if double else 4.5), TYPED),
        Mistake("typed_exactly", with_bits(lambda block, double: 4.126953125 if double else 4.5), NO_BLOCK),
        Mistake("always_4127", with_bits(lambda block, double: 4.127),
                "You took 4.127 bits per number: that is rounded, and only for blocks of 64 with double quantization. "
                "nf4_bytes computes it."),
        Mistake("always_45", with_bits(lambda block, double: 4.5),
                "You took 4.5 bits per number: that is for blocks of 64 without double quantization. nf4_bytes "
                "computes it from both."),
        Mistake("second_scales_forgotten", with_bits(lambda block, double: 4 + (8 if double else 32) / block),
                "Under double quantization the scales' own scales are missing: one in float32 for 256 of them."),
        Mistake("scales_of_16_bits", with_bits(lambda block, double: 4 + (8 + 32 / 256 if double else 16) / block),
                "Without double quantization a scale is float32, 32 bits, whatever the weight's dtype was."),
        Mistake("always_two_bytes", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq) + 2 * rest),
                "You took 2 bytes for each of the others whatever e says."),
        Mistake("e_everywhere", base_of(lambda n, rest, block, dq, e: (n + rest) * e),
                "You took e bytes for every number: that is the base before it is quantized."),
        Mistake("bits_of_linear", base_of(lambda n, rest, block, dq, e: n * bits_per_number(4, block, dq) + rest * e),
                "You added bits of the one to bytes of the other: bits_per_number is in bits, nf4_bytes in bytes."),
        Mistake("gigabytes", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq) + rest * e) / 1e9),
                "Those are GB. Return bytes; `units` turns them into GB and GiB."),
        Mistake("gibibytes", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq) + rest * e) / 2**30),
                "Those are GiB. Return bytes; `units` turns them into GB and GiB."),
        Mistake("e_on_both", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq) + rest) * e),
                "You took e times the sum. nf4_bytes gives bytes already: e is for the others alone."),
        Mistake("rest_without_e", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq) + rest),
                "You counted one byte for each of the others. They take e bytes each, {e} here."),
        Mistake("e_in_bits", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq) + rest * e / 8),
                "You divided e by 8. It is in bytes already."),
        Mistake("four_bits_a_byte", base_of(lambda n, rest, block, dq, e: 2 * nf4_bytes(n, block, dq) + rest * e),
                "Your linear layers take twice what they should: a byte has 8 bits."),
        Mistake("both", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq), rest * e)), None,
                "a tuple of 2, and a number is expected"),
    ),
    alternatives=(
        by_hand,
        with_bits(lambda block, double: bits_per_number(4, block, double)),
        base_of(lambda n, rest, block, dq, e: round(rest * e + nf4_bytes(n, block=block, double_quant=dq))),
    ),
    explain={"division by zero": "nf4_bytes takes the block size second and double_quant third."},
    kinds={"block": "Right for blocks of 64 and wrong for others. How many scales are there?"},
    fact=f"Llama-2-7B: {states.quantized_base(6_476_005_376, 262_410_240) / 1e9:.2f} GB in place of "
    f"{2 * 6_738_415_616 / 1e9:.2f}, and {2 * 262_410_240 / 1e9:.2f} of them for the embeddings and norms, 4 % of the "
    "numbers.",
)
