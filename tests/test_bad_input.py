"""Wrong settings, and right ones in the wrong order: one clear sentence each, the model as it was (see wrong.py)."""

import math
import re

import pytest
import torch
from small_models import small_model
from torch import nn
from wrong import QV, Table, attached, check

from utils import LoRA, attach, load_adapter

TABLE = Table()
LLAMA = r"in this LlamaForCausalLM\."
NAMES = r"it can be a tuple of names of modules, or one regular expression as a str"
LEFT = r"exclude and layers together leave none of the 4 matched modules"
PAIR = {"targets": QV}

# name -> (settings of LoRA, what attaching it says)
SETTINGS = {
    "target that matches nothing": (
        {"targets": ("q_prj",)},
        rf"no module is called q_prj {LLAMA} Near in name: .*q_proj.*\.",
    ),
    "target like nothing": (
        {"targets": ("xyz",)},
        rf"no module is called xyz {LLAMA} It has: .*down_proj, .*v_proj\.",
    ),
    "targets matched in part": ({"targets": ("q_proj", "query")}, rf"no module is called query {LLAMA} .*"),
    "part of a name": ({"targets": ("proj",)}, rf"no module is called proj {LLAMA} .*"),
    "regex that matches nothing": (
        {"targets": ".*query"},
        r"targets='\.\*query' matches no module of this LlamaForCausalLM",
    ),
    "name given as a regex": (
        {"targets": "q_proj"},
        r"targets='q_proj' matches no module of this LlamaForCausalLM; if it is a name, write \('q_proj',\)",
    ),
    "invalid regex": ({"targets": "(q_proj"}, r"targets is not a regular expression: '\(q_proj' \(.*\)"),
    "targets empty": ({"targets": ()}, r"targets is empty: name at least one module, or say 'all-linear'"),
    "targets of numbers": ({"targets": (1, 2)}, rf"targets is \(1, 2\); {NAMES}"),
    "targets a number": ({"targets": 7}, rf"targets is 7; {NAMES}"),
    "target is a container": (
        {"targets": ("self_attn",)},
        r"model\.layers\.0\.self_attn: LoRA adapts nn\.Linear, Conv1D and nn\.Embedding, not LlamaAttention",
    ),
    "target is a norm": (
        {"targets": ("norm",)},
        r"model\.norm: LoRA adapts nn\.Linear, Conv1D and nn\.Embedding, not LlamaRMSNorm",
    ),
    "layer that does not exist": (
        PAIR | {"layers": (1, 2, 7)},
        r"layers \[2, 7\] do not exist; this model's layers are 0 to 1",
    ),
    "negative layer": (PAIR | {"layers": (-1,)}, r"layers \[-1\] do not exist; this model's layers are 0 to 1"),
    "layers a number": (PAIR | {"layers": 1}, r"layers is 1; it can be None or a tuple of layer numbers"),
    "layers of bools": (PAIR | {"layers": (True,)}, r"layers is \(True,\); it can be None or a tuple of layer .*"),
    "no layers": (PAIR | {"layers": ()}, LEFT),
    "everything excluded": (PAIR | {"exclude": QV}, LEFT),
    "exclude that matches nothing": (PAIR | {"exclude": ("k_prj", "v_proj")}, r"exclude: no module fits \['k_prj'\]"),
    "exclude by a regex for nothing": (PAIR | {"exclude": "k_prj"}, r"exclude: no module fits 'k_prj'"),
    "exclude by an invalid regex": (PAIR | {"exclude": "*"}, r"exclude is not a regular expression: '\*' \(.*\)"),
    "rank for a module not adapted": (
        PAIR | {"rank_pattern": {"down_proj": 4}},
        r"no adapted module fits the pattern 'down_proj'",
    ),
    "alpha for no module": (PAIR | {"alpha_pattern": {"q_prj": 4}}, r"no adapted module fits the pattern 'q_prj'"),
    "pattern an invalid regex": (
        PAIR | {"rank_pattern": {"(": 4}},
        r"rank_pattern is not a regular expression: '\(' \(.*\)",
    ),
    "pattern a list": (
        PAIR | {"rank_pattern": ["q_proj"]},
        r"rank_pattern is \['q_proj'\]; it must be a dict \{name or regular expression: value\}",
    ),
    "trained whole, but absent": (
        PAIR | {"modules_to_save": ("score",)},
        r"modules_to_save: no module is called score\. It has: .*\.",
    ),
    "trained whole, inside of another": (
        PAIR | {"modules_to_save": ("mlp", "up_proj")},
        r"modules_to_save: model\.layers\.0\.mlp\.up_proj is a part of model\.layers\.0\.mlp, which is trained .*",
    ),
    "target inside of what is trained whole": (
        {"targets": ("lm_head",), "modules_to_save": ("lm_head",)},
        rf"no module is called lm_head {LLAMA} lm_head is trained whole \(modules_to_save\)\.",
    ),
    "rank 0 for one module": (
        PAIR | {"rank_pattern": {"q_proj": 0}},
        r"the rank is 0; it must be a whole number from 1 up",
    ),
    "alpha 0 for one module": (
        PAIR | {"alpha_pattern": {"q_proj": 0}},
        r"alpha is 0; it must be a positive number",
    ),
    "unknown scaling": (
        {"scaling": "sqrt"},
        r"scaling is 'sqrt'; it can be 'standard' \(alpha / r\) or 'rslora' \(alpha / sqrt\(r\)\)",
    ),
    "unknown init": ({"init": "zeros"}, r"init is 'zeros'; it can be 'uniform', 'gaussian', 'random_b'"),
    "unknown bias": ({"bias": "some"}, r"bias is 'some'; it can be 'none', 'lora_only', 'all'"),
    "bias of a model without": (PAIR | {"bias": "all"}, r"bias='all', but there is no bias to train here: .*"),
    "dtype of whole numbers": (
        {"dtype": torch.int8},
        r"dtype is torch\.int8; it can be None or a floating-point torch\.dtype",
    ),
    "dtype a str": ({"dtype": "bf16"}, r"dtype is 'bf16'; it can be None or a floating-point torch\.dtype"),
}
for r in (0, -1, 2.0, "8", True, None):
    SETTINGS[f"rank {r!r}"] = {"r": r}, rf"the rank is {re.escape(repr(r))}; it must be a whole number from 1 up"
for a in (0, -1.0, math.nan, math.inf, "16", True):
    SETTINGS[f"alpha {a!r}"] = {"alpha": a}, rf"alpha is {re.escape(repr(a))}; it must be a positive number"
for p in (1, 1.5, -0.1, math.nan, "0.1"):
    says = rf"dropout is {re.escape(repr(p))}; it is a probability from 0 up to, not including, 1"
    SETTINGS[f"dropout {p!r}"] = {"dropout": p}, says

for name, (options, says) in SETTINGS.items():

    @TABLE.row(name, says)
    def _(model, tmp, options=options):
        yield
        attach(model, LoRA(**options))


# ------------------------------------------------------------------------------------------------- which model


@TABLE.row("family without usual targets", r"no usual targets are known for the model family 'mystery': name them .*")
def _(model, tmp):
    model.config.model_type = "mystery"
    yield
    attach(model, LoRA())


@TABLE.row("a model that is none", r"the model is a str; attach needs a torch\.nn\.Module", TypeError)
def _(model, tmp):
    yield
    attach("llama", LoRA())


@TABLE.row("a configuration that is none", r"the configuration is a dict; attach needs one such as LoRA.*", TypeError)
def _(model, tmp):
    yield
    attach(model, {"r": 8})


@TABLE.row("a layer that torch never calls", r"attention\.out_proj: torch reads its weight without calling it, .*")
def _(model, tmp):
    model.attention = nn.MultiheadAttention(8, 2)
    yield
    attach(model, LoRA(targets=("out_proj",)))


@TABLE.row("an embedding that computes more", r"extra: LoRA knows nn\.Embedding; Hashed does more than look rows up")
def _(model, tmp):
    class Hashed(nn.Embedding):
        pass

    model.extra = Hashed(4, 4)
    yield
    attach(model, LoRA(targets=("q_proj", "extra")))


# ------------------------------------------------------------------------------------------------- in which order


@TABLE.row("the same name twice", r"the model has an adapter called 'default' already: detach it, or give this one .*")
def _(model, tmp):
    attached(model)
    yield
    attached(model)


@TABLE.row("merged twice", r"adapter 'default' is merged already")
def _(model, tmp):
    adapter = attached(model)
    adapter.merge()
    yield
    adapter.merge()


@TABLE.row("unmerged without a merge", r"adapter 'default' is not merged")
def _(model, tmp):
    adapter = attached(model)
    yield
    adapter.unmerge()


@TABLE.row("merged while switched off", r"adapter 'default' is switched off: activate it before merging")
def _(model, tmp):
    adapter = attached(model)
    attached(model, "other")
    yield
    adapter.merge()


@TABLE.row("merged while disabled", r"adapter 'default' is switched off: activate it before merging")
def _(model, tmp):
    adapter = attached(model)
    off = adapter.disabled()  # entered by hand: a `with` would end before the model is looked at
    off.__enter__()
    yield
    adapter.merge()


@TABLE.row("attached while another is merged", r"adapter 'default' is merged into the weights: unmerge it before .*")
def _(model, tmp):
    attached(model).merge()
    yield
    attached(model, "other")


@TABLE.row(
    "loaded while another is merged",
    r"the adapter in .* does not fit this LlamaForCausalLM: adapter 'other' is merged into the weights: .*",
)
def _(model, tmp):
    attached(small_model("llama")).save(tmp)
    attached(model, "other").merge()
    yield
    load_adapter(model, tmp)


@TABLE.row("switched while another is merged", r"adapter 'other' is merged into the weights: unmerge it before .*")
def _(model, tmp):
    adapter = attached(model)
    attached(model, "other").merge()
    yield
    adapter.activate()


@TABLE.row("tied weights merged", r"lm_head\.weight is the same tensor as model\.embed_tokens\.weight: merging .*")
def _(model, tmp):
    model.lm_head.weight = model.model.embed_tokens.weight
    adapter = attached(model, targets=("q_proj", "lm_head"))
    yield
    adapter.merge()


@TABLE.row("tied weights exported", r"model\.embed_tokens\.weight is the same tensor as lm_head\.weight: merging .*")
def _(model, tmp):
    model.lm_head.weight = model.model.embed_tokens.weight
    adapter = attached(model, targets=("q_proj", "embed_tokens"))
    yield
    adapter.export(tmp / "plain")


@TABLE.row("infinity merged", r"model\.layers\.0\.self_attn\.q_proj: the merged weight would not be finite; .*")
def _(model, tmp):
    adapter = attached(model)
    adapter.parameters()[0].data[0, 0] = math.inf
    yield
    adapter.merge()


@TABLE.row("trained whole around another", r"modules_to_save: another adapter is attached inside .*mlp; detach it .*")
def _(model, tmp):
    attached(model, targets=("up_proj",))
    yield
    attached(model, "other", modules_to_save=("mlp",))


for verb in ("activate", "merge", "unmerge", "detach", "save", "export", "disabled"):

    @TABLE.row(f"{verb} after detach", r"adapter 'default' was detached: attach or load it again")
    def _(model, tmp, verb=verb):
        adapter = attached(model)
        adapter.detach()
        yield
        if verb == "disabled":
            with adapter.disabled():
                pass
        else:
            getattr(adapter, verb)(*[tmp / "folder"] if verb in ("save", "export") else [])


@TABLE.cases()
def test_says_it_in_one_sentence_and_changes_nothing(case, tmp_path):
    check(case, tmp_path)


def test_an_encoder_layer_of_torch_is_refused():
    """In eval mode nn.TransformerEncoderLayer hands its weights to one fused kernel and calls no layer."""
    with pytest.raises(ValueError, match="linear1: torch reads its weight without calling it"):
        attach(nn.TransformerEncoderLayer(8, 2, 16), LoRA(targets=("linear1",)))
