"""How many numbers a transformer holds, from its sizes: one formula per family, equal to transformers' own count.

    llama_parameters(vocab=32000, d=4096, d_ff=11008, layers=32, heads=32, kv_heads=32)          6,738,415,616

A linear layer from d to m has d m numbers, and m more with a bias. A LayerNorm has 2 d, an RMSNorm d. An embedding has
d for each row; a head that shares them ("tied") has none of its own.
"""


def llama_parameters(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    """How many parameters a Llama has: no biases, and norms with a weight alone (Touvron et al. 2023).

    vocab: rows of the embedding   d: width of the residual stream   d_ff: width of the feed-forward part's inside
    heads: of the queries   kv_heads: of the keys and of the values; a head is d // heads wide
    tied: whether the output layer is the embedding's own matrix   returns an int

    Llama-2-7B is (32000, 4096, 11008, 32, 32, 32): 6,738,415,616.
    """
    kv_dim = d // heads * kv_heads
    attention = 2 * d * d + 2 * d * kv_dim  # q and o, k and v
    feed_forward = 3 * d * d_ff  # gate, up and down
    block = attention + feed_forward + 2 * d  # and two norms
    embeddings = vocab * d if tied else 2 * vocab * d
    return embeddings + layers * block + d  # and the last norm


def qwen2_parameters(vocab, d, d_ff, layers, heads, kv_heads, tied=False):
    """Qwen2: a Llama with biases on q, k and v; its small models are tied."""
    biases = d + 2 * (d // heads * kv_heads)
    return llama_parameters(vocab, d, d_ff, layers, heads, kv_heads, tied) + layers * biases


def gpt2_parameters(vocab, d, layers, positions=1024, d_ff=None):
    """GPT-2 and GPT-3: learned positions, biases everywhere, a tied head.

    per layer   qkv (d, 3 d), o (d, d), up and down (d, d_ff), all with biases, two norms of 2 d: with d_ff = 4 d that
                is 12 d^2 + 13 d
    """
    d_ff = d_ff or 4 * d
    layer = 4 * d * d + 4 * d + 2 * d * d_ff + d_ff + d + 4 * d
    return layers * layer + (vocab + positions) * d + 2 * d


def opt_parameters(vocab, d, d_ff, layers, positions=2048):
    """OPT: GPT-2's layer with q, k and v apart, and two rows of positions that are never used."""
    return gpt2_parameters(vocab, d, layers, positions + 2, d_ff)


def bert_parameters(vocab, d, d_ff, layers, positions=512, segments=2, labels=0):
    """BERT and RoBERTa (one segment, positions 514), with the pooler and, for so many labels, BERT's classifier.

    The layer is GPT-2's. The embeddings of tokens, positions and segments have a norm of 2 d; the pooler is (d, d).
    """
    layer = 4 * d * d + 4 * d + 2 * d * d_ff + d_ff + d + 4 * d
    pooled = d * d + d + (d + 1) * labels
    return layers * layer + (vocab + positions + segments) * d + 2 * d + pooled


def t5_parameters(vocab, d, d_ff, layers, heads, head_dim=64, gated=False, tied=True, decoder_layers=None, buckets=32):
    """T5 (tied, two matrices in its feed-forward part) and T5 1.1 or T0 (untied, gated: three). No biases.

    encoder layer   q, k, v and o (d, heads head_dim), the feed-forward part, two norms of d
    decoder layer   the same with a second attention, to the encoder, and its norm
    once            the embedding, a last norm for each stack, and for each a bias per head and bucket of distances
    """
    attention = 4 * d * heads * head_dim
    ffn = (3 if gated else 2) * d * d_ff
    encoder = layers * (attention + ffn + 2 * d)
    decoder = (layers if decoder_layers is None else decoder_layers) * (2 * attention + ffn + 3 * d)
    return encoder + decoder + (1 if tied else 2) * vocab * d + 2 * d + 2 * buckets * heads


def parameters_of(config):
    """The count for a config of transformers, by its family's formula. BERT's and RoBERTa's: of the bare model.

    raises ValueError for another family
    """
    c, family = config, config.model_type
    tied = getattr(c, "tie_word_embeddings", True)
    if family in ("llama", "mistral", "qwen2"):
        heads = (c.num_attention_heads, c.num_key_value_heads)
        if (getattr(c, "head_dim", None) or c.hidden_size // heads[0]) * heads[0] != c.hidden_size:
            raise ValueError(f"there is no formula for heads of {c.head_dim} in a width of {c.hidden_size}")
        count = qwen2_parameters if family == "qwen2" else llama_parameters
        return count(c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, *heads, tied)
    if family == "gpt2":
        return gpt2_parameters(c.vocab_size, c.n_embd, c.n_layer, c.n_positions, c.n_inner)
    if family == "opt" and c.word_embed_proj_dim == c.hidden_size:
        return opt_parameters(c.vocab_size, c.hidden_size, c.ffn_dim, c.num_hidden_layers, c.max_position_embeddings)
    if family in ("bert", "roberta"):
        sizes = (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers)
        return bert_parameters(*sizes, c.max_position_embeddings, c.type_vocab_size)
    if family == "t5":
        sizes = (c.vocab_size, c.d_model, c.d_ff, c.num_layers, c.num_heads, c.d_kv)
        return t5_parameters(*sizes, c.is_gated_act, tied, c.num_decoder_layers, c.relative_attention_num_buckets)
    raise ValueError(f"there is no formula for the parameters of {family!r}")
