"""Chapter 01, what a forward pass keeps: attention, and a block."""

from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory import activations

# ------------------------------------------------------------------------------------------------- attention_kept


def attention_cases(rng):
    """n is never a single row's length, so that n length and length^2 are not taken for one another."""
    c, batch = pick(rng, 16, 24), pick(rng, 2, 3)
    drawn = [
        ((batch * 40, 40, 8, 8, c, 4, "sdpa"), ()),
        ((batch * 64, 64, 6, 6, 2 * c), ("half",)),  # e and kernel as they are by default
        ((3 * 100, 100, 12, 4, c, 2, "sdpa"), ("half", "grouped")),
        ((batch * 50, 50, 4, 4, c, 4, "eager"), ("eager",)),
        ((batch * 30, 30, 6, 6, c, 2, "eager"), ("eager", "half")),
        ((2 * 70, 70, 9, 3, c, 4, "eager"), ("eager", "grouped")),
        ((5 * 20, 20, 8, 2, c, 2, "eager"), ("eager", "half", "grouped")),
    ]
    names = ("n", "length", "heads", "kv_heads", "head_dim", "e", "kernel")
    return [
        Case(dict(zip(names, values, strict=False)), kinds,
             {"heads": values[2], "kv_heads": values[3], "n": values[0], "length": values[1]})
        for values, kinds in drawn
    ]


def attending(sdpa=lambda n, h, q, kv, e: e * n * (2 * q + 2 * kv) + 4 * n * h,
              tensors=lambda n, q, kv, e: 3 * e * n * q,
              squares=lambda n, length, h, e: n * length * h * (4 if e == 4 else 4 + e)):  # fmt: skip
    """An attention_kept with another formula for sdpa, or for one of the two parts of eager."""

    def attention_kept(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
        q, kv = heads * head_dim, kv_heads * head_dim
        if kernel == "sdpa":
            return sdpa(n, heads, q, kv, e)
        return tensors(n, q, kv, e) + squares(n, length, heads, e)

    return attention_kept


def always(kernel):
    """An attention_kept that does not look at its kernel."""
    return lambda n, length, heads, kv_heads, head_dim, e=2, ignored="sdpa": activations.attention_kept(
        n, length, heads, kv_heads, head_dim, e, kernel
    )


def sdpa_and(kept):
    """An attention_kept whose eager is sdpa and so many bytes for each probability, of e."""

    def attention_kept(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
        probabilities = n * length * heads * kept(e) if kernel == "eager" else 0
        return activations.attention_kept(n, length, heads, kv_heads, head_dim, e) + probabilities

    return attention_kept


def row_sums_under_eager(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
    right = activations.attention_kept(n, length, heads, kv_heads, head_dim, e, kernel)
    return right + (4 * n * heads if kernel == "eager" else 0)


def kernels_swapped(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
    other = {"sdpa": "eager", "eager": "sdpa"}[kernel]
    return activations.attention_kept(n, length, heads, kv_heads, head_dim, e, other)


def no_return_under_eager(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
    if kernel == "sdpa":
        return activations.attention_kept(n, length, heads, kv_heads, head_dim, e)


SDPA_AND = (
    "Under eager you added the probabilities to what sdpa keeps. Eager keeps the factors of its own two products "
    "instead: q, k and v repeated to all heads, and the probabilities. It needs neither the output nor a sum per row."
)
CAUSAL = (
    "Under eager you counted half of the probabilities. The masked half is there too: eager computes the whole square, "
    "and the mask makes zeros of a half, which take as much memory."
)


def attention_by_tensors(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
    if kernel == "eager":
        query = key = value = e * n * heads * head_dim
        scores = n * heads * length
        return query + key + value + 4 * scores + (0 if e == 4 else e * scores)
    query = out = e * n * heads * head_dim
    key = value = e * n * kv_heads * head_dim
    return query + key + value + out + 4 * n * heads


ATTENTION_KEPT = Exercise(
    name="attention_kept",
    reference=activations.attention_kept,
    cases=attention_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("all_heads", attending(sdpa=lambda n, h, q, kv, e: 4 * e * n * q + 4 * n * h),
                "Under sdpa you gave keys and values all {heads} heads. They are kept as they came out of k and v, "
                "with kv_heads."),
        Mistake("not_repeated", attending(tensors=lambda n, q, kv, e: e * n * (q + 2 * kv)),
                "Under eager you kept keys and values with kv_heads. That kernel repeats them to all heads before it "
                "multiplies, and keeps what it multiplied."),
        Mistake("no_output", attending(sdpa=lambda n, h, q, kv, e: e * n * (q + 2 * kv) + 4 * n * h),
                "Under sdpa the output is missing. The kernel computes the probabilities anew in the backward pass, "
                "and needs the output for the softmax's derivative."),
        Mistake("no_row_sums", attending(sdpa=lambda n, h, q, kv, e: e * n * (2 * q + 2 * kv)),
                "Under sdpa the softmax's sum of each row is missing: one float32 for each token and head."),
        Mistake("row_sums_in_half", attending(sdpa=lambda n, h, q, kv, e: e * n * (2 * q + 2 * kv) + e * n * h),
                "You took e bytes for the softmax's sum (the log-sum-exp) of each row. It is in float32 whatever e is: "
                "4 bytes for each token and head."),
        Mistake("row_sums_once", attending(sdpa=lambda n, h, q, kv, e: e * n * (2 * q + 2 * kv) + 4 * n),
                "You kept one sum per token. Each head has a softmax of its own: n heads of them."),
        Mistake("once_in_half", attending(squares=lambda n, length, h, e: 4 * n * length * h),
                "Right in float32. In half precision eager keeps the probabilities twice, 4 + 2 bytes: in float32 as "
                "the softmax made them, and in half precision for the product with v."),
        Mistake("softmax_in_half", attending(squares=lambda n, length, h, e: e * n * length * h),
                "You took e bytes per probability. The softmax is computed in float32, and keeps its output so; in "
                "half precision a copy for the product with v comes on top."),
        Mistake("twice_always", attending(squares=lambda n, length, h, e: n * length * h * (4 + e)),
                "In float32 you kept the probabilities twice. Softmax and the product with v read the same tensor "
                "then, and what is shared is kept once."),
        Mistake("scores_too", attending(squares=lambda n, length, h, e: n * length * h * (8 if e == 4 else 8 + e)),
                "You kept the scores as well. The derivative of softmax reads its output alone."),
        Mistake("tokens_squared", attending(squares=lambda n, length, h, e: n * n * h * (4 if e == 4 else 4 + e)),
                "You let every token look at all n = {n} tokens of the batch. It looks at its own row: n length of "
                "them."),
        Mistake("length_squared",
                attending(squares=lambda n, length, h, e: length**2 * h * (4 if e == 4 else 4 + e)),
                "You counted the probabilities of one row: length^2. With all rows it is n length."),
        Mistake("one_head", attending(squares=lambda n, length, h, e: n * length * (4 if e == 4 else 4 + e)),
                "You counted the probabilities of one head. There are {heads}, each with its own."),
        Mistake("eager_output", attending(tensors=lambda n, q, kv, e: 4 * e * n * q),
                "Under eager you kept the output. It is the result of a product, which keeps its two factors; whoever "
                "reads the output keeps it (here o, as its input)."),
        Mistake("sdpa_and_probabilities", sdpa_and(lambda e: 4 if e == 4 else 4 + e), SDPA_AND),
        Mistake("sdpa_and_float32_probabilities", sdpa_and(lambda e: 4), SDPA_AND),
        Mistake("sdpa_and_half_probabilities", sdpa_and(lambda e: e), SDPA_AND),
        Mistake("causal", attending(squares=lambda n, length, h, e: n * length * h * (4 if e == 4 else 4 + e) / 2),
                CAUSAL),
        Mistake("causal_with_diagonal",
                attending(squares=lambda n, length, h, e: n * (length + 1) / 2 * h * (4 if e == 4 else 4 + e)), CAUSAL),
        Mistake("no_return_under_eager", no_return_under_eager,
                'Right under sdpa, and with kernel="eager" yours returns None. Is there a return on that branch?'),
        Mistake("row_sums_under_eager", row_sums_under_eager,
                "Under eager you kept a sum for each row as well. sdpa keeps it to compute the probabilities anew; "
                "eager has them."),
        Mistake("kernels_swapped", kernels_swapped,
                "The two kernels are swapped: eager is the one that keeps the probabilities."),
        Mistake("always_sdpa", always("sdpa"),
                "kernel has no effect: yours is the sdpa formula always. Under eager the probabilities are kept too."),
        Mistake("always_eager", always("eager"),
                "kernel has no effect: yours is the eager formula always. sdpa never writes the probabilities to "
                "memory."),
        Mistake("two_bytes", lambda n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa":
                activations.attention_kept(n, length, heads, kv_heads, head_dim, 2, kernel),
                "You took 2 bytes per number whatever e says."),
        Mistake("probabilities_alone", attending(tensors=lambda n, q, kv, e: 0),
                "Under eager you kept the probabilities alone. Queries, keys and values are factors of its two "
                "products: they are kept as well."),
        Mistake("doubled", lambda *inputs: 2 * attention_by_tensors(*inputs), None, "exactly 2 times"),
        Mistake("none", lambda *inputs: None, None, "It returned None"),
    ),
    alternatives=(
        attention_by_tensors,
        attending(sdpa=lambda n, h, q, kv, e: n * (2 * e * (q + kv) + 4 * h)),
        attending(squares=lambda n, length, h, e: n // length * h * length**2 * {4: 4, 2: 6}[e]),
    ),
    kinds={
        "eager": "Right under sdpa and wrong under eager. Which factors do eager's two products have?",
        "half": "Right in float32 and wrong in half precision. Which tensors stay in float32 there?",
        "grouped": "Right when keys and values have as many heads as queries, and wrong when they have fewer.",
    },
    fact="At 4,096 tokens in half precision a Llama-2-7B layer keeps "
    f"{activations.attention_kept(4096, 4096, 32, 32, 128) / 2**20:.0f} MiB for attention under sdpa and "
    f"{activations.attention_kept(4096, 4096, 32, 32, 128, kernel='eager') / 2**30:.1f} GiB under eager.",
)

# ------------------------------------------------------------------------------------------------- block_kept


def block_cases(rng):
    drawn = [
        (pick(rng, 33, 50), 4, 4, pick(rng, 16, 24), 4),
        (pick(rng, 70, 90), 6, 6, 16, 2),
        (128, 8, 2, pick(rng, 16, 32), 2),
        (pick(rng, 20, 40), 12, 4, 8, 4),
        (64, 9, 3, 8),
    ]
    cases = []
    for n, heads, kv_heads, head_dim, *e in drawn:
        d = heads * head_dim
        inputs = {"n": n, "d": d, "d_ff": 3 * d - pick(rng, 8, 24), "heads": heads, "kv_heads": kv_heads,
                  "head_dim": head_dim}  # fmt: skip
        inputs |= {"e": e[0]} if e else {}
        kinds = (("half",) if e != [4] else ()) + (("grouped",) if kv_heads < heads else ())
        cases.append(Case(inputs, kinds, {"n": n, "d": d}))
    heads, d = 6, pick(rng, 120, 144)  # heads of 16 numbers, 96 together: q is narrower than the block
    wide = {"n": 40, "d": d, "d_ff": 3 * d, "heads": heads, "kv_heads": heads, "head_dim": 16, "e": 4}
    return [*cases, Case(wide, ("wide",), {"n": 40, "d": d})]


def block(norm=lambda n, d, e: 4 * n * d + 4 * n + e * n * d, norms=2, inputs=lambda d, d_ff: 2 * d + d_ff, gated=3,
          attention=lambda n, h, kv_h, c, e: e * n * c * (2 * h + 2 * kv_h) + 4 * n * h):  # fmt: skip
    """A block_kept with another term in it. inputs: numbers per token that linear layers keep, o apart."""

    def block_kept(n, d, d_ff, heads, kv_heads, head_dim, e=2):
        linear = e * n * inputs(d, d_ff)
        feed_forward = gated * e * n * d_ff
        return norms * norm(n, d, e) + linear + attention(n, heads, kv_heads, head_dim, e) + feed_forward

    return block_kept


def and_also(rule):
    """A block_kept with rule(n, d, d_ff, e) bytes too many."""

    def block_kept(n, d, d_ff, heads, kv_heads, head_dim, e=2):
        return activations.block_kept(n, d, d_ff, heads, kv_heads, head_dim, e) + rule(n, d, d_ff, e)

    return block_kept


def width_from_d(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    return activations.block_kept(n, d, d_ff, heads, kv_heads, d // heads, e)


def always_two_bytes(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    return activations.block_kept(n, d, d_ff, heads, kv_heads, head_dim, 2)


def weights_too(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    weights = 2 * d * heads * head_dim + 2 * d * kv_heads * head_dim + 3 * d * d_ff
    return activations.block_kept(n, d, d_ff, heads, kv_heads, head_dim, e) + e * weights


def weights_and_norms_too(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    return weights_too(n, d, d_ff, heads, kv_heads, head_dim, e) + e * 2 * d


def block_per_token(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    in_e = 4 * d + 4 * d_ff + 2 * (heads + kv_heads) * head_dim  # two copies of d for norms and two for linear inputs
    return n * (e * in_e + 4 * (2 * d + 2 + heads))


def block_by_list(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    tensors = [(d, 4), (1, 4), (d, e), (d, e)]  # a norm, and what reads its output
    tensors += [(heads * head_dim, e), (kv_heads * head_dim, e), (kv_heads * head_dim, e), (heads * head_dim, e)]
    tensors += [(heads, 4)]
    tensors += [(d, 4), (1, 4), (d, e), (d, e)]
    tensors += [(d_ff, e)] * 4
    return sum(width * size * n for width, size in tensors)


def o_again(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    q, kv = heads * head_dim, kv_heads * head_dim
    norms = 2 * (4 * n * d + 4 * n + e * n * d)
    inputs = e * n * (2 * d + q + d_ff)
    attention = e * n * (2 * q + 2 * kv) + 4 * n * heads
    return norms + inputs + attention + 3 * e * n * d_ff


LLAMA_2_7B = activations.block_kept(2048, 4096, 11008, 32, 32, 128)
FOUR = (
    "You are {e} short. Four tensors are d_ff wide: gate, which the activation reads, act(gate) and up, which their "
    "product reads, and the product, which down reads."
)

FLOAT32_GATE = (
    "You kept a tensor of the feed-forward part in float32. Norms and the softmax alone compute in float32; the "
    "activation and the product that follows are in e bytes."
)
WEIGHTS_TOO = (
    "You added the block's weights. They are there before the forward pass, and model_states counts them: activations "
    "grow with the tokens n."
)

BLOCK_KEPT = Exercise(
    name="block_kept",
    reference=activations.block_kept,
    cases=block_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("o_again", o_again,
                "The input of o is counted twice: it is the output that attention keeps already, one tensor with two "
                "readers."),
        Mistake("one_residual", and_also(lambda n, d, d_ff, e: e * n * d),
                "You are e n d over. Either the input of o is counted beside the output of attention, which is the "
                "same tensor; or an addition keeps one of its terms, and the derivative of a sum reads neither."),
        Mistake("both_residuals", and_also(lambda n, d, d_ff, e: 2 * e * n * d),
                "You are 2 e n d over. The two additions keep nothing, as the derivative of a sum reads neither term; "
                "and what a norm returns is kept once, as the input of the linear layers."),
        Mistake("in_float32", and_also(lambda n, d, d_ff, e: (4 - e) * n * d_ff), FLOAT32_GATE),
        Mistake("two_in_float32", and_also(lambda n, d, d_ff, e: 2 * (4 - e) * n * d_ff), FLOAT32_GATE),
        Mistake("five_wide", block(gated=4),
                "You are e n d_ff over: four tensors are d_ff wide. What act(gate) * up returns and what down reads "
                "are the same one."),
        Mistake("weights_too", weights_too, WEIGHTS_TOO),
        Mistake("weights_and_norms_too", weights_and_norms_too, WEIGHTS_TOO),
        Mistake("always_two_bytes", always_two_bytes, "You took 2 bytes per number whatever e says."),
        Mistake("width_from_d", width_from_d, None, "Right when heads * head_dim is d"),
        Mistake("norms_without_x", block(norm=lambda n, d, e: 4 * n + e * n * d),
                "Your norms do not keep their x. Their derivative reads it again: 4 n d bytes per norm, in float32."),
        Mistake("norms_wholly_in_e", block(norm=lambda n, d, e: 2 * e * n * d + e * n),
                "Right in float32. In half precision a norm still computes in float32, and keeps x and 1/rms so: 4 "
                "bytes, not e. Only x / rms has e."),
        Mistake("one_norm", block(norms=1),
                "You counted one norm. A block has two: before attention, and before the feed-forward part."),
        Mistake("no_norms", block(norms=0), "The two norms are missing. Their derivative reads x and 1/rms."),
        Mistake("norm_in_half", block(norm=lambda n, d, e: 2 * e * n * d + 4 * n),
                "Right in float32. In half precision a norm still computes in float32, and keeps its x so: 4 bytes, "
                "not e."),
        Mistake("frozen_norm", block(norm=lambda n, d, e: 4 * n * d + 4 * n),
                "You are 2 e n d short. Each norm keeps x / rms for the gradient of its own weight, and the linear "
                "layers behind it keep what it returns: two tensors per norm."),
        Mistake("no_rms", block(norm=lambda n, d, e: 4 * n * d + e * n * d),
                "1/rms is missing in the norms: one float32 per token and norm."),
        Mistake("rms_in_half", block(norm=lambda n, d, e: 4 * n * d + e * n + e * n * d),
                "You took e bytes for 1/rms. A norm computes in float32: 4 bytes per token."),
        Mistake("copy_in_float32", block(norm=lambda n, d, e: 8 * n * d + 4 * n),
                "You kept x / rms in float32. It is cast back before the norm's weight meets it: e bytes."),
        Mistake("every_reader", block(inputs=lambda d, d_ff: 5 * d + d_ff),
                "You counted the input of q, k, v, gate and up once for each. q, k and v read one tensor, gate and up "
                "another: what is shared is kept once."),
        Mistake("every_reader_and_o", block(inputs=lambda d, d_ff: 6 * d + d_ff),
                "You counted the input of every linear layer. q, k and v read one tensor, gate and up another, and o "
                "reads what attention kept: what is shared is kept once."),
        Mistake("no_inputs", block(inputs=lambda d, d_ff: 0),
                "The inputs of the linear layers are missing: the gradient of a weight is made of its layer's input."),
        Mistake("three_wide", block(gated=2), FOUR.format(e="e n d_ff")),
        Mistake("two_wide", block(gated=1), FOUR.format(e="2 e n d_ff")),
        Mistake("one_wide", block(gated=0), FOUR.format(e="3 e n d_ff")),
        Mistake("down_is_narrow", block(inputs=lambda d, d_ff: 3 * d),
                "You took d numbers for the input of down. It comes from inside the feed-forward part: d_ff."),
        Mistake("one_input", block(inputs=lambda d, d_ff: d + d_ff),
                "You are e n d short. Two inputs are d wide: what q, k and v read, and what gate and up read. If you "
                "have both, look for the output of attention."),
        Mistake("no_output", block(attention=lambda n, h, kv_h, c, e: e * n * c * (h + 2 * kv_h) + 4 * n * h),
                "The output of attention is missing: it is kept, and o reads the same tensor."),
        Mistake("no_row_sums", block(attention=lambda n, h, kv_h, c, e: e * n * c * (2 * h + 2 * kv_h)),
                "Attention's sum of each row is missing (the log-sum-exp): 4 bytes per token and head. "
                "`attention_kept` has it."),
        Mistake("q_k_and_v_alone", block(attention=lambda n, h, kv_h, c, e: e * n * c * (h + 2 * kv_h)),
                "Of attention you kept q, k and v alone. Its output and 4 bytes per token and head are kept too: "
                "`attention_kept` has them."),
        Mistake("no_attention", block(attention=lambda n, h, kv_h, c, e: 0),
                "Attention is missing. `attention_kept` says what it keeps."),
        Mistake("all_heads", block(attention=lambda n, h, kv_h, c, e: 4 * e * n * c * h + 4 * n * h),
                "Your keys and values have all heads. Give attention_kept the kv_heads."),
        Mistake("attention_in_half", lambda n, d, d_ff, heads, kv_heads, head_dim, e=2: block(
                attention=lambda *_: activations.attention_kept(n, 0, heads, kv_heads, head_dim))(
                n, d, d_ff, heads, kv_heads, head_dim, e),
                "Wrong in float32 and right in half precision: attention_kept takes e too, and is told nothing of it."),
        Mistake("weights", lambda n, d, d_ff, heads, kv_heads, head_dim, e=2:
                e * (2 * d * d + 2 * d * kv_heads * head_dim + 3 * d * d_ff + 2 * d),
                "Those are the block's weights. Activations grow with the tokens n: what does the backward pass read?"),
        Mistake("doubled", lambda *inputs: 2 * block_per_token(*inputs), None, "exactly 2 times"),
    ),
    alternatives=(block_per_token, block_by_list, block()),
    kinds={
        "half": "Right in float32 and wrong in half precision. Norms and the softmax keep tensors in float32, and "
        "nothing else does.",
        "wide": "Right when heads * head_dim is d, and wrong when it is not: q and the output of attention are heads * "
        "head_dim wide, whatever d is.",
        "grouped": "Right when keys and values have as many heads as queries, and wrong when they have fewer.",
    },
    fact=f"In half precision one row of 2,048 tokens makes a block of Llama-2-7B keep {LLAMA_2_7B / 2**20:.0f} MiB, "
    f"{LLAMA_2_7B / 2048 / 4096:.0f} bytes per token and unit of width, and all 32 blocks "
    f"{32 * LLAMA_2_7B / 2**30:.1f} GiB.",
)

EXERCISES = (ATTENTION_KEPT, BLOCK_KEPT)
