"""Where the parts of a transformer are called what: the map that block-wise methods read.

    family = family_of(model)
    for path in family.layers(model): ...           "model.layers.0", "model.layers.1", ...
    f"{path}.{family.attention}"                    the module that computes attention

Adding a family is adding a row. What a row says was read in transformers' modeling files and is tested on small models.
"""

import re
from dataclasses import dataclass, replace

from utils.methods.parts import Guest, core_of


@dataclass(frozen=True)
class Family:
    """Names within one layer, relative to the layer's path.

    layer            regular expression of a whole layer's path, in the base model or below its head
    attention        the module that calls the attention function (self-attention)
    attention_out    the module whose output is the attention sub-layer's, before the residual addition
    ffn              the module whose input and output are the feed-forward sub-layer's; None where there is none (OPT)
    ffn_in, ffn_out  the modules with the sub-layer's input and output; ffn_out is before the residual addition
    ffn_norm         the norm of the feed-forward sub-layer: its input is the residual stream, or, with post_norm, that
                     with the sub-layer's output added
    q, k, v, o       the projections of the attention, paths in the layer; GPT-2 has q, k and v in one
    post_norm        True where the norm comes after the residual addition (BERT)
    ffn_block        in BERT: the module called with (hidden, residual) that returns norm(f(hidden) + residual)
    cross            the attention of a decoder to its encoder, or None
    """

    layer: str
    attention: str
    attention_out: str
    ffn: str | None
    ffn_in: str
    ffn_out: str
    ffn_norm: str
    q: str
    k: str
    v: str
    o: str
    post_norm: bool = False
    ffn_block: str | None = None
    attention_block: str | None = None
    cross: str | None = None

    def layers(self, model):
        """The paths of all layers, in the model's order."""
        return [path for path, _ in own_modules(model) if re.fullmatch(self.layer, path)]


LLAMA = Family(
    layer=r"(?:.*\.)?layers\.\d+",
    attention="self_attn",
    attention_out="self_attn.o_proj",
    ffn="mlp",
    ffn_in="mlp",
    ffn_out="mlp.down_proj",
    ffn_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
)
GPT2 = Family(
    layer=r"(?:.*\.)?h\.\d+",
    attention="attn",
    attention_out="attn.resid_dropout",
    ffn="mlp",
    ffn_in="mlp",
    ffn_out="mlp.dropout",
    ffn_norm="ln_2",
    q="attn.c_attn",
    k="attn.c_attn",
    v="attn.c_attn",
    o="attn.c_proj",
)
OPT = Family(
    layer=r"(?:.*\.)?layers\.\d+",
    attention="self_attn",
    attention_out="self_attn.out_proj",
    ffn=None,
    ffn_in="fc1",
    ffn_out="fc2",
    ffn_norm="final_layer_norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.out_proj",
)
BERT = Family(
    layer=r"(?:.*\.)?layer\.\d+",
    attention="attention.self",
    attention_out="attention.output.dropout",
    ffn=None,
    ffn_in="intermediate",
    ffn_out="output.dropout",
    ffn_norm="output.LayerNorm",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    post_norm=True,
    ffn_block="output",
    attention_block="attention.output",
)
T5_ENCODER = Family(
    layer=r"(?:.*\.)?encoder\.block\.\d+",
    attention="layer.0.SelfAttention",
    attention_out="layer.0.dropout",
    ffn="layer.1.DenseReluDense",
    ffn_in="layer.1.DenseReluDense",
    ffn_out="layer.1.dropout",
    ffn_norm="layer.1.layer_norm",
    q="layer.0.SelfAttention.q",
    k="layer.0.SelfAttention.k",
    v="layer.0.SelfAttention.v",
    o="layer.0.SelfAttention.o",
)
T5_DECODER = Family(
    layer=r"(?:.*\.)?decoder\.block\.\d+",
    attention="layer.0.SelfAttention",
    attention_out="layer.0.dropout",
    ffn="layer.2.DenseReluDense",
    ffn_in="layer.2.DenseReluDense",
    ffn_out="layer.2.dropout",
    ffn_norm="layer.2.layer_norm",
    q="layer.0.SelfAttention.q",
    k="layer.0.SelfAttention.k",
    v="layer.0.SelfAttention.v",
    o="layer.0.SelfAttention.o",
    cross="layer.1.EncDecAttention",
)
FAMILIES = {
    "llama": (LLAMA,),
    "mistral": (LLAMA,),
    "qwen2": (LLAMA,),
    "qwen3": (LLAMA,),
    "gemma": (LLAMA,),
    "gpt2": (GPT2,),
    "opt": (OPT,),
    "bert": (BERT,),
    "roberta": (BERT,),
    "xlm-roberta": (BERT,),
    "t5": (T5_ENCODER, T5_DECODER),
    "mt5": (T5_ENCODER, T5_DECODER),
}


def family_of(model, method):
    """The rows for a model, one for each of its stacks of layers: (Family, ...).

    method: its name, for the message
    raises ValueError for a family without a row
    """
    name = getattr(getattr(model, "config", None), "model_type", "")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        family = name or type(model).__name__
        raise ValueError(f"{method} does not know where the family {family!r} has its parts; it knows {known}")
    if name == "opt" and not model.config.do_layer_norm_before:  # OPT-350m alone
        return (replace(OPT, post_norm=True),)
    return FAMILIES[name]


def own_modules(model):
    """(path, module) of the model's own modules, whatever is attached: cores for wrappers, and no guests."""

    def walk(module, prefix):
        module = core_of(module)
        if prefix:
            yield prefix, module
        for name, child in module.named_children():
            if not isinstance(child, Guest):
                yield from walk(child, f"{prefix}.{name}" if prefix else name)

    return walk(model, "")
