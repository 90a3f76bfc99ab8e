"""Wrong settings, and right ones in the wrong order: one clear sentence each, the model as it was (see wrong.py)."""

import math
from dataclasses import fields, replace

import pytest
import torch
import transformers as tf
from method_table import METHODS, config_of
from small_models import COMMON, TOKENS, small_model
from torch import nn
from wrong import OTHERS, QV, Table, attached, attached_other, check

from utils import LoRA, attach, load_adapter, lora_plus_groups
from utils.methods.registry import methods

# ------------------------------------------------------------------------------------------- settings by themselves

# kind of a setting -> (values that are none, what is said of them)
WRONG = {
    "rank": ((None, True, -1, 0, 2.0, math.nan, "8"), "the rank is {}; it must be a whole number from 1 up"),
    "count": ((None, True, -1, 0, 2.0, math.nan, "8"), "{name} is {}; it must be a whole number from 1 up"),
    "count or None": ((True, -1, 0, 2.0, math.nan, "8"), "{name} is {}; it must be a whole number from 1 up"),
    "from 0": ((None, True, -1, 2.0, math.nan, "8"), "{name} is {}; it must be a whole number from 0 up"),
    "steps": ((True, -1, 0, 2.0, math.nan, "8"), "{name} is {}; it must be a whole number from 1 up"),
    "positive": ((None, True, -1, 0, math.nan, math.inf, "1"), "{name} is {}; it must be a positive number"),
    "positive or 0": ((None, True, -1, math.nan, math.inf, "1"), "{name} is {}; it must be a positive number"),
    "number": ((None, True, math.nan, math.inf, "1"), "{name} is {}; it must be a number"),
    "probability": (
        (None, True, -0.1, 1, math.nan, "0.1"),
        "{name} is {}; it is a probability from 0 up to, not including, 1",
    ),
    "word": ((None, True, 0, "zeros", ["none"]), "{name} is {}; it can be "),
    "yes or no": ((None, 0, 1, "yes"), "{name} is {}; it can be True, False"),
    "yes, no or None": ((0, 1, "yes"), "{name} is {}; it can be None, False, True"),
    "1 or 2": ((None, True, 0, 3, "1"), "{name} is {}; it can be 1, 2"),
    "dtype": ((True, 32, "bf16", torch.int8), "{name} is {}; it can be None or a floating-point torch.dtype"),
    "names": ((True, 7, math.nan, (1, 2), (None,), {"q": 1}), "{name} is {}; it can be a tuple of names of modules"),
    "layers": ((True, 1, -1, "0", (0.5,), (True,)), "{name} is {}; it can be None or a tuple of layer numbers"),
    "dict": (
        (True, 0, [], ["q"], "q", {1: 2}),
        "{name} is {}; it must be a dict {{name or regular expression: value}}",
    ),
    "tokens": ((None, True, -1, math.nan, "a text", (-1,), (True,)), "{name} must be token numbers"),
}
# setting -> its kind, in all methods but where a line names one
KINDS = {
    **dict.fromkeys(("r", "init_r", "target_r"), "rank"),
    **dict.fromkeys(("num_virtual_tokens", "adapter_len", "delta_t"), "count"),
    **dict.fromkeys(("size", "hidden", "adapter_layers"), "count or None"),
    **dict.fromkeys(("tinit", "tfinal"), "from 0"),
    **dict.fromkeys(("alpha", "reduction", "scale", "init_std"), "positive"),
    **dict.fromkeys(("dropout", "beta1", "beta2"), "probability"),
    **dict.fromkeys(("init", "adapter_init", "lora_init", "bias", "scaling", "dropout_on"), "word"),
    **dict.fromkeys(("activation", "reads", "gate", "encoder"), "word"),
    **dict.fromkeys(("targets", "exclude", "feedforward", "modules_to_save"), "names"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), "dict"),
    "total_steps": "steps",
    "orth_weight": "positive or 0",
    "gate_init": "number",
    "layer_norms": "yes or no",
    "queries": "yes, no or None",
    "num_transformer_submodules": "1 or 2",
    "init_ids": "tokens",
    "layers": "layers",
    "dtype": "dtype",
    ("PTuning", "layers"): "count",
}
CASES = [(cls, f.name) for cls in methods() for f in fields(cls)]


@pytest.mark.parametrize("cls, name", [pytest.param(*c, id=f"{c[0].__name__}-{c[1]}") for c in CASES])
def test_no_method_takes_a_setting_of_another_kind(cls, name):
    needed = {"total_steps": 10} if cls.__name__ == "AdaLoRA" else {}
    cls(**needed)
    values, says = WRONG[KINDS.get((cls.__name__, name)) or KINDS[name]]
    for value in values:
        with pytest.raises(ValueError) as raised:
            cls(**needed | {name: value})
        message = str(raised.value)
        assert message.startswith(says.format(repr(value), name=name)), message
        assert "\n" not in message and len(message) < 500


# ------------------------------------------------------------------------------------------- settings and a model

TABLE = Table()
LLAMA = r"in this LlamaForCausalLM\."
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
    "bias of a model without": (PAIR | {"bias": "all"}, r"bias='all', but there is no bias to train here: .*"),
}
for name, (options, says) in SETTINGS.items():

    @TABLE.row(name, says)
    def _(model, tmp, options=options):
        yield
        attach(model, LoRA(**options))


# what a setting does not fit, method by method
BLOCKWISE = ("houlsby", "pfeiffer", "parallel", "llama-adapter", "prefix through a network", "mam", "unipelt")
NUMBERED = ("dora", "adalora", "houlsby", "pfeiffer", "parallel", "bitfit", "ia3")
UNFIT = {
    "unmatched target": (
        ("dora", "adalora", "bitfit"),  # (IA)^3's own are in test_ia3
        {"targets": ("k_prj",)},
        r"no module (with a bias )?is called k_prj( in this \w+)?\. Near in name: .*k_proj.*\.",
    ),
    "unknown layers": (
        NUMBERED,
        {"layers": (1, 2, 7)},
        r"layers \[2, 7\] do not exist; this model's layers are 0 to 1",
    ),
    "no layers": (
        NUMBERED,
        {"layers": ()},
        r"exclude and layers together leave none of the \d matched modules|layers is empty: \w+ would adapt nothing",
    ),
    "excluded, but absent": (
        ("dora", "adalora", "bitfit", "ia3"),
        {"exclude": ("k_prj",)},
        r"exclude: no module fits \['k_prj'\]",
    ),
    "trained whole, but absent": (
        OTHERS,
        {"modules_to_save": ("pooled",)},
        r"modules_to_save: no module is called pooled\. (Near in name|It has): .*\.",
    ),
    "prompt as long as all positions": (
        ("prompt tuning", "p-tuning"),
        {"num_virtual_tokens": 64},
        r"num_virtual_tokens is 64, which leaves no position of the model's 64 to the text",
    ),
}
for mistake, (which, options, says) in UNFIT.items():
    for method in which:

        @TABLE.row(f"{method}: {mistake}", says)
        def _(model, tmp, method=method, options=options):
            model = small_model(OTHERS[method])
            config = replace(config_of(method, OTHERS[method]), **options)
            yield model
            attach(model, config)


# ------------------------------------------------------------------------------------------------- which model


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


def of_no_family(kind):
    """Models without the names that a method knows."""
    if kind == "Plain":
        return Plain()
    if kind == "gpt_neox":
        return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON | TOKENS))
    picture = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    return tf.ViTForImageClassification(tf.ViTConfig(**COMMON | picture))


NO_FAMILY = {
    r"[\w-]+ does not know where the family '{}' has its parts; it knows llama, .*": {
        "Plain": BLOCKWISE,
        "gpt_neox": BLOCKWISE,
        "vit": (*BLOCKWISE, "p-tuning v2"),
    },
    r"no usual (targets|modules) are known for the model family '{}': name them with targets=.*": {
        "Plain": ("dora", "adalora", "ia3"),
        "gpt_neox": ("ia3",),
        "vit": ("dora", "adalora", "ia3"),
    },
    r"P\w+ puts its prompt before .*; this {} has none that it knows": {
        "Plain": ("prompt tuning", "p-tuning"),
    },
    r"P\w+ puts its prompt before text, and this ViTForImageClassification reads none": {
        "vit": ("prompt tuning", "p-tuning"),
    },
    r"P-Tuning v2 trains a head with the prefix, and this \w+ has none: .*": {
        "Plain": ("p-tuning v2",),
        "gpt_neox": ("p-tuning v2",),
    },
}
for says, kinds in NO_FAMILY.items():
    for kind, method in [(kind, method) for kind, which in kinds.items() for method in which]:

        @TABLE.row(f"{method} on {kind}", says.format(kind))
        def _(model, tmp, method=method, kind=kind):
            model = of_no_family(kind)
            default = type(config_of(method, OTHERS[method]))  # the small models' settings name their modules
            yield model
            attach(model, default(total_steps=10) if method == "adalora" else default())


for method in BLOCKWISE:

    @TABLE.row(f"{method} on a model without layers", r"[\w-]+ found no layers in this LlamaForCausalLM")
    def _(model, tmp, method=method):
        model.model.layers = nn.ModuleList()
        yield
        attach(model, config_of(method, "llama"))


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


@TABLE.row("a configuration's class", r"the configuration is a type; attach needs one such as LoRA\(r=8\)", TypeError)
def _(model, tmp):
    yield
    attach(model, LoRA)


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


for method in OTHERS:

    @TABLE.row(f"{method}: the same name twice", r"the model has an adapter called 'default' already: detach it, or .*")
    def _(model, tmp, method=method):
        model = attached_other(method).model
        yield model
        attached_other(method, model)

    if not METHODS[method].mergeable:

        @TABLE.row(
            f"{method}: exported, which would merge it", r"[\w.]+: a \w+ (has|adds|makes) .*, so it cannot be .*"
        )
        def _(model, tmp, method=method):
            adapter = attached_other(method)
            yield adapter.model
            adapter.export(tmp / "plain")


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


# ------------------------------------------------------------------------------------------------- LoRA+


@TABLE.row("groups of a model", r"the adapter is a LlamaForCausalLM; lora_plus_groups needs .*", TypeError)
def _(model, tmp):
    attached(model)
    yield
    lora_plus_groups(model, 1e-3)


for method in ("houlsby", "p-tuning v2", "mam"):

    @TABLE.row(f"groups of {method}", r"\w+ has no matrix B, whose rate LoRA\+ would raise")
    def _(model, tmp, method=method):
        adapter = attached_other(method)
        yield adapter.model
        lora_plus_groups(adapter, 1e-3)


for number in ("lr", "ratio", "embedding_lr", "weight_decay"):
    for value in (True, math.nan, math.inf, "1"):
        says = rf"{number} is {value!r}; it must be (zero or )?a positive number"

        @TABLE.row(f"groups with {number}={value!r}", says)
        def _(model, tmp, number=number, value=value):
            adapter = attached(model)
            yield
            lora_plus_groups(adapter, **{"lr": 1e-3} | {number: value})


@TABLE.cases()
def test_says_it_in_one_sentence_and_changes_nothing(case, tmp_path):
    check(case, tmp_path)


def test_an_encoder_layer_of_torch_is_refused():
    """In eval mode nn.TransformerEncoderLayer hands its weights to one fused kernel and calls no layer."""
    with pytest.raises(ValueError, match="linear1: torch reads its weight without calling it"):
        attach(nn.TransformerEncoderLayer(8, 2, 16), LoRA(targets=("linear1",)))
