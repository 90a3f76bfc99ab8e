"""The machinery of the tables of wrong input: each row gets one clear sentence, and nothing has changed.

A row is a generator over (model, tmp), a small Llama and an empty folder. What comes before its `yield` is right and
sets the scene; what comes after it is wrong and must raise. In between, the model and the files are photographed; a row
about another model yields that one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from method_table import config_of
from small_models import small_model

from utils import LoRA, attach

QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Row:
    name: str
    error: type
    says: str  # a regular expression that the whole message must match
    run: Callable


class Table(list):
    """Rows, added with a decorator."""

    def row(self, name, says, error=ValueError):
        def put(run):
            self.append(Row(name, error, says, run))
            return run

        return put

    def cases(self):
        assert len({r.name for r in self}) == len(self), "two rows have the same name"
        return pytest.mark.parametrize("case", [pytest.param(r, id=r.name) for r in self])


def attached(model, name="default", **options):
    """An adapter that is not the identity."""
    return attach(model, LoRA(**{"r": 4, "targets": QV, "init": "random_b"} | options), name)


# The methods beside LoRA, by their rows of method_table, and a small model for each.
OTHERS = {
    "dora": "llama",
    "adalora": "llama",
    "houlsby": "llama",
    "pfeiffer": "llama",
    "parallel": "llama",
    "llama-adapter": "llama",
    "prompt tuning": "llama",
    "p-tuning": "llama",
    "prefix through a network": "llama",
    "p-tuning v2": "bert",
    "bitfit": "qwen2",
    "ia3": "llama",
    "mam": "llama",
    "unipelt": "llama",
}


def attached_other(method, model=None, name="default"):
    """An adapter of another method, by default on its model of OTHERS."""
    model = small_model(OTHERS[method]) if model is None else model
    return attach(model, config_of(method, model.config.model_type), name)


def photograph(model, tmp):
    """Everything a wrong call might have changed: all bytes of the model (NaN equals NaN then), and all the rest."""
    numbers = {n: t.detach().clone().view(torch.uint8) for n, t in model.state_dict().items()}
    modules = [(n, type(m), m.training) for n, m in model.named_modules()]
    trained = [(n, p.requires_grad) for n, p in model.named_parameters()]
    states = [(n, a.active, a.merged) for n, a in getattr(model, "_attached_adapters", {}).items()]
    files = {str(f): f.read_bytes() for f in tmp.rglob("*") if f.is_file()}
    return numbers, (modules, trained, states, files)


def check(case, tmp):
    """Run one row."""
    model = small_model("llama")
    scene = case.run(model, tmp)
    other = next(scene)
    model = model if other is None else other
    numbers, rest = photograph(model, tmp)
    with pytest.raises(case.error) as raised:
        next(scene)
    message = str(raised.value)
    assert type(raised.value) is case.error
    assert re.fullmatch(case.says, message), message
    assert "\n" not in message and len(message) < 500
    numbers_after, rest_after = photograph(model, tmp)
    assert rest_after == rest
    assert numbers_after.keys() == numbers.keys()
    assert all(torch.equal(numbers_after[n], numbers[n]) for n in numbers)
