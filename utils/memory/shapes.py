"""The sizes of a transformer that its memory depends on, read from any Hugging Face config."""

from dataclasses import dataclass

FAMILIES = {  # model_type -> the kind of block it has
    "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gemma": "gemma",
    "gpt2": "gpt2", "opt": "opt", "bert": "bert", "roberta": "bert", "t5": "t5",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes in numbers, not bytes.

    block       which kind of block: "llama", "gemma", "gpt2", "opt", "bert" or "t5"
    layers      blocks (of the encoder, in an encoder-decoder)     decoder_layers: of the decoder there, else 0
    d           width of the residual stream        d_ff: of the feed-forward part's inside
    heads, kv_heads, head_dim                       q_dim = heads head_dim, kv_dim = kv_heads head_dim
    vocab       rows of the embedding               labels: outputs of a classification head, 0 for a language model
    family      config.model_type                   head_norms: whether queries and keys have norms (Qwen3)
    """

    block: str
    layers: int
    d: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    labels: int = 0
    decoder_layers: int = 0
    gated: bool = True
    activation: str = "silu"
    family: str = ""
    head_norms: bool = False

    @property
    def q_dim(self):
        return self.heads * self.head_dim

    @property
    def kv_dim(self):
        return self.kv_heads * self.head_dim


def shape_of(model):
    """The Shape of a transformers model (its weights are not looked at, so the meta device will do).

    raises ValueError for a family without formulas
    """
    config = model.config
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"there are no activation formulas for {family!r} yet; there are for {', '.join(FAMILIES)}")
    d = config.hidden_size
    heads = config.num_attention_heads
    classifies = "Classification" in type(model).__name__
    return Shape(
        block=FAMILIES[family],
        layers=config.num_hidden_layers,
        d=d,
        d_ff=_first(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff") or 4 * d,
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads,
        head_dim=_first(config, "head_dim", "d_kv") or d // heads,
        vocab=config.vocab_size,
        labels=config.num_labels if classifies else 0,
        decoder_layers=_first(config, "num_decoder_layers") or 0,
        gated=FAMILIES[family] in ("llama", "gemma") or getattr(config, "is_gated_act", False),
        family=family,
        head_norms=family == "qwen3",
        activation=_first(config, "hidden_act", "activation_function", "dense_act_fn"),
    )


def _first(config, *names):
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)
