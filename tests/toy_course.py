"""A toy chapter with a library of its own, for the tests of the notebook tools; the fixture `toy` writes it out."""

import nbformat

TOYLIB = '''
"""What the toy chapter teaches, and a check with the manners of the real one."""

import os


def square(x):
    """The square of x.

    x: a number
    """
    # multiplied, not raised: this is the idea
    return x * x


class Pair:
    """Two numbers."""

    names = ("first", "second")

    def __init__(self, first, second):
        """Keep both."""
        self.first, self.second = first, second

    @staticmethod
    def zero():
        return Pair(0, 0)


def total(values):
    """The sum of numbers."""
    return sum(values)


TRIALS = {"square": (square, 3), "Pair": (Pair, None), "total": (total, [1, 2])}


def check(attempt, point=None):
    reference, argument = TRIALS[attempt.__name__]
    try:
        if isinstance(attempt, type):
            made = attempt(1, 2)
            right = (made.first, made.second) == (1, 2)
        else:
            right = attempt(argument) == reference(argument)
        says = "wrong."
    except NotImplementedError:
        right, says = False, "not written yet."
    if not right and os.environ.get("NBGRADER_EXECUTION"):
        raise AssertionError(f"{attempt.__name__}: {says}")
    print(f"{attempt.__name__}: {'right. Good.' if right else says}")
    return attempt if right else reference
'''

CHAPTER = """\
# %% [markdown]
# # 1. Toy
#
# Ten minutes.

# %%
from toylib import check

# %% [markdown]
# ## The idea
#
# A number times itself.

# %% [markdown] exercise="toylib:square" difficulty=1 importance=2 minutes=3 points=2
# ## Square a number
#
# Complete `square`.
#
# Hint (the idea): multiply.
# Twice the same.
#
# Hint (the shapes): there are none.

# %%
print(square(4))

# %% [markdown] exercise="toylib:Pair" difficulty=2 importance=1 minutes=1 points=1 remark="short" remark_points=1
# ## Keep two numbers
#
# Complete `Pair`.

# %% [markdown] exercise="toylib:total" difficulty=1 importance=1 minutes=2 points=3
# ## Add numbers

# %% tags=["nbval-ignore-output"] slug="sum"
import time

time.time()
"""


def edit(root, old, new):
    """Replace text in the chapter's source."""
    path = root / "solutions" / "01_toy.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def notebook(root, folder):
    return nbformat.read(root / folder / "01_toy.ipynb", as_version=4)


def by_id(book):
    return {cell.id: cell for cell in book.cells}
