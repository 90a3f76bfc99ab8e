"""Prefix tuning against PEFT's on a whole tiny Llama: CPU time of forward + backward, and bytes kept for backward.

Both put the prefix in front of the same keys and values, which the attention function then keeps, and the frozen model
does the rest: frozen / peft is the least that ours / peft could be. What we save is the network, which PEFT runs for
every sample, with all it keeps, and a mask for every sample. So a flat prefix costs about what PEFT's costs, and the
bytes get nowhere near 0.90: the network's are few beside the model's.
"""

import copy

import torch
from peft import PrefixTuningConfig, get_peft_model

from bench import common
from utils import PrefixTuning, attach

TITLE = "Prefix tuning, batch 16, forward + backward"
SETTINGS = (  # virtual tokens, tokens of a text, width of the network
    (20, 32, None),
    (20, 32, 512),
    (20, 128, None),
    (20, 128, 512),
    (100, 128, 512),
)


def measure(repeats):
    """The rows of the table, as dicts."""
    return [row(*settings, repeats) for settings in SETTINGS]


def row(length, tokens, hidden, repeats):
    """One row: a flat prefix, or with `hidden` one that a network makes."""
    models = pair(length, hidden)
    ids = torch.randint(1024, (16, tokens))
    common.same(models, lambda model: model(ids).logits)

    def loss(model):
        return model(ids, labels=ids).loss

    def step(model):
        model.zero_grad()
        loss(model).backward()

    about = {"prefix": length, "tokens": f"16 x {tokens}", "network": hidden or "none"}
    return common.compare(about, models, loss, step, repeats, [], 0.90, 0.90)


def pair(length, hidden):
    """{frozen, ours, peft}, equal in all numbers: PEFT has one tensor where we have one for each layer."""
    base = common.tiny_llama()
    network = {"prefix_projection": True, "encoder_hidden_size": hidden} if hidden else {}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **network)
    mine, other = copy.deepcopy(base), get_peft_model(copy.deepcopy(base), config)
    own = list(attach(mine, PrefixTuning(length, hidden)).parts[""].tensors().values())
    theirs = list(other.prompt_encoder["default"].parameters())
    with torch.no_grad():
        if hidden:  # E, W1, b1, and then W2 and b2 of each layer
            for tensor, source in zip(theirs, (*own[:3], torch.cat(own[3::2]), torch.cat(own[4::2])), strict=True):
                tensor.copy_(source)
        else:
            theirs[0].copy_(torch.cat(own, dim=1))
    return {"frozen": base.train(), "ours": mine.train(), "peft": other.train()}
