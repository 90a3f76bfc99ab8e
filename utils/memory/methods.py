"""What the course's methods keep for the backward pass, beside what the model keeps for itself.

Each function stands for one kind of part and is called where that is attached. It writes down what the part keeps of
its own, and returns the tensor that comes out. n tokens, e bytes per activation, as in `activations`; "copies" are
those of an adapter's numbers in the activations' dtype, where its own is another (float32 over half precision).

What the methods have in common: behind the first part the activations need a gradient, and all that follows keeps what
it needs for that. This, and not the adapter, is most of the memory.
"""


def copies(block, *tensors):
    """Bytes of the rounded copies that products keep of small tensors: e each, nothing where the dtypes are equal."""
    return sum(block.e * t.numel() for t in tensors if t.element_size() != block.e)


def noise(run, p, numbers):
    """What torch's dropout keeps of its draws: e bytes each on a CPU, one byte each on CUDA."""
    return (1 if run.device == "cuda" else run.e) * numbers if p else 0


# ---------------------------------------------------------------------------------------------- at a linear layer


def lora(block, part, x, y):
    """y + s B A dropout(x): x, and one byte for each number of it if there is dropout. e n d_in (+ n d_in)

    Of a layer in 4 bits only the output can be used, so autograd does the rest: A x is kept, the copies of A and B,
    and with dropout the dropped x instead of x. + e n r + e r (d_in + d_out)
    """
    block.terms["adapters"] += x.numbers * (part.dropout > 0) * (x.flows or not block.run.quantized)
    if block.run.quantized:
        block.keep(block.like(x) if part.dropout else x, "linear inputs")
        block.terms["adapters"] += block.e * block.n * part.r + copies(block, part.A) * x.flows + copies(block, part.B)
    else:
        block.keep(x, "linear inputs")
    return block.like(y, True)


def dora(block, part, x, y):
    """g (W x + s B A x): as LoRA, the output before the gain g = m / |.|, and of each row g, |.| and a boolean, whether
    |.| is 0. e n (d_in + d_out) + 9 d_out. Over 4 bits it is g - 1 that is kept, in the activations' dtype."""
    gain = block.e if block.run.quantized else 4
    block.terms["adapters"] += block.e * y.numbers + (gain + 5) * part.m.numel()
    return lora(block, part, x, y)


def adalora(block, part, x, y):
    """y + s B (E * A) x: as LoRA, and the product E * A in the adapter's dtype. + 4 r d_in"""
    if part.r == 0:
        return y
    block.terms["adapters"] += part.A.element_size() * part.A.numel()
    return lora(block, part, x, y)


def ia3(block, part, x, y):
    """l * y, or l * x before the layer: what is scaled, for dl, and l's copy if that is to have a gradient itself.

    e n d (+ e d). GPT-2's l has ones for the queries put in front, which makes a new tensor in any dtype.
    """
    scaled = x if part.feedforward else y
    if scaled.flows:
        filled = part.l.numel() + part.skip
        block.terms["adapters"] += block.e * filled if part.skip else copies(block, part.l)
    block.keep(scaled, "adapters")
    return block.like(y, True)


def bias(block, part, x, y):
    """W x + b with a trained b: nothing."""
    return block.like(y, True)


# ------------------------------------------------------------------------------------------------------- adapters


READ_THEIR_INPUT = ("gelu", "gelu_tanh", "swish")  # in the derivative; relu and tanh read their output


def change(block, part, h):
    """W_up f(W_down h + b_down) + b_up: h, what f keeps and W_up's input, and copies. e n (d + m), or e n (d + 2 m)

    f and W_up keep one tensor if f's derivative reads its output, else two. Dropout between them keeps its draws, and
    makes another tensor for W_up. The copy of W_down is for h's gradient.
    """
    block.keep(h, "adapters")
    narrow = block.n * part.W_down.shape[0]
    tensors = 1 + (part.activation in READ_THEIR_INPUT or part.dropout > 0)
    block.terms["adapters"] += block.e * narrow * tensors + noise(block.run, part.dropout, narrow)
    block.terms["adapters"] += copies(block, part.W_down) * h.flows + copies(block, part.W_up)


def houlsby(block, part, x, y):
    """y + change(y)"""
    change(block, part, y)
    return block.like(y, True)


def pfeiffer(block, part, x, y):
    """y + change(y + residual stream), a sum that is a tensor of its own. e n d"""
    change(block, part, block.like(y, y.flows or block.stream.flows))
    return block.like(y, True)


def parallel(block, part, x, y):
    """y + s change(input of the feed-forward part), or of its norm. A trained s keeps the change, e n d."""
    change(block, part, block.stream if block.is_norm(part.source) else block.ffn)
    if not isinstance(part.scale, int | float):
        block.terms["adapters"] += block.e * y.numbers + copies(block, part.scale)
    return block.like(y, True)


# ------------------------------------------------------------------------------------------------------ at a norm


def pfeiffer_before_norm(block, part, x, flows):
    """x + change(norm(x)), and then the norm: it runs twice and keeps what it keeps twice."""
    block.terms["adapters"] += block.kept_by_norm(flows)
    change(block, part, block.like(x, flows or block.needs.norms))
    return block.like(x, True), True


def norm_bias(block, part, x, flows):
    """A trained b in w (x - mean) / std + b: the kernel keeps what it does for x's gradient, and b's copy. e d"""
    block.terms["adapters"] += copies(block, part.b)
    return x, True


def trained_norm(block, part, x, flows):
    """Trained copies of a norm's numbers, rounded: e d each where the kernel keeps them (a LayerNorm both, an RMSNorm
    its w for x's gradient, Gemma's makes another tensor of it)."""
    kept = {"llama": flows, "t5": flows, "gemma": False}.get(block.shape.block, True)
    block.terms["adapters"] += copies(block, *part.copies.values()) * kept
    return x, flows


# --------------------------------------------------------------------------------------------------- at attention


def prefix(block, part, q):
    """[P_k; K] and [P_v; V]: longer keys and values, all of which need a gradient. `attention` counts them.

    Made by a network, P costs its inside, l h in the adapter's dtype. Dropout keeps its draws, for P_k and P_v of every
    sample.
    """
    length, d_kv = part.prefix[0].shape
    inner = getattr(part.prefix[0], "inner", None)
    if inner is not None:
        block.terms["adapters"] += inner.weight.element_size() * length * inner.out_features
    block.terms["adapters"] += noise(block.run, part.dropout, 2 * block.run.batch * length * d_kv)
    return length


def gated_prompt(block, part, q):
    """g softmax(q k_P^T s) v_P beside the attention: the K probabilities of every token and head with the gate and
    without, q in another order than attention keeps it, and k_P and v_P repeated for the batch.

    2 e n K heads + e n q_dim + 2 e batch K q_dim. What comes out of the heads is a sum, so `o` keeps its input anew.
    returns 0, the keys in front of the text's
    """
    run, shape, length = block.run, block.shape, part.adaption_prompt.shape[1]
    repeated = run.batch * length * shape.q_dim * (1 + q.flows)
    reordered = block.n * shape.q_dim * (run.batch > 1 or not q.flows)
    if shape.block == "gpt2" and run.batch == 1 and not q.flows:
        reordered *= 3  # not reordered, but a view of q, k and v together
    block.terms["adapters"] += block.e * (2 * block.n * length * shape.heads + repeated + reordered)
    gate = part.adaption_gate
    block.terms["adapters"] += copies(block, gate) + (part.rule != "scalar") * gate.element_size() * gate.numel()
    return 0


def prompt_network(part):
    """What the network of a prompt keeps, in bytes: the MLP the outputs of its two ReLUs, 2 l h in its dtype.

    An LSTM's kernel has a workspace that grows with l (12 h + 4 d_in) in each layer, each way: about that is counted.
    A prompt without a network keeps nothing: putting it in front is a copy.
    """
    encoder = getattr(part, "encoder", None)
    if encoder is None:
        return 0
    rows = encoder.embedding.weight
    numbers = sum(m.out_features for m in encoder.mlp_head[:-1] if hasattr(m, "out_features"))
    if encoder.lstm_head is not None:
        h, d = encoder.lstm_head.hidden_size, rows.shape[1]
        numbers += sum(2 * (12 * h + 4 * width) for width in (d, *[2 * h] * (encoder.lstm_head.num_layers - 1)))
    return rows.element_size() * len(rows) * numbers


# --------------------------------------------------------------------------------------------------- UniPELT's gates


def gate(block, part, x):
    """mean over tokens of sigmoid(w x + b): x, the sigmoids in float32, the copy of w, and the gates for what they are
    multiplied with; with a mask the number of real tokens. e n d + 4 n gates + e gates (d + batch) (+ 8 batch)"""
    block.keep(x, "adapters")
    gates = len(part.bias)
    block.terms["adapters"] += 4 * block.n * gates + copies(block, part.weight) * x.flows
    block.terms["adapters"] += block.run.batch * (block.e * gates + 8 * block.masked)


def gated_lora(block, part, x, y):
    """y + G B A x, by autograd: x, A x, A x times each gate, and the copies. e n (d_in + r + r gates)"""
    gate(block, part.gate, x)
    term = block.e * block.n * part.r * (1 + len(part.gate.bias)) + x.numbers * (part.dropout > 0) * x.flows
    block.terms["adapters"] += term + copies(block, part.A) * x.flows + copies(block, part.B)
    if part.dropout:
        block.keep(block.like(x), "adapters")
    return block.like(y, True)


def gated_pfeiffer(block, part, x, y):
    """y + G change(h): the change is kept for the gate. + e n d"""
    h = block.like(y, y.flows or block.stream.flows)
    change(block, part, h)
    gate(block, part.gate, h)
    block.keep(block.like(y), "adapters")
    return block.like(y, True)


def gated_before_norm(block, part, x, flows):
    """x + G change(norm(x)) before the norm."""
    block.terms["adapters"] += block.kept_by_norm(flows)
    h = block.like(x, flows or block.needs.norms)
    change(block, part, h)
    gate(block, part.gate, h)
    block.keep(block.like(x), "adapters")
    return block.like(x, True), True


def gated_prefix(block, part, q):
    """[G P_k; K] and [G P_v; V]: P_k and P_v are kept for the gate, unless they are trained as they are. e 2 l d_kv"""
    gate(block, part.gate, block.attention_input)
    length = prefix(block, part, q)
    numbers = 2 * length * part.prefix[0].shape[1]
    rows = next(iter(part.prefix[0].parameters()))
    if part.dropout:
        numbers *= block.run.batch
    new = part.dropout or part.prefix[0].mlp or rows.element_size() != block.e
    block.terms["adapters"] += block.e * numbers * bool(new) + block.n * block.masked
    return length


AT_LINEAR = {
    "LoRALinear": lora, "DoRALinear": dora, "AdaLoRALinear": adalora, "IA3Linear": ia3, "TrainedBias": bias,
    "HoulsbyBottleneck": houlsby, "PfeifferPreNorm": pfeiffer, "ParallelBottleneck": parallel,
    "GatedLoRALinear": gated_lora, "GatedPreNorm": gated_pfeiffer,
}  # fmt: skip
AT_NORM = {
    "PfeifferPostNorm": pfeiffer_before_norm, "GatedPostNorm": gated_before_norm, "TrainedBias": norm_bias,
    "TrainedNorm": trained_norm,
}  # fmt: skip
AT_ATTENTION = {"PrefixAttention": prefix, "GatedPrefix": gated_prefix, "GatedPrompt": gated_prompt}


def of(part, table):
    """The function for a part, by its class or one that this is made from.   raises ValueError where there is none"""
    for kind in type(part).__mro__:
        if kind.__name__ in table:
            return table[kind.__name__]
    raise ValueError(f"there is no formula yet for what a {type(part).__name__} keeps there")
