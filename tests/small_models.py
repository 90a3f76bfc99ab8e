"""Tiny random models of ten architectures, for the tests of every method: 20,000 to 40,000 numbers each.

    model = small_model("gpt2")              a fresh copy, in eval mode
    logits(model)                            its output on a fixed batch with padding
    names("gpt2").attention                  what the architecture calls its modules

and what the tests of an attached method compare: output, bits, shape_of.

Biases and norms are random too. As transformers makes them they are zeros and ones, and a test would not notice a
method that forgets them. No dropout: two copies of a model compute the same in training mode.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
import transformers as tf

VOCAB, WIDTH, INNER, LAYERS, HEADS, LENGTH = 64, 32, 48, 2, 4, 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.15,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _llama(**extra):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON | TOKENS | extra))


def _gpt2():
    size = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.15}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**size | no_dropout | TOKENS))


def _opt():
    size = COMMON | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "dropout": 0.0, "init_std": 0.15}
    return tf.OPTForCausalLM(tf.OPTConfig(**size | TOKENS))


def _t5():
    size = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**size | tokens, dropout_rate=0.0))


BUILDERS = {
    "llama": _llama,
    "llama_gqa": lambda: _llama(num_key_value_heads=2),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**COMMON | TOKENS, num_key_value_heads=2)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**COMMON | TOKENS, num_key_value_heads=2)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**COMMON | TOKENS, num_key_value_heads=1, head_dim=16)),
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**COMMON | TOKENS | NO_DROPOUT, num_labels=3)),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**COMMON | TOKENS | NO_DROPOUT, num_labels=3)
    ),
    "t5": _t5,
}
ALL = tuple(BUILDERS)
DECODERS = ("llama", "llama_gqa", "qwen2", "mistral", "gemma", "gpt2", "opt")
ENCODERS = ("bert", "roberta")
WITH_BIASES = ("qwen2", "gpt2", "opt", "bert", "roberta")  # in the attention's projections
# Where a method can work inside attention: T5's was in one piece in older versions of transformers, down to 5.2.
OPEN_ATTENTION = tuple(a for a in ALL if a != "t5" or hasattr(tf.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"))


@dataclass(frozen=True)
class Names:
    """What an architecture calls its modules."""

    attention: tuple  # the usual targets
    nested: str  # a name of two parts: its last part alone would match more, or other, modules
    mlp: str  # the second linear layer of the feed-forward part
    embedding: str
    norm: str


_LLAMA = Names(("q_proj", "v_proj"), "self_attn.o_proj", "down_proj", "embed_tokens", "norm")
_BERT = Names(("query", "value"), "attention.output.dense", "intermediate.dense", "word_embeddings", "pooler")
NAMES = {
    "gpt2": Names(("c_attn",), "attn.c_proj", "mlp.c_proj", "wte", "ln_f"),
    "opt": Names(("q_proj", "v_proj"), "self_attn.out_proj", "fc2", "embed_tokens", "final_layer_norm"),
    "bert": _BERT,
    "roberta": Names(_BERT.attention, _BERT.nested, _BERT.mlp, _BERT.embedding, "output.LayerNorm"),
    "t5": Names(("q", "v"), "SelfAttention.o", "wo", "embed_tokens", "final_layer_norm"),
}


def names(architecture):
    """The Names of an architecture."""
    return NAMES.get(architecture, _LLAMA)


@cache
def _prototype(architecture):
    with torch.random.fork_rng():
        torch.manual_seed(ALL.index(architecture))
        model = BUILDERS[architecture]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def small_model(architecture, dtype=torch.float32):
    """A fresh model of an architecture in ALL, in eval mode; every copy has the same weights."""
    return deepcopy(_prototype(architecture)).to(dtype)


def batch(model):
    """Three sequences of 11 tokens, the last one padded to that length, as the keyword arguments the model takes."""
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[2, 8:], mask[2, 8:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def logits(model):
    """The model's output on `batch`: (3, 11, 64) of a language model, (3, 3) of a classifier."""
    return model(**batch(model)).logits


def backward(output):
    """Backward from a fixed weighted sum of an output, so that every entry of it counts differently."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (output * weights).sum().backward()


def gradients(model, adapter):
    """Loss-like output and every trained gradient, in training mode."""
    model.zero_grad()
    torch.manual_seed(0)
    found = logits(model.train())
    backward(found)
    return found.detach(), {n: p.grad for n, p in adapter.named_parameters()}


@torch.no_grad()
def output(model):
    """`logits` without a graph. Two outputs are compared to the bit only so: with a graph, torch may multiply a weight
    that is trained by another kernel than a frozen one."""
    return logits(model)


def bits(model):
    """Name -> a copy of everything a model holds."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def shape_of(model):
    """All that `detach` must put back, but for the numbers."""
    modules = [(n, type(m), m.training) for n, m in model.named_modules()]
    return modules, [(n, p.requires_grad) for n, p in model.named_parameters()], "_attached_adapters" in model.__dict__


@torch.no_grad()
def move(adapter, by=0.1):
    """What training does, in one step: every trained number changes."""
    for parameter in adapter.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=by)
