"""How many numbers a model holds, from its sizes alone."""


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
