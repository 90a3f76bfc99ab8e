# %% [markdown]
# # 3. QLoRA
#
# LoRA trains few numbers, but the frozen ones are all still there. A model of 65 billion numbers with 2 bytes each is
# 130 GB, before the first gradient. QLoRA (Dettmers et al. 2023, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314))
# keeps the frozen base in about 4 bits per number and trains a LoRA beside it. Its authors fine-tuned a model of that
# size on one GPU with 48 GB. Three ideas carry it: a code book for 4 bits (NF4), scales that are quantized too (double
# quantization), and an optimizer whose state can leave the GPU (paged optimizers). All three are in this chapter.
#
# After this chapter you can
#
# - write 4-bit quantization yourself: the code book NF4, blocks with their scales, two numbers in a byte, scales that
#   are quantized again; the bytes are those of `bitsandbytes`, the 8-bit scales but for a few neighbours;
# - say which 16 numbers are the best ones, for which question, and prove it with a measurement;
# - write a linear layer over 4-bit weights whose backward pass keeps no dense weight;
# - say what `load_in_4bit=True` gives you, and what it does not;
# - predict the memory of a QLoRA step before you rent the GPU;
# - merge a QLoRA without losing it;
# - use `transformers`, `bitsandbytes` and `peft` knowing what they do inside.
#
# The fourteen exercises take about two and a half hours, and the rest as long again. If you have less, exercises 1, 3, 5,
# 8, 9, 10 and 13 are the core, and every section can be read without the one before it having been worked through: an
# exercise may stay blank, and the chapter then goes on with the course's own function. Good places to stop are before
# *A layer over 4-bit weights* and before *The same with today's libraries*. After exercise 14 there is nothing to write.
#
# All of it runs on a laptop, on the tiny models, whatever the `profile`. Only the section *On a GPU* reads the `profile`.

# %% [markdown]
# ## The idea
#
# To **quantize** is to write a number with few bits. Four bits have 16 patterns, so a weight can be one of 16 numbers,
# and must be rounded to the nearest of them. Three decisions say how:
#
# 1. **Which 16 numbers?** They are called the **code book**. It is a table that all weights share. What is stored for
#    a weight is its place in the table, 0 to 15, the **index**.
# 2. **In which unit?** The code book lies between -1 and 1, and weights do not. So weights are taken in **blocks** of,
#    say, 64 neighbours, and each is divided by the largest magnitude of its block, the **absmax**. That is one more
#    number to store for each block, its **scale**.
# 3. **How do they lie in memory?** Two indices share a byte.
#
# $$\text{index}_i = \arg\min_k \left|\, \text{code}_k - \frac{w_i}{\text{absmax}} \right|, \qquad
#   w'_i = \text{code}_{\text{index}_i} \cdot \text{absmax}$$
#
# The indices and the scales are how the base is *stored*. Nothing is computed in 4 bits. When a layer is needed, its
# W′ is formed from them, multiplied with x, and thrown away:
#
# $$y = W' x + \frac{\alpha}{r} B A x$$
#
# A and B are not quantized, and they are all that is trained.
#
# | symbol | in code | means |
# |---|---|---|
# | W | `W` | a weight before it was quantized, (d_out, d_in) |
# | index | `index` | for each number of W its place in the code book |
# | code | `code` | the code book |
# | absmax | `absmax` | for each block its largest magnitude, a float32 number |
# | offset, absmax2 | `offset`, `absmax2` | scales that are quantized too: their mean, and the scales of the scales |
# | group | `group` | scales that share one absmax2 |
# | block size | `block_size` | weights that share one absmax |
# | W′ | | what comes back: W, rounded |
# | A, B, α, r | `A`, `B`, `alpha`, `r` | the LoRA, as in chapter 2 |

# %%
import inspect
import logging
from statistics import NormalDist

import torch
from torch import nn

from utils import load_base, plots
from utils.checks import check
from utils.quantization import blocks, codebooks
from utils.quantization.blocks import TINY, unpack
from utils.quantization.codebooks import NF4_OFFSET

_ = torch.manual_seed(0)

# %%
model = load_base("decoder")
linear = {name: m.weight.detach().float() for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
W, levels = linear["layers.0.self_attn.q_proj"], codebooks.nf4_codebook()

def error_of_the_others(size, block_size):
    """The relative error of W when its first weight is replaced by one of `size` standard deviations."""
    spoilt = W.clone()
    spoilt[0, 0] = size * W.std()
    index, absmax = blocks.quantize_blockwise(spoilt, levels, block_size)
    change = (blocks.dequantize_blockwise(index, absmax, levels, block_size).view_as(W) - W).flatten()[1:]
    return (change.norm() / W.flatten()[1:].norm()).item()

# %%
left, right = plots.panels(2)
_ = left.hist((W.view(-1, 64) / W.view(-1, 64).abs().amax(1)[:, None]).flatten(), bins=50, color="#9AA1AA")
for level in levels:
    _ = left.axvline(level, color=plots.ORANGE, linewidth=0.8)
_ = left.set(title="Weights, and NF4's 16 numbers", xlabel="weight / absmax of its block", ylabel="weights")
deviations = [4, 8, 16, 32, 64, 128]
outlier_curves = {name: (deviations, [error_of_the_others(size, block) for size in deviations])
                  for name, block in {"one scale for all": W.numel(), "blocks of 64": 64}.items()}
_ = plots.lines(outlier_curves, ax=right, logx=True, xlabel="one weight, in standard deviations",
                ylabel="error of all the others", title="What one outlier does")

# %%
for name, (_, rises) in outlier_curves.items():
    print(f"{name:18} error {rises[0]:.3f} beside one of 4 standard deviations, {rises[-1]:.3f} beside one of 128")
assert outlier_curves["one scale for all"][1][-1] > 0.9 and outlier_curves["blocks of 64"][1][-1] < 0.15

# %% [markdown]
# Both pictures are about the weights of one layer of the tiny Llama that you know from chapter 2.
#
# On the left, the weights gather around zero, and so do the 16 numbers (the orange lines): fine steps where most
# weights are, wide ones at the ends. The small columns at -1 and 1 are the largest weights of their blocks.
#
# On the right, one single weight of that layer, an **outlier**, is made larger and larger. The curves show what becomes
# of all the others: the **relative error**, the norm of W′ - W divided by that of W. If all weights share a scale, the
# outlier sets it, and beside it the others are small. They are rounded to a few numbers next to zero, in the end to
# zero itself, and the error reaches 1: everything else is gone. With blocks, only the outlier's 63 neighbours pay.
#
# The first five exercises build all that you just saw.

# %% [markdown] exercise="utils.quantization.codebooks:nf4_codebook" difficulty=3 importance=5 minutes=15 points=2
# ## From quantiles to a code book
#
# Which 16 numbers? Evenly spaced ones would be the obvious choice. But the weights of trained layers are distributed
# roughly like draws from a normal distribution, and the numbers near the ends would hardly ever be used. The paper
# argues that a table is used best if each of its entries is needed equally often. (Whether that is the right aim, a
# later section asks.)
#
# So space the *probabilities* evenly, and take the number that belongs to each. The **quantile** at probability p is
# the number that a random draw stays below with probability p. Python has it: `NormalDist().inv_cdf(p)` for the normal
# distribution N(0, 1). Where draws are many, a small step in the number covers a large probability, and the quantiles
# lie close together. This is the idea of **NF4**, the 4-bit NormalFloat of the paper.
#
# Three things have to be settled.
#
# - **Zero must be in it exactly.** Zeros are common in what models store (padding for example), and should stay what
#   they are. The quantile at probability 1/2 is zero.
# - **16 is an even number.** With zero in the middle, 15 numbers are left for two sides. NF4 gives 8 to the positive
#   side and 7 to the negative one. Each side is spaced on its own.
# - **The quantile at probability 1 is infinite.** So the outermost probability is a little less, `offset`. Divide the
#   range of probabilities into 16 equal bins, and the middle of the outermost one is at 1 - 1/32; with 15 bins it is
#   at 1 - 1/30. NF4 takes the number halfway between the two, in seven digits: 0.9677083.
#
# At last everything is divided by the largest number, so that the code book runs from -1 to 1, as the scaled weights
# do.
#
# Complete `nf4_codebook`. `NF4_OFFSET` and `NormalDist` are imported already.
#
# Hint (how many): each side runs from `offset` to probability 1/2. Which number belongs to 1/2, and how often may it be
# in the code book? So how many evenly spaced probabilities do you need, if 8 numbers of a side are to be positive?
#
# Hint (the other side): N(0, 1) is symmetric. Must you look up a probability below 1/2 at all?
#
# Hint (a line of it): `torch.linspace(offset, 0.5, 9)[:-1]` are the probabilities of the positive side.

# %% [markdown]
# `bitsandbytes`, the library of QLoRA's first author, has the same table, typed in as 16 numbers. Yours comes from a
# formula. Are they the same?

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports at import that there is no GPU
import bitsandbytes

code, typed_in = nf4_codebook(), bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
print("  ".join(f"{number:.4f}" for number in code[:8].tolist()))
print("  ".join(f"{number:.4f}" for number in code[8:].tolist()))
equal = (code == typed_in).sum()
print(f"largest difference {(code - typed_in).abs().max():.1g}; {equal} of 16 are equal to the last bit")
print(f"halfway between 1 - 1/32 and 1 - 1/30: {((1 - 1 / 32) + (1 - 1 / 30)) / 2:.8f}; used: {NF4_OFFSET}")
assert torch.allclose(code, typed_in, rtol=0, atol=1e-6)

# %% [markdown]
# Now the way back: from each number to its probability. Undo the division, and ask the normal distribution how much
# lies below.

# %%
below = [NormalDist().cdf(number * NormalDist().inv_cdf(NF4_OFFSET)) for number in code.tolist()]
ax = plots.lines({"normal distribution": ([NormalDist().cdf(z) for z in torch.linspace(-2, 2, 99)],
                                          torch.linspace(-2, 2, 99) / NormalDist().inv_cdf(NF4_OFFSET))},
                 xlabel="probability", ylabel="number", title="NF4: even in probability, uneven in value")
_ = ax.vlines(below, -1.1, code, color=plots.FROZEN)
_ = ax.hlines(code, 0, below, color=plots.FROZEN)
_ = ax.plot(below, code, "o", color=plots.ORANGE)
gaps = torch.tensor(below).diff()
print(f"a step is {gaps[:7].mean():.4f} of probability below zero and {gaps[7:].mean():.4f} above it")
assert gaps[:7].std() < 1e-4 and gaps[7:].std() < 1e-4 and gaps[0] > gaps[-1]

# %% [markdown]
# The steps in probability are even on each side, and a little smaller on the positive one, which has one number more.
# The paper wants each number used equally often. Whether that comes true for weights that were divided by their
# block's absmax is another question; a later section counts.

# %% [markdown] exercise="utils.quantization.blocks:nearest_code" difficulty=2 importance=4 minutes=8 points=1
# ## The nearest of 16
#
# Each weight gets the number nearest to it. You could compute all 16 distances and take the smallest. For a layer of
# 4096 x 4096 weights that is a table of 16 · 4096 · 4096 distances: a gigabyte in float32, for one layer.
#
# There is a shorter way. Let the code book rise. Between two neighbours the nearest number changes at one place, the
# border. So 15 borders divide the line into 16 intervals, and the interval is the index. `torch.bucketize(values,
# borders)` finds it by a binary search, in 4 comparisons.
#
# One code book of this chapter does not rise: FP4, which you will meet soon, is in the order of its bit patterns. The
# index is a number's place in `code` as it was given to you.
#
# Complete `nearest_code`. It returns uint8, whole numbers from 0 to 255. A value exactly between two numbers may go
# either way: `bitsandbytes` takes the lower one, as does `bucketize`, and the check never asks.
#
# Hint (the borders): which value is as far from one neighbour as from the other? `code[:-1]` and `code[1:]` are the
# neighbours, all at once.
#
# Hint (any order): which order does `bucketize` need? If you put the numbers into it, what must you remember to find
# the place where a number stood before?
#
# Hint (a line of it): `sorted_code, order = code.sort()`; the i-th smallest number stood at `order[i]`.

# %%
values = torch.rand(10_000) * 2 - 1
three_books = {"NF4": nf4_codebook(), "FP4": codebooks.fp4_codebook(), "INT4": codebooks.int4_codebook()}
for name, book in three_books.items():
    nearest, distances = nearest_code(values, book), (values[:, None] - book).abs()
    excess = distances[torch.arange(10_000), nearest.long()] - distances.min(1).values
    print(f"{name:5} {len(nearest.unique()):2} numbers used, farther than the nearest by at most {excess.max():.0g}")
    assert excess.max() < 1e-6 and nearest.dtype == torch.uint8
print(f"all distances of a layer of 4096 x 4096: {16 * 4096 * 4096 * 4 / 1e9:.2f} GB in float32")

# %% [markdown]
# As a picture, rounding is a staircase. Here are NF4's and that of INT4, whose 15 different numbers are evenly spaced.

# %%
line = torch.linspace(-1, 1, 1001)
stairs = {name: (line, book[nearest_code(line, book).long()]) for name, book in three_books.items() if name != "FP4"}
_ = plots.lines(stairs, points=False, xlabel="weight / absmax", ylabel="rounded to", title="Rounding is a staircase")
for name, (_, stair) in stairs.items():
    miss = (stair - line).abs()
    print(f"{name:5} largest error {miss.max():.3f}; {miss[line.abs() < 0.25].max():.3f} below a quarter")

# %% [markdown]
# NF4 is finer in the middle and coarser at the ends. That pays if most weights are in the middle.

# %% [markdown] exercise="utils.quantization.blocks:quantize_blockwise" difficulty=3 importance=5 minutes=15 points=2
# ## Encode, block by block
#
# You have a code book between -1 and 1 and a way to look numbers up. What is missing is the unit. Dividing by the
# largest magnitude, the absmax, uses the whole range and cuts nothing off. It is also fragile: the largest is one
# number, and the picture at the head of the chapter shows what it does to the others. Hence the blocks. A small block
# confines the damage, and costs a scale.
#
# Blocks run over the weight **as it lies in memory**, row after row: with 64, the first block of a 128 x 128 matrix is
# half of its first row. A row need not be a whole number of blocks, and then a block goes on in the next row. What is
# left at the end is a shorter block with its own absmax.
#
# Two details keep the bytes those of `bitsandbytes`:
#
# - Whatever the dtype of the weight, the scaling is done in float32, and the scales are float32.
# - A block of zeros has absmax 0, and 0 / 0 is not a number. Divide by `TINY` there, which is 1e-38.
#
# Complete `quantize_blockwise`: the indices of all numbers, and the absmax of all blocks.
#
# Hint (whole blocks): `x.view(-1, block_size)` puts one block in each row, if the count is right; `.abs().amax(1)` is
# then the absmax of each.
#
# Hint (the last one): either treat what is left over by itself, or add zeros up to a whole block and cut the indices
# to the right length at the end. Zeros cannot change an absmax.

# %% [markdown]
# First a block of four numbers, small enough for paper. The absmax is 2. Divided by it, the numbers are 0.25, -1, 0.15
# and 0. In the table above, the nearest ones are 0.2461, -1, 0.1609 and 0. Which places are these?

# %%
four_indices, one_absmax = quantize_blockwise(torch.tensor([0.5, -2, 0.3, 0]), code, block_size=4)
print("index", four_indices.tolist(), "absmax", one_absmax.tolist())
assert four_indices.tolist() == [10, 0, 9, 7] and one_absmax.tolist() == [2]

# %% [markdown]
# Are there outliers in real layers, even in a tiny model? Look for the layer with the largest one, and encode that
# layer with a single scale and with smaller and smaller blocks. How many of the weights end at index 7, which is zero?

# %%
path = max(linear, key=lambda path: linear[path].abs().max() / linear[path].std())
outlier = linear[path]
print(f"{path} {tuple(outlier.shape)}: the largest is {outlier.abs().max() / outlier.std():.1f} standard deviations")
at_zero, in_use = {}, {}
for block_size in (outlier.numel(), 4096, 512, 64):
    outlier_index, block_scales = quantize_blockwise(outlier, code, block_size)
    part_of_all = torch.bincount(outlier_index.long(), minlength=16) / outlier_index.numel()
    at_zero[block_size], in_use[block_size] = part_of_all[7].item(), (part_of_all > 0.01).sum().item()
    print(f"blocks of {block_size:6,}: {len(block_scales):4} scales, {at_zero[block_size]:6.1%} of all weights become "
          f"zero, {in_use[block_size]:2} numbers are used for 1 % or more")
assert at_zero[outlier.numel()] > 2 * at_zero[64] and in_use[outlier.numel()] < in_use[64]

# %% [markdown]
# With one scale, most of the 16 numbers lie idle, waiting for weights as large as the outlier. Blocks of 64 use all
# of them. The price is printed beside them: hundreds of scales instead of one. How many bits that is comes later.

# %% [markdown] exercise="utils.quantization.blocks:dequantize_blockwise" difficulty=1 importance=5 minutes=6 points=1
# ## Decode
#
# The way back is short: look each index up, and multiply by the scale of its block. Every forward pass and every
# backward pass of a QLoRA does this for each layer, so it has to be fast. The course trains with quicker versions of
# the same few lines.
#
# Complete `dequantize_blockwise`. Number i belongs to block i // block_size.
#
# Hint (what you need): for n numbers, n entries of the code book and n scales, to be multiplied. You have n places, and
# one scale per block. What makes n of each? And is n always a whole number of blocks?
#
# Hint (the look-up): a tensor of whole numbers in brackets looks all of them up at once. But PyTorch takes uint8 in
# brackets for a mask. So what must happen to `index` before?
#
# Hint (the line): `absmax.repeat_interleave(block_size)[: len(index)]` are the scales.

# %% [markdown]
# What is lost? Look at one block before and after. The grey lines are the 16 numbers times the absmax of this block:
# the only values that a decoded weight can have.

# %%
index, absmax = quantize_blockwise(W, code)
back = dequantize_blockwise(index, absmax, code).view_as(W)
ax = plots.panels()[0]
_ = ax.hlines(code * absmax[0], 0, 63, color=plots.FROZEN)
_ = ax.plot(W.flatten()[:64], "o", color=plots.BLUE, markersize=5, label="W")
_ = ax.plot(back.flatten()[:64], "x", color=plots.ORANGE, label="W', decoded")
_ = ax.set(xlabel="place in the first block", ylabel="weight", title="A block of 64 weights, rounded to 16 numbers")
_ = ax.legend(loc="upper left", bbox_to_anchor=(1, 1))

# %%
miss, size = (back - W).abs().view(-1, 64), W.view(-1, 64).abs()  # one block in each row
of_the_largest = (miss / size)[size == absmax[:, None]].max()
half_step = code.diff().max() / 2
print(f"relative error {(back - W).norm() / W.norm():.1%}")
print(f"error of the largest weight of each block {of_the_largest:.0%}")
print(f"largest error {(miss.amax(1) / absmax).max():.3f} absmax, half of the widest step {half_step:.3f}")
assert 0.05 < (back - W).norm() / W.norm() < 0.12 and (miss.amax(1) <= 1.0001 * half_step * absmax).all()
assert of_the_largest < 1e-6

# %% [markdown]
# Weights are off by a few percent of their block's scale, which adds up to about a tenth of the layer's norm. The
# largest of each block is exact. That a model survives this at all is the empirical part of QLoRA, and you
# will measure it. Encoding once more changes nothing: what is in the code book is its own nearest number.

# %%
again, absmax_again = quantize_blockwise(back, code)
print("encoded again:", "the same indices" if torch.equal(again, index) else "other indices")
assert torch.equal(again, index) and torch.allclose(absmax_again, absmax)

# %% [markdown] exercise="utils.quantization.blocks:pack" difficulty=2 importance=3 minutes=8 points=1
# ## Two numbers in a byte
#
# The smallest thing that a computer can address is a byte, 8 bits. An index needs 4, half a byte, which is called a
# **nibble**. One index per byte would waste the half that you came for. So two neighbours share one: the first in the
# high four bits, the second in the low four.
#
# To get there, the first is shifted up by four bits, `first << 4`, which multiplies it by 16. Then `|` puts the second
# into the bits that became free.
#
# If the count is odd, the last number needs a partner, the **filler**. The default is 7, NF4's zero. `bitsandbytes`
# keeps the bytes as a column, and so do we.
#
# Complete `pack`. `unpack`, the way back, is given: the course's own, printed below the check.
#
# Hint (pairs): `index[0::2]` are the numbers at even places, `index[1::2]` those at odd ones.
#
# Hint (the filler): `torch.cat([index, index.new_full((1,), filler)])` adds one number of the same dtype.

# %%
print(inspect.getsource(unpack))
packed = pack(torch.tensor([10, 0, 9, 7], dtype=torch.uint8))
print([f"{byte:08b}" for byte in packed.flatten().tolist()], packed.flatten().tolist())
assert packed.tolist() == [[10 * 16 + 0], [9 * 16 + 7]]
for count in (1, 2, 9, 64, 1001):
    some = torch.randint(16, (count,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(some), count), some) and pack(some).shape == ((count + 1) // 2, 1)

# %% [markdown]
# In binary you can read the four numbers of the small block: 1010 is ten, 0000 zero, 1001 nine, 0111 seven. Now count
# the bytes of the whole layer.

# %%
packed = pack(index)
kept_bytes = {"float32": W.nbytes, "16 bits": W.nbytes // 2, "codes": packed.nbytes, "scales": absmax.nbytes}
for name, size in kept_bytes.items():
    print(f"{name:8} {size:>7,} bytes, {8 * size / W.numel():5.2f} bits per weight")
assert 8 * (kept_bytes["codes"] + kept_bytes["scales"]) == 4.5 * W.numel()

# %% [markdown]
# ## The bytes of bitsandbytes
#
# You now have the storage format, but for the scales, which QLoRA quantizes too (exercise 7). If it is the one that everybody else uses, then every byte must agree with
# what `bitsandbytes` makes of the same weights. First every layer of the model:

# %%
def differing(x, block_size=64):
    """How many of your bytes are not those of bitsandbytes. The scales must be equal."""
    index, absmax = quantize_blockwise(x, nf4_codebook(), block_size)
    reference, state = bitsandbytes.functional.quantize_4bit(
        x, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    assert torch.allclose(absmax, state.absmax, rtol=0, atol=1e-37)
    return (pack(index) != reference).sum().item()

different = [differing(weight) for weight in linear.values()]
total = sum(weight.numel() // 2 for weight in linear.values())
print(f"{len(different)} layers, {total:,} bytes, of which {sum(different)} differ")
assert sum(different) <= 5

# %% [markdown]
# Then what is likely to go wrong: an odd count, a last block that is short, blocks of zeros, an outlier,
# weights in 16 bits.

# %%
def drawn(n, kind, dtype):
    x = torch.randn(n)
    if kind == "zeros":
        x[:64] = 0
    if kind == "outlier":
        x[n // 2] = 10_000
    return x.to(dtype)

trials = [(n, kind, dtype, block_size) for n in (1, 2, 63, 64, 65, 129, 1000, 4097)
          for kind in ("plain", "zeros", "outlier") for dtype in (torch.float32, torch.float16, torch.bfloat16)
          for block_size in (32, 64, 256)]
different = [differing(drawn(n, kind, dtype), block_size) for n, kind, dtype, block_size in trials]
print(f"{len(trials)} tensors: {different.count(0)} have equal bytes, and all have equal scales")
assert sum(different) <= 5

# %% [markdown]
# The course's own functions give equal bytes everywhere. If yours differ in a byte or two, they are still right:
# somebody who divides by absmax, where `bitsandbytes` multiplies by 1 / absmax, or who spaces the probabilities in
# float64, gets numbers that differ in their last bit, and once in a million weights that decides on which side of a
# midpoint one falls. (In one corner the scales differ by 1e-38: for a last, short block of zeros `bitsandbytes` keeps
# the tiny number itself.)
#
# This is how QLoRA keeps the weights of a base, on disk and on the GPU. What it does with their scales comes below.

# %% [markdown]
# ## Which code book?
#
# NF4 is one choice of 16 numbers. It has rivals, and this section measures all of them on the same weights.
#
# | | the 16 numbers | scales per block |
# |---|---|---|
# | NF4 | quantiles of the normal distribution | absmax |
# | INT4 | -7 ... 7, divided by 7: even steps | absmax |
# | FP4 | 4-bit floating point: a sign, two bits of exponent, one of mantissa | absmax |
# | affine INT4 | 16 even steps from the block's smallest number to its largest | smallest number and step |
# | Lloyd-Max | fitted to the weights themselves: your next exercise | absmax |
#
# Affine INT4 has no code book. A weight is $w' = \text{low} + k \cdot \text{step}$ with k from 0 to 15: low is the
# smallest number of the block, and step a fifteenth of the way from there to the largest.
#
# The measure is the **relative error**: the norm of W′ − W divided by the norm of W. Begin with weights that are
# exactly what NF4 was made for, numbers from N(0, 1), in blocks of 64.

# %%
import copy
import math

import matplotlib.pyplot as plt

from utils import load_task, load_tokenizer
from utils.quantization.base import FP4, INT4, NF4, layers_to_quantize, quantize_base
from utils.quantization.blocks import affine_blockwise, dequantize_affine, dequantize_scales
from utils.quantization.codebooks import dynamic_codebook, fp4_codebook, int4_codebook
from utils.tasks import collate, evaluate

# %%
BOOKS = {"NF4": nf4_codebook(), "INT4": int4_codebook(), "FP4": fp4_codebook()}

def through(W, code, block_size=64):
    """W' of a weight W: encoded and decoded. code None: affine."""
    if code is None:
        return dequantize_affine(*affine_blockwise(W, block_size), block_size).view(W.shape)
    return dequantize_blockwise(*quantize_blockwise(W, code, block_size), code, block_size).view(W.shape)

def relative_error(got, W):
    return ((got - W).norm() / W.norm()).item()

# %%
gaussian = torch.randn(2**17, generator=torch.Generator().manual_seed(0))
FOUR_WAYS = BOOKS | {"affine INT4": None}
in_64 = {name: relative_error(through(gaussian, book), gaussian) for name, book in FOUR_WAYS.items()}
for name, its_error in in_64.items():
    print(f"{name:12} relative error {its_error:.1%}")
print("FP4, sorted:", *(f"{c:.2f}" for c in sorted(BOOKS["FP4"].tolist())))
assert in_64["NF4"] < in_64["INT4"] < in_64["FP4"]

# %% [markdown]
# Among the three code books NF4 is the best here. FP4 is the worst: four of its 16 patterns mean nearly the same, 0 or
# ±0.005, and wide gaps are left further out. Affine INT4 looks good, but it has two scales per block where the others
# have one. You will put a price on that below.
#
# ### Are the bins equally full?
#
# The QLoRA paper calls NF4 "information theoretically optimal", since each of its 16 numbers should be used equally
# often on normal weights (Dettmers et al. 2023, section 3). That is a claim that you can count. 16 equal bins hold 6.25
# percent each.
#
# Count twice. First as quantiles intend it: all numbers divided by one constant, the quantile that NF4's own 1 stands
# for. Then as it is really done, each block divided by its largest magnitude.

# %%
def use(values):
    """Percent of the values that each number of NF4 is the nearest to."""
    return 100 * torch.bincount(nearest_code(values, BOOKS["NF4"]).long(), minlength=16) / len(values)

largest, quantile = gaussian.view(-1, 64).abs().amax(1), NormalDist().inv_cdf(NF4_OFFSET)
scaled = (gaussian.view(-1, 64) / largest[:, None]).flatten()
used = {"divided by one constant": use(gaussian / quantile), "divided by each block's absmax": use(scaled)}
for name, percent in used.items():
    print(f"{name:31} {percent.min():.1f} % to {percent.max():.1f} %")
print(f"the constant is {quantile:.2f}, the mean absmax {largest.mean():.2f}")
least, most = used["divided by each block's absmax"].aminmax()
assert least < 2.5 and most > 8.5 and used["divided by one constant"].min() > 5

# %%
ax = plots.panels()[0]
for i, (name, percent) in enumerate(used.items()):
    _ = ax.bar(torch.arange(16) + 0.4 * i - 0.2, percent, 0.4, label=name)
_ = ax.axhline(6.25, color=plots.INK, linestyle="--", linewidth=1)
_ = ax.set_xticks(range(16), [f"{c:.2f}" for c in BOOKS["NF4"].tolist()], fontsize=7)
_ = ax.set(xlabel="number of the code book", ylabel="percent of the weights", title="How often NF4's numbers are used")
_ = ax.set_ylim(0, 12.5)
_ = ax.legend(loc="upper center", ncols=2)

# %% [markdown]
# Divided by one constant, the bins are nearly equal: the quantiles do what they were made for. After the division by
# absmax they are far from it. The outer numbers are used several times less than the inner ones. The reason is in the
# last line: the largest of 64 normal numbers is larger than the quantile that NF4's own 1 stands for. So a block is
# pressed together, and its ends become thin. The paper's sentence holds for another scaling than the one used. Yoshida
# (2023, [arXiv:2306.06965](https://arxiv.org/abs/2306.06965)) works this out, and shows that the best code book depends
# on the block size.
#
# And is "each number equally often" even what you want? It makes the *codes* as informative as can be. A layer would
# rather have W′ near W. These are two aims.

# %% [markdown] exercise="utils.quantization.codebooks:lloyd_step" difficulty=3 importance=3 minutes=12 points=2
# ## A code book that is optimal in the mean squared error
#
# Which 16 numbers make the mean squared error as small as possible? Two conditions must hold:
#
# 1. Every value has the code book's *nearest* number.
# 2. Every number is the *mean* of the values that have it: of all numbers, the mean has the smallest squared distances.
#
# **Lloyd's algorithm** (Lloyd 1957, published in 1982; Max 1960) satisfies them in turn, until nothing moves. It is
# k-means in one dimension.
#
# Complete `lloyd_step`, one round: give each value to its nearest number, then move each number to the mean of its
# values. A number that no value chose stays where it is. The code book is in rising order.
#
# Hint (nearest): the nearest number changes at the midpoints between neighbours. `torch.bucketize(values, midpoints)`
# gives the places, as in `nearest_code`.
#
# Hint (means): sums and counts for all places at once: `index_add_` and `torch.bincount` with `minlength`. Beware of
# counts of zero.

# %% [markdown]
# Let it run on the scaled weights, from NF4 on. One wish remains: a block's largest weight is ±1 after scaling, and a
# code book with ±1 in it keeps that weight exactly. So there are two ways: with the ends held at ±1, or with all 16
# free.

# %%
def lloyd(values, held=True, rounds=100):
    """The fitted code book, and the mean squared error before every round. held: -1 and 1 stay in it"""
    book, mse = nf4_codebook(), []
    for _ in range(rounds):
        mse.append((book[nearest_code(values, book).long()] - values).square().mean().item())
        book = lloyd_step(values, book)
        if held:
            book[0], book[-1] = -1, 1
    return book, mse

fits = {"ends held": lloyd(scaled[: 2**16]), "all free": lloyd(scaled[: 2**16], held=False)}

# %%
for name, (book, mse) in fits.items():
    in_weights = 1 - relative_error(through(gaussian, book), gaussian) / in_64["NF4"]
    in_scaled = 1 - (mse[-1] / mse[0]) ** 0.5
    print(f"{name:10} mean squared error {mse[0]:.6f} with NF4, {mse[-1]:.6f} after {len(mse)} rounds")
    print(f"{'':10} error below NF4's by {in_scaled:.1%} in the scaled weights, by {in_weights:.1%} in the weights")
    assert 0.04 < in_scaled < 0.08 and 0.02 < in_weights < 0.07
free = fits["all free"][1]
assert all(after <= before * (1 + 1e-6) for before, after in zip(free, free[1:]))

# %%
_ = plt.figure(figsize=(7, 1.9))
shown = {"NF4": BOOKS["NF4"]} | {f"Lloyd, {name}": book for name, (book, _) in fits.items()}
for i, book in enumerate(shown.values()):
    _ = plt.plot(book, [-i] * 16, plots.MARKERS[i], color=plots.PALETTE[i])
_ = plt.yticks([0, -1, -2], list(shown))
_ = plt.ylim(-2.6, 0.6)
_ = plt.title("Three code books for scaled normal weights")

# %% [markdown]
# So NF4 is not the best in the mean squared error, not even on normal weights: both fitted code books beat it, by a few
# percent. Lloyd's numbers are spread more evenly: NF4 crowds them in the middle. None of them is zero, so a weight of 0
# would not stay 0. Whether a few percent matter to a model is the question after next.
#
# How much you gain depends on where you measure: in the scaled weights, which Lloyd's algorithm saw, or in the weights
# themselves, where a block with a large absmax counts for more. Whoever quotes one percentage should say which.
#
# ## Error and block size
#
# A smaller block has a smaller absmax, and so finer steps. Measure every code book for blocks of 16 to 4,096, on
# N(0, 1) and on the real weights of the tiny Llama. Lloyd's numbers are fitted anew for each point, with the ends held.
# Before you run it: which curve will be flattest?

# %%
unquantized, tokenizer = load_base("decoder"), load_tokenizer("decoder")
weights = {path: unquantized.get_submodule(path).weight.data for path in layers_to_quantize(unquantized, NF4())}
every_weight = torch.cat([weight.flatten() for weight in weights.values()]).view(-1, 4096)
real = every_weight[::4].flatten()  # a quarter, from all layers
BLOCK_SIZES = [16, 64, 256, 1024, 4096]

def fitted_book(x, block_size):
    """Lloyd's numbers for some of the blocks of x."""
    sample = x.view(-1, block_size)[:: len(x) // 2**15]
    return lloyd((sample / sample.abs().amax(1, keepdim=True)).flatten(), rounds=40)[0]

def by_block_size(x):
    """For each way the relative error of x, at every block size."""
    every = {size: FOUR_WAYS | {"Lloyd": fitted_book(x, size)} for size in BLOCK_SIZES}
    return {name: [relative_error(through(x, every[size][name], size), x) for size in every] for name in every[16]}

# %%
measured = {"N(0, 1)": by_block_size(gaussian[: 2**16]), "weights of the tiny Llama": by_block_size(real)}
left, right = plots.panels(2)
_ = right.sharey(left)
for ax, (title, rows) in zip((left, right), measured.items()):
    _ = plots.lines({name: (BLOCK_SIZES, 100 * torch.tensor(row)) for name, row in rows.items()}, ax=ax, logx=True,
                    xlabel="block size", ylabel="relative error in %", title=title)
right.get_legend().remove()

# %%
for title, rows in measured.items():
    print(title)
    for name, row in rows.items():
        print(f"  {name:12}", *(f"{size}: {share:5.1%}  " for size, share in zip(BLOCK_SIZES, row)))
        assert row[0] < row[1] < row[-1]
    assert all(rows["INT4"][i] < rows["FP4"][i] for i in (0, 1, 2))
    assert all(nf4 < int4 for nf4, int4 in zip(rows["NF4"], rows["INT4"]))
    assert min(rows, key=lambda name: rows[name][0]) == "affine INT4" and rows["affine INT4"][-1] > rows["NF4"][-1]

# %% [markdown]
# NF4's curve is the flattest of those that are not fitted: its numbers are dense in the middle, which is where weights
# gather when a large absmax presses the rest together. Affine INT4 is the best in blocks of 16, where its range fits
# the block most closely, and falls behind NF4 in large ones. INT4, whose steps are even too, but around zero and with
# one scale, is behind NF4 everywhere. The real weights behave like normal ones in small blocks. In large ones they lose
# more, since some of them are far larger than the rest, and one scale has to serve both.
#
# ### One outlier
#
# The chapter's first picture showed what one huge weight does to its block under NF4. Which code book bears it best?
# Put one weight of 20 standard deviations among 4,096 normal ones, and look at the error of the *other* 4,095. With a
# block of 4,096 all of them share the outlier's scale.

# %%
NINE_SIZES = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
plain_block, others = gaussian[:4096].clone(), torch.arange(4096) != 1234
spoiled_block = plain_block.clone()
spoiled_block[1234] = 20
def damage(x, code):
    """Relative error of the others, per block size, in percent."""
    return [100 * relative_error(through(x, code, size)[others], x[others]) for size in NINE_SIZES]

damages = {name: damage(spoiled_block, book) for name, book in BOOKS.items()}
damages["NF4 without the outlier"] = damage(plain_block, BOOKS["NF4"])
_ = plots.lines({name: (NINE_SIZES, row) for name, row in damages.items()}, logx=True, xlabel="block size",
                ylabel="relative error of the others, %", title="One weight of 20 standard deviations among 4,096")

# %%
ratios = [with_it / without for with_it, without in zip(damages["NF4"], damages["NF4 without the outlier"])]
print("NF4's error with it / without it:", *(f"{ratio:.2f} ({size})" for size, ratio in zip(NINE_SIZES, ratios)))
at_zero_share = (through(spoiled_block, BOOKS["INT4"], 4096) == 0).float().mean().item()
print(f"INT4, one block of 4,096: {at_zero_share:.0%} of the weights become 0")
assert ratios[0] < 1.2 and ratios[-1] > 3 and at_zero_share > 0.75

# %% [markdown]
# NF4 bears it best, with its dense middle. With blocks of 64 the damage stays among 64 weights. With one scale for all,
# every weight suffers, and with even steps most of them are rounded to zero. This is what blocks are for, and why the block size is a trade: protection and
# fine steps against scales to store.

# %% [markdown]
# ## Does the weight error tell what happens to the model?
#
# Nobody wants weights; people want predictions. So measure the **perplexity** of the tiny Llama on 40 documents that it
# has never seen, exp of its mean loss per token, with every linear layer in 4 bits. First with real quantized layers.

# %%
documents = load_task("documents")["test"].select(range(40)).to_list()
unseen_batch = collate(documents, tokenizer)
scored = unseen_batch["labels"][:, 1:] != -100  # the tokens that count: no padding

@torch.no_grad()
def log_probabilities(model):
    """(tokens, V): what the model thinks of each next token."""
    logits = model(input_ids=unseen_batch["input_ids"], attention_mask=unseen_batch["attention_mask"]).logits[:, :-1]
    return logits[scored].log_softmax(-1)

def loss_of(log_p):
    """Mean loss per token, from the log probabilities of all tokens."""
    return -log_p.gather(1, unseen_batch["labels"][:, 1:][scored][:, None]).mean().item()

# %% tags=["nbval-ignore-output"]
float32_log_p = log_probabilities(unquantized)
float32_loss = loss_of(float32_log_p)
assert math.isclose(float32_loss, evaluate(unquantized, documents, tokenizer)["loss"], rel_tol=1e-4)
settings = {"NF4, double quantized": NF4(), "NF4": NF4(double_quant=False), "INT4": INT4(), "FP4": FP4()}
four_bit_loss = {name: loss_of(log_probabilities(quantize_base(copy.deepcopy(unquantized), how)))
                 for name, how in settings.items()}
print(f"{'float32':22} perplexity {math.exp(float32_loss):.4f}")
for name, loss in four_bit_loss.items():
    print(f"{name:22} perplexity {math.exp(loss):.4f}, loss {loss - float32_loss:+.4f}")
assert all(abs(loss - float32_loss) < 0.02 for loss in four_bit_loss.values())

# %% [markdown]
# All are within a percent of the base. Four bits hardly hurt this model, so differences between code books are small,
# and small differences can be luck. To see what is luck, quantize the same weights several times, each time with the
# blocks cut at other places. Add affine INT4 and Lloyd's numbers, which have no layer of their own: their W′ is put
# into a plain layer. And add blocks of 1,024, where errors are larger.
#
# Beside the loss, measure how far the predictions have moved from the base's: the mean **KL divergence** between the
# two distributions of the next token, p of the base and q of the quantized model, over all tokens v of the vocabulary:
#
# $$\text{KL}(p, q) = \sum_v p(v) \, \big(\log p(v) - \log q(v)\big)$$
#
# It is zero if q is p, and positive otherwise. The loss asks whether the documents became less likely. The divergence
# asks whether anything changed, for better or worse.

# %%
stand_in = copy.deepcopy(unquantized)  # its weights are replaced by W'

def quality(code, block_size, shift):
    """Relative error of the weights, change of the loss, and divergence from the base. Blocks begin `shift` later."""
    error, size = 0, sum(weight.square().sum().item() for weight in weights.values())
    for path, weight in weights.items():
        rounded = through(weight.flatten().roll(shift), code, block_size).roll(-shift).view(weight.shape)
        error += (rounded - weight).square().sum().item()
        stand_in.get_submodule(path).weight.data = rounded
    log_p, log_q = float32_log_p, log_probabilities(stand_in)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()  # summed over v, and the mean over the tokens
    return (error / size) ** 0.5, loss_of(log_q) - float32_loss, divergence

# %%
runs = {(name, size): [quality(book, size, shift) for shift in (0, 21, 42)]
        for size in (64, 1024) for name, book in (FOUR_WAYS | {"Lloyd": fitted_book(real, size)}).items()}
plain_layer, quantized_layer = runs["NF4", 64][0][1], four_bit_loss["NF4"] - float32_loss
assert math.isclose(plain_layer, quantized_layer, abs_tol=1e-4)  # W' in a plain layer is a quantized layer

# %%
def scatter(ax, size, column, label):
    """One point per run with blocks of `size`. column: 1 the change of the loss, 2 the divergence"""
    for i, name in enumerate(FOUR_WAYS | {"Lloyd": None}):
        errors_in_percent = [100 * run[0] for run in runs[name, size]]
        _ = ax.plot(errors_in_percent, [run[column] for run in runs[name, size]], plots.MARKERS[i], label=name)
    _ = ax.set(xlabel="relative error of the weights, %", ylabel=label)

axes = plt.subplots(2, 2, figsize=(7, 5.2))[1]
for row, size in zip(axes, (64, 1024)):
    scatter(row[0], size, 1, "change of the loss")
    scatter(row[1], size, 2, "divergence")
    _ = row[0].set_title(f"blocks of {size:,}")
_ = axes[0, 1].legend(fontsize=8)

# %% tags=["nbval-ignore-output"]
means = {key: torch.tensor(three).mean(0).tolist() for key, three in runs.items()}
for (name, size), (weight_error, loss, divergence) in means.items():
    least, most = (pick(run[1] for run in runs[name, size]) for pick in (min, max))
    print(f"{name:11} blocks of {size:4}  error {weight_error:5.1%}  loss {loss:+.4f} ({least:+.4f} to {most:+.4f})"
          f"  divergence {divergence:.5f}")
correlation = torch.corrcoef(torch.tensor(list(means.values())).T)
print(f"correlation of the error with the loss {correlation[0, 1]:.2f}, with the divergence {correlation[0, 2]:.2f}")

# %%
nf4_1024, affine_1024 = means["NF4", 1024], means["affine INT4", 1024]
assert affine_1024[0] > nf4_1024[0] and affine_1024[1] < nf4_1024[1] and affine_1024[2] > nf4_1024[2]
assert correlation[0, 2] > correlation[0, 1]

# %% [markdown]
# The weight error does **not** rank the losses. Affine INT4 in blocks of 1,024 has a larger error than NF4, and yet its
# loss is lower: it is about that of the base. Cutting the blocks elsewhere does not undo that, so it is not a matter of
# where blocks begin. The divergence shows that these predictions did change, and by more than NF4's: on these documents
# the changes happen to cancel. Follow the divergence when you choose among formats: changes cannot cancel in it. (It
# also goes with the weight error far more closely than the loss does.)
#
# And be honest about the scale: a model of a million parameters, 40 short documents, losses that differ in the third
# decimal. Other documents may rank the code books of one block size differently. The QLoRA paper's own comparison is
# another setting: OPT, BLOOM, LLaMA and Pythia models of 125M to 13B, mean perplexity on Pile Common Crawl (its table
# 2): Int4 34.34, FP4 (E2M1) 31.07, FP4 (E3M0) 29.48, NF4 with double quantization 27.41. (E2M1 and E3M0 are 4-bit
# floats with so many bits of exponent and mantissa.) There too the errors do not rank it: FP4 (E3M0) beats Int4 and
# E2M1, though its error on normal weights is by far the largest. *Published figures* measures all of them; the FP4 that
# you measured is that of `bitsandbytes`, which is neither.

# %% [markdown]
# ## The scales are not free
#
# A block of 64 weights has one scale in float32: half a bit per weight, an eighth of what the codes cost. Look at the
# scales of a layer.

# %%
random_W = 0.02 * torch.randn(1024, 4096, generator=torch.Generator().manual_seed(1))
random_index, scales = quantize_blockwise(random_W, BOOKS["NF4"])
print(f"{len(scales):,} scales, {scales.nbytes:,} bytes, beside {random_W.numel() // 2:,} bytes of codes")
print(f"smallest {scales.min():.4f}, mean {scales.mean():.4f}, largest {scales.max():.4f}")

# %% [markdown]
# They could be stored in 8 bits, which is 256 numbers to choose from. `bitsandbytes` has a code book for that, the
# **dynamic** one (Dettmers 2015, [arXiv:1511.04561](https://arxiv.org/abs/1511.04561)). It covers the seven decades
# from 10⁻⁷ to 1, and each decade has twice as many numbers as the one below it, evenly spaced within: 1, 2, 4, ... 64.
# These are 127 numbers; their negatives, 0 and 1 make 256.

# %%
dynamic = dynamic_codebook()
left, right = plots.panels(2, height=2.6)
_ = left.plot(dynamic, ".", color=plots.BLUE, markersize=3)
_ = left.set(title="The dynamic code book", xlabel="index", ylabel="number")
_ = right.semilogy(range(128, 256), dynamic[128:], ".", color=plots.BLUE, markersize=3)
_ = right.set(title="Its positive numbers", xlabel="index", yticks=[10.0**-k for k in range(7, -1, -1)])
for k in range(7, 0, -1):
    between = ((dynamic > 10.0**-k) & (dynamic < 10.0 ** (1 - k))).sum().item()
    print(f"{between:2} numbers between {10.0**-k:g} and {10.0 ** (1 - k):g}")
    assert between == 2 ** (7 - k)
print(f"the widest step is {dynamic.diff().max():.3f}; NF4's is {BOOKS['NF4'].diff().max():.3f}")

# %% [markdown]
# So its steps are fine near 0 and coarser towards 1, as NF4's are, but over a far larger range: a number a million
# times smaller than the largest of its block is not lost. And half of all its numbers lie above 0.1 in magnitude, so
# even the widest step is small.

# %% [markdown] exercise="utils.quantization.blocks:quantize_scales" difficulty=3 importance=4 minutes=8 points=2
# ## Double quantization
#
# The scales are positive, much alike, and need not be exact. So quantize them too (QLoRA, section 3), in 8 bits:
#
# 1. Subtract their mean, the **offset**. What is left lies on both sides of 0. (NF4's `offset` was a probability. The
#    two share a name, no more.)
# 2. Encode it as you encode weights, in groups of 256 scales, each with a second scale `absmax2` in float32.
#
# The code book is the one that you have just seen, `dynamic_codebook()`, with both signs. It also serves 8-bit Adam,
# later in this chapter.
#
# Complete `quantize_scales`. It returns the indices, the offset (a tensor without axes) and the second scales. The
# other way, `dequantize_scales`, is there already.
#
# Hint (what is there): once their mean is gone, the scales are numbers to be encoded in blocks. What is the block size
# here, and which code book? Which function of yours takes both?
#
# Hint (the line): `quantize_blockwise(absmax - offset, dynamic_codebook(), group)` gives two of the three.

# %% [markdown]
# How exact are the scales when they come back? Compare with the same 8 bits without the first step, and see what
# becomes of the weights.

# %%
scale_codes, offset, absmax2 = quantize_scales(scales)
scales_back = dequantize_scales(scale_codes, offset, absmax2)
with_offset, without = relative_error(scales_back, scales), relative_error(through(scales, dynamic, 256), scales)
print(f"error of the scales: {with_offset:.2%}, and {without:.2%} if the mean stays in")

def error_with(its_scales):
    back = dequantize_blockwise(random_index, its_scales, BOOKS["NF4"]).view(random_W.shape)
    return relative_error(back, random_W)

doubled, single = error_with(scales_back), error_with(scales)
print(f"error of the weights: {doubled:.3%}, and {single:.3%} with scales in float32")
assert with_offset < without / 2 and doubled < 1.001 * single

# %%
negative = (dynamic[scale_codes.long()] < 0).float().mean().item()
print(f"{negative:.0%} of the codes are negative: with the offset, both halves of the code book work")
assert 0.4 < negative < 0.6

# %% [markdown]
# The scales come back to a fraction of a percent, and the weights hardly notice: their own rounding is so much larger.
# Does `bitsandbytes` store the same?

# %%
_, state = bitsandbytes.functional.quantize_4bit(random_W, blocksize=64, compress_statistics=True, quant_type="nf4")
bitsandbytes_back = dequantize_scales(state.absmax, state.offset, state.state2.absmax)
equal = (state.absmax == scale_codes).float().mean().item()
worse = (((bitsandbytes_back - scales).abs() - (scales_back - scales).abs()) / scales).max().item()
print(f"{equal:.1%} of the indices are equal; where not, their scale is further off by {worse:.3%} at most")
assert torch.allclose(state.offset, offset) and torch.allclose(state.state2.absmax, absmax2)
assert equal > 0.98 and worse < 1e-3

# %% [markdown]
# The offset and the second scales are the same. A few indices may differ: on a CPU, `bitsandbytes` looks the nearest
# number up on a coarse grid, so what lies close to a midpoint can fall on the other side. Such a scale is as exact on
# either side.

# %% [markdown] exercise="utils.quantization.blocks:bits_per_number" difficulty=1 importance=5 minutes=5 points=1
# ## Bits per weight
#
# Now the account. A weight costs its code, and its share of everything that it shares: `block_size` weights share a
# scale; if the scales are double quantized, `group` scales share a second one.
#
# Complete `bits_per_number`. A scale is 32 bits; double quantized it is 8 bits, and the second scale is 32. Do it on
# paper first for NF4 with blocks of 64 and groups of 256, without and with double quantization.
#
# Hint (the second scale): how many weights does one of them serve?

# %% [markdown]
# Formula against stored tensors: ours, and those of `bitsandbytes`.

# %%
from utils.quantization.weights import quantize_weight

def bits_stored(*tensors):
    return 8 * sum(t.nbytes for t in tensors if t is not None) / random_W.numel()

for twice in (False, True):
    ours_4_bit = quantize_weight(random_W, "nf4", 64, twice)
    codes_there, state = bitsandbytes.functional.quantize_4bit(
        random_W, blocksize=64, compress_statistics=twice, quant_type="nf4")
    counted = {"ours": bits_stored(ours_4_bit.packed, ours_4_bit.absmax, ours_4_bit.nested[1] if twice else None),
               "bitsandbytes": bits_stored(codes_there, state.absmax, state.state2.absmax if twice else None)}
    predicted = bits_per_number(4, 64, twice)
    print(f"double quantization {twice!s:5}  predicted {predicted:.6f}, counted {counted}")
    assert set(counted.values()) == {predicted}

# %% [markdown]
# Exact. What the formula leaves out is once per tensor: the code books (16 and 256 float32 numbers, which every layer's
# entry in a file repeats) and the offset. How much is that?

# %%
once_in_bits = 32 * (16 + 256 + 1)
for name, numbers in {"a layer of 4096 x 4096": 4096**2, "q_proj of the tiny Llama": 128 * 128}.items():
    print(f"{name:25} {once_in_bits / numbers:.4f} bits per weight more")
saved = bits_per_number(4, 64, False) - bits_per_number(4, 64, True)
print(f"double quantization saves {saved:.6f} bits per weight")
assert abs(saved - 0.373) < 0.001 and once_in_bits / 4096**2 < 0.001

# %% [markdown]
# The paper's "0.373 bits per parameter" (section 3) is confirmed. Now the price of error can be named fairly: error
# against bits, and no longer against block size. Affine INT4 pays for two scales.

# %%
def doubly(x, code, block_size):
    index, absmax = quantize_blockwise(x, code, block_size)
    return dequantize_blockwise(index, dequantize_scales(*quantize_scales(absmax)), code, block_size)

FIVE_SIZES = [32, 64, 128, 256, 512]
prices = {"NF4": [bits_per_number(4, size, False) for size in FIVE_SIZES]}
prices |= {"NF4, double": [bits_per_number(4, size, True) for size in FIVE_SIZES],
           "INT4": prices["NF4"], "affine INT4": [4 + 2 * 32 / size for size in FIVE_SIZES]}
paid = {name: [100 * relative_error(through(gaussian, FOUR_WAYS[name], size), gaussian) for size in FIVE_SIZES]
        for name in ("NF4", "INT4", "affine INT4")}
paid["NF4, double"] = [100 * relative_error(doubly(gaussian, BOOKS["NF4"], size), gaussian) for size in FIVE_SIZES]
_ = plots.lines({name: (prices[name], paid[name]) for name in prices}, xlabel="bits per weight, scales included",
                ylabel="relative error in %", title="Blocks of 32 to 512, weights from N(0, 1)")

# %%
for name, size in (("NF4, double", 64), ("NF4", 256), ("NF4", 64), ("affine INT4", 128), ("NF4", 32),
                   ("affine INT4", 64)):
    at = FIVE_SIZES.index(size)
    print(f"{name:12} blocks of {size:3}: {prices[name][at]:.3f} bits, error {paid[name][at]:.2f} %")
for i in (1, 2):  # affine blocks are twice as large for the same bits
    assert prices["affine INT4"][i] == prices["NF4"][i - 1] and paid["affine INT4"][i] > paid["NF4"][i - 1]
assert paid["NF4, double"][1] < paid["NF4"][3]

# %% [markdown]
# At 4.5 bits and at 5, NF4 is ahead of affine INT4, whose second scale eats up its advantage. And for about the same
# 4.13 bits you can have large blocks with float scales or small blocks with 8-bit scales: the small ones are better.
# That is what double quantization really buys: blocks of 64 for the price of blocks of 256.

# %% [markdown]
# ## A layer over 4-bit weights
#
# Codes and scales are how the base is stored. To compute with it, a layer needs W′ for a short time. How long W′ stays
# decides whether QLoRA saves anything in training.

# %%
import json

import torch
import torch.nn.functional as F
from torch import nn

from utils import LoRA, attach, load_base, plots
from utils.architectures import architecture
from utils.checks import check
from utils.quantization.base import FP4, NF4, quantization_report, quantize_base
from utils.quantization.linear import NF4Linear, QuantizedLinear
from utils.quantization.weights import QuantizedWeight

# %%
from utils.measure import flops, saved_by_shape
from utils.memory.estimate import estimate, facts_of, predict
from utils.memory.instruments import LiveBytes
from utils.memory.states import nf4_bytes, units

_ = torch.manual_seed(0)

# %% [markdown] exercise="utils.quantization.linear:QuantizedProduct" difficulty=4 importance=5 minutes=20 points=3
# ## The product, and what it leaves behind
#
# The simplest way is to unpack W′ and call `F.linear`. The output is right, and so are the gradients. But autograd keeps
# what the backward pass needs, and for the gradient of x that is W′:
#
# $$y = x\,W'^\top + b, \qquad \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\,W', \qquad
#   \frac{\partial L}{\partial b} = \sum_{\text{tokens}} \frac{\partial L}{\partial y}$$
#
# In an ordinary layer W is there anyway, so keeping it costs nothing. Here W′ was made for the occasion. If each layer
# keeps its own until the backward pass comes, the whole base is back in memory in 16 bits, beside the codes.
#
# The codes are there anyway. So keep those, and unpack them a second time in the backward pass. And x? Only the gradient
# of W would need it, and W is frozen.
#
# Complete the class. `weight` is a `QuantizedWeight`; `weight.dequantize(dtype)` gives W′, (d_out, d_in), in the dtype
# you ask for. x may have any number of leading axes and any dtype; products are taken in that dtype. bias may be None.
# `backward` returns one value per argument of `forward`: x, bias, weight.
#
# Hint (keeping): which of x, bias and weight does the backward pass need? `ctx.save_for_backward` is for tensors.
# Anything else, such as `weight`, can be put on `ctx` itself.
#
# Hint (shapes): (..., d_out) times (d_out, d_in) is (..., d_in). Which of the two passes needs a transpose?
#
# Hint (the bias): the gradient of b sums over all tokens, and they may lie along several axes.
# `grad.reshape(-1, grad.shape[-1])` makes two axes of any number; then sum over the tokens.
#
# Hint (asking first): if nobody asks for the gradient of x, does W′ have to be unpacked? `ctx.needs_input_grad` is a
# tuple of booleans in the order of the arguments.

# %% [markdown]
# Count it. `left_behind` runs a forward pass and counts the bytes that are still alive afterwards, besides the weights
# and the output. It sees what autograd keeps and what a function hides elsewhere. Four products with the same codes:
#
# - `F.linear` on a W′ made before, which autograd keeps;
# - yours;
# - the course's layer, `NF4Linear`;
# - `Linear4bit` of `bitsandbytes`.

# %%
import bitsandbytes

def left_behind(layer, x):
    """Bytes that a forward pass leaves alive, besides the weights and the output."""
    with LiveBytes([*nf4_layer.parameters(), *nf4_layer.buffers()]) as live:
        h = x.clone()
        y = layer(h)
        del h  # whoever needs the input has kept it
        return live.mark("forward") - y.nbytes

dense_W = torch.randn(768, 512) / 512**0.5
# %%
bnb_layer = bitsandbytes.nn.Linear4bit(512, 768, bias=False, compute_dtype=torch.float32, quant_type="nf4")
bnb_layer.weight = bitsandbytes.nn.Params4bit(dense_W.clone(), requires_grad=False, quant_type="nf4").to("cpu")
nf4_weight = QuantizedWeight.from_bitsandbytes(bnb_layer.weight)  # the same codes and scales
nf4_layer = NF4Linear(nf4_weight)

# %%
x = torch.randn(32, 512, requires_grad=True)
products = {"F.linear, W' unpacked before": lambda h: F.linear(h, nf4_weight.dequantize()),
            "yours": lambda h: QuantizedProduct.apply(h, None, nf4_weight), "NF4Linear": nf4_layer, "Linear4bit": bnb_layer}
left_bytes = {name: left_behind(layer, x) for name, layer in products.items()}
for name, size in left_bytes.items():
    print(f"{name:30} leaves {size:>9,} bytes; W' has {dense_W.nbytes:,}")
assert left_bytes["F.linear, W' unpacked before"] == dense_W.nbytes
assert left_bytes["yours"] == left_bytes["NF4Linear"] == left_bytes["Linear4bit"] == 0

# %% [markdown]
# And the numbers are the same, output and gradient:

# %%
gradients = {}
for name, layer in products.items():
    y = layer(x)
    gradients[name] = y, torch.autograd.grad(y.square().sum(), x)[0]
dense_pair = gradients["F.linear, W' unpacked before"]
for name, pair in gradients.items():
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(pair, dense_pair))
    print(f"{name:30} differs from F.linear by {error:.0e}")
    assert error < 1e-5

# %% [markdown]
# What would the simple way cost at full size? It keeps W′ of all layers, in 16 bits.

# %%
seven = facts_of("Llama-2-7B", LoRA(r=16, targets="all-linear"))
in_4_bits, in_16_bits = nf4_bytes(seven.in_blocks), 2 * seven.in_blocks
print(f"Llama-2-7B's linear layers: {in_4_bits / 1e9:.2f} GB of codes and scales, {in_16_bits / 1e9:.2f} GB in 16 bits")
print(f"LoRA in 16 bits has {in_16_bits / 1e9:.2f} GB of them in memory; QLoRA that keeps W': "
      f"{(in_4_bits + in_16_bits) / 1e9:.2f} GB")
assert in_16_bits > 3 * in_4_bits

# %% [markdown]
# More than LoRA without quantization. So the custom backward pass is not an optimization of QLoRA: without it nothing is
# saved, unless gradient checkpointing throws W′ away again, block by block.
#
# The price is paid in time: the unpacking. How often in a step? Count the calls on the tiny Llama, which has 4 blocks of
# 7 linear layers, with and without gradient checkpointing.

# %%
def tiny(dtype=torch.float32, setting=None):
    """The tiny Llama, in training mode, and in 4 bits if there is a setting."""
    model = load_base("decoder").to(dtype).train()
    return model if setting is None else quantize_base(model, setting)

def recompute(model):
    """Switch on gradient checkpointing, under its newer name or its older one."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})  # the newer of PyTorch's two ways to recompute, and the one it recommends

# %%
from unittest.mock import patch

def unpackings(checkpointing):
    """How often W' is formed in one step of a tiny QLoRA."""
    model = tiny(setting=NF4())
    attach(model, LoRA(r=8, targets="all-linear"))
    if checkpointing:
        recompute(model)
    ids = torch.randint(3, 2000, (2, 16))
    real = QuantizedWeight.dequantize  # it still does the work; `patch` counts the calls
    with patch.object(QuantizedWeight, "dequantize", autospec=True, side_effect=real) as calls:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return calls.call_count

# %%
formed = {"without": unpackings(False), "with checkpointing": unpackings(True)}
print("W' is formed", formed, "times in a step; there are", 4 * 7, "layers")
assert formed["without"] == 28 + 25 and formed["with checkpointing"] in (28 + 28 + 25, 3 * 28)

# %% [markdown]
# Twice for each layer. Three layers are spared one: q, k and v of the first block read the embedding, which is frozen, so
# nobody asks for the gradient of their input. With checkpointing it is three times, for all: `transformers` then asks for
# the gradient of the embedding's output too.

# %% [markdown]
# ## Storage dtype and compute dtype
#
# Two dtypes are easily mixed up. The **storage dtype** is that of what lies in memory: 4-bit codes in bytes. The
# **compute dtype** is the one that W′ is unpacked to and that products are taken in. QLoRA computes in bfloat16. The
# weights are rounded to 16 levels and then multiplied with 8 significant bits: does the second rounding still matter?

# %%
in_float32 = x.detach() @ dense_W.T

def error_of(dtype, weights):
    y = F.linear(x.detach().to(dtype), weights.to(dtype)).float()
    return ((y - in_float32).norm() / in_float32.norm()).item()

off = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    off[dtype] = error_of(dtype, dense_W), error_of(dtype, nf4_weight.dequantize(dtype))
    print(f"{dtype!s:15} with W {100 * off[dtype][0]:6.3f} %, with W' {100 * off[dtype][1]:.3f} %")
assert off[torch.bfloat16][1] < 1.02 * off[torch.float32][1] and off[torch.float32][1] > 0.08

# %% [markdown]
# It does not: the error of the codes is many times that of bfloat16, so computing in float32 buys nothing. Only unpacking
# is done in float32: code times scale, rounded once.
#
# `NF4Linear` computes in the dtype of its input, or in `compute_dtype` if you set one; the output has x's dtype in any
# case. And the number of operations? The same as in 16 bits:

# %%
half = NF4Linear(nf4_weight, compute_dtype=torch.bfloat16)
for h in (x.detach(), x.detach().bfloat16()):
    print(f"x {h.dtype}, compute dtype {half.compute_dtype}: y {half(h).dtype}")
    assert half(h).dtype == h.dtype
dense = nn.Linear(512, 768, bias=False)
print(f"operations of the product: {flops(lambda: dense(x)):,} dense, {flops(lambda: nf4_layer(x)):,} in 4 bits")
assert flops(lambda: nf4_layer(x)) == flops(lambda: dense(x))

# %% [markdown]
# So QLoRA saves memory and no arithmetic. It makes a step slower, by the unpacking, where LoRA in 16 bits would have
# fitted too.

# %% [markdown]
# ## Quantize a whole model
#
# `quantize_base` puts the linear layers of a model into 4 bits, one after the other, in place. All the rest stays as it
# is: embeddings, norms, and the output embedding. First quantize, then attach.

# %%
tiny_nf4 = tiny(setting=NF4())
print(quantization_report(tiny_nf4))
tiny_lora = attach(tiny_nf4, LoRA(r=8, targets="all-linear"))
print(tiny_lora)

# %%
for name, whole_model in {"the tiny Llama": load_base("decoder"), "Llama-2-7B": architecture("Llama-2-7B")}.items():
    ends = {whole_model.get_input_embeddings().weight, whole_model.get_output_embeddings().weight}  # one, if tied
    share = sum(p.numel() for p in ends) / whole_model.num_parameters()
    print(f"{name:15} embeddings are {share:.1%} of all numbers")
assert share < 0.05

# %% [markdown]
# The tiny Llama is in float32, so what lies "beside it" has 4 bytes a number: here it is most of the memory. That is
# because the model is tiny: a vocabulary of 2,048 words is a quarter of its numbers. In Llama-2-7B, input and
# output together are 4 %.
#
# Why not quantize the embeddings too? They are looked up, not multiplied: each token reads one row. The output embedding
# is a product, but its errors go into the logits directly. The authors leave both in 16 bits.

# %% [markdown] exercise="utils.quantization.base:bitsandbytes_fields" difficulty=2 importance=5 minutes=6 points=1
# ## What `load_in_4bit=True` gives you
#
# In the world of `transformers` you load a model in 4 bits with
# `from_pretrained(..., quantization_config=BitsAndBytesConfig(...))`. Many tutorials pass `load_in_4bit=True` and call it
# QLoRA. Before you run the cell after the exercise, guess: which code book, which scales, which compute dtype do they
# get?
#
# Complete `bitsandbytes_fields`, which returns the arguments that mean the same as ours. There are four: that it is 4
# bits, which code book, whether the scales are quantized too, and the compute dtype. Their names are in the
# documentation: `help(BitsAndBytesConfig)`, or look at what the config prints.
#
# Hint (the names): what does `print(BitsAndBytesConfig(load_in_4bit=True))` list? One name is `load_in_4bit`. The other
# three begin with `bnb_4bit_`.
#
# Hint (spelling): `BitsAndBytesConfig` takes unknown names without an error.

# %%
from transformers import BitsAndBytesConfig

NAMES = {"code book": "bnb_4bit_quant_type", "double quantization": "bnb_4bit_use_double_quant",
         "compute dtype": "bnb_4bit_compute_dtype"}
bare_config, qlora_config = BitsAndBytesConfig(load_in_4bit=True), BitsAndBytesConfig(**bitsandbytes_fields())
for name, field in NAMES.items():
    print(f"{name:20} load_in_4bit alone: {getattr(bare_config, field)!s:14} QLoRA: {getattr(qlora_config, field)}")
assert (bare_config.bnb_4bit_quant_type, bare_config.bnb_4bit_use_double_quant) == ("fp4", False)
assert bare_config.bnb_4bit_compute_dtype == torch.float32 and qlora_config.bnb_4bit_quant_type == "nf4"

# %% [markdown]
# Not NF4, not double, not bfloat16: nothing of what the paper is about but the blocks of 64. What does that cost? Put the
# same weight through `bitsandbytes` with both configurations.

# %%
def through_bitsandbytes(config):
    """(bits per weight, relative error) of a layer that is quantized as the config says."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        dense_W, blocksize=64, quant_type=config.bnb_4bit_quant_type, compress_statistics=config.bnb_4bit_use_double_quant)
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    error = (bitsandbytes.functional.dequantize_4bit(packed, state) - dense_W).norm() / dense_W.norm()
    return 8 * (packed.nbytes + scales) / dense_W.numel(), error.item()

bnb_costs = {"load_in_4bit alone": through_bitsandbytes(bare_config), "QLoRA": through_bitsandbytes(qlora_config)}
for name, (bits, error) in bnb_costs.items():
    print(f"{name:20} {bits:.3f} bits per weight, error {100 * error:.2f} %")
assert all(of_qlora < alone for of_qlora, alone in zip(bnb_costs["QLoRA"], bnb_costs["load_in_4bit alone"]))

# %% [markdown]
# More bits *and* a larger error. The compute dtype costs no memory for weights. It should cost time on a GPU, whose
# tensor cores want 16 bits; that is not measured here.
#
# The config does not complain. Three mistakes that people make:

# %%
silent = {"a name that does not exist": dict(bnb_4bit_double_quant=True),
          "a code book that does not exist": dict(bnb_4bit_quant_type="NF4"),
          "the fields, and not load_in_4bit": dict(load_in_4bit=False, bnb_4bit_quant_type="nf4")}
for what, fields in silent.items():
    config = BitsAndBytesConfig(**{"load_in_4bit": True} | fields)
    print(f"{what:34} in 4 bits: {config.load_in_4bit!s:6} {config.bnb_4bit_quant_type}, double "
          f"{config.bnb_4bit_use_double_quant}")
assert not BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_double_quant=True).bnb_4bit_use_double_quant

# %% [markdown]
# The first changes nothing, the second fails later, when a model is loaded, and the third loads the model unquantized.
# So look at what you have got after loading: `model.config.quantization_config`, and the class of a layer. (There is
# one more field, `bnb_4bit_quant_storage`: the dtype that the bytes pretend to have, for FSDP, which wants all tensors
# alike. It changes no number.)

# %% [markdown] exercise="utils.memory.states:quantized_base" difficulty=1 importance=5 minutes=6 points=1
# ## From 7B to 70B
#
# How large is a base in 4 bits? Not "half a byte times 7 billion": there are the scales, and there is what was not
# quantized.
#
# Complete `quantized_base`, in bytes. `linear` numbers are in NF4; the `rest` has `e` bytes each.
#
# Hint (the two parts): which numbers cost `e` bytes, and which cost bits? You know the bits per number from an earlier
# exercise. `nf4_bytes(numbers, block, double_quant)`, imported above, makes bytes of them.

# %% [markdown]
# First against the tensors that are really there. Formulas count fractions of blocks and bytes, so tensors may be
# larger by a few bytes per layer.

# %%
def stored_bytes(model):
    """(numbers in 4 bits, other numbers, bytes of all)."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    others = [p for p in model.parameters() if p.dtype != torch.uint8]
    numbers = sum(layer.in_features * layer.out_features for layer in layers), sum(p.numel() for p in others)
    return *numbers, sum(layer.quantized.nbytes() for layer in layers) + sum(p.nbytes for p in others)

for setting in (NF4(), NF4(double_quant=False), NF4(block_size=128), FP4()):
    in_layers, rest, counted = stored_bytes(tiny(torch.bfloat16, setting))
    formula = quantized_base(in_layers, rest, setting.block_size, setting.double_quant)
    print(f"{setting.kind}, blocks of {setting.block_size:3}, double {setting.double_quant!s:5}: "
          f"{counted:,} bytes, formula {formula:,.1f}")
    assert 0 <= counted - formula < 28 * 6

# %% [markdown]
# Now the real ones. `facts_of` builds an architecture on the meta device and counts. LLaMA's first generation had a 33B
# and a 65B, which the QLoRA paper used; their sizes are those of a Llama-2-13B made wider and deeper.

# %%
WIDER = {"33B": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52,
                     num_key_value_heads=52),
         "65B": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64,
                     num_key_value_heads=64)}
MODELS = {name: architecture(f"Llama-{name}") for name in ("2-7B", "3-8B", "2-13B", "2-70B")}
MODELS |= {f"1-{size}": architecture("Llama-2-13B", **fields) for size, fields in WIDER.items()}
ADAPTER = LoRA(r=16, targets="all-linear")
model_facts = {f"Llama-{name}": facts_of(model, ADAPTER) for name, model in MODELS.items()}
model_facts = dict(sorted(model_facts.items(), key=lambda item: item[1].total))

# %%
base_GB, bits_each = {}, {}
for name, f in model_facts.items():
    rest = f.total - f.trained - f.in_blocks
    base_GB[name] = {"in 4 bits": quantized_base(f.in_blocks, 0) / 1e9, "not quantized": quantized_base(0, rest) / 1e9}
    bits_each[name] = 8e9 * sum(base_GB[name].values()) / (f.in_blocks + rest)
    print(f"{name:12} {2 * (f.in_blocks + rest) / 1e9:6.1f} GB in 16 bits, {sum(base_GB[name].values()):6.2f} GB "
          f"quantized, {bits_each[name]:.2f} bits per number")
_ = plots.stacked(base_GB, xlabel="GB", fmt="{:.1f}", title="The base in NF4, double quantized, without an adapter")
assert all(4.127 < b < 6 for b in bits_each.values()) and max(bits_each, key=bits_each.get) == "Llama-3-8B"

# %% [markdown]
# "4 bits" are 4.2 for the largest of these and 5.7 for Llama-3-8B, whose vocabulary of 128,256 words stays in 16 bits,
# twice: input and output. And published figures?

# %%
PUBLISHED = {"Llama-2-7B": 5, "Llama-2-13B": 10, "Llama-1-33B": 21, "Llama-1-65B": 41}  # QLoRA, Table 6, in GB
for name, gb in PUBLISHED.items():
    base_alone = sum(base_GB[name].values())
    print(f"{name:12} base computed {base_alone:5.2f} GB, published {gb:2} GB: {gb / base_alone:.2f} times as much")
    assert 1.15 < gb / base_alone < 1.4

# %% [markdown]
# These are the memory footprints of **Guanaco**, as the paper calls the models that it fine-tuned from LLaMA with
# QLoRA. They are larger than our bases, by a fifth to two fifths. The formula is right for the tensors, as you have
# seen, so something else was counted, or counted otherwise, and the paper does not say what. *Published figures*, near the end, tries out
# what it may be.

# %% [markdown]
# ## Predict a whole QLoRA step
#
# The base is one part of a training step. The others are known from chapter 1: the adapter with its gradients and
# moments, the activations, the loss. `predict` knows about 4 bits: what a layer keeps, and one W′ at a time. Is it
# right? Count a step on the tiny Llama in bfloat16, with live bytes.

# %%
def loss_on(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss

def take_step(model, ids, optimizer):
    loss_on(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()

def bytes_of(tensors):
    """Bytes of these tensors. Two that share their memory count once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

# %%
def tiny_with(setting, method, checkpointing):
    """(model, optimizer) of the tiny Llama in bfloat16, ready for a step."""
    model = tiny(torch.bfloat16, setting)
    trained = attach(model, method).parameters()
    if checkpointing:
        recompute(model)
    return model, torch.optim.AdamW(trained, foreach=True)

# %%
def counted_step(setting, method, batch, length, checkpointing):
    """({(shape, dtype): bytes} kept by the forward pass, bytes of states, bytes at the peak) of one step."""
    model, optimizer = tiny_with(setting, method, checkpointing)
    ids = torch.randint(3, 2000, (batch, length))
    kept = saved_by_shape(lambda: loss_on(model, ids), [model])
    take_step(model, ids, optimizer)  # makes the moments
    states = [t for of_one in optimizer.state.values() for t in of_one.values()]
    scales = [t for name, t in model.named_buffers() if "absmax" in name]
    in_states = bytes_of([*model.parameters(), *scales, *states])
    with LiveBytes([*model.parameters(), *model.buffers(), *states, ids]) as live:
        take_step(model, ids, optimizer)
    return kept, in_states, in_states + live.peak

# %%
SETUPS = {"LoRA over 16 bits": (None, 0.0, False), "QLoRA": (NF4(), 0.0, False),
          "LoRA, dropout": (None, 0.1, False), "QLoRA, dropout": (NF4(), 0.1, False),
          "QLoRA, checkpointing": (NF4(), 0.0, True)}
kept_parts, kept_shapes = {}, {}
for name, (setting, dropout, checkpointing) in SETUPS.items():
    method = LoRA(r=8, targets="all-linear", dropout=dropout)
    options = dict(batch=8, length=64, checkpointing=checkpointing)
    step = estimate(tiny(torch.bfloat16), method, quantized=setting is not None, device="cpu", **options)
    kept_shapes[name], states, peak = counted_step(setting, method, **options)
    kept_parts[name] = dict(step.kept)
    print(f"{name:21} states {states / 1e6:.3f} MB, peak {peak / 1e6:.2f} MB, predicted {step.peak / 1e6:.2f}")
    assert abs(sum(step.states.values()) / states - 1) < 0.01 and abs(step.peak / peak - 1) < 0.05

# %%
for name in list(SETUPS)[:4]:  # with checkpointing, autograd's list does not show what is held
    counted, parts = sum(kept_shapes[name].values()), kept_parts[name]
    others = sum(size for part, size in parts.items() if part not in ("adapters", "linear inputs"))
    print(f"{name:17} keeps {counted:,} bytes, predicted {sum(parts.values()):,}: linear inputs "
          f"{parts['linear inputs']:,}, adapters {parts.get('adapters', 0):,}, others {others:,}")
    assert counted == sum(parts.values())
small = {shape: size for (shape, _), size in kept_shapes["QLoRA"].items() if 8 in shape and len(shape) == 2}
a_x = small.pop((8 * 64, 8))  # 512 tokens, r = 8
print(f"QLoRA's adapters: A x {a_x:,} bytes, copies of A and B {sum(small.values()):,}: {', '.join(map(str, small))}")
assert a_x + sum(small.values()) == kept_parts["QLoRA"]["adapters"] and "adapters" not in kept_parts["LoRA over 16 bits"]

# %% [markdown]
# What the forward pass keeps is predicted to the byte, the states within one percent, the peak within five. (With
# checkpointing, autograd's own list does not show what is held, so only states and peak are compared.)
#
# Compare what is kept: QLoRA's forward pass keeps a little *more* than LoRA's over 16 bits, namely A x, and copies of A
# and B rounded to bfloat16. (The course's LoRA over 16 bits computes these again in its backward pass.) Dropout costs
# both a mask for each layer. QLoRA keeps the masked copies of x as well: they are what its linear inputs have grown by.
# Four bits save weights, and no activations.
#
# Now a real size: Llama-2-7B, rows of 512 tokens, with more and more rows.

# %%
row_counts = [1, 2, 4, 8, 16]
WAYS = {"LoRA": (False, False), "QLoRA": (True, False), "LoRA, checkpointing": (False, True),
        "QLoRA, checkpointing": (True, True)}
llama = model_facts["Llama-2-7B"]
peaks = {name: [predict(llama, batch=n, length=512, quantized=four, checkpointing=again).peak / 1e9 for n in row_counts]
         for name, (four, again) in WAYS.items()}
_ = plots.lines({name: (row_counts, ys) for name, ys in peaks.items()}, xlabel="rows of 512 tokens",
                ylabel="GB at the peak", title="Llama-2-7B, LoRA r=16 on all linear layers, predicted")
assert peaks["QLoRA"][0] < peaks["LoRA"][0] - 9

# %%
for again in ("", ", checkpointing"):
    saved = [lora - qlora for lora, qlora in zip(peaks["LoRA" + again], peaks["QLoRA" + again])]
    print(f"4 bits save {', '.join(f'{gb:.1f}' for gb in saved)} GB with {row_counts} rows{again}")
    assert max(saved) - min(saved) < 0.2 * saved[0]
few = next(n for n, lora, qlora in zip(row_counts, peaks["LoRA, checkpointing"], peaks["QLoRA"]) if lora < qlora)
print(f"from {few} rows on, LoRA over 16 bits with checkpointing needs less than QLoRA without it")

# %% [markdown]
# Quantization shifts the curve down by about the same amount everywhere. Checkpointing flattens it, and from some number
# of tokens on that is what matters. So QLoRA is for a base that does not fit; checkpointing is for rows that do not fit.
#
# And the headline of the paper, 65 billion numbers on one GPU with 48 GB, with one row of 512 tokens and checkpointing?

# %%
for r in (16, 64):
    large_facts = facts_of(MODELS["1-65B"], LoRA(r=r, targets="all-linear"))
    print(f"r = {r}: the adapter has {large_facts.trained / 1e6:.0f} million numbers")
    for name, recipe in (("adapter and moments in float32", "adapters in fp32"), ("all of it in 16 bits", "pure bf16")):
        step = predict(large_facts, recipe, batch=1, length=512, checkpointing=True, quantized=True)
        phase = max(step.moments, key=step.moments.get)  # "moments" of the step here: its phases
        print(f"r = {r}, {name:30} {step.peak / 1e9:5.1f} GB = {units(step.peak)[1]:.1f} GiB, in the phase: {phase}")
        if r == 64 and recipe == "pure bf16":
            assert units(step.peak)[1] < 48

# %% [markdown]
# The peak is in one **phase** of the step: the loss, the backward pass of the last or of the first block, or the
# optimizer's step. With r = 16 it fits in every way. With the paper's r = 64 the adapter has 800 million numbers, and
# then it matters how these are kept. With float32 for the adapter, its gradients and its moments a GiB is left of a
# card's 48, which is less than CUDA and the gaps of the allocator usually take. In 16 bits it fits. This is where
# **paged optimizers** help: moments can leave the GPU when the peak comes. They come in a later section.
#
# Which way fits which GPU? `plan` has tried QLoRA in chapter 1 already:

# %%
from utils.memory.plan import plan

for name, gpu in (("Llama-2-7B", "RTX-4090"), ("Llama-2-70B", "A100-80GB")):
    planned = plan(name, gpu, length=1024)
    print(planned, "\n")
assert all(row.batch == 0 for row in planned.rows if not row.way.quantized) and planned.best.way.quantized

# %% [markdown]
# A 7B on 24 GiB leaves the choice between 16 bits and 4. A 70B on one card of 80 does not.

# %% [markdown]
# ## On a GPU
#
# All of this was counted on a CPU. With a GPU, the cell below takes one QLoRA step on the model of your `profile` and
# asks CUDA for the peak, beside the same step over 16 bits. (`profile = "colab"` is a model of half a billion numbers,
# "gpu" one of seven billion.) Without a GPU it takes the step on the tiny model and has no peak to show.

# %% tags=["nbval-ignore-output"]
from utils import hardware as machine

device, here = machine.describe().kind, machine.settings().dtype

def one_step(setting):
    """The loss of one step over the profile's decoder, in 16 bits or in 4, and the peak in GB where there is CUDA."""
    model = load_base("decoder", profile, dtype=here).train()
    model = (model if setting is None else quantize_base(model, setting)).to(device)
    trained = attach(model, LoRA(r=16, targets="all-linear")).parameters()
    batch = collate(load_task("tickets")["train"].select(range(4)).to_list(), load_tokenizer("decoder", profile))
    optimizer = torch.optim.AdamW(trained)
    loss = model(**{name: t.to(device) for name, t in batch.items()}, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item(), torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None

# %% tags=["nbval-ignore-output"]
for name, setting in (("LoRA over 16 bits", None), ("QLoRA", NF4())):
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss, peak = one_step(setting)
    print(f"{name:18} on {machine.describe().name}: loss {loss:.2f}, {f'peak {peak:.2f} GB' if peak else 'no GPU, no peak'}")
    assert math.isfinite(loss)

# %% [markdown]
# Larger models, and the speed of the kernels, are measured by two commands. `make gpu-test` trains QLoRA on Llama-2-7B and
# Llama-2-70B with random weights for a few steps, compares the peaks with the prediction, and writes them to
# `data/measurements`. `make gpu-bench` measures unpacking, and the product that unpacks as it goes. Where somebody has
# run them, the records are shown here:

# %% tags=["nbval-ignore-output"]
from utils.paths import DATA

records = sorted((DATA / "measurements").glob("*/memory.json"))
for path in records:
    for row in json.loads(path.read_text())["rows"]:
        if row["way"] == "QLoRA" and row["measured"]:
            print(f"{path.parent.name}: {row['model']}, {row['batch']} x {row['length']}: predicted "
                  f"{row['predicted'] / 2**30:.1f} GiB, measured {row['measured'] / 2**30:.1f} GiB")
if not records:
    print("No measurement of a GPU is recorded. What this chapter says about GPUs is predicted, and not measured.")

# %% [markdown]
# ## Training
#
# QLoRA is three steps in a fixed order: put the base into 4 bits, attach LoRA to it, train. The base is rounded
# *before* the adapter exists, so the adapter learns on the rounded model, and may make up for some of the rounding.
#
# Train both, with the same first A and B and the same messages in the same order: LoRA on the float32 base, and LoRA
# on the base in NF4. The task is that of chapter 2: turn a customer's message into a record in JSON. Thirty steps of
# eight messages take seconds here and up to two minutes on a slow machine. They are a beginning, not a result.

# %%
from utils import DoRA, LoRA, attach, dequantize_base, load_adapter, train
from utils.experiments import final, load, run_one
from utils.quantization.base import NF4, quantize_base
from utils.tasks import collate, evaluate

# %%
ticket_words, tickets = load_tokenizer("decoder"), load_task("tickets")
messages, unseen_messages = list(tickets["train"]), list(tickets["validation"])[:64]

def unseen_loss(model):
    """Mean loss per token on 64 messages that are never trained on."""
    return evaluate(model, unseen_messages, ticket_words)["loss"]

# %%
EVERYWHERE = LoRA(r=8, alpha=16, targets="all-linear")

def short_run(setting=None, config=EVERYWHERE, steps=30, lr=2e-3, optimizer="adamw"):
    """A short training on the tickets, on the float32 base or on a quantized one: (model, adapter, losses)."""
    _ = torch.manual_seed(0)
    model = load_base("decoder", dtype=torch.float32)
    model = model if setting is None else quantize_base(model, setting)
    adapter = attach(model, config)
    history = train(model, messages, lambda rows: collate(rows, ticket_words), params=adapter.parameters(),
                    steps=steps, batch_size=8, lr=lr, seed=0, optimizer=optimizer, quiet=True)
    return model, adapter, history.loss

# %% tags=["nbval-ignore-output"]
lora_model, lora_adapter, lora_losses = short_run()
qlora_model, qlora_adapter, qlora_losses = short_run(NF4())
loss_before = unseen_loss(load_base("decoder"))
loss_after = {"LoRA on float32": unseen_loss(lora_model), "QLoRA on NF4": unseen_loss(qlora_model)}
_ = plots.lines({name: (range(1, 31), losses) for name, losses in zip(loss_after, (lora_losses, qlora_losses))},
                xlabel="step", ylabel="training loss", title="One start, one order of messages, two bases")
print(f"loss on {len(unseen_messages)} unseen messages, before: {loss_before:.3f}")
for name, loss in loss_after.items():
    print(f"after, {name:15}: {loss:.3f}")

# %% tags=["nbval-ignore-output"]
print(f"{'step':>4} {'float32':>9} {'NF4':>9}")
for step in (1, 5, 10, 20, 30):
    print(f"{step:>4} {lora_losses[step - 1]:>9.4f} {qlora_losses[step - 1]:>9.4f}")
assert max(loss_after.values()) < 0.4 and max(loss_after.values()) - min(loss_after.values()) < 0.08
assert all(p.grad is None for p in qlora_model.parameters() if not p.requires_grad)
assert {p.dtype for p in qlora_adapter.parameters()} == {torch.float32}

# %% [markdown]
# The two curves begin apart by what rounding did to the base, and then run together. Nothing in 4 bits was trained:
# the codes are whole numbers and have no gradient. What was trained is A and B, in float32.
#
# ### Four bases, recorded
#
# Thirty steps decide nothing. The record holds 300 steps on four bases, each with the same four learning rates, tuned
# on the validation split, and three seeds at the best one. First its slice, live: the NF4 base before any training.

# %%
bases = load("qlora_bases")
live = run_one(bases["arms"]["NF4, untrained"]["settings"], seed=0, lr=0)
recorded = final(bases, "NF4, untrained")[0]
for split in ("test", "documents"):
    now, then = live[split]["loss"], recorded[split]["loss"]
    print(f"{split:10} loss of the untrained NF4 base: live {now:.3f}, recorded {then:.3f}")
    assert abs(now - then) < 0.02

# %%
def over_seeds(arm, probe, score):
    return [r[probe][score] for r in final(bases, arm)]

for arm in bases["arms"]:
    new, old = over_seeds(arm, "test", "loss"), over_seeds(arm, "documents", "loss")
    known = over_seeds(arm, "old_facts", "exact_match")
    print(f"{arm:18} loss on the new task {min(new):.4f} to {max(new):.4f}, on old documents {sum(old) / 3:.3f}; "
          f"old facts known {sum(known) / 3:.0%}")

# %%
kinds = [arm for arm in bases["arms"] if "untrained" not in arm]
scores = {kind: over_seeds(kind, "test", "exact_match") for kind in kinds}
mean_score = {kind: sum(seeds) / len(seeds) for kind, seeds in scores.items()}
for kind, seeds in scores.items():
    print(f"{kind:8} mean {mean_score[kind]:.3f}, seeds {', '.join(f'{score:.3f}' for score in sorted(seeds))}")
_ = plots.bars(scores, xlabel="exact match on 400 test messages", title="LoRA r = 8 on four bases; dots are seeds")

# %%
tries = {kind: sorted((r["lr"], r["validation"]["exact_match"]) for r in bases["runs"]
                      if r["arm"] == kind and r["seed"] == 0) for kind in kinds}
ax = plots.lines({kind: tuple(zip(*tried)) for kind, tried in tries.items()}, logx=True, xlabel="learning rate",
                 ylabel="exact match, validation", title="Four bases, four learning rates, seed 0")
rates = [rate for rate, _ in tries["NF4"]]
_ = ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
_ = ax.set_xticks([], minor=True)

# %%
by_rate = [[tries[kind][i][1] for kind in kinds] for i in range(4)]
between_bases = [max(row) - min(row) for row in by_rate]
between_rates = {kind: max(at_rate for _, at_rate in tried) - min(at_rate for _, at_rate in tried)
                 for kind, tried in tries.items()}
print("largest difference between bases, rate by rate:", [f"{gap:.2f}" for gap in between_bases])
print("between rates, on one base:", {kind: f"{gap:.2f}" for kind, gap in between_rates.items()})
seconds = {kind: sum(r["cpu_seconds"] for r in bases["runs"] if r["arm"] == kind) for kind in kinds}
print("CPU time of the training:", {kind: f"{t / seconds['float32']:.2f} x float32" for kind, t in seconds.items()})

# %%
assert min(mean_score.values()) > 0.9 and min(mean_score, key=mean_score.get) == "NF4"
assert sum(score >= min(scores["float32"]) for score in scores["NF4"]) == 1  # the overlap hangs on one seed
assert max(between_bases) < min(between_rates.values())
assert {bases["arms"][kind]["lr"] for kind in kinds} == {max(bases["arms"]["NF4"]["tries"])}
for kind in kinds[1:]:  # the seeds of each 4-bit base overlap those of float32
    assert max(scores[kind]) >= min(scores["float32"]) and max(scores["float32"]) >= min(scores[kind])
    before_and_after = [over_seeds(arm, "old_facts", "exact_match") for arm in (f"{kind}, untrained", kind)]
    assert min(before_and_after[0]) > 0.95 and max(before_and_after[1]) < 0.5
    rounded, unrounded = (over_seeds(f"{base}, untrained", "documents", "loss")[0] for base in (kind, "float32"))
    assert abs(rounded - unrounded) < 0.02

# %% [markdown]
# What the record shows, and what it does not:
#
# - **All four bases learn the task. NF4 comes out last**, though of the three in 4 bits its weights have the smallest error.
#   Only one of its three seeds reaches the range of float32. Three seeds on one tiny task do not show that NF4 is worse.
#   They do not show either that it costs nothing.
# - **The learning rate matters more than the bits.** Between the rates the score moves by more than between any two
#   bases at one rate. All four chose the highest rate on the list, so a still higher one may be better yet.
# - **Rounding forgets little, training a lot.** Before training, the bases in 4 bits know the old facts. After
#   training at this rate most of the facts are gone, on float32 as well.
# - **The price is time.** Unpacking each weight twice per step made the training slower, by the factors printed
#   above, on this CPU and with this small model.
#
# Dettmers et al. (2023) compare QLoRA with LoRA in 16 bits from 7B to 65B and find nearly equal means (their table
# 4). This record neither confirms nor refutes that: its seeds differ by more than the paper's means do.

# %% [markdown]
# ### QDoRA
#
# Any method whose forward pass calls the frozen layer works on a layer in 4 bits. DoRA, a variant of LoRA, also needs
# the length of each row of W + ΔW; it takes W' from the codes. On a 4-bit base it is called QDoRA, and nothing else
# changes in your code.

# %% tags=["nbval-ignore-output"]
qdora, qdora_adapter, qdora_losses = short_run(NF4(), DoRA(r=8, alpha=16, targets="all-linear"), steps=10)
for name, trained, losses in (("QLoRA", qlora_adapter, qlora_losses), ("QDoRA", qdora_adapter, qdora_losses)):
    size = sum(p.numel() for p in trained.parameters())
    print(f"{name}: {size:,} trained numbers, loss at step 1 {losses[0]:.3f}, at step 10 {losses[9]:.3f}")
assert abs(qdora_losses[0] - qlora_losses[0]) < 1e-3 and qdora_losses[9] < qdora_losses[0] - 0.2

# %% [markdown]
# Both start from the same model, the base in NF4, so the first losses agree. DoRA trains one more number per row of
# each layer.

# %%
from utils.methods.parts import core_of  # the layer under an adapter, or the module itself
from utils.targeting import inside, is_linear, module_tree, task_head

# %% [markdown] exercise="utils.targeting:linear_names" difficulty=2 importance=4 minutes=8 points=1
# ## Which layers to adapt
#
# Dettmers et al. found that LoRA on query and value alone did not reach full fine-tuning of LLaMA-7B, and that LoRA
# on all linear layers did (their figure 2). So QLoRA adapts all linear layers. Libraries ask for *names*: collect
# them from the model.
#
# Two linear layers are left out. The output embedding, which makes the logits, stays in 16 bits and is not adapted.
# The head of a classifier is new and is trained whole.
#
# Complete `linear_names`. You may use what the library has: `module_tree(model)` gives (path, module) of every
# module, `is_linear(module)` knows `nn.Linear`, its 4-bit subclasses and GPT-2's Conv1D, `task_head(model)` is the
# name of a task's head or None, and `inside(path, name)` tells whether a path is that module or in it.
#
# Hint (the output embedding): why not leave out what is called `lm_head`? It has other names elsewhere.
# `model.get_output_embeddings()` returns the module; compare with `is`.
#
# Hint (the short name): several layers share one, and the order is to be alphabetical. `path.rsplit(".", 1)[-1]`. A set
# holds each name once, `sorted` orders it.

# %%
quantized = quantize_base(load_base("decoder"), NF4())
target_names = linear_names(quantized)
print(target_names)
assert target_names == linear_names(load_base("decoder")) and "lm_head" not in target_names
by_names = attach(load_base("decoder"), LoRA(r=4, targets=target_names))
by_keyword = attach(load_base("decoder"), LoRA(r=4, targets="all-linear"))
# an adapter's `parts`: for each layer that it adapts, by path, what it put there
assert list(by_names.parts) == list(by_keyword.parts) and len(by_names.parts) == 7 * quantized.config.num_hidden_layers
print(f"{len(by_names.parts)} layers, the same as targets=\"all-linear\"")

# %% [markdown]
# Is "all linear" better than a higher rank in attention alone? Compare at nearly equal numbers of trained parameters,
# on the NF4 base, for 15 steps: rank 8 everywhere, rank 20 in all of attention, rank 39 in query and value.

# %% tags=["nbval-ignore-output"]
adapted_places = {"all linear, r = 8": (8, target_names),
                  "attention, r = 20": (20, ("q_proj", "k_proj", "v_proj", "o_proj")),
                  "q and v, r = 39": (39, ("q_proj", "v_proj"))}
place_curves, place_counts = {}, {}
for place, (r, targets) in adapted_places.items():
    _, handle, losses = short_run(NF4(), LoRA(r=r, alpha=2 * r, targets=targets), steps=15, lr=6e-3)
    place_curves[place], place_counts[place] = (range(1, 16), losses), sum(p.numel() for p in handle.parameters())
_ = plots.lines(place_curves, xlabel="step", ylabel="training loss", title="Equally many trained numbers in three places")

# %% tags=["nbval-ignore-output"]
early = {place: sum(losses[5:]) / 10 for place, (_, losses) in place_curves.items()}
for place in adapted_places:
    print(f"{place:18} {place_counts[place]:,} trained numbers, mean loss of steps 6 to 15: {early[place]:.3f}")
everywhere, attention, two = early.values()
assert max(place_counts.values()) < 1.05 * min(place_counts.values())
assert everywhere < attention - 0.02 and everywhere < two - 0.06

# %% [markdown]
# At this one learning rate, all linear layers learn fastest at first, and query and value alone slowest. That is a
# statement about the first 15 steps and one rate. It is not the end of the race: in chapter 2's record every arm had
# its own best rate and 200 steps, on another task, and there all choices but "query alone" ended within a few points
# of one another. Taken together: all linear layers at a small rank is a safe choice, and not always a better one.

# %%
from utils.quantization.weights import quantize_weight

# %% [markdown] exercise="utils.quantization.weights:requantized_merge" difficulty=3 importance=5 minutes=12 points=2
# ## Merging into 4 bits
#
# In chapter 2 you merged: W + ΔW took W's place. Here W is in 4 bits, and you would like the merged weight in 4 bits
# too. So add the update to W', what the codes stand for, and round the sum.
#
# How much of the update survives? Compare what the new codes stand for with the sum they were made from, and take it
# as a share of the update:
#
# $$\mathrm{lost} = \frac{\lVert \mathrm{merged} - (W' + \Delta W) \rVert}{\lVert \Delta W \rVert}$$
#
# With lost = 0 all of it arrived. With lost = 1 the error is as large as the update itself. (‖·‖ is the root of the
# sum of all squares.)
#
# Complete `requantized_merge`. `quantize_weight(W, kind, block_size, double_quant)` makes a `QuantizedWeight`, whose
# `dequantize()` gives the weight that it stands for.
#
# Hint (the settings): what would the layer do with codes of other blocks than its own? The new codes go into the same
# layer, so all three settings go on to `quantize_weight`.
#
# Hint (lost): with what do you compare the merged weight, and by what do you divide? `.norm()` of a tensor is the root
# of the sum of its squares, and `.item()` makes a float of one number.

# %% [markdown]
# What do you expect of an update of 1 % of the weight, ‖ΔW‖ = 0.01 ‖W′‖? Compare it with what rounding W itself costs,
# which the cell prints.
#
# The cell takes one layer of the QLoRA that you just trained, and scales its update up and down. Besides `lost` it
# measures how much *arrives*: how far the weight moved along the update, 1 if it arrived in full. The third curve
# adds the same update to the *original* float32 weight, rounds, and compares with that weight rounded alone.

# %%
part = qlora_adapter.parts["model.layers.1.mlp.up_proj"]  # the LoRA around one layer; `core` is that layer
W4 = part.core.dequantize(torch.float32)
W32 = load_base("decoder", dtype=torch.float32).model.layers[1].mlp.up_proj.weight.detach()
with torch.no_grad():
    update = part.merged_tensors()["weight"] - W4  # W' + ΔW, less W'
own_size, cost = (update.norm() / W4.norm()).item(), ((W4 - W32).norm() / W32.norm()).item()
print(f"rounding W costs {cost:.3f} of its norm")
assert 0.08 < cost < 0.10

# %%
def arrives(change, delta):
    """How far the weight moved along delta: 1 if delta arrived in full."""
    return ((change * delta).sum() / (delta * delta).sum()).item()

def merge_at(size):
    """(lost, what arrives in 4 bits, what arrives from float32) for the update at this share of ||W'||."""
    delta = update * size / own_size
    merged, lost = requantized_merge(W4, delta, "nf4", 64, True)
    with_update, alone = (quantize_weight(weights, "nf4", 64, True).dequantize() for weights in (W32 + delta, W32))
    return lost, arrives(merged.dequantize() - W4, delta), arrives(with_update - alone, delta)

# %% tags=["nbval-ignore-output"]
update_sizes = [0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1]
merged_at = [merge_at(size) for size in update_sizes]
lost, arrived, from_float32 = ([100 * share for share in column] for column in zip(*merged_at))
percent = [100 * size for size in update_sizes]
ax = plots.lines({"lost, into 4 bits": (percent, lost), "arrives, into 4 bits": (percent, arrived),
                  "arrives, from float32": (percent, from_float32)}, logx=True, xlabel="||ΔW|| in % of ||W′||",
                 ylabel="% of the update", title="One layer: what rounding leaves of an update")
ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
_ = ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
_ = ax.set_xticks([], minor=True)
_ = ax.axvline(100 * own_size, color="gray", linestyle="--", linewidth=1)
print(f"this adapter's own update: {own_size:.1%} of the weight (dashed)")
print(f"more than 100 % lost up to a size of {max(s for s, share in zip(percent, lost) if share > 100):.0f} %")

# %% tags=["nbval-ignore-output"]
for size, shares in list(zip(update_sizes, merged_at))[1::2]:
    print("size {:4.0%}: lost {:4.0%}   arrives {:4.0%}   from float32 {:4.0%}".format(size, *shares))
at = dict(zip(update_sizes, merged_at))
assert at[0.01][0] > 1 and at[0.02][0] > 1 and at[0.1][0] < 1 and at[1][0] < 0.2
assert at[0.01][1] < 0.1 and at[0.3][1] > 0.9 and all(from_32 > 0.7 for _, _, from_32 in merged_at)

# %% [markdown]
# Below a few percent of the weight nearly nothing arrives, and the error is *larger* than the update: nearly all of it is
# gone, and the scales have moved a little besides. The reason is where W' lies. It was rounded before, so every
# weight sits exactly on a number of the code book. An update must carry it over the border to the next one, halfway,
# and a small update carries hardly any.
#
# The original weights lie anywhere between the numbers. A small update carries a few of them over a border, each by a
# whole step, and on average that adds up to the update. So rounding W + ΔW once, after training on float32, is noisy
# and does not erase. Rounding W' + ΔW, where W' was rounded before, erases.

# %% [markdown]
# ### The whole model, merged in four ways
#
# Now all layers at once, with the loss on unseen messages. The adapter is the same in all four:
#
# 1. **unmerged**, beside the base in 4 bits, as trained;
# 2. **dequantize, then merge**: W' + ΔW in float32;
# 3. **merged into the original** float32 weights, from a saved adapter, as it is often done;
# 4. **merged and rounded again** to 4 bits.

# %%
import tempfile

import transformers

sample = collate(unseen_messages[:16], ticket_words)

def sample_logits(model):
    with torch.no_grad():
        return model(**sample).logits

# %%
as_trained, beside = sample_logits(qlora_model), unseen_loss(qlora_model)
with qlora_adapter.disabled():
    effect = (as_trained - sample_logits(qlora_model)).norm()
merged_ways = {"unmerged": (as_trained, beside)}
try:
    qlora_adapter.merge()
except ValueError as error:
    print(f"ValueError: {error}")

# %%
lost_shares = qlora_adapter.merge(requantize=True)  # per layer: what `requantized_merge` calls lost
merged_ways["merged, rounded to 4 bits"] = sample_logits(qlora_model), unseen_loss(qlora_model)
qlora_adapter.unmerge()  # the codes from before are back

# %%
float32_base = load_base("decoder", dtype=torch.float32)
dequantized_base = dequantize_base(quantize_base(load_base("decoder", dtype=torch.float32), NF4()))
with tempfile.TemporaryDirectory() as folder:
    qlora_adapter.save(folder)
    for way, onto in {"merged into the original": float32_base, "dequantized, then merged": dequantized_base}.items():
        load_adapter(onto, folder).merge()
        merged_ways[way] = sample_logits(onto), unseen_loss(onto)

# %% tags=["nbval-ignore-output"]
apart = {way: ((got - as_trained).norm() / effect).item() for way, (got, _) in merged_ways.items()}
for way, (_, loss) in merged_ways.items():
    print(f"{way:26} loss {loss:.3f}   logits differ by {apart[way]:8.2%} of what the adapter does")
print(f"lost per layer, rounded to 4 bits: {min(lost_shares.values()):.0%} to {max(lost_shares.values()):.0%}")
assert apart["dequantized, then merged"] < 1e-4 < 0.05 < apart["merged into the original"]
assert abs(merged_ways["merged into the original"][1] - beside) < 0.05
assert merged_ways["merged, rounded to 4 bits"][1] > beside + 0.1

# %% [markdown]
# - **Dequantized, then merged** is the model that was trained, up to float rounding. It is no longer in 4 bits. Save
#   it in 16 bits, and quantize again only if you measure what that costs.
# - **Merged into the original** is another model than the one that was trained: its logits differ by a good share of
#   what the adapter does at all. Here its loss is as good. You cannot know that in advance, so measure it.
# - **Rounded to 4 bits again** throws away a good part of the training. That is why `merge` asks for
#   `requantize=True`.
#
# An update that is larger beside its weight survives better, as the curves say. After a longer training, or at a
# higher rate, a rounded merge may do little harm. It returns `lost` for every layer, so that you can look.

# %% [markdown]
# ### Quantize first, or train first?
#
# One sometimes reads that QLoRA is a LoRA-tuned model that is quantized afterwards. That is another procedure,
# post-training quantization. Compare the two orders with equal steps: train on float32, merge, then quantize; and
# quantize, then train.

# %% tags=["nbval-ignore-output"]
transformers.utils.logging.disable_progress_bar()
lora_adapter.merge()
with tempfile.TemporaryDirectory() as folder:
    lora_adapter.export(folder)
    afterwards = quantize_base(type(lora_model).from_pretrained(folder), NF4())
lora_adapter.unmerge()
orders = {"train in float32 (no rounding)": loss_after["LoRA on float32"], "train, then quantize": unseen_loss(afterwards),
          "quantize, then train": beside, "quantize, train, merge, quantize": merged_ways["merged, rounded to 4 bits"][1]}
for order, loss in orders.items():
    print(f"{order:34} loss {loss:.3f}")
assert abs(orders["train, then quantize"] - orders["quantize, then train"]) < 0.08
assert orders["quantize, train, merge, quantize"] > orders["train, then quantize"] + 0.1

# %% [markdown]
# Here the two orders end alike. They differ all the same. Training on float32 needs the float32 base in memory, which
# QLoRA exists to avoid; and what it gives is one quantized model, not a base that many adapters share. The last line
# is the order to stay away from: rounding twice, with a small update between.

# %%
import warnings

import peft

four_bit = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")).to("cpu")
four_bit.is_loaded_in_4bit = True  # as transformers marks it
peft_model = peft.get_peft_model(four_bit, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    peft_model.merge_adapter()
said = [str(w.message) for w in said if "4-bit" in str(w.message)]
print("peft:", *said)
assert said

# %% [markdown]
# `peft` merges into 4 bits when you ask it to, and warns. It rounds the sum once, as you did, and its `unmerge`
# subtracts and rounds once more. Read the warning as: evaluate what you get.

# %%
import inspect

from utils.optimizers import BLOCK, AdamW8bit, adamw_update, moment_codebooks

print(f"adamw_update{inspect.signature(adamw_update)}")

# %% [markdown] exercise="utils.optimizers:adamw8bit_update" difficulty=3 importance=4 minutes=15 points=2
# ## Moments in 8 bits
#
# AdamW keeps two numbers per trained one, the moments m and v: 8 bytes in float32. Dettmers et al. (2021,
# [arXiv:2110.02861](https://arxiv.org/abs/2110.02861)) keep them the way that you kept weights: an index into a code
# book, and one scale per block. Here the index has 8 bits and a block has `BLOCK` = 256 numbers.
#
# The code book is the dynamic one, which you met under double quantization: it spends its 256 numbers over seven
# decades. Moments need some of that: a cell below looks how far those of one block are apart. m has a sign. v never has
# one, and gets a code book of its own, twice as fine.
#
# The moments cannot be updated in 8 bits: a change of a thousandth would be rounded away in every step. So each step
# decodes them, updates in float32, and encodes the result. You have all the parts.
#
# Complete `adamw8bit_update`. m and v are pairs (index, absmax), as `quantize_blockwise` returns them.
# `moment_codebooks(device)` gives the code books of m and of v, and `adamw_update` is the step in float32 that you
# wrote in chapter 1; its arguments are printed above. p and grad may have any shape and may be bfloat16.
#
# Hint (the shape): how many axes does a decoded tensor have, and how many has p? Decoding gives n numbers in a row;
# `.view_as(p)` puts them into p's shape.
#
# Hint (the dtype): in which dtype is the step taken, and in which does p come back? `.float()` on p and grad before the
# step, `.to(p.dtype)` on p after it.

# %% [markdown]
# Fifty steps on 10,000 numbers with noisy gradients, with moments in float32 and in 8 bits. How far apart do
# the weights end, measured by the way that they went? And does bitsandbytes, given the same gradients, end where you do?

# %%
generator = torch.Generator().manual_seed(0)
p_start, drift = torch.randn(10_000, generator=generator), torch.randn(10_000, generator=generator)
noisy_gradients = [drift + torch.randn(10_000, generator=generator) for _ in range(50)]
no_codes, no_scales = torch.zeros(10_000, dtype=torch.uint8), torch.zeros(-(-10_000 // BLOCK))
p32, m32, v32 = p_start, torch.zeros(10_000), torch.zeros(10_000)
p8, m8, v8 = p_start, (no_codes, no_scales), (no_codes, no_scales)
their_p = torch.nn.Parameter(p_start.clone())
their_optimizer = bitsandbytes.optim.AdamW8bit([their_p], lr=1e-2, weight_decay=0.01)
for step, grad in enumerate(noisy_gradients, 1):
    p32, m32, v32 = adamw_update(p32, grad, m32, v32, step, lr=1e-2)
    p8, m8, v8 = adamw8bit_update(p8, grad, m8, v8, step, lr=1e-2)
    their_p.grad = grad.clone()
    their_optimizer.step()

# %% tags=["nbval-ignore-output"]
way = (p32 - p_start).norm()
gap = {"float32": (p8 - p32).norm() / way, "bitsandbytes": (p8 - their_p.detach()).norm() / way}
held = {"float32": sum(t.nbytes for t in (m32, v32)), "8 bits": sum(t.nbytes for t in (*m8, *v8))}
for name, share in gap.items():
    print(f"8 bits against {name:12}: they end {share:.2%} of the way apart")
print({name: f"{size:,} bytes of moments, {size / 10_000:.2f} per number" for name, size in held.items()})
assert 1e-4 < gap["float32"] < 0.05 and gap["bitsandbytes"] < gap["float32"] / 2
assert held["8 bits"] == 2 * (10_000 + 4 * 40)

# %% [markdown]
# Now the first ten steps of the training that you ran above. `AdamW8bit` is a `torch.optim` optimizer around the
# same function. As in bitsandbytes it leaves tensors of fewer than 4,096 numbers in float32, because little is saved
# there. All of this tiny LoRA's tensors are that small, so the limit is lowered here. At 7B every A and B of rank 64
# is far above it.

# %%
def moment_bytes(optimizer):
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim)

made = {}  # the optimizers, to look into afterwards

def from_256_numbers(params, **settings):
    made["from 256"] = AdamW8bit(params, min_8bit_size=256, **settings)
    return made["from 256"]

def as_it_comes(params, **settings):
    made["as it comes"] = AdamW8bit(params, **settings)
    return made["as it comes"]

# %% tags=["nbval-ignore-output"]
_, _, eight_losses = short_run(NF4(), steps=10, optimizer=from_256_numbers)  # ten steps: all in the same warm-up
_ = short_run(NF4(), steps=1, optimizer=as_it_comes)
count = sum(p.numel() for p in qlora_adapter.parameters())
in_8_bits, in_32 = moment_bytes(made["from 256"]), moment_bytes(made["as it comes"])
print(f"moments of {count:,} numbers: {in_8_bits:,} bytes, and {in_32:,} with the usual limit")
gaps = [abs(a - b) for a, b in zip(eight_losses, qlora_losses)]
print(f"loss {eight_losses[0]:.3f} -> {eight_losses[-1]:.3f}, at most {max(gaps):.4f} from that with float32 moments")
assert in_8_bits < 2.04 * count and in_32 == 8 * count and max(gaps) < 0.02

# %% tags=["nbval-ignore-output"]
all_v = [state["v"] for state in made["as it comes"].state.values()]
block = next(v for v in all_v if v.count_nonzero() == v.numel()).flatten()[:BLOCK]
print(f"v of one block after a step: the largest is {block.max() / block.min():.0e} times the smallest")

# %% [markdown]
# A quarter of the bytes, and the same losses. And the numbers of one block are indeed many decades apart. What it
# is worth depends on how much you train. For a LoRA on a 7B, do the arithmetic:

# %%
from utils.architectures import architecture

lora_7b = attach(architecture("Llama-2-7B"), LoRA(r=64, targets="all-linear"))
lora_sizes = {name: p.numel() for name, p in lora_7b.named_parameters()}
trained_numbers = sum(lora_sizes.values())
print(f"LoRA r = 64 on all linear layers of Llama-2-7B: {trained_numbers:,} numbers in {len(lora_sizes)} tensors")
eight_bits = 2 * (1 + 4 / BLOCK)  # bytes of both moments of a number
print(f"moments: {8 * trained_numbers / 1e9:.2f} GB in float32, {eight_bits * trained_numbers / 1e9:.2f} GB in 8 bits")
all_numbers = sum(p.numel() for p in architecture("Llama-2-7B").parameters())
print(f"full fine-tuning: {8 * all_numbers / 1e9:.0f} GB and {eight_bits * all_numbers / 1e9:.0f} GB")
assert trained_numbers == 159_907_840 and all(n >= 4096 for n in lora_sizes.values())

# %% [markdown]
# 8-bit moments were made for full fine-tuning, where they save tens of gigabytes. For this LoRA they save one.
#
# ## Paged optimizers
#
# QLoRA's third idea keeps the moments in float32, and lets them *leave the GPU*. They lie in memory that CPU and GPU
# share (CUDA's unified memory), cut into pages. When a long batch needs the room, the driver moves pages to the CPU's
# memory; when the optimizer needs them, they come back. What would have ended the run out of memory only makes one
# step slower.
#
# It needs CUDA. What follows is a **simulation**: `utils.paging` counts pages as they come and go, and moves nothing.
# The scene: a GPU of 8 GB, Llama-2-7B in NF4, the LoRA that you just counted with its gradients, and nine steps, one
# with a long batch.

# %%
from utils.paging import moment_tensors, simulate_training

GB, in_blocks = 10**9, sum(core_of(part).weight.numel() for part in lora_7b.parts.values())
base_bytes = quantized_base(in_blocks, all_numbers - in_blocks)  # the linear layers in NF4, the rest in 16 bits
fixed = int(base_bytes) + 2 * 4 * trained_numbers  # A, B and their gradients in float32
needs = moment_tensors(lora_sizes)
adapter_GB = 8 * trained_numbers / GB  # twice 4 bytes per number, and as much for its two moments
print(f"base {base_bytes / GB:.2f} GB, A and B with gradients {adapter_GB:.2f} GB, moments {adapter_GB:.2f} GB")
scenes = {"one long batch": [1 * GB] * 4 + [int(2.4 * GB)] + [1 * GB] * 4, "all batches long": [int(2.4 * GB)] * 9}

# %%
for name, activations in scenes.items():
    for paged in (False, True):
        steps = simulate_training(8 * GB, fixed, needs, activations, paged)
        end = f"ends in step {len(steps)}: asks for {steps[-1].peak / GB:.2f} GB" if not steps[-1].fits else "fits"
        moved = " ".join(f"{s.moved / GB:.1f}" for s in steps)
        print(f"{name:17} paged={paged!s:5} {end}; GB moved, step by step: {moved}")

# %%
spike, steady = (simulate_training(8 * GB, fixed, needs, scene) for scene in scenes.values())
_ = plots.lines({name: (range(1, 10), [s.moved / GB for s in steps]) for name, steps in
                 zip(scenes, (spike, steady))}, xlabel="step", ylabel="GB moved, both ways",
                title="A simulation: moments that leave an 8 GB GPU and come back")
assert not simulate_training(8 * GB, fixed, needs, scenes["one long batch"], paged=False)[-1].fits
assert all(s.fits for s in (*spike, *steady))
assert sum(s.moved > 0 for s in spike) == 1 and all(s.moved for s in steady)
bus = 25 * GB  # bytes per second each way; about what PCIe 4.0 with 16 lanes carries
print(f"the long batch: {spike[4].moved / GB:.1f} GB, at best {spike[4].moved / bus:.2f} s; "
      f"all long: {sum(s.moved for s in steady) / GB:.1f} GB in nine steps")

# %% [markdown]
# Paging is for spikes: one long batch costs one slow step. When every batch is long, the same moments go out and come
# back in every step, and a smaller batch, gradient checkpointing or 8-bit moments are the better remedy. When the
# weights and the activations alone are too many, paging cannot help: it only ever moves the moments.
#
# The real one is bitsandbytes' `PagedAdamW32bit`, here `optimizer="paged_adamw"`. It pages only tensors of 100,000
# numbers or more. Without CUDA bitsandbytes warns and does not page; `paged_adamw` refuses, so that you notice.

# %% tags=["nbval-ignore-output"]
from utils.optimizers import paged_adamw

p = torch.nn.Parameter(torch.ones(2**20, device="cuda" if torch.cuda.is_available() else "cpu"))
try:
    optimizer = paged_adamw([p], lr=1e-3)
    p.square().sum().backward()
    optimizer.step()
    print("m of", p.numel(), "numbers is paged:", getattr(optimizer.state[p]["state1"], "is_paged", False))
except ValueError as error:
    print(f"ValueError: {error}")

# %% [markdown]
# ## The same with today's libraries
#
# In daily work three libraries share what you have built. `bitsandbytes` holds weights in 4 bits and multiplies with
# them. `transformers` puts its layers into a model while it loads. `peft` attaches the LoRA. This section does
# everything with them, as you would type it today, and asserts that it is the same.
#
# | here | there |
# |---|---|
# | `quantize_base(model, NF4())` after loading | `quantization_config=BitsAndBytesConfig(...)` for `from_pretrained` |
# | `NF4Linear` | `bitsandbytes.nn.Linear4bit` |
# | `NF4(exclude=...)` | `BitsAndBytesConfig(llm_int8_skip_modules=...)`, also for 4 bits, whatever the name says |
# | `attach(model, LoRA(...))` | `prepare_model_for_kbit_training(model)`, `get_peft_model(model, LoraConfig(...))` |

# %%
import copy
import logging
import tempfile
import warnings
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where there is no GPU it says so on import
import bitsandbytes
import peft
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# %%
from utils import LoRA, attach, load_adapter, load_base, load_task, load_tokenizer
from utils.models import base_name
from utils.quantization.base import NF4, bitsandbytes_fields, from_bitsandbytes, quantize_base
from utils.tasks import collate

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`")  # peft still uses the older name

# %% [markdown]
# First the base, twice. Both start from the same file. Neither knows of the other.

# %%
def load_theirs(skip=(), dtype=torch.float32, compute_dtype=torch.float32):
    """The tiny base in NF4, double quantized, by transformers and bitsandbytes."""
    fields = bitsandbytes_fields(compute_dtype=compute_dtype)
    config = BitsAndBytesConfig(**fields, llm_int8_skip_modules=["lm_head", *skip])
    return AutoModelForCausalLM.from_pretrained(base_name("decoder"), quantization_config=config, dtype=dtype)

def load_ours(skip=()):
    return quantize_base(load_base("decoder", dtype=torch.float32), NF4(exclude=tuple(skip)))

def in_four_bits(model):
    return [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]

float32_base, our_model, their_model = load_base("decoder", dtype=torch.float32), load_ours(), load_theirs()
print(f"{len(in_four_bits(their_model))} layers of bitsandbytes, such as {in_four_bits(their_model)[0]}")

# %% [markdown]
# ### The same bytes
#
# Every packed byte is compared, and every scale. The scales are in 8 bits. Where one lies on the border between two
# numbers of the 8-bit code book, rounding decides, and the two may take neighbours.

# %%
def compare(name):
    mine, layer = our_model.get_submodule(name).quantized, their_model.get_submodule(name)
    state = layer.weight.quant_state
    apart = (mine.absmax.int() - state.absmax.int()).abs()
    return torch.equal(mine.packed, layer.weight.data), mine.packed.numel(), apart

rows = [compare(name) for name in in_four_bits(their_model)]
apart = torch.cat([row[2] for row in rows])
total_bytes = sum(n for _, n, _ in rows)
print(f"packed bytes: {sum(same for same, *_ in rows)} of {len(rows)} layers equal, {total_bytes:,} bytes")
assert len(rows) == 28 and all(same for same, *_ in rows)
assert (apart > 0).float().mean() < 0.02 and apart.max() <= 1

# %% tags=["nbval-ignore-output"]
print(f"scales: {int((apart > 0).sum())} of {len(apart):,} are the neighbour of ours, none is further away")

# %% [markdown]
# ### The same weights?
#
# Now what the bytes stand for. Never trust a quantized layer that you have not compared with the weight it was made of.
# NF4 in blocks of 64 should be about 9 % away from it, in the Euclidean norm.

# %% tags=["nbval-ignore-output"]
def away(W, name):
    """How far a weight is from the original one, as a share of it."""
    W0 = float32_base.get_submodule(name).weight
    return ((W - W0).norm() / W0.norm()).item()

by_kind = {}
for name in in_four_bits(their_model):
    packed = their_model.get_submodule(name).weight
    unpacked = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    pair = away(our_model.get_submodule(name).dequantize(), name), away(unpacked, name)
    by_kind.setdefault((name.split(".")[-1], our_model.get_submodule(name).in_features), []).append(pair)
for (kind, d_in), pairs in by_kind.items():
    mine, its = (max(values) for values in zip(*pairs))
    print(f"{kind:10} d_in {d_in}, {d_in / 64:g} blocks in a row: away by {mine:.3f} here, {its:.3f} in bitsandbytes")

# %%
wrong = [kind for (kind, _), pairs in by_kind.items() if max(its - mine for mine, its in pairs) > 0.05]
assert all(d_in % 64 for (kind, d_in) in by_kind if kind in wrong)
assert all(mine < 0.12 for pairs in by_kind.values() for mine, _ in pairs)

# %% [markdown]
# On a CPU with AVX-512, version 0.50 of bitsandbytes unpacks wrongly where a row is not a whole number of blocks. Its
# bytes are right, the numbers that it makes of them are not. The tiny base has one such kind of layer, `down_proj`,
# whose rows have 352 numbers. The sizes of real models are usually multiples of 64, so you would hardly meet it
# there, and a GPU has its own kernel. You found it because you compared. (On another CPU you may have found nothing.)
# Both sides leave these layers in float32 from here on.
#
# One more thing has to be said to bitsandbytes. On some CPUs it rearranges a weight at the first call in `eval()` and
# rounds the scales to 16 bits, to generate faster. For a comparison to the last digit that is switched off.

# %%
def as_stored(model):
    """bitsandbytes without its rearranged weights."""
    for name in in_four_bits(model):
        model.get_submodule(name).support_avx512bf16_for_cpu = False
    return model.eval()

our_model, their_model = load_ours(wrong).eval(), as_stored(load_theirs(wrong))
decoder_tokenizer = load_tokenizer("decoder")
rows = list(load_task("tickets")["train"].select(range(48)))
batches = [collate(rows[i:i + 8], decoder_tokenizer) for i in range(0, 48, 8)]

@torch.no_grad()
def logits_of(model, batch=batches[0]):
    model.eval()
    return model(**batch, use_cache=False).logits

# %% tags=["nbval-ignore-output"]
taken_over = from_bitsandbytes(copy.deepcopy(their_model))  # our layers, with their bytes and their scales
largest_logit = logits_of(their_model).abs().max().item()
gaps = {"each quantized for itself": (logits_of(our_model) - logits_of(their_model)).abs().max().item() / largest_logit,
        "with the same scales": (logits_of(taken_over) - logits_of(their_model)).abs().max().item() / largest_logit}
to_base = (logits_of(our_model) - logits_of(float32_base)).abs().max().item() / largest_logit
print("largest difference of logits, as a share of the largest:", {k: f"{gap:.1e}" for k, gap in gaps.items()})
print(f"what the quantization itself changed: {to_base:.1e}")
assert gaps["each quantized for itself"] < 5e-3 and gaps["with the same scales"] < 1e-5 and to_base > 0.02

# %% [markdown]
# The handful of scales that lie on a border is all that is between the two. With the same scales they agree to the
# rounding of float32. And that difference is far smaller than what the quantization changed.

# %% [markdown]
# ### What `prepare_model_for_kbit_training` does
#
# Every tutorial calls it, few say why. Ask the model before and after. Here the parts that stay out of 4 bits are in
# bfloat16, as in a real base.

# %%
def state_of(model):
    """What the preparation changes, as it is now."""
    beside = [p for p in model.parameters() if p.dtype != torch.uint8]  # norms and embeddings, not the packed bytes
    embedding = model.get_input_embeddings()
    needs = embedding(batches[0]["input_ids"]).requires_grad and not embedding.weight.requires_grad
    return {"dtype beside the 4 bits": {str(p.dtype)[6:] for p in beside}, "its bytes": sum(p.nbytes for p in beside),
            "trained tensors": sum(p.requires_grad for p in model.parameters()),
            "frozen input that needs grad": needs, "checkpointing": model.is_gradient_checkpointing}

# %% tags=["nbval-ignore-output"]
half = load_theirs(wrong, torch.bfloat16, torch.bfloat16)
state_before = state_of(half)
half = peft.prepare_model_for_kbit_training(half, gradient_checkpointing_kwargs={"use_reentrant": False})
state_after = state_of(half)
for what in state_before:
    print(f"{what:28} {state_before[what]!s:12} -> {state_after[what]}")
assert state_after["its bytes"] == 2 * state_before["its bytes"] and state_after["trained tensors"] == 0
for what in ("checkpointing", "frozen input that needs grad"):
    assert (state_before[what], state_after[what]) == (False, True)

# %% [markdown]
# So it does four things.
#
# 1. It freezes all parameters. `get_peft_model` would do that too.
# 2. It turns everything that is in 16 bits and not quantized into float32: the norms, which is about precision, and the
#    embeddings and the head as well, which is memory.
# 3. It makes the output of the embedding require a gradient, although nothing there is trained. Gradient checkpointing
#    of the older, "reentrant", kind gives no gradient at all if none of a block's inputs needs one. peft still takes
#    that kind if you do not say `use_reentrant`, and PyTorch then warns. Say False. (peft then leaves this third thing to
#    transformers, which does it when checkpointing goes on.)
# 4. It switches gradient checkpointing on. That costs time, and if your activations fit you may say
#    `use_gradient_checkpointing=False`. Then the third thing does not happen either.
#
# On a real model the second point is half a GB or more:

# %%
from utils.memory.estimate import facts_of
from utils.memory.states import quantized_base

for name in ("Llama-2-7B", "Llama-3-8B"):
    counts = facts_of(name, LoRA(r=16, targets="all-linear"))
    in_layers, rest = counts.in_blocks, counts.total - counts.trained - counts.in_blocks
    sixteen, prepared = (quantized_base(in_layers, rest, e=e) / 1e9 for e in (2, 4))
    print(f"{name}: base {sixteen:.2f} GB, prepared {prepared:.2f} GB, {100 * (prepared / sixteen - 1):.0f} % more")
    assert prepared - sixteen > 0.5

# %% [markdown]
# Here `attach` freezes the base and makes adapters in float32. The rest of the model keeps its dtype; if you want
# checkpointing you say so.
#
# ### The same training
#
# Now the same A and B on both sides, and the same batches. Theirs is prepared, so it also recomputes its activations;
# ours does not.

# %% tags=["nbval-ignore-output"]
their_model = peft.prepare_model_for_kbit_training(their_model, gradient_checkpointing_kwargs={"use_reentrant": False})
config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
peft_model = peft.get_peft_model(their_model, config)
torch.manual_seed(0)
our_adapter = attach(our_model, LoRA(r=8, alpha=16, targets="all-linear", init="random_b"))

def twin(name):
    return peft_model.get_parameter("base_model.model." + name.replace(".weight", ".default.weight"))

with torch.no_grad():
    for name, tensor in our_adapter.named_parameters():
        twin(name).copy_(tensor)
theirs_trained = [p for p in peft_model.parameters() if p.requires_grad]
print(f"{len(theirs_trained)} trained tensors, {sum(p.numel() for p in theirs_trained):,} numbers on either side")
assert sum(p.numel() for p in theirs_trained) == sum(p.numel() for p in our_adapter.parameters())

# %%
def losses_over(model, parameters):
    """Train on the six batches, one step each: the loss before each step."""
    model.train()
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0), []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

# %% tags=["nbval-ignore-output"]
gap_before = (logits_of(our_model) - logits_of(peft_model)).abs().max().item() / largest_logit
their_losses = losses_over(peft_model, theirs_trained)
our_losses = losses_over(our_model, our_adapter.parameters())
print("peft + bitsandbytes", [round(loss, 2) for loss in their_losses])
print("attach + NF4Linear ", [round(loss, 2) for loss in our_losses])
gap = max(abs(a - b) for a, b in zip(their_losses, our_losses, strict=True))
print(f"largest difference of logits before {gap_before:.1e}, of losses {gap:.1e}")
assert gap_before < 5e-3 and gap < 0.01 and our_losses[-1] < 0.7 * our_losses[0]

# %% [markdown]
# Three libraries there and one here walk down the same curve.
#
# ### The same files
#
# An adapter's file holds A and B, nothing of the base. So one that was trained over bitsandbytes' layers loads over
# ours, and back. What the file cannot say is how the base was quantized. Load it over another base, and nobody
# complains.

# %%
folder = Path(tempfile.mkdtemp())
our_adapter.save(folder / "ours")
peft_model.save_pretrained(folder / "peft")
here = load_ours(wrong)
_ = load_adapter(here, folder / "peft")
there = peft.PeftModel.from_pretrained(as_stored(load_theirs(wrong)), folder / "ours")
over_float32 = load_base("decoder", dtype=torch.float32)  # not the base that the adapter was trained on
_ = load_adapter(over_float32, folder / "ours")

# %% tags=["nbval-ignore-output"]
probe = batches[1]
gaps = {"peft's file here": logits_of(here, probe) - logits_of(peft_model, probe),
        "our file in peft": logits_of(there, probe) - logits_of(our_model, probe),
        "over the base before quantization": logits_of(over_float32, probe) - logits_of(our_model, probe)}
gaps = {name: gap.abs().max().item() / largest_logit for name, gap in gaps.items()}
print({name: f"{gap:.1e}" for name, gap in gaps.items()})
assert gaps["peft's file here"] < 5e-3 and gaps["our file in peft"] < 5e-3
assert gaps["over the base before quantization"] > 5 * gaps["our file in peft"]

# %% [markdown]
# ## Claims, tested
#
# What people say about QLoRA, in interviews, posts and course notes. Each statement is put to a test in a cell, and the
# cell decides. Before you run it, say what you expect.
#
# A claim is split into parts that a computer can answer, and each part is printed with its yes or no. All hold: true.
# None holds: false. Some hold: it depends, and the parts say on what. A number holds if it is within 5 % of the
# computed one. Two claims, 23 and 24, are not tested but read from a table of the paper. Two more cannot be tested
# here, and the reason is given instead of a verdict. (Three more you have tested in chapter 1: that LoRA and QLoRA
# are in one memory class, what share of the memory each method saves, and that 24 GB are enough for a 7B and a 13B.)

# %%
import logging
import statistics
import warnings
from unittest.mock import patch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import bitsandbytes
import peft
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# %%
from utils import LoRA, attach, load_base
from utils.architectures import architecture
from utils.experiments import final, load
from utils.measure import flops
from utils.memory.estimate import facts_of, predict
from utils.memory.states import nf4_bytes, quantized_base
from utils.models import base_name
from utils.paging import simulate_training
from utils.quantization.base import NF4, bitsandbytes_fields, quantize_base, replace_layers
from utils.quantization.blocks import bits_per_number, dequantize_blockwise, nearest_code, quantize_blockwise
from utils.quantization.codebooks import NF4_OFFSET, dynamic_codebook, fp4_codebook, int4_codebook
from utils.quantization.codebooks import lloyd_codebook, nf4_codebook
from utils.quantization.linear import NF4Linear
from utils.quantization.weights import QuantizedWeight, quantize_weight, requantized_merge

# %%
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`")  # peft still uses the older name
warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # claim 8 shows what it means

# %%
GB = 10**9
verdicts = []

def note(claim, verdict, seen):
    """Note and print a verdict. seen: what was found, with ; between one thing and the next"""
    verdicts.append((claim, verdict))
    print(f"{claim}: {verdict.upper()}\n    " + seen.replace("; ", "\n    "))

def judge(claim, seen, **parts):
    """Note a verdict and return it. parts: what was tested -> did it hold"""
    verdict = "true" if all(parts.values()) else "it depends" if any(parts.values()) else "false"
    note(claim, verdict, seen)
    for part, holds in parts.items():
        print(f"    {'yes' if holds else 'no':4}{part.replace('_', ' ')}")
    return verdict

# %%
def close(computed, claimed, share=0.05):
    return abs(computed / claimed - 1) <= share

# %% [markdown]
# ### What it is
#
# **Claim 1. "QLoRA is LoRA over a base quantized to 4 bits."**
#
# **Claim 2. "Forward: the base is dequantized, LoRA is added. Backward: only LoRA is updated."**
#
# One layer is enough for both. Its gradients are compared with those by hand, written with W', the weight that the
# codes stand for.

# %%
torch.manual_seed(0)
W_small, inputs, G = torch.randn(96, 128) * 0.02, torch.randn(8, 128, requires_grad=True), torch.randn(8, 96)
net = nn.Sequential(NF4Linear(quantize_weight(W_small, "nf4", double_quant=True)))
attach(net, LoRA(r=4, alpha=8, targets=("0",), init="random_b"))  # a random B: with zeros the update would be nothing
packed_codes, A, B = net[0].core.weight, net[0].A, net[0].B  # core: the layer inside the LoRA
outputs = net(inputs)
outputs.backward(G)
W4_small = net[0].core.dequantize()
dA, dB = 2 * B.T @ G.T @ inputs, 2 * G.T @ (inputs @ A.T)  # alpha / r = 2
dx = G @ W4_small + 2 * G @ B @ A

# %%
def same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)

trained = {name for name, p in net.named_parameters() if p.grad is not None}
untouched = packed_codes.grad is None
seen = f"base: {packed_codes.dtype}, {packed_codes.nbytes:,} bytes for {W_small.numel():,} weights; "
seen += f"trained: {len(trained)} of 3 tensors"
assert judge("QLoRA is LoRA over 4 bits", seen, four_bits=2 * packed_codes.nbytes == W_small.numel(),
             only_A_and_B_are_trained=len(trained) == 2 and untouched) == "true"

# %%
by_hand = inputs @ W4_small.T + 2 * inputs @ A.T @ B.T
assert judge("dequantize forward, update LoRA", "gradients beside those by hand", forward=same(outputs, by_hand),
             only_LoRA_is_updated=same(A.grad, dA) and same(B.grad, dB) and untouched,
             x_has_its_gradient_through_the_base=same(inputs.grad, dx)) == "true"

# %% [markdown]
# "Updates only LoRA" must not be read as "the backward pass skips the base". The error goes through every frozen layer,
# and for that W' is unpacked again.
#
# **Claim 3. "The adapters are in 16 bits, and their gradients are computed with the dequantized weights."**
#
# **Claim 4. "The LoRA part is trained in FP16."** Both are asked of peft, over a base whose other parts are in 16 bits.

# %%
LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

def by_library(dtype=torch.bfloat16, **fields):
    """The tiny base by transformers, in 4 bits as the fields say."""
    fields = bitsandbytes_fields(compute_dtype=dtype) | fields
    return AutoModelForCausalLM.from_pretrained(base_name("decoder"), quantization_config=BitsAndBytesConfig(**fields),
                                                dtype=dtype)

def adapter_dtypes(dtype, asked):
    """asked: whether peft shall leave the adapters in the base's dtype"""
    model = peft.get_peft_model(by_library(dtype), LORA, autocast_adapter_dtype=not asked)
    return {p.dtype for p in model.parameters() if p.requires_grad}

# %%
dtypes = {(dtype, asked): adapter_dtypes(dtype, asked)
          for dtype in (torch.bfloat16, torch.float16) for asked in (False, True)}

def by_peft(dtype):
    return f"peft over {str(dtype)[6:]}: {str(*dtypes[dtype, False])[6:]}; if asked: {str(*dtypes[dtype, True])[6:]}"

assert judge("16-bit adapters, gradients with W'", by_peft(torch.bfloat16),
             gradients_are_those_with_the_unpacked_W=same(A.grad, dA) and same(inputs.grad, dx),
             sixteen_bits_by_default=dtypes[torch.bfloat16, False] == {torch.bfloat16},
             sixteen_bits_if_asked=dtypes[torch.bfloat16, True] == {torch.bfloat16}) == "it depends"
assert judge("LoRA is trained in FP16", by_peft(torch.float16) + "; the paper has bf16",
             by_default=dtypes[torch.float16, False] == {torch.float16},
             if_asked=dtypes[torch.float16, True] == {torch.float16}) == "it depends"

# %% [markdown]
# The paper's A and B are in bf16. peft makes them float32 unless you say `autocast_adapter_dtype=False`, and so do we:
# small steps would be lost in the rounding of 16 bits. That doubles their bytes, gradients included. Ask before you
# compute a memory from "16-bit adapters".
#
# **Claim 5. "The weights are dequantized to FP16 at inference."** Count how often a weight is unpacked.
#
# **Claim 6. "LoRA and QLoRA add no latency."** Counted are operations and unpackings in a forward pass of what you
# would serve. No time is measured.

# %%
def unpackings_of(fn):
    with patch.object(QuantizedWeight, "dequantize", autospec=True, side_effect=QuantizedWeight.dequantize) as counted:
        fn()
    return counted.call_count

ids = torch.randint(3, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
base_model = load_base("decoder", dtype=torch.float32)
merged_model, unmerged_model = (load_base("decoder", dtype=torch.float32) for _ in range(2))
attach(merged_model, LoRA(r=4, targets="all-linear", init="random_b")).merge()
_ = attach(quantize_base(unmerged_model, NF4()), LoRA(r=4, targets="all-linear"))
with torch.no_grad():
    once = unpackings_of(lambda: unmerged_model(input_ids=ids))
    work = {name: flops(lambda: m(input_ids=ids)) for name, m in
            (("base", base_model), ("LoRA merged", merged_model), ("QLoRA", unmerged_model))}
in_step = unpackings_of(lambda: unmerged_model(input_ids=ids, labels=ids).loss.backward())

# %%
assert judge("dequantized to FP16 at inference", f"28 layers; {once} unpackings in a forward pass; {in_step} in a step",
             at_inference=once == 28, only_at_inference=in_step == 0) == "it depends"
more = {name: 100 * (operations / work["base"] - 1) for name, operations in work.items()}
seen = f"LoRA merged: {more['LoRA merged']:.0f} % more operations; QLoRA: {more['QLoRA']:.0f} %, and {once} unpackings"
assert judge("LoRA and QLoRA: no latency", seen, LoRA_merged_adds_nothing=work["LoRA merged"] == work["base"],
             QLoRA_adds_nothing=once == 0 and work["QLoRA"] == work["base"]) == "it depends"

# %% [markdown]
# The storage dtype and the compute dtype are two things. In storage it is always 4 bits; the products are in
# the compute dtype (bf16 in the paper), in every forward pass, and again in the backward pass. A step unpacks
# less than twice as often as a forward pass, because q, k and v of the first block read the embeddings, and nothing below
# them is trained.
#
# ### How it is set up
#
# **Claim 7. "`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float16")` makes it QLoRA."**
#
# **Claim 8. "Load in 4 bits, `get_peft_model`, `Trainer`: the code is complete."** It lacks
# `prepare_model_for_kbit_training`. Does it train, with gradient checkpointing on?
#
# **Claim 9. "The `Trainer`'s settings for QLoRA are `fp16=True` and `optim="paged_adamw_32bit"`."** Paging needs CUDA,
# so nothing is trained with it here.

# %%
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float16")
kind, double = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
bits = bits_per_number(double_quant=double), bits_per_number(double_quant=True)
seen = f"{kind}, double quantization {double}; {bits[0]:.3f} bits for a weight, QLoRA's NF4 has {bits[1]:.3f}"
assert judge("load_in_4bit=True makes it QLoRA", seen, NF4=kind == "nf4", double_quantization=double) == "false"

# %%
def learns(model, switch):
    """Whether gradients arrive, with the older kind of checkpointing, after switching the embedding's output."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    switch()
    try:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except RuntimeError as error:
        print("RuntimeError:", str(error).split(" and ")[0])
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)

# %%
bare = peft.get_peft_model(by_library(), LORA).train()
norm = bare.get_submodule("base_model.model.model.norm").weight.dtype
without = learns(bare, bare.disable_input_require_grads)
assert judge("complete without prepare", f"norms in {str(norm)[6:]}",
             learns_without_the_hook_of_the_embedding=without,
             learns_with_it=learns(bare, bare.enable_input_require_grads),
             norms_in_float32=norm == torch.float32) == "it depends"

# %%
optimizer_names = {name.value for name in transformers.training_args.OptimizerNames}
ends = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16)}
seen = f"float16 ends at {ends[torch.float16]:,.0f}; bf16, the paper's, at {ends[torch.bfloat16]:.0e}"
assert judge("fp16=True with paged AdamW", seen, the_Trainer_has_the_optimizer="paged_adamw_32bit" in optimizer_names,
             fp16_has_the_range_of_bf16=ends[torch.float16] > 1e38) == "it depends"

# %% [markdown]
# In claim 8 everything hangs on one hook: does the embedding's output need a gradient?
# `prepare_model_for_kbit_training` sets it for the older kind of checkpointing, and the installed transformers for both,
# when you switch checkpointing on. The checkpointing of today (`use_reentrant=False`) does not need it. What is left of the preparation is the
# precision of the norms. `fp16=True` works on a GPU that has nothing better. It needs the scaling of the loss that
# `Trainer` then does, and bf16 does not.
#
# **Claim 10. "Paged optimizers move the optimizer's state between GPU and CPU, against running out of memory at a
# spike."** The real one needs CUDA. Tested are what bitsandbytes says of its optimizer, and the simulator of this
# chapter: a GPU of 24 GB, 20 GB of weights, 2 GB of moments, and one long batch.
#
# **Claim 11. "Quantize before you create the LoRA, or the gradients are wrong."** The other order: attach first, then
# exchange the layers under the adapter.

# %%
GPU, MOMENTS = 24 * 10**9, {"m": (10**9, True), "v": (10**9, True)}

def steps(paged, activations):
    return simulate_training(GPU, 20 * 10**9, MOMENTS, [int(gb * 1e9) for gb in activations], paged)

spike = {paged: [step.fits for step in steps(paged, (1, 3, 1))] for paged in (False, True)}
moved = {name: sum(step.moved for step in steps(True, gb)) / GB for name, gb in
         (("never", (1, 1, 1)), ("once", (1, 3, 1)), ("always", (3, 3, 3)))}
paging = bitsandbytes.optim.PagedAdamW32bit([nn.Parameter(torch.zeros(2))]).is_paged
seen = f"simulated; GB moved if batches are long: " \
        f"{', '.join(f'{name} {gb:.1f}' for name, gb in moved.items())}"
assert judge("paged optimizers against spikes", seen, paged_says_bitsandbytes=paging,
             without_paging_the_run_ends=not all(spike[False]), with_paging_it_does_not=all(spike[True]),
             no_spike_no_traffic=moved["never"] == 0) == "true"

# %%
def in_nf4(layer):
    return NF4Linear(quantize_weight(layer.weight, "nf4", double_quant=True))

def gradients_of(quantize_first):
    """Of A and B, in the one order or in the other."""
    model = load_base("decoder", dtype=torch.float32)
    model = quantize_base(model, NF4()) if quantize_first else model
    torch.manual_seed(0)
    adapter = attach(model, LoRA(r=4, targets="all-linear", init="random_b"))
    if not quantize_first:
        replace_layers(model, lambda layer: type(layer) is nn.Linear and layer is not model.lm_head, in_nf4)
    model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in adapter.parameters()]

# %%
first, other = gradients_of(True), gradients_of(False)
gap = max((a - b).abs().max().item() for a, b in zip(first, other, strict=True))
works = all(gradient.isfinite().all() for gradient in first)
assert judge("quantize first, or wrong gradients", f"the other order: largest difference of gradients {gap:.1e}",
             quantize_first_works=works, other_order_is_wrong=gap > 1e-5) == "it depends"

# %% [markdown]
# Quantizing first is the order to keep: no library replaces the layers under an adapter, and `quantize_base` refuses.
# But the reason given is wrong: the gradients are the same. What the two orders make of an update is the next question.
#
# ### Before or after
#
# **Claim 12. "The pipeline is: first adapt, then compress."**
#
# **Claim 13. "QLoRA means to take a model tuned with LoRA and quantize it to 4 bits."**
#
# **Claim 14. "QLoRA has no overhead at inference once it is merged."**
#
# The cell takes updates of two sizes, and a weight of the tiny base. In one order the weight is quantized, and the
# update is merged into its codes. In the other the update is added to the weight as it was, and the sum is quantized.
# You know both measures from *Merging into 4 bits*: how much of BA *arrives*, and the error, in units of |BA|.

# %%
torch.manual_seed(0)
W_q = base_model.get_submodule("model.layers.1.self_attn.q_proj").weight.detach()
W4_q, direction = quantize_weight(W_q).dequantize(), torch.randn(128, 4) @ torch.randn(4, 128)
in_full = {}
for size in (0.01, 0.5):
    BA = direction * size * W_q.norm() / direction.norm()
    changes = {"adapted, then quantized": quantize_weight(W_q + BA).dequantize() - W4_q,
               "quantized, adapted, and merged": requantized_merge(W4_q, BA)[0].dequantize() - W4_q}
    for order, change in changes.items():
        in_full[order, size] = ((change * BA).sum() / (BA * BA).sum()).item()
        print(f"|BA| = {size:3.0%} of |W|, {order:30}: {in_full[order, size]:4.0%} of BA arrives, "
              f"error {(change - BA).norm() / BA.norm():.0%}")
updated = W_q + 0.01 * direction * W_q.norm() / direction.norm()
for what, weight_32 in (("W", W_q), ("W and a BA of 1 %", updated)):
    print(f"rounding {what}: {(quantize_weight(weight_32).dequantize() - weight_32).norm() / weight_32.norm():.1%} off")

# %%
in_training = next(m for m in unmerged_model.modules() if isinstance(m, NF4Linear)).weight.dtype
small, large = (in_full["adapted, then quantized", size] for size in (0.01, 0.5))
tuned_in_16_bits = in_training != torch.uint8
assert judge("first adapt, then compress", f"QLoRA's base is {in_training} while A and B are trained",
             QLoRA_adapts_first=tuned_in_16_bits, a_small_update_arrives_when_adapted_first=abs(small - 1) < 0.2,
             a_large_one_does=abs(large - 1) < 0.2) == "it depends"
assert judge("QLoRA: tune, then quantize", f"its base is {in_training} in training; the other way round it is "
             "quantization after training", the_base_is_tuned_in_16_bits=tuned_in_16_bits) == "false"

# %%
in_blocks_7b = facts_of("Llama-2-7B", LoRA(r=16, targets="all-linear")).in_blocks
layers_GB = {4: nf4_bytes(in_blocks_7b) / GB, 16: 2 * in_blocks_7b / GB}
small = in_full["quantized, adapted, and merged", 0.01]
seen = f"merged in 16 bits, a 7B's layers go from {layers_GB[4]:.1f} to {layers_GB[16]:.1f} GB; "
seen += f"merged in 4 bits, {small:.0%} of a small BA arrives"
assert judge("merged QLoRA has no overhead", seen, no_more_operations=work["LoRA merged"] == work["base"],
             no_more_memory_in_16_bits=close(layers_GB[16], layers_GB[4]),
             nothing_lost_in_4_bits=small > 0.9) == "it depends"

# %% [markdown]
# Adapt first, and all of the update is there, in the mean. The original weights lie anywhere between two codes. A small
# update carries a few of them to the next code, by a whole step each, and that adds up to BA. The error beside it looks
# huge only in units of a small BA: it comes from the few weights that change by a whole step. Measured from the weight
# before rounding, the noise is the same with an update or without, as the last two lines show. A QLoRA has that noise too; it is there from the start, and the training goes on over it. So neither order loses the update,
# and under *Quantize first, or train first?* the two ended alike.
#
# What loses it is to round twice, with a small update between: W' lies on the codes already, and rounding puts it back
# there. QLoRA keeps BA beside the base and does not round again. It quantizes first because the 16-bit base then need
# not be in memory, not because the other order fails.
#
# ### The numbers of the format
#
# **Claim 15. "NF4 has its 16 levels at the quantiles of a normal distribution and loses less than INT4."**
#
# **Claim 16. "Double quantization: blocks of 64, scales from FP32 to FP8, 0.37 bits saved per parameter."**
#
# **Claim 17. "NF4 is information-theoretically optimal."** That is: its 16 codes are used equally often.

# %%
normal = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

def percent_off(values, book, block_size=64):
    """How far the rounded values are from what they were, in the Euclidean norm."""
    back = dequantize_blockwise(*quantize_blockwise(values, book, block_size), book, block_size)
    return 100 * ((back - values).norm() / values.norm()).item()

gap = (nf4_codebook() - bitsandbytes.functional.get_4bit_type("nf4", device="cpu")).abs().max().item()
lose = {name: percent_off(normal, book) for name, book in
        (("NF4", nf4_codebook()), ("INT4", int4_codebook()), ("FP4", fp4_codebook()))}
seen = "away on N(0, 1): " + ", ".join(f"{name} {percent:.1f} %" for name, percent in lose.items())
assert judge("NF4: quantiles, better than INT4", seen, levels_at_quantiles=gap < 1e-6,
             loses_less=lose["NF4"] < lose["INT4"]) == "true"

# %%
saved = bits_per_number(double_quant=False) - bits_per_number(double_quant=True)
hardware = [torch.arange(256, dtype=torch.uint8).view(dtype).float()
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
shared = [int(torch.isin(dynamic_codebook(), numbers).sum()) for numbers in hardware]
seen = f"{saved:.3f} bits saved; of the 256 numbers {shared[0]} and {shared[1]} exist in the two FP8 of the hardware"
assert judge("double quantization: FP8, 0.37 bits", seen, saves_that_much=close(saved, 0.37),
             the_scales_are_in_FP8=max(shared) > 200) == "it depends"

# %%
def use(index):
    return 100 * torch.bincount(index.int(), minlength=16) / len(index)

outermost = statistics.NormalDist().inv_cdf(NF4_OFFSET)  # the quantile that NF4 calls 1
one_scale = use(nearest_code((normal / outermost).clamp(-1, 1), nf4_codebook()))
in_blocks = use(quantize_blockwise(normal, nf4_codebook())[0])
some_blocks = normal[: 2**17].view(-1, 64)
scaled_blocks = (some_blocks / some_blocks.abs().amax(1, keepdim=True)).reshape(-1)
lloyd_error = percent_off(normal, lloyd_codebook(scaled_blocks, rounds=60))

# %%
seen = "; ".join(f"use of a code, {how}: {shares.min():.1f} to {shares.max():.1f} %" for how, shares in
                 (("one fixed scale", one_scale), ("blocks of 64", in_blocks)))
seen += f"; error {lose['NF4']:.2f} %, with Lloyd's code book {lloyd_error:.2f} %"
assert judge("NF4 is optimal", seen, equal_use_with_one_scale=bool(one_scale.max() < 1.5 * one_scale.min()),
             equal_use_in_blocks=bool(in_blocks.max() < 1.5 * in_blocks.min()),
             least_error=lose["NF4"] <= lloyd_error) == "it depends"

# %% [markdown]
# NF4's 16 numbers are made so that a normal distribution uses each about equally often, and with one fixed scale it
# does. But every block is divided by its own largest weight. What comes out is no longer normal, and how it is
# distributed depends on the block size. Yoshida (2023, [arXiv:2306.06965](https://arxiv.org/abs/2306.06965)) said so
# three weeks after the paper. A code book that is fitted to such blocks has a smaller error. Ask of every "optimal": for
# which distribution, and by which measure?
#
# In claim 16 the paper writes FP8 (section 3). bitsandbytes has a code book of its own with 256 numbers, which is not
# the FP8 that a GPU computes with.
#
# ### Memory
#
# **Claim 18. "A 65B takes 260 GB in FP32, 130 in FP16, 65 in INT8, 32.5 in 4 bits."**
#
# **Claim 19. "4 bits and LoRA: 35 GB."**
#
# **Claim 20. "So one A100 with 40 GB can fine-tune a 65B."**
#
# **Claim 21. "QLoRA fine-tunes a 65B on one GPU of 48 GB."**
#
# **Claim 22. "A 7B can be trained on 24 GB."**
#
# The sizes are LLaMA's. The step has one row of 512 tokens, checkpointing, and the paper's adapters: r = 64 on all
# linear layers, in bf16 with moments in float32. Beside it an adapter of r = 16. As in chapter 1, a twentieth of the
# GPU is left to the framework.

# %%
LLAMA_SIZES = {"7B": {}, "65B": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80,
                               num_attention_heads=64, num_key_value_heads=64)}
llamas = {(size, r): facts_of(architecture("Llama-2-7B", **fields), LoRA(r=r, targets="all-linear"))
          for size, fields in LLAMA_SIZES.items() for r in (16, 64)}

def gib(size, r):
    """What a GPU needs for a step, in GiB, as GPUs are sold."""
    step = predict(llamas[size, r], "bf16, fp32 moments", 1, 512, checkpointing=True, quantized=True)
    return step.peak / 0.95 / 2**30

need = {key: gib(*key) for key in llamas}
of_65b = llamas["65B", 64]
base_numbers = of_65b.total - of_65b.trained
stored_GB = {double: quantized_base(of_65b.in_blocks, base_numbers - of_65b.in_blocks, double_quant=double) / GB
             for double in (True, False)}

# %%
claimed = {"FP32": (32, 260), "FP16": (16, 130), "INT8": (8, 65), "4 bits": (4, 32.5)}
computed = {name: bits * base_numbers / 8 / GB for name, (bits, _) in claimed.items()}
seen = ", ".join(f"{name} {gb:.1f}" for name, gb in computed.items())
seen += f" GB; as stored: NF4 {stored_GB[False]:.1f}, double quantized {stored_GB[True]:.1f}"
holds = {name: close(computed[name], gb) for name, (_, gb) in claimed.items()}
assert judge("65B: 260, 130, 65 and 32.5 GB", seen, **holds) == "true"

# %%
loaded = stored_GB[True] + 2 * of_65b.trained / GB
peak = {r: need["65B", r] * 0.95 * 2**30 / GB for r in (16, 64)}
seen = f"base {stored_GB[True]:.1f} GB; with A and B of r = 64 {loaded:.1f}; "
seen += f"in training {peak[64]:.1f}, with r = 16 {peak[16]:.1f}"
assert judge("4 bits and LoRA: 35 GB", seen, the_base=close(stored_GB[True], 35),
             the_training=close(peak[64], 35)) == "it depends"

def verdict_for(claim, size, gpu):
    seen = ", ".join(f"r = {r}: {need[size, r]:.1f} GiB" for r in (16, 64)) + " (predicted)"
    return judge(claim, seen, **{f"fits_with_r_=_{r}": need[size, r] < gpu for r in (16, 64)})

assert verdict_for("a 65B on an A100 of 40 GB", "65B", 40) == "it depends"
assert verdict_for("a 65B on 48 GB", "65B", 48) == "true"
assert verdict_for("a 7B on 24 GB", "7B", 24) == "true"

# %% [markdown]
# The first claim is bits times parameters, and holds. It forgets the scales and the embeddings, which stay in 16 bits.
# The 35 GB are a base that lies still. On a card of 40 GB the paper's own recipe does not fit. With a small adapter
# and short rows it just might, by arithmetic: 40 GB are GiB there, too. Nobody would plan with so little room.
#
# ### Quality
#
# **Claim 23. "On MMLU, QLoRA is within 0.5 % of full fine-tuning in 16 bits."**
#
# **Claim 24. "QLoRA loses less than 1 %."**
#
# No model of this size is trained here, so these two are not tested. They are read from the table that they go back to:
# Table 4 of the paper, the accuracy of
# LLaMA after tuning on two data sets, at four sizes. Its baseline is *LoRA* in bf16. The means are 53.0 for it and 53.1
# for NF4 with double quantization, as printed (*Quality, and a default* adds up the cells); of the eight pairs, the worst has NF4 1.3 points lower, the best 1.4 points higher.

# %%
note("MMLU: within 0.5 % of full", "false", "read from Table 4: the baseline is LoRA in bf16, not full fine-tuning; "
     "single pairs are apart by up to 1.4 points")
note("QLoRA loses less than 1 %", "it depends", "read from Table 4: yes in the mean, printed 0.1 points higher, from "
     "its own cells 0.05 lower; no for the worst pair, which is 1.3 points lower")

# %% [markdown]
# Name the baseline. The comparison with full fine-tuning is another one (Table 3), with models up to 11 billion
# parameters. And single pairs scatter by more than a point in both directions, as they would with another seed.
#
# **Claim 25. "Too small a rank hurts, the wrong modules hurt, and a quantization needs a numeric check."** The first
# two from the records of chapter 2, accuracies on the task intent, three seeds each. The third you have seen under
# *The same weights?*; here once more, in a way that does not depend on the CPU.
#
# **Claim 26. "QLoRA reaches 98 to 99 % of the quality of full fine-tuning, prompt tuning 90 to 95 %."**
#
# **Claim 27. "bitsandbytes' NF4 runs on phones and on a Raspberry Pi."**

# %%
def mean_accuracy(experiment, arm):
    return statistics.mean(run["test"]["accuracy"] for run in final(load(experiment), arm))

rank = {r: mean_accuracy("lora_rank_intent", f"r={r}") for r in (1, 8, 32)}
place = {arm.split(",")[0]: mean_accuracy("lora_targets_intent", arm) for arm in
         ("query, r=36", "attention, r=9", "all linear, r=4")}
with_huge = normal[:4096].clone()
with_huge[0] = 1000  # one block for all, with one huge weight in it: no error, no warning
rounded = dequantize_blockwise(*quantize_blockwise(with_huge, nf4_codebook(), 4096), nf4_codebook(), 4096)
others_off = ((rounded - with_huge)[1:].norm() / with_huge[1:].norm()).item()

# %%
seen = "; ".join(f"{arm if isinstance(arm, str) else f'r = {arm}'}: {100 * accuracy:.0f} %"
                 for arm, accuracy in (rank | place).items())
seen += f"; one outlier in one large block: all others {100 * others_off:.0f} % off, without a word"
assert judge("rank, modules, numeric check", seen, small_rank_hurts=rank[8] > rank[1] + 0.05,
             query_alone_hurts=place["all linear"] > place["query"] + 0.05,
             attention_alone_hurts=place["all linear"] > place["attention"] + 0.05,
             numeric_check_is_needed=others_off > 0.5) == "it depends"
note("QLoRA reaches 98 to 99 %", "untested", "no source, task, model or measure is given: there is nothing to repeat")
note("NF4 on phones, Raspberry Pi", "untested", "it says nothing of speed or memory, and no such device is here")

# %% [markdown]
# ### All verdicts

# %%
for number, (claim, verdict) in enumerate(verdicts, 1):
    print(f"{number:>2}  {verdict:10} {claim}")
tally = {word: sum(verdict == word for _, verdict in verdicts) for word in ("true", "it depends", "false", "untested")}
print(tally)
assert sum(tally.values()) == len(verdicts) == 27

# %% [markdown]
# Of the claims about the format, the code book and the bits hold, and "FP8" and "optimal" do not. Those about "QLoRA" in
# general mix what the paper did, what the libraries do unless
# told otherwise, and what you typed. Three lines of a configuration lie between them.

# %% [markdown]
# ## Published figures
#
# The paper's numbers about formats and memory follow from arithmetic that you have done in this chapter. So do it
# again, and put it beside what was printed. All are from Dettmers et al. 2023, *QLoRA*
# ([arXiv:2305.14314](https://arxiv.org/abs/2305.14314)), but for the sizes of LLaMA (Touvron et al. 2023,
# [arXiv:2302.13971](https://arxiv.org/abs/2302.13971), Table 2).

# %%
import itertools
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import bitsandbytes
import torch
import transformers

from utils import LoRA
from utils.architectures import architecture
from utils.memory.estimate import facts_of, predict
from utils.memory.states import quantized_base
from utils.quantization.blocks import bits_per_number, dequantize_blockwise, quantize_blockwise
from utils.quantization.codebooks import fp4_codebook, int4_codebook, nf4_codebook

# %% [markdown]
# One rule for "agrees": the computed number, rounded to as many digits as were printed, is the printed one.

# %%
figures = []

def figure(what, source, published, computed, digits, why=""):
    """Note one figure. published, computed: in the same unit   digits: decimals printed"""
    agrees = round(computed, digits) == published
    figures.append((what, source, published, f"{computed:,.5g}", "agrees" if agrees else "differs", why))
    print(f"{what:42} published {published:<7} computed {figures[-1][3]:<11} {figures[-1][4]}")
    return agrees

def no_figure(what, source, published, why):
    """Note a figure that cannot be computed here."""
    figures.append((what, source, published, "-", "not here", why))
    print(f"{what:42} published {published:<7} cannot be computed here: {why}")

# %% [markdown]
# ### The format
#
# Appendix E lists the 16 numbers of NF4; bitsandbytes has them in its code, and that is what they are compared with.
# Section 3 has the bits of double quantization, and says that each bin of NF4 is expected to get the same number of
# values: a sixteenth, 6.25 %.

# %%
their_code = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
equal = int(((their_code - nf4_codebook()).abs() < 1e-6).sum())
assert figure("numbers of NF4 that are equal", "appendix E", 16, equal, 0)
scale_bits, nested_bits = bits_per_number(double_quant=False) - 4, bits_per_number(double_quant=True) - 4
assert figure("bits of the scales per weight", "section 3", 0.5, scale_bits, 1)
assert figure("  double quantized", "section 3", 0.127, nested_bits, 3)
assert figure("  saved", "section 3", 0.373, scale_bits - nested_bits, 3)

normal = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
codes_used = quantize_blockwise(normal, nf4_codebook())[0]
share = 100 * torch.bincount(codes_used.int(), minlength=16) / len(codes_used)
for name, value in (("most", share.max().item()), ("least", share.min().item())):
    assert not figure(f"% of values in the {name} used bin", "section 3", 6.25, value, 2, "a block's largest becomes 1")

# %% [markdown]
# Table 2 ranks the formats by the mean perplexity of models from 125 million to 13 billion parameters. The perplexities
# cannot be computed here. Whether the error of the weights ranks them the same way, can. E2M1 and E3M0 are 4-bit floats
# with so many bits of exponent and mantissa; what bitsandbytes calls FP4 is E2M1 with a far smaller smallest number.

# %%
def float4(*magnitudes):
    positive = torch.tensor(magnitudes) / max(magnitudes)
    return torch.cat([positive, -positive])

formats = {"NF4": nf4_codebook(), "FP4 E3M0": float4(0.0, 1, 2, 4, 8, 16, 32, 64), "FP4 bitsandbytes": fp4_codebook(),
         "FP4 E2M1": float4(0.0, 0.5, 1, 1.5, 2, 3, 4, 6), "INT4": int4_codebook()}

def off_normal(book):
    """How far N(0, 1) is from itself after rounding in blocks of 64, in percent of its norm."""
    back = dequantize_blockwise(*quantize_blockwise(normal, book), book)
    return 100 * ((back - normal).norm() / normal.norm()).item()

# %%
weight_errors = {name: off_normal(book) for name, book in formats.items()}
ranked = sorted(weight_errors, key=weight_errors.get)
print("by weight error:", ", ".join(f"{name} {weight_errors[name]:.1f} %" for name in ranked))
print("by perplexity, Table 2: NF4 with double quantization, FP4 E3M0, FP4 E2M1, INT4")
no_figure("mean perplexity with NF4", "Table 2", 27.41, "OPT, BLOOM, LLaMA and Pythia are not here")
assert ranked[0] == "NF4" and ranked[-1] == "FP4 E3M0"

# %% [markdown]
# NF4 comes first in both, and E2M1 before INT4, if only just. But E3M0, with by far the largest error, is second by
# perplexity. And the FP4 that bitsandbytes has is not quite the paper's: its smallest number is so small that by error
# it falls behind INT4. An error of the weights does not tell what a model makes of it, as you saw on the tiny base.
#
# ### A base in 4 bits
#
# Section 2 describes a 7B: the base takes 5,048 MB, LoRA of 0.2 % of the weights 26 MB, and the gradients of the inputs
# 567 MB, or 18 MB per sequence with checkpointing.
#
# **Guanaco** is what the authors call their chat models: LLaMA of four sizes, tuned with QLoRA on dialogues (OASST1).
# Table 6 lists what they take in 4 bits: 5, 10, 21 and 41 GB. (The smaller two are not checked against
# the paper.) Under *From 7B to 70B* they were more than the base. Here they are tried with all readings that come to mind.

# %%
LLAMA = {"7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
         "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
         "33B": dict(hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52),
         "65B": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64)}
llama_facts = {size: facts_of(architecture("Llama-2-7B", num_key_value_heads=fields["num_attention_heads"], **fields),
                        LoRA(r=64, targets="all-linear")) for size, fields in LLAMA.items()}
N = {size: f.total - f.trained for size, f in llama_facts.items()}

def base_bytes(size, double_quant=True, e=2):
    """Bytes of the base. e: of the numbers that are not in 4 bits"""
    linear = llama_facts[size].in_blocks
    return quantized_base(linear, N[size] - linear, double_quant=double_quant, e=e)

# %%
for (size, n), printed in zip(N.items(), (6.7, 13.0, 32.5, 65.2)):
    agrees = figure(f"parameters of LLaMA {size}, billions", "LLaMA, Table 2", printed, n / 1e9, 1,
                    "" if size != "65B" else "cut, not rounded")
    assert agrees == (size != "65B")

# %%
assert not figure("4-bit base of a 7B, MB", "section 2", 5048, base_bytes("7B") / 1e6, 0, "no reading of it gives this")
readings = [base_bytes("7B", double, e) / mega  # scales, bytes of what is not in 4 bits, MB or MiB
            for double, e, mega in itertools.product((True, False), (2, 4), (1e6, 2**20))]
print(f"  in {len(readings)} readings: from {min(readings):,.0f} to {max(readings):,.0f}")
mib = 0.002 * N["7B"] * 2 / 2**20
assert figure("LoRA of 0.2 % of a 7B, MiB", "section 2", 26, mib, 0, "in MiB; 27 MB")
assert 5048 not in map(round, readings)
no_figure("gradients of a 7B's inputs, MB", "section 2", 567, "neither rows nor their length are given")
assert figure("  one layer's share of 567 MB", "section 2", 18, 567 / 32, 0, "our reading of `per sequence`")

# %%
guanaco = dict(zip(llama_facts, (5, 10, 21, 41)))
for size, printed in guanaco.items():
    assert not figure(f"Guanaco {size}, GB", "Table 6", printed, base_bytes(size) / 1e9, 0, "more than the base alone")

# %%
def guanaco_sizes(double, e, of_adapter, unit):
    """All four, in `unit` bytes. e, of_adapter: bytes of a number that is not in 4 bits, and of one of A and B"""
    return [(base_bytes(size, double, e) + of_adapter * llama_facts[size].trained) / unit for size in guanaco]

def hits(reading):
    return sum(round(size) == printed for size, printed in zip(guanaco_sizes(*reading), guanaco.values()))

readings = list(itertools.product((True, False), (2, 4), (0, 2, 4), (1e9, 2**30)))  # 0: without A and B
best = max(readings, key=hits)
print(f"of {len(readings)} readings {sum(hits(reading) == hits(best) for reading in readings)} gives "
      f"{hits(best)} of 4, none gives more: scales {'double quantized' if best[0] else 'plain'}, "
      f"rest {8 * best[1]} bits, A and B {8 * best[2]} bits")
print(f"  {', '.join(f'{size:.1f}' for size in guanaco_sizes(*best))}, in units of {best[3]:,.0f} bytes")
assert hits(best) == 3 and best == (False, 2, 4, 1e9)

# %% [markdown]
# The base in NF4 with double quantization is well below what was printed. With plain scales, the rest in 16 bits, and A
# and B of r = 64 in float32, three of four come out, and 13B does not. That may be how they were counted, or not; the
# paper does not say. Nobody should take 5 GB for a format: the format is 3.9.
#
# ### A step of 65B
#
# Appendix G, Figure 6 divides the memory of training: 45.0 GB for 65B with one row of 512 tokens and checkpointing.
# (That number is not checked against the figure itself.) The abstract says less than 48 GB. The optimizer
# of bitsandbytes updates in one kernel, so the temporary tensors of PyTorch's AdamW are left out of the computed one.

# %%
step_65b = predict(llama_facts["65B"], "bf16, fp32 moments", 1, 512, checkpointing=True, quantized=True)
during = max([step_65b.gradients] + [size for phase, size in step_65b.moments.items() if phase != "optimizer step"])
total = (sum(step_65b.states.values()) + during) / 1e9
parts = {name: size / 1e9 for name, size in step_65b.states.items() if size} | {"at the peak beside it": during / 1e9}
print("GB:", "; ".join(f"{name} {gb:.1f}" for name, gb in parts.items()))
assert not figure("a step of 65B, r = 64, GB", "appendix G", 45.0, total, 1, "within 1 %; activations not described")
assert abs(total / 45.0 - 1) < 0.01 and total < 48 and step_65b.peak / 1e9 < 48

# %% [markdown]
# ### Quality, and a default
#
# Table 4 prints a mean for each format, of eight cells. The cells add up to 424.3 for LoRA in bf16, 417.5 for FP4 and
# 423.9 for NF4 with double quantization. Table 3 has a T5 of 3 billion parameters on Super-NaturalInstructions.

# %%
MMLU = (("LoRA in bf16", 424.3, 53.0, ""), ("FP4", 417.5, 52.2, ""), ("NF4", 423.9, 53.1, "of its own cells"))
for name, cells, printed, why in MMLU:
    assert figure(f"MMLU, {name}: mean", "Table 4", printed, cells / 8, 1, why) == (name != "NF4")
no_figure("Super-NI, T5-3B, NF4 double quantized", "Table 3", 55.3, "it takes the training of a T5 of 3 billion")
config = transformers.BitsAndBytesConfig(load_in_4bit=True)
default_fields = (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.bnb_4bit_compute_dtype)
print("load_in_4bit=True alone, transformers", transformers.__version__, "gives", default_fields)
assert default_fields == ("fp4", False, torch.float32)

# %% [markdown]
# The printed mean of NF4, 53.1, is a tenth above the mean of its cells, and that one is below the mean of bf16. A tenth
# of a point does not matter. That the order of two methods hangs on it does: there is no order.
#
# ### The table

# %%
for what, source, published, computed, word, why in figures:
    print(f"{what:42} {source:15} {published:>7} {computed:>9} {word:8} {why}")
tally = {word: sum(row[4] == word for row in figures) for word in ("agrees", "differs", "not here")}
print(tally)
assert sum(tally.values()) == len(figures) and tally["not here"] == 3

# %% [markdown]
# ## In an interview
#
# **In one minute.** QLoRA is LoRA over a base that is frozen in 4 bits. Each weight is one of 16 numbers, NF4, times
# the scale of its block of 64; the scales are in 8 bits, too (double quantization). That is 4.127 bits instead of 16.
# For every product a weight is unpacked into bf16 and thrown away again. Gradients go through the base, and only A
# and B are trained, in 16 or 32 bits. What shrinks is the base: a 65B trains on one GPU of 48 GB. What does not:
# activations, adapters, embeddings and head. The price is the work of unpacking, and a base whose weights are 9 %
# off, which is what A and B are trained on top of. Merge it into 16 bits; merging into 4 bits can round the update
# away.
#
# Twelve questions about QLoRA that you may well be asked. Answer aloud first. Below each answer you find where the
# chapter proves it, and a cell prints the evidence.

# %%
import torch

from utils import LoRA, attach, load_base
from utils.memory.estimate import facts_of, predict
from utils.memory.states import quantized_base
from utils.paging import simulate_training
from utils.quantization.base import NF4, dequantize_base, quantize_base
from utils.quantization.blocks import bits_per_number, dequantize_blockwise, quantize_blockwise
from utils.quantization.codebooks import fp4_codebook, int4_codebook, nf4_codebook
from utils.quantization.linear import NF4Linear
from utils.quantization.weights import quantize_weight, requantized_merge

# %%
gauss = torch.randn(2**18, generator=torch.Generator().manual_seed(0))

def rounded(values, book, block_size=64):
    """What comes back from 4 bits."""
    return dequantize_blockwise(*quantize_blockwise(values, book, block_size), book, block_size)

def off_in_percent(back, values):
    return 100 * ((back - values).norm() / values.norm()).item()

# %% [markdown]
# ### 1. What does QLoRA save over LoRA, and what not?
#
# **Answer.** The frozen base: from 2 bytes a weight to 4.127 bits, for the linear layers of the blocks. Embeddings and
# head stay in 16 bits. Gradients and moments of the adapters are the same, since it trains the same numbers; and so,
# to a percent on a 7B without dropout, are the activations. So with long rows or many of them the saving becomes a smaller and smaller share.
#
# **Wrong answers.** "Four times less memory": of the base, and not quite. "Its optimizer is smaller": LoRA's is as
# small.
#
# **Evidence.** *From 7B to 70B*, *Predict a whole QLoRA step*, the claims under *Memory*, and these lines:

# %%
seven = facts_of("Llama-2-7B", LoRA(r=16, targets="all-linear"))
for rows in (1, 8, 32):
    lora_step, qlora_step = (predict(seven, None, rows, 2048, quantized=quantized) for quantized in (False, True))
    print(f"{rows:>2} rows of 2,048: {lora_step.peak / 1e9:5.1f} GB, {qlora_step.peak / 1e9:5.1f} with a 4-bit base: "
          f"{100 * (1 - qlora_step.peak / lora_step.peak):.0f} % less")
    activations = [sum(step.kept.values()) for step in (lora_step, qlora_step)]
    assert abs(activations[1] / activations[0] - 1) < 0.01 and lora_step.gradients == qlora_step.gradients

# %% [markdown]
# ### 2. Storage dtype and compute dtype: what is the difference?
#
# **Answer.** In storage a weight is half a byte and a share of a scale. No arithmetic is done in it. For every product
# the weight is unpacked into the compute dtype, multiplied, and thrown away. So a 4-bit base computes in bf16, and the
# adapters have a third dtype of their own. If you name no compute dtype, transformers takes float32. A GPU's units for
# 16-bit products then have nothing to do, so it should be slower; that is known from elsewhere and not measured here.
#
# **Wrong answers.** "It multiplies 4-bit integers." "The gradients have 4 bits, too."
#
# **Evidence.** *The product, and what it leaves behind*, *Storage dtype and compute dtype*, *What `load_in_4bit=True`
# gives you*, and these lines:

# %%
layer = NF4Linear(quantize_weight(torch.randn(64, 128)))
for dtype in (torch.float32, torch.bfloat16):
    y = layer(torch.randn(2, 128, dtype=dtype))
    print(f"stored as {layer.weight.dtype}, {layer.weight.nbytes:,} bytes; x in {dtype}, y in {y.dtype}")
    assert y.dtype == dtype
assert layer.weight.nbytes * 2 == 64 * 128

# %% [markdown]
# ### 3. What is NF4, and why not INT4?
#
# **Answer.** A code book of 16 numbers that are quantiles of a normal distribution, scaled to [-1, 1], with an exact
# zero. Weights are roughly normal, so its numbers are dense where the weights are, while INT4 spends as many on the
# rare large ones. On Gaussian weights the error is about a seventh smaller. "Optimal" it is not: dividing by the
# block's largest weight changes the distribution.
#
# **Wrong answers.** "A 4-bit floating-point format": it has no exponent, it is a table. "It is optimal."
#
# **Evidence.** *From quantiles to a code book*, *Which code book?*, the claims under *The numbers of the format*, and
# this line:

# %%
books_of = {"NF4": nf4_codebook(), "INT4": int4_codebook(), "FP4": fp4_codebook()}
format_errors = {name: off_in_percent(rounded(gauss, book), gauss) for name, book in books_of.items()}
print("away from a Gaussian weight:", ", ".join(f"{name} {percent:.1f} %" for name, percent in format_errors.items()))
assert format_errors["NF4"] < 0.9 * format_errors["INT4"] < format_errors["FP4"] and (nf4_codebook() == 0).sum() == 1

# %% [markdown]
# ### 4. Why blocks, and why of 64?
#
# **Answer.** One scale for a whole matrix lets one large weight spoil all the others: they are crowded into the few
# codes near zero. A block confines the damage. A smaller block has a smaller error and costs more scales: 32 bits for
# each. 64 costs half a bit per weight, and double quantization brings that down to an eighth of a bit.
#
# **Wrong answers.** "For parallelism." "Smaller is always better": at 16 you would pay 6 bits for 4.
#
# **Evidence.** *Error and block size*, *One outlier*, and these lines:

# %%
with_outlier = gauss.clone()
with_outlier[0] = 100
rest = {}
for size in (16, 64, 1024, len(gauss)):
    restored = rounded(with_outlier, nf4_codebook(), size)
    rest[size] = off_in_percent(restored[1:], gauss[1:])
    print(f"block {size:>7,}: {bits_per_number(4, size, False):.3f} bits, all other weights {rest[size]:5.1f} % away")
assert rest[64] < 12 and rest[len(gauss)] > 80

# %% [markdown]
# ### 5. What does double quantization save?
#
# **Answer.** The scales of blocks of 64 are 32 / 64 = 0.5 bits per weight. In 8 bits, with one float32 for 256 of
# them, they are 8/64 + 32/(64 · 256) = 0.127. So 0.373 bits per weight: 3 GB for a 65B. It adds next to
# nothing to the error, because a scale that is a little off does not count beside the rounding to 16 codes. It is off
# unless asked for.
#
# **Wrong answers.** "It quantizes the weights twice." "It halves the model."
#
# **Evidence.** *Double quantization*, *Bits per weight*, and this line:

# %%
square = gauss.view(512, 512)
double_off = {double: off_in_percent(quantize_weight(square, double_quant=double).dequantize(), square)
              for double in (False, True)}
saved = (bits_per_number(double_quant=False) - bits_per_number(double_quant=True)) * 64.76e9 / 8 / 1e9
print(f"saved for 64.76 billion weights: {saved:.2f} GB; error {double_off[False]:.3f} %, "
      f"double quantized {double_off[True]:.3f} %")
assert 2.9 < saved < 3.1 and abs(double_off[True] / double_off[False] - 1) < 0.005

# %% [markdown]
# ### 6. Is QLoRA faster than LoRA?
#
# **Answer.** No, there is more work in a step: the same products, and each weight is unpacked for the forward pass
# and again for the backward pass. With checkpointing there is a third time. It can be faster end to end when the
# memory that it saves allows a batch that would not fit, or one GPU instead of two. Generation may gain, since it
# mostly waits for weights to be read, and 4 bits are read sooner; but only with a kernel that multiplies without
# writing the weight out. The work is counted in this chapter. Seconds on a GPU are not measured in it: say so when
# you are asked for them.
#
# **Wrong answers.** "Yes, 4-bit arithmetic is faster": there is none.
#
# **Evidence.** *The product, and what it leaves behind*, the claims on latency under *What it is*, and this line:

# %%
model = quantize_base(load_base("decoder", dtype=torch.float32), NF4()).train()
_ = attach(model, LoRA(r=4, targets="all-linear"))
ids = torch.randint(3, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
plain = unpackings_of(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
again = unpackings_of(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
print(f"28 layers are unpacked {plain} times in a step, {again} times with checkpointing")
assert 28 < plain < again

# %% [markdown]
# ### 7. How do you merge a QLoRA adapter?
#
# **Answer.** Into the base that it was trained over: unpack the 4-bit weights to 16 bits, add BA, and save in 16 bits.
# The original 16-bit weights are another base, 9 % away; the adapter never saw them. And merging back into 4 bits
# rounds a second time: an update that is small beside the steps of the code book is put back where it was. If you must
# serve in 4 bits, keep the adapter beside the base, or quantize knowingly and evaluate.
#
# **Wrong answers.** "`merge_and_unload` and done": ask into what. "Merge into the original, it is more precise."
#
# **Evidence.** *Merging into 4 bits*, *The whole model, merged in four ways*, *Before or after*, and these lines:

# %%
model = quantize_base(load_base("decoder", dtype=torch.float32), NF4()).eval()
ids = torch.randint(3, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
one_adapter = attach(model, LoRA(r=4, alpha=1, targets="all-linear", init="random_b"))
original_model = load_base("decoder", dtype=torch.float32)
with torch.no_grad():
    wanted = model(input_ids=ids).logits
    _ = dequantize_base(model)
    one_adapter.merge()
    gap = (model(input_ids=ids).logits - wanted).abs().max().item() / wanted.abs().max().item()
q_proj = original_model.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
small_update = 0.01 * q_proj.norm() * torch.nn.functional.normalize(torch.randn(q_proj.numel()), dim=0).view_as(q_proj)
_, error_of_update = requantized_merge(quantize_weight(q_proj).dequantize(), small_update)
print(f"unpacked, then merged: {gap:.1e} of the logits")
print(f"merged into 4 bits: error {error_of_update:.0%} of a small update")
assert gap < 1e-4 and error_of_update > 0.5

# %% [markdown]
# ### 8. What does a paged optimizer do, and when does it not help?
#
# **Answer.** Its moments lie in CUDA's unified memory. When a long batch needs the room, the driver moves their pages
# to the CPU, and they come back for the optimizer's step. So a spike does not end the run. If every step is a spike,
# every step waits for the bus. And a LoRA's moments are a small part of the whole, so there is little to page out.
#
# **Wrong answers.** "It makes the optimizer smaller": that is the 8-bit one. "It offloads the weights."
#
# **Evidence.** *Paged optimizers*, its simulator in `utils/paging.py`, and these lines:

# %%
GPU, adam_moments = 24 * 10**9, {"m": (10**9, True), "v": (10**9, True)}
for name, activations in (("one long batch", (1, 3, 1, 1)), ("all long", (3, 3, 3, 3)), ("too long", (1, 5, 1, 1))):
    steps = simulate_training(GPU, 20 * 10**9, adam_moments, [gb * 10**9 for gb in activations])
    fit, moved = [step.fits for step in steps], [round(step.moved / 1e9, 1) for step in steps]
    print(f"{name:15} fits {fit}, GB moved {moved}")
assert not steps[-1].fits

# %% [markdown]
# ### 9. It needs more memory than you computed. Where do you look?
#
# **Answer.** In this order: is it NF4 with double quantization, or FP4 without, which is the default? Did
# `prepare_model_for_kbit_training` turn embeddings and head into float32? Are the adapters in float32? Is the head's
# product with a large vocabulary in the peak? Then activations, and whether checkpointing is on. The first three can be
# computed on paper.
#
# **Wrong answers.** "bitsandbytes leaks." "Smaller r."
#
# **Evidence.** *What `load_in_4bit=True` gives you*, *What `prepare_model_for_kbit_training` does*, the claims under
# *How it is set up*, and these lines:

# %%
eight = facts_of("Llama-3-8B", LoRA(r=16, targets="all-linear"))
rest = eight.total - eight.trained - eight.in_blocks
for what, double, e in (("as QLoRA means it", True, 2), ("without double quantization", False, 2),
                        ("and embeddings and head in float32", False, 4)):
    print(f"Llama-3-8B {what:36} {quantized_base(eight.in_blocks, rest, double_quant=double, e=e) / 1e9:.2f} GB")
step_8b = predict(eight, None, 1, 2048, checkpointing=True, quantized=True)
phase = max(step_8b.moments, key=step_8b.moments.get)
print(f"and in a step of 2,048 tokens {step_8b.peak / 1e9:.1f} GB; the phase that needs most is the {phase}")
assert quantized_base(eight.in_blocks, rest, double_quant=False, e=4) > 1.3 * quantized_base(eight.in_blocks, rest)

# %% [markdown]
# ### 10. How do you check a quantized model before you train on it?
#
# **Answer.** Look at the dtype of each kind of layer and at the bytes in total. Unpack each weight and compare it with
# the original: 9 to 11 % for NF4 in blocks of 64, and every layer alike. Then the perplexity of the quantized base on
# your own text, beside that of the base. A layer that is off by much is an outlier or a bug, and the loss alone may
# not tell: training would go on around it.
#
# **Wrong answers.** "If it loads, it is right." "The loss falls."
#
# **Evidence.** *The same weights?*, where this found a mistake in a library, *One outlier*, and this line:

# %%
original_model = load_base("decoder", dtype=torch.float32)
quantized = quantize_base(load_base("decoder", dtype=torch.float32), NF4())
by_layer = {}
for name, layer in quantized.named_modules():
    if isinstance(layer, NF4Linear):
        percent = off_in_percent(layer.dequantize(), original_model.get_submodule(name).weight)
        by_layer.setdefault(name.split(".")[-1], []).append(percent)
print({kind: f"{max(values):.1f} %" for kind, values in by_layer.items()})
assert all(8 < value < 12 for values in by_layer.values() for value in values)

# %% [markdown]
# ### 11. QLoRA's NF4, or GPTQ, or AWQ?
#
# **Answer.** They are made for different ends. NF4 rounds each weight to the nearest code and looks at nothing but
# the weight. So it needs no data, happens while a model loads, and is good for training over it. GPTQ and AWQ are
# made for serving. They look at inputs from a calibration set and spend the error where inputs are small: AWQ scales
# the columns that meet large inputs up before it rounds, GPTQ lets weights not yet rounded make up for those that
# are. `peft` can put a LoRA on both as well. A usual way: train with QLoRA, merge into 16 bits, then GPTQ or AWQ, and
# evaluate.
#
# **Wrong answers.** "They are the same, all have 4 bits." "GPTQ is a way of fine-tuning": nothing is trained by a loss.
#
# **Evidence.** *Does the weight error tell what happens to the model?*, and these lines, AWQ's idea on one layer with
# some large inputs. The weight is off by more, the output by less:

# %%
draw = torch.Generator().manual_seed(0)
square, activity = torch.randn(512, 512, generator=draw), torch.randn(256, 512, generator=draw)
activity[:, ::64] *= 20  # a few inputs are always large
weight_off, output_off = {}, {}
for how, scale in (("nearest code", torch.ones(512)), ("columns scaled first", activity.abs().mean(0) ** 0.25)):
    returned = quantize_weight(square * scale, "int4").dequantize() / scale
    weight_off[how] = off_in_percent(returned, square)
    output_off[how] = off_in_percent(activity @ returned.T, activity @ square.T)
    print(f"INT4, {how:20}: weight {weight_off[how]:.1f} % off, output {output_off[how]:.1f} % off")
assert weight_off["columns scaled first"] > weight_off["nearest code"]
assert output_off["columns scaled first"] < 0.75 * output_off["nearest code"]

# %% [markdown]
# ### 12. When would you not use QLoRA?
#
# **Answer.** When the base fits in 16 bits with room for the batch: then LoRA has less work in a step, no rounding
# error, and a merge that is simple. When activations are the problem: long rows call for checkpointing or shorter
# rows, and 4 bits of weights hardly help. When the model is small, since much of it is embeddings that stay in 16
# bits. And when you must serve one merged model in 4 bits: quantize after the training, once, by a method made for
# serving.
#
# **Wrong answers.** "Never, it is LoRA with less memory." "Whenever the model is large": ask for the GPU.
#
# **Evidence.** *Predict a whole QLoRA step*, *Merging into 4 bits*, and these lines:

# %%
for name, rows, tokens in (("Qwen2.5-0.5B", 4, 512), ("Llama-2-7B", 1, 512), ("Llama-2-7B", 8, 2048)):
    counted_facts = facts_of(name, LoRA(r=16, targets="all-linear"))
    both = [predict(counted_facts, None, rows, tokens, quantized=quantized).peak / 1e9 for quantized in (False, True)]
    outside = 1 - counted_facts.in_blocks / (counted_facts.total - counted_facts.trained)
    print(f"{name:12} {rows} x {tokens:5,} tokens: LoRA {both[0]:5.1f} GB, QLoRA {both[1]:5.1f}; "
          f"{outside:3.0%} of the base stays in 16 bits")

# %% [markdown]
# ## What to read next
#
# - The paper: Dettmers et al. 2023, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314), *QLoRA*. Section 3 is three
#   pages, and you have built all of it but the paging, which you simulated; section 4 asks what it costs in quality.
# - Dettmers et al. 2021, [arXiv:2110.02861](https://arxiv.org/abs/2110.02861), *8-bit Optimizers via Block-wise
#   Quantization*: where blocks and the dynamic code book come from.
# - Yoshida 2023, [arXiv:2306.06965](https://arxiv.org/abs/2306.06965), *NF4 Isn't Information Theoretically Optimal
#   (and that's Good)*: a short note on the claim that NF4 is optimal, with a better code book for large blocks.
# - bitsandbytes' documentation of [`Linear4bit`](https://huggingface.co/docs/bitsandbytes/main/reference/nn/linear4bit)
#   and of [FSDP with QLoRA](https://huggingface.co/docs/bitsandbytes/main/fsdp_qlora), which explains why packed bytes
#   may be stored as another dtype.
# - Li et al. 2023, [arXiv:2310.08659](https://arxiv.org/abs/2310.08659), *LoftQ*: A and B that start by making up for
#   the rounding error, instead of at zero.
# - Xu et al. 2023, [arXiv:2309.14717](https://arxiv.org/abs/2309.14717), *QA-LoRA*: an adapter made so that it can be
#   merged into 4 bits without loss.
# - Frantar et al. 2022, [arXiv:2210.17323](https://arxiv.org/abs/2210.17323), *GPTQ*, and Lin et al. 2023,
#   [arXiv:2306.00978](https://arxiv.org/abs/2306.00978), *AWQ*: 4 bits that look at data while they round, for serving.
# - `utils/quantization/`, which is what you have written in pieces, and `utils/kernels/four_bit.py` for a GPU.
