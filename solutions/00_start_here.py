# %% [markdown]
# # 0. Start here
#
# Ten minutes. At the end you know that your machine is ready, how an exercise works, how to hand one in, and what this
# course measures.
#
# The course teaches **parameter-efficient fine-tuning**, PEFT for short: making a large pretrained model do a new task
# by training a small number of numbers, often less than one in a hundred. You build each method from its equation. You
# measure what it does. And whenever you try something, you are told what exactly is right or wrong with it.

# %% [markdown]
# ## Your machine
#
# This cell looks at the machine that runs this notebook, and says how an adapter for a model of 1.5 billion numbers would
# be trained on it, and why. Do not mind the words that you do not know yet.

# %% tags=["nbval-ignore-output"]
import math
import platform

import torch

from utils import load_base, load_task, load_tokenizer
from utils.checks import check
from utils.hardware import KNOWN, settings

print(f"Python {platform.python_version()}, torch {torch.__version__}\n")
print(settings())

# %% [markdown]
# The same rules answer for a machine that you do not have. A T4, the free GPU on Colab, is the one with a trap: asked
# whether it supports bfloat16, it says yes, and then emulates it slowly.

# %%
print(settings("T4"))

# %% [markdown]
# ## Three profiles
#
# A cell near the top of every notebook sets `profile`. It decides which models and data sets are used; the text and the
# exercises stay the same.
#
# | profile | models | needs | for |
# |---|---|---|---|
# | `tiny` | about a million numbers, trained by this course and shipped with it | any CPU, no network | learning, and the tests of this course |
# | `colab` | about half a billion, from the Hugging Face hub | a 16 GB GPU such as Colab's T4 | seeing the same effects on a real model |
# | `gpu` | about seven billion, from the hub | a GPU with 24 GB or more | real sizes |
#
# Begin with `tiny`. A tiny model is not a toy version of the mathematics: every equation, every file and every mistake
# is the same as at full size. What may differ is how well a method *performs*, and there the text says what was measured
# and at which size.

# %%
from pathlib import Path

from utils.models import PROFILES

for name, bases in PROFILES.items():
    print(f"{name:6}", {kind: Path(base).name for kind, base in bases.items()})

# %% [markdown]
# Here is the tiny decoder, a language model, at work. It has read invented documents: people, towns, shop dialogues. Ask
# it something it has read.

# %%
model, tokenizer = load_base("decoder", profile), load_tokenizer("decoder", profile)
example = load_task("tickets", profile)["test"][0]
inputs = tokenizer(example["prompt"], return_tensors="pt", return_token_type_ids=False)
reply = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(reply[0], skip_special_tokens=True))

# %% [markdown]
# It answers like the shop's agent, as it learned to. In chapter 2 an adapter of less than a tenth of its size makes it
# answer with a record instead, and you take the new behaviour off again like a coat. You also train one yourself.

# %% [markdown]
# ## How an exercise works
#
# An exercise is a function with a description of what goes in and what comes out, and no body. You write the body and
# run the cell. The next code cell calls `check`, which does one of three things.
#
# - **Right:** it says so, with one fact worth knowing.
# - **Wrong:** it says what is wrong and where to look, and lends you the course's own function for the rest of the
#   chapter. It tries yours on fresh random inputs of several shapes, so an answer that fits one example does not pass.
# - **Blank:** it says so, and lends you ours, too. Nothing further down breaks. Skip what you like and come back.
#
# Between the exercise and its check are hints and the answer, folded. Opening them is no shame; trying for the time
# that the heading gives, first, is what makes it stick.

# %% [markdown] exercise="utils.hardware:tensor_bytes" difficulty=1 importance=4 minutes=3 points=1
# ## How many bytes?
#
# Memory is the reason why PEFT exists, and every estimate of memory starts here: how many bytes does a tensor take? It
# has as many numbers as the product of its shape, and each number takes `dtype.itemsize` bytes.
#
# Complete `tensor_bytes`. An empty shape, `()`, is a single number.
#
# Hint (the product): `math.prod(shape)` multiplies, and gives 1 for an empty shape.
#
# Hint (the size of one number): `torch.float32.itemsize` is 4, `torch.bfloat16.itemsize` is 2.

# %% [markdown]
# Use it at once. One weight matrix of Llama-2-7B has the shape (4096, 4096). How many of them fill the 16 GB of a T4?

# %%
for dtype in (torch.float32, torch.bfloat16, torch.int8):
    size = tensor_bytes((4096, 4096), dtype)
    print(f"{str(dtype):15} {size:>12,} bytes; {KNOWN['T4'].memory_gb * 10**9 / size:7.1f} of them fill a T4")
assert tensor_bytes((4096, 4096), torch.float32) == torch.zeros(4096, 4096).nbytes

# %% [markdown]
# A check that only nods is worth little, so try it on something wrong as well. This version counts numbers instead of
# bytes:

# %%
def tensor_bytes_wrong(shape, dtype):
    return math.prod(shape)

tensor_bytes_wrong.__name__ = "tensor_bytes"  # check finds an exercise by its name
_ = check(tensor_bytes_wrong)

# %% [markdown]
# ## What this course measures
#
# - **Counts, exactly.** Parameters and bytes are counted, not estimated, and compared with arithmetic that you did first.
# - **Agreement.** What you build is compared with `peft`, `bitsandbytes` and `transformers`: outputs, gradients, files.
# - **Effects, with their spread.** Where training is involved, results come from several seeds, and each method's
#   learning rate was tuned with the same number of tries. Experiments that take longer than a reading are recorded in
#   `data/experiments`; the notebook plots the record and repeats one part of it live.
# - **Claims.** Each chapter tests statements that circulate about its method. Many are true. Some are not, and a number
#   of them depend on something that the statement leaves out.
#
# Where an effect does not show on the tiny models, the text says so.

# %% [markdown]
# ## Handing in
#
# If you work alone, the checks are your teacher. If you are in a class, hand in the notebook file itself, with your
# cells in it. Do not rename the functions; cells that you add, move or delete by accident are put right before grading.
# Before you hand in, run all cells once from the top, so that you see what the grader will see: *Kernel → Restart Kernel
# and Run All Cells*. Under the grader nothing is lent: a blank or wrong exercise gets no points.
#
# Teachers find everything about handing out, collecting and grading in the README.
#
# ## Where to go
#
# Chapters can be read in any order once you know LoRA. If you have one evening, read chapter 2. If you have an interview
# next week, read the last section of each chapter first: ten questions each, with short answers, long answers, the wrong
# answers one hears, and the cell that proves the right one.
