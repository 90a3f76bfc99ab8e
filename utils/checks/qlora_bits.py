"""Chapter 03, bits per weight."""


from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.quantization import blocks


def bit_cases(rng):
    drawn = [(4, 64, True, 256), (4, 64, False, 256), (3, 32, True, 100), (8, pick(rng, 96, 160), True, 128),
             (5, pick(rng, 48, 80), False, 128)]  # fmt: skip
    return [
        Case({"bits": bits, "block_size": block, "double_quant": double, "group": group},
             ("double",) if double else ("single",), {"bits": bits, "block_size": block, "group": group})  # fmt: skip
        for bits, block, double, group in drawn
    ]


def counting(double, single=lambda bits, block, group: bits + 32 / block):
    """A bits_per_number with other formulas, of (bits, block_size, group)."""

    def bits_per_number(bits=4, block_size=64, double_quant=True, group=256):
        return (double if double_quant else single)(bits, block_size, group)

    return bits_per_number


def both(rule):
    """A bits_per_number that follows the right formula up to a last step, rule(bits per number, bits)."""

    def bits_per_number(bits=4, block_size=64, double_quant=True, group=256):
        return rule(blocks.bits_per_number(bits, block_size, double_quant, group), bits)

    return bits_per_number


def right(bits, block, group):
    return bits + (8 + 32 / group) / block


def bits_by_terms(bits=4, block_size=64, double_quant=True, group=256):
    if not double_quant:
        return bits + 32 / block_size
    return bits + 8 / block_size + 32 / (block_size * group)


def bits_of_a_group(bits=4, block_size=64, double_quant=True, group=256):
    """Count the bits of a whole group of blocks, then divide by its numbers."""
    numbers = block_size * group
    scales = 8 * group + 32 if double_quant else 32 * group
    return (bits * numbers + scales) / numbers


def bits_by_fractions(bits=4, block_size=64, double_quant=True, group=256):
    from fractions import Fraction

    per_scale = Fraction(8) + Fraction(32, group) if double_quant else Fraction(32)
    return float(bits + per_scale / block_size)


SAVED = blocks.bits_per_number(double_quant=False) - blocks.bits_per_number()

ROUNDED = "You rounded. Do not round here: keep all digits, and round where you print."

BITS_PER_NUMBER = Exercise(
    name="bits_per_number",
    reference=blocks.bits_per_number,
    cases=bit_cases,
    mistakes=(
        Mistake("no_second_scale", counting(lambda bits, block, group: bits + 8 / block),
                "The second scales are missing: 32 bits more for `group` scales, that is for group * block_size "
                "weights."),
        Mistake("thirty_two_for_eight", counting(lambda bits, block, group: bits + 32 / block + 32 / (block * group)),
                "You counted double quantized scales with 32 bits. They are 8 bits now; the 32 are those of the second "
                "scales."),
        Mistake("per_group_only", counting(lambda bits, block, group: bits + 8 / block + 32 / group),
                "You spread a second scale over `group` weights. It serves `group` scales, and each of those serves "
                "block_size weights: 32 / (block_size * group)."),
        Mistake("swapped", counting(lambda bits, block, group: bits + (8 + 32 / block) / group,
                                    lambda bits, block, group: bits + 32 / group),
                "block_size and group are swapped: block_size weights share a scale, group scales share a second one."),
        Mistake("swapped_in_double", counting(lambda bits, block, group: bits + (8 + 32 / block) / group),
                "block_size and group are swapped where scales are double quantized: block_size weights share a scale, "
                "group scales share a second one."),
        Mistake("always_double", counting(right, right),
                "You counted double quantized scales whatever double_quant says. Without it a scale is 32 bits."),
        Mistake("never_double", counting(lambda bits, block, group: bits + 32 / block),
                "You counted scales of 32 bits whatever double_quant says. With it a scale is 8 bits, and `group` of "
                "them share 32 more."),
        Mistake("flag_backward", counting(lambda bits, block, group: bits + 32 / block, right),
                "double_quant is taken the wrong way round: True means scales of 8 bits."),
        Mistake("bytes", both(lambda all_bits, bits: all_bits / 8),
                "Those are bytes. Bits are asked for: 8 times as many."),
        Mistake("scales_in_bytes", counting(lambda bits, block, group: bits + (1 + 4 / group) / block,
                                            lambda bits, block, group: bits + 4 / block),
                "You counted the code in bits and the scales in bytes. A float32 has 32 bits, a uint8 has 8."),
        Mistake("scales_alone", both(lambda all_bits, bits: all_bits - bits),
                "That is what the scales cost. Add the bits of the code itself."),
        Mistake("sixteen", counting(lambda bits, block, group: bits + (8 + 16 / group) / block,
                                    lambda bits, block, group: bits + 16 / block),
                "You counted float scales with 16 bits. They are kept in float32."),
        Mistake("second_in_eight", counting(lambda bits, block, group: bits + (8 + 8 / group) / block),
                "You counted the second scales with 8 bits. They are float32: 32."),
        Mistake("not_shared", counting(lambda bits, block, group: bits + 8 + 32 / group / block),
                "Your 8 bits are not shared. Division binds tighter than addition: (8 + 32 / group) / block_size."),
        Mistake("not_shared_twice", counting(lambda bits, block, group: bits + (8 + 32) / block),
                "You gave every scale a second scale of its own. `group` scales share one: 32 / group bits each."),
        Mistake("product", counting(lambda bits, block, group: bits + 8 * 32 / (block * group)),
                "You multiplied the 8 bits with the 32. They are added: each scale has its 8 bits and a share of 32."),
        Mistake("four", counting(lambda bits, block, group: right(4, block, group),
                                 lambda bits, block, group: 4 + 32 / block),
                "You wrote 4. Use the argument bits: it is {bits} here."),
        Mistake("sixty_four", counting(lambda bits, block, group: right(bits, 64, group),
                                       lambda bits, block, group: bits + 32 / 64),
                "You wrote 64. Use the argument block_size: it is {block_size} here."),
        Mistake("two_five_six", counting(lambda bits, block, group: right(bits, block, 256)),
                "You wrote 256. Use the argument group: it is {group} here."),
        Mistake("whole", counting(lambda bits, block, group: bits + (8 + 32 // group) // block,
                                  lambda bits, block, group: bits + 32 // block),
                "// drops the fraction, and the scales cost a fraction of a bit. Use /."),
        Mistake("rounded", both(lambda all_bits, bits: round(all_bits, 3)), ROUNDED),
        Mistake("rounded_if_double", counting(lambda bits, block, group: round(right(bits, block, group), 3)), ROUNDED),
        Mistake("table", counting(lambda *_: 4.127, lambda *_: 4.5),
                "You typed two numbers, which hold for 4 bits, blocks of 64 and groups of 256; and the first of them "
                "is rounded. Compute it from the arguments, and do not round."),
        Mistake("defaults", counting(lambda bits, block, group: right(bits, 64, 256),
                                     lambda bits, block, group: bits + 32 / 64),
                "You wrote 64 and 256. Use the arguments block_size and group: they are {block_size} and {group} "
                "here."),
        Mistake("precedence", counting(lambda bits, block, group: bits + 8 / block + 32 / block * group),
                "Python divides by block_size and then multiplies by group. 32 / (block_size * group) is meant."),
        Mistake("both_added", counting(lambda bits, block, group: right(bits, block, group) + 32 / block),
                "You counted the scales twice where they are double quantized, in 32 bits and in 8. The 8 bits take "
                "the place of the 32."),
        Mistake("a_pair", both(lambda all_bits, bits: (bits, all_bits - bits)), None,
                "Yours returned a tuple of 2, and a number is expected"),
    ),
    alternatives=(bits_by_terms, bits_of_a_group, bits_by_fractions),
    kinds={
        "double": "Right for scales in float32, and wrong where they are double quantized: 8 bits each, and 32 more "
        "for `group` of them.",
        "single": "Right where scales are double quantized, and wrong where they are not: 32 bits for block_size "
        "weights.",
    },
    fact=f"Double quantization saves {SAVED:.3f} bits a weight: of Llama-2-7B's 6.48 billion in linear layers "
    f"{6_476_005_376 * SAVED / 8e9:.2f} GB.",
)
