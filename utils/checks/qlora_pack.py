"""Chapter 03, decoding blocks of weights, and two of them in a byte."""

import torch
import torch.nn.functional as F

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick, spaced_code
from utils.checks.qlora_blocks import SHORT
from utils.quantization.blocks import dequantize_blockwise, pack
from utils.quantization.codebooks import nf4_codebook

# ------------------------------------------------------------------------------------------------- dequantize


def dequantize_cases(rng):
    nf4, small = nf4_codebook(), pick(rng, 8, 10)
    found = []
    for n, code, block_size, dtype, kinds in (
        (256, nf4, None, torch.uint8, ()),
        (4 * small, spaced_code(rng, 9), small, torch.uint8, ()),
        (3 * small + pick(rng, 3, 5), nf4, small, torch.uint8, ("short",)),
        (pick(rng, 30, 50), nf4, 64, torch.int32, ("short",)),
    ):
        index = torch.randint(len(code), (n,), generator=rng).to(dtype)
        absmax = 0.1 + torch.rand(-(-n // (block_size or 64)), generator=rng)
        inputs = {"index": index, "absmax": absmax, "code": code} | ({"block_size": block_size} if block_size else {})
        found.append(Case(inputs, kinds, {"block_size": block_size or 64}))
    return found


def dequantizer(look=lambda code, index: code[index.long()], scales=lambda absmax, n, size, index:
                absmax.repeat_interleave(size)[:n], join=torch.mul):  # fmt: skip
    """A dequantize_blockwise with something else in it: how code numbers, scales and both together are found."""

    def dequantize_blockwise(index, absmax, code, block_size=64):
        return join(look(code, index), scales(absmax, len(index), block_size, index))

    return dequantize_blockwise


def evenly(code, index):
    return index / (len(code) - 1) * 2 - 1


def last_two_alike(absmax, n, size, index):
    where = torch.arange(n) // size
    return absmax[where.clamp(max=max(n // size - 1, 0))]


def not_cut(index, absmax, code, block_size=64):
    return code[index.long()] * absmax.repeat_interleave(block_size)


def decode_by_view(index, absmax, code, block_size=64):
    return (code[index.long()].view(-1, block_size) * absmax[:, None]).reshape(-1)


def decode_by_padding(index, absmax, code, block_size=64):
    values = F.pad(torch.take(code, index.long()), (0, -len(index) % block_size))
    return (values.view(-1, block_size) * absmax[:, None]).flatten()[: len(index)]


def decode_by_loop(index, absmax, code, block_size=64):
    values = code.index_select(0, index.int())
    return torch.cat([part * s for part, s in zip(values.split(block_size), absmax, strict=True)])


ALL_THE_SAME = "All numbers got the same scale. Number i belongs to block i // block_size."

DEQUANTIZE_BLOCKWISE = Exercise(
    name="dequantize_blockwise",
    reference=dequantize_blockwise,
    cases=dequantize_cases,
    mistakes=(
        Mistake("divided", dequantizer(join=torch.div),
                "You divided by absmax. Encoding divided by it, so decoding multiplies."),
        Mistake("no_scale", dequantizer(scales=lambda absmax, n, size, index: 1),
                "The scales are missing: your numbers all lie in [-1, 1]. Multiply each block by its absmax."),
        Mistake("tiled", dequantizer(scales=lambda absmax, n, size, index: absmax.repeat(size)[:n]),
                "Your scales change from number to number. Each holds for block_size neighbours: repeat_interleave "
                "repeats each entry, repeat the whole list."),
        Mistake("always_64", lambda index, absmax, code, block_size=64: dequantize_blockwise(index, absmax, code),
                "You wrote 64. Use the argument block_size: it is {block_size} here."),
        Mistake("by_index", dequantizer(scales=lambda absmax, n, size, index: absmax[index.long() // size]),
                "You found the block from the 4-bit index. It is a number's position that says which block it is in."),
        Mistake("first_scale", dequantizer(scales=lambda absmax, n, size, index: absmax[0]), ALL_THE_SAME),
        Mistake("largest_scale", dequantizer(scales=lambda absmax, n, size, index: absmax.max()), ALL_THE_SAME),
        Mistake("mean_scale", dequantizer(scales=lambda absmax, n, size, index: absmax.mean()), ALL_THE_SAME),
        Mistake("evenly", dequantizer(look=evenly),
                "You turned the index into an evenly spaced number. Which number it stands for, the code book says."),
        Mistake("index_itself", dequantizer(look=lambda code, index: index.float()),
                "You scaled the index itself. It is a place in the code book: look up code[index] first."),
        Mistake("one_off", dequantizer(look=lambda code, index: code[(index.long() - 1) % len(code)]),
                "You looked up the place before the right one: index 0 is the first number of the code book."),
        Mistake("reversed", dequantizer(look=lambda code, index: code.flip(0)[index.long()]),
                "You read the code book from its end."),
        Mistake("added", dequantizer(join=torch.add),
                "You added absmax. Encoding divided by it, so decoding multiplies."),
        Mistake("last_two_alike", dequantizer(scales=last_two_alike),
                "The last, shorter block got the scale of the block before. It has its own."),
        Mistake("squared", dequantizer(scales=lambda absmax, n, size, index: absmax.repeat_interleave(size)[:n] ** 2),
                "You multiplied by absmax twice."),
        Mistake("mask", dequantizer(look=lambda code, index: code[index]), None,
                "To PyTorch a uint8 tensor in brackets is a mask"),
        Mistake("not_cut", not_cut, None, SHORT),
        Mistake("whole_blocks_only", decode_by_view, None, SHORT),
        Mistake("as_blocks", lambda index, absmax, code, block_size=64: F.pad(
                dequantize_blockwise(index, absmax, code, block_size), (0, -len(index) % block_size)
                ).view(-1, block_size), None, "Wrong shape: yours ("),
        Mistake("in_float16", lambda *inputs: dequantize_blockwise(*inputs).half(), None, "you returned float16"),
    ),
    alternatives=(
        decode_by_padding,
        decode_by_loop,
        dequantizer(scales=lambda absmax, n, size, index: absmax[torch.arange(n) // size]),
    ),
    kinds={"short": SHORT},
    explain={"of the mask": "To PyTorch a uint8 tensor in brackets is a mask, not a list of places: index.long()."},
    fact="The largest weight of every block comes back as it was: its code is 1 or -1, times its own magnitude.",
)

# ------------------------------------------------------------------------------------------------- pack


def pack_cases(rng):
    found = []
    for n, filler, kinds in (
        (2 * pick(rng, 8, 9), None, ()),
        (2 * pick(rng, 20, 30), None, ()),
        (2 * pick(rng, 5, 6) + 1, None, ("odd",)),
        (1, None, ("odd",)),
        (2 * pick(rng, 5, 6) + 1, pick(rng, 3, 12), ("odd", "filler")),
    ):
        index = torch.randint(1, 16, (n,), generator=rng).to(torch.uint8)
        index[:2] = torch.tensor([pick(rng, 9, 11), pick(rng, 2, 4)])[:n]
        inputs = {"index": index} | ({"filler": filler} if filler is not None else {})
        found.append(Case(inputs, kinds, {"filler": 7 if filler is None else filler}))
    return found


def packer(join=lambda first, second: first << 4 | second, pairs=lambda index: (index[0::2], index[1::2]),
           fill=lambda index, filler: torch.cat([index, index.new_full((1,), filler)]),
           done=lambda packed: packed[:, None]):  # fmt: skip
    """A pack with something else in it."""

    def pack(index, filler=7):
        if len(index) % 2:
            index = fill(index, filler)
        return done(join(*pairs(index)))

    return pack


def halves(index):
    return index[: len(index) // 2], index[len(index) // 2 :]


def pack_by_product(index, filler=7):
    numbers = index.tolist() + [filler] * (len(index) % 2)
    return torch.tensor([[16 * a + b] for a, b in zip(numbers[::2], numbers[1::2], strict=True)], dtype=torch.uint8)


def pack_by_matrix(index, filler=7):
    pairs = F.pad(index.int(), (0, len(index) % 2), value=filler).view(-1, 2)
    return (pairs * torch.tensor([16, 1])).sum(1, keepdim=True).to(torch.uint8)


NOT_JOINED = "The two numbers overlap. Shifted by 4 bits the first one has the high half of the byte to itself."
PUSHED_OUT = (
    "Your first number is gone. << 8 pushes it out of the byte at one end, >> at the other; << 4 moves it to the high "
    "half."
)

PACK = Exercise(
    name="pack",
    reference=pack,
    cases=pack_cases,
    mistakes=(
        Mistake("low_first", packer(lambda first, second: second << 4 | first),
                "Your first number is in the low four bits. bitsandbytes puts the first of a pair in the high four: "
                "which of the two has to be shifted?"),
        Mistake("halves", packer(pairs=halves),
                "You paired the first half of the numbers with the second. A byte holds two neighbours: index[0::2] "
                "and index[1::2]."),
        Mistake("sliding", packer(pairs=lambda index: (index[:-1], index[1:])),
                "Your pairs overlap: each number is in two bytes. A byte holds numbers 0 and 1, the next one 2 and 3."),
        Mistake("precedence", packer(lambda first, second: first << 4 + second),
                "Python adds before it shifts: first << 4 + second shifts by 4 + second. Use |, or parentheses."),
        Mistake("and", packer(lambda first, second: first << 4 & second),
                "& keeps the bits that both have, and here they have none in common. | puts them together."),
        Mistake("not_shifted", packer(torch.bitwise_or), NOT_JOINED),
        Mistake("added", packer(torch.add), NOT_JOINED),
        Mistake("shifted_by_3", packer(lambda first, second: first << 3 | second), NOT_JOINED),
        Mistake("shifted_by_2", packer(lambda first, second: first << 2 | second), NOT_JOINED),
        Mistake("shifted_by_8", packer(lambda first, second: first << 8 | second), PUSHED_OUT),
        Mistake("right", packer(lambda first, second: first >> 4 | second), PUSHED_OUT),
        Mistake("tens", packer(lambda first, second: first * 10 + second),
                "You multiplied by 10. A shift by four bits is a multiplication by 16."),
        Mistake("fifteens", packer(lambda first, second: first * 15 + second),
                "You multiplied by 15. A shift by four bits is a multiplication by 16."),
        Mistake("one_per_byte", lambda index, filler=7: index[:, None],
                "Yours has one number per byte. Two fit: 4 bits each."),
        Mistake("dropped", lambda index, filler=7: pack(index[: len(index) // 2 * 2]),
                "With an odd number of weights the last one is lost. Add the filler, then pair."),
        Mistake("filler_first", packer(fill=lambda index, filler: torch.cat([index.new_full((1,), filler), index])),
                "You put the filler in front, so that every pair is shifted. It comes after the last number."),
        Mistake("filler_high", lambda index, filler=7: pack(index, filler) if len(index) % 2 == 0 else torch.cat(
                [pack(index[:-1]), (filler << 4 | index[-1:])[:, None]]),
                "In the last byte the filler is in the high four bits. The odd number is the first of its pair: it "
                "goes there."),
        Mistake("filled_with_zero", packer(fill=lambda index, filler: F.pad(index, (0, 1))),
                "You filled up with a 0. In NF4 that stands for -1; use the argument filler, whose default stands for "
                "zero."),
        Mistake("last_twice", packer(fill=lambda index, filler: torch.cat([index, index[-1:]])),
                "You filled up with the last number once more. Use the argument filler."),
        Mistake("fixed_filler", lambda index, filler=7: pack(index), "You wrote 7. Use the argument filler."),
        Mistake("flat", packer(done=lambda packed: packed),
                "The bytes are right. bitsandbytes keeps them as a column: (ceil(n / 2), 1)."),
        Mistake("a_row", packer(done=lambda packed: packed[None]),
                "The bytes are right, as a row. bitsandbytes keeps them as a column: (ceil(n / 2), 1)."),
        Mistake("even_only", packer(fill=lambda index, filler: index), None, "takes the filler as its partner"),
        Mistake("float_filler", packer(fill=lambda index, filler: torch.cat([index, torch.tensor([float(filler)])])),
                None, "The filler must be uint8"),
        Mistake("in_int32", lambda index, filler=7: pack(index, filler).int(), None,
                "wrong dtype: uint8 is expected, you returned int32"),
        Mistake("in_int64", lambda index, filler=7: pack(index.long(), filler), None, "you returned int64"),
        Mistake("signed", lambda index, filler=7: pack(index, filler).to(torch.int8),
                "Your bytes are int8, where the highest bit is a sign: from 128 on they come out negative. Use uint8."),
    ),
    alternatives=(pack_by_product, pack_by_matrix, packer(lambda first, second: 16 * first + second),
                  packer(torch.bitwise_xor, lambda index: (index[0::2] << 4, index[1::2]))),
    kinds={
        "odd": "Right for an even count of numbers and wrong for an odd one: the last of them takes the filler as "
        "its partner.",
        "filler": "Right with the default filler, and wrong with another one.",
    },
    explain={"not implemented for 'Float'": "The filler must be uint8, as index is: index.new_full((1,), filler)."},
    fact="Two in a byte: Llama-2-7B's 4096 x 4096 layers take 8.4 MB of codes each, and 33.6 MB in 16 bits.",
)

EXERCISES = (DEQUANTIZE_BLOCKWISE, PACK)
