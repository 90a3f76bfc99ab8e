"""The graders: `lora_delta = check(lora_delta)`.

core.py      what an exercise is, how an attempt is run, what check() prints and returns
diagnose.py  from a wrong result to one sentence
one module per chapter: the exercises, each a reference, fresh random cases, and its list of named mistakes
"""

from utils.checks.core import check, find

__all__ = ["check", "find"]
