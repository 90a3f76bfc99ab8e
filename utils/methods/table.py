"""The table of methods in utils/methods/README.md, made from the code: python -m utils.methods.table

What is trained is read from each configuration's docstring, whether it can be merged from an adapter on a tiny model,
the rest from classes and from the tests that name them. A test compares the file with what this makes.
"""

import importlib
import inspect
import re

from utils.attach import attach
from utils.methods.parts import TrainedCopy
from utils.methods.registry import HOME, methods
from utils.models import load_base
from utils.paths import ROOT

FILE = ROOT / "utils" / "methods" / "README.md"
HEAD = """# The methods

Made by `python -m utils.methods.table` from the code. One file per method, readable beside its paper; the same verbs
for all: attach, print, parameters, disabled, merge, unmerge, save, load, detach, activate.

"""
COLUMNS = ("method", "paper", "trains", "merge", "PEFT type", "CPU path", "GPU path", "tested against")
NEEDED = {"AdaLoRA": {"total_steps": 100}}  # settings without a default
OWN_GRADIENTS = {  # autograd functions written by hand
    "LoRA": "LoRAFunction",
    "DoRA": "DoRAFunction",
    "AdaLoRA": "LoRAFunction, GramDistances",
}
KERNELS = {"LoRA": "kernels/lora.py", "DoRA": "kernels/dora.py"}  # Triton; beside them everything is plain PyTorch


def row(cls):
    """The cells of one method, by column."""
    code = importlib.import_module(cls.__module__)
    document = " ".join(inspect.getdoc(cls).split())
    paper = re.search(r"arxiv\.org/abs/([\d.]+)", code.__doc__)[1]
    peft_type = cls.peft_type or "none: a format of our own"
    return {
        "method": f"[{cls.__name__}]({code.__name__.rsplit('.', 1)[-1]}.py)",
        "paper": f"[{paper}](https://arxiv.org/abs/{paper})",
        "trains": re.search(r"Trains (.+?) \([A-Z][^()]*\d{4}", document)[1],
        "merge": merge(cls),
        "PEFT type": f"{peft_type}, use_dora" if cls.__name__ == "DoRA" else peft_type,
        "CPU path": OWN_GRADIENTS.get(cls.__name__, "PyTorch"),
        "GPU path": f"the same, or Triton: {KERNELS[cls.__name__]}" if cls.__name__ in KERNELS else "the same",
        "tested against": tested_against([c.__name__ for c in cls.__mro__]),
    }


def merge(cls):
    """Whether an adapter of the method can be merged; if not, why."""
    config = cls(**NEEDED.get(cls.__name__, {}))
    for base in ({"kind": "decoder"}, {"kind": "encoder", "head": "classify", "num_labels": 2}):
        try:
            parts = attach(load_base(**base), config).parts.values()
        except ValueError:
            continue  # BitFit wants biases, P-Tuning v2 a head
        own = [part for part in parts if not isinstance(part, TrainedCopy)]
        reasons = [part.why_not for part in own if not part.mergeable and part.tensors()]
        return f"no: it {reasons[0]}" if reasons else "yes"
    raise ValueError(f"{cls.__name__} fits neither tiny model")


def tested_against(names):
    """The libraries that a method's tests compare it with, under one of these names: its own, and what it builds on.

    Every method has tests by hand besides.
    """
    word = re.compile(rf"\b({'|'.join(names)})\b")
    texts = {file.stem: file.read_text() for file in sorted((ROOT / "tests").glob("test_*.py"))}
    about = {stem: text for stem, text in texts.items() if word.search(text)}
    libraries = {
        "peft": any("peft" in stem for stem in about),
        "adapters 1.3": any("test_adapters_library" in stem + text for stem, text in about.items()),
    }
    return ", ".join(name for name, found in libraries.items() if found) or "its definition, by hand"


def table():
    """The whole file, as text."""
    rows = [row(cls) for cls in methods()]
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cells[c].replace("|", "\\|") for c in COLUMNS) for cells in rows]
    return HEAD + "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(table())
    print(f"{FILE.relative_to(ROOT)}: {len(HOME)} methods")
