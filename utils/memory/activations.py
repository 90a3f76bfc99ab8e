"""What autograd keeps for the backward pass of one forward pass, term by term, as formulas.

    kept = activations(shape, Run(batch=4, length=512, needs=everything(shape)))
    kept.total, kept.terms

Every formula follows from three rules:
    1. A product x W^T keeps x if W is trained (for dL/dW = g^T x), and W, which is there anyway, if x needs a gradient.
    2. Any other function keeps what its own derivative reads: softmax its output, silu its input, a product of two
       activations both of them, an addition nothing.
    3. What two functions keep of the same tensor is kept once.
A frozen weight therefore saves the memory of its input, unless an adapter beside it reads the same x.

n = batch x length tokens; e = bytes of an activation (4 in float32, 2 in half precision); numbers marked 4 are in
float32 whatever e is. Masks of dropout are not counted: the formulas are for dropout 0 (see `dropout_masks`).
"""

from collections import Counter
from dataclasses import dataclass, field, replace

# ------------------------------------------------------------------------------------------ what a run depends on


@dataclass(frozen=True)
class Needs:
    """Which tensors training asks for.

    inputs     names of the linear layers whose input is kept, because they or an adapter beside them train
    norms      whether the weights of the norms train        embedding, head: whether those two do
    start      whether the input of the first block needs a gradient (a trained embedding, or a prompt in front)
    """

    inputs: frozenset = frozenset()
    norms: bool = False
    embedding: bool = False
    head: bool = False
    start: bool = False


_LLAMA = {f"{part}.{role}_proj": role for part, roles in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
          for role in roles}  # fmt: skip
LINEAR = {  # path within a block -> what the formulas call the linear layer there
    "llama": _LLAMA,
    "gemma": _LLAMA,
    "gpt2": {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    "opt": {f"self_attn.{name}_proj": name[0] for name in ("q", "k", "v", "out")} | {"fc1": "up", "fc2": "down"},
    "bert": {f"attention.self.{name}": name[0] for name in ("query", "key", "value")}
    | {"attention.output.dense": "o", "intermediate.dense": "up", "output.dense": "down"},
}


def everything(shape):
    """The Needs of full fine-tuning."""
    return Needs(frozenset(LINEAR[shape.block].values()), norms=True, embedding=True, head=True, start=True)


@dataclass(frozen=True)
class Run:
    """One forward pass.

    needs   a Needs, which holds for the ends of the model and for all blocks, unless `blocks` has one for each
    e       bytes per activation        attention: "sdpa" or "eager"
    """

    batch: int
    length: int
    needs: Needs
    e: int = 4
    attention: str = "sdpa"
    checkpointing: bool = False
    blocks: tuple[Needs, ...] = ()

    @property
    def n(self):
        return self.batch * self.length


@dataclass
class Kept:
    """Bytes by term. `flows`: whether the tensor that comes out needs a gradient."""

    terms: Counter = field(default_factory=Counter)
    flows: bool = False

    @property
    def total(self):
        return sum(self.terms.values())


# ------------------------------------------------------------------------------------------------- single functions


def rms_norm(run, d, flows):
    """y = w x / rms(x), computed in float32: keeps x in float32 (squaring and scaling read it) and 1/rms per token.

    A trained w also keeps x / rms, in the activations' dtype. 4 n d + 4 n (+ e n d)
    """
    kept = 4 * run.n * d + 4 * run.n if flows else 0
    return kept + (run.e * run.n * d if run.needs.norms else 0)


def gemma_norm(run, d, flows):
    """As rms_norm, but y = (1 + w) x / rms(x) is multiplied in float32, and 1 + w is a new tensor. + 4 d"""
    kept = 4 * run.n * d + 4 * run.n + 4 * d if flows else 0
    return kept + (4 * run.n * d if run.needs.norms else 0)


def layer_norm(run, d, flows):
    """y = w (x - mean) / std + b, in one kernel: keeps x, and mean and 1/std per token. e n d + 2 e n

    (On CUDA mean and 1/std are in float32: 8 n.)
    """
    return run.e * run.n * d + 2 * run.e * run.n if flows or run.needs.norms else 0


def attention(run, shape, flows):
    """softmax(q k^T / sqrt(head_dim)) v, with (q, k, v) or fewer of them needing a gradient.

    sdpa    keeps q, k, v, the output and one float32 per row and head: e n (2 q_dim + 2 kv_dim) + 4 n heads
    eager   keeps q, k and v repeated to all heads, and the probabilities: in float32 as the softmax made them, and
            in half precision once more for the product with v: 3 e n q_dim + 4 n length heads (+ e n length heads)
    flows: three booleans, for q, k and v
    """
    q, k, v = flows
    if not (q or k or v):
        return 0
    if run.attention == "sdpa":
        return run.e * run.n * (2 * shape.q_dim + 2 * shape.kv_dim) + 4 * run.n * shape.heads
    alone = run.batch == shape.kv_heads == 1  # one head for all of one sequence is repeated without a copy
    repeated = shape.kv_dim if alone else shape.q_dim
    kept = run.e * run.n * (shape.q_dim * k + repeated * q + repeated * (q or k))  # q for dk, k for dq, v for the rest
    square = run.n * run.length * shape.heads
    as_computed = run.e if shape.block in ("gpt2", "bert") else 4  # these two do not ask for a softmax in float32
    softmax = q or k
    copy = v and not (softmax and as_computed == run.e)
    return kept + square * (as_computed * softmax + run.e * copy)


def gated(run, d_ff, flows):
    """act(gate) * up: keeps gate for the activation, act(gate) and up for the product. 3 e n d_ff"""
    gate, up = flows
    return run.e * run.n * d_ff * (int(gate) + int(gate) + int(up))


def gelu_new(run, d_ff):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) written out: x, 0.5 x, the tanh and 1 + tanh. 4 e n d_ff"""
    return 4 * run.e * run.n * d_ff


def rotary_tables(run, shape):
    """cos and sin, once for the whole model, as every layer reads the same two. 2 e length head_dim"""
    return 2 * run.e * run.length * shape.head_dim


def attention_kept(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
    """What attention keeps when q, k and v all need a gradient, in bytes.

    n: tokens   length: of a row   e: bytes per number   kernel: "sdpa" or "eager"
    sdpa    q, k, v, the output, and a float32 for each token and head: e n (2 q + 2 kv) + 4 n heads, with
            q = heads head_dim and kv = kv_heads head_dim
    eager   q, k and v repeated to all heads, and the probabilities, n length heads of them: in float32 as the softmax
            makes them, and in half precision once more for the product with v
    """
    q, kv = heads * head_dim, kv_heads * head_dim
    if kernel == "sdpa":
        return e * n * (2 * q + 2 * kv) + 4 * n * heads
    return 3 * e * n * q + n * length * heads * (4 if e == 4 else 4 + e)


def block_kept(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    """What one block of a Llama keeps in full fine-tuning with sdpa, in bytes.

    two norms        x in float32, 1/rms, and x / rms for the norm's own weight: 4 n d + 4 n + e n d each
    linear inputs    of q, k and v together, of gate and up together, of down: e n (2 d + d_ff); o reads what attention kept
    attention        `attention_kept`
    act(gate) * up   gate, act(gate) and up: 3 e n d_ff
    """
    norms = 2 * (4 * n * d + 4 * n + e * n * d)
    inputs = e * n * (2 * d + d_ff)
    return norms + inputs + attention_kept(n, 0, heads, kv_heads, head_dim, e) + 3 * e * n * d_ff


def checkpoint_kept(layers, block, boundary, every=1):
    """The most that is kept with a checkpoint after `every` blocks: one boundary for each segment, and the blocks of
    one segment while its backward pass runs.

    block: bytes that a block keeps   boundary: bytes of a block's input   returns bytes
    """
    segments = -(-layers // every)
    return segments * boundary + min(every, layers) * block


def loss_peak(n, vocab):
    """Beyond what is kept, the loss's backward pass makes two float32 tensors of n vocab numbers: 8 n vocab bytes.

    They are the gradient of log-softmax's output and that of the logits.
    """
    return 8 * n * vocab


def token_loss(run, shape):
    """Cross-entropy over the vocabulary: log-softmax keeps its float32 output, and the labels. 4 n vocab + 8 n + 4

    (Labels are shifted by one: a single row is a view of the padded row, one longer.)
    """
    return 4 * run.n * shape.vocab + 8 * (run.n + (run.batch == 1)) + 4


# --------------------------------------------------------------------------------------------------------- blocks


def llama_block(run, shape, flows):
    """norm, attention with rotary positions, norm, gated feed-forward: Llama, Mistral, Qwen, and Gemma."""
    n, e, d, needs = run.n, run.e, shape.d, run.needs
    norm = gemma_norm if shape.block == "gemma" else rms_norm
    kept = Kept()
    kept.terms["norms"] += norm(run, d, flows)
    flows = flows or needs.norms
    qkv = tuple(flows or name in needs.inputs for name in "qkv")
    kept.terms["linear inputs"] += e * n * d * bool({"q", "k", "v"} & needs.inputs)
    kept.terms["attention"] += attention(run, shape, qkv)
    shared = run.attention == "sdpa" and any(qkv)  # sdpa kept its output already, and o reads the same
    kept.terms["linear inputs"] += e * n * shape.q_dim * ("o" in needs.inputs and not shared)
    flows = any(qkv) or "o" in needs.inputs
    kept.terms["norms"] += norm(run, d, flows)
    flows = flows or needs.norms
    halves = tuple(flows or name in needs.inputs for name in ("gate", "up"))
    kept.terms["linear inputs"] += e * n * d * bool({"gate", "up"} & needs.inputs)
    kept.terms["feed-forward"] += gated(run, shape.d_ff, halves)
    kept.terms["linear inputs"] += e * n * shape.d_ff * ("down" in needs.inputs)
    kept.flows = any(halves) or "down" in needs.inputs
    return kept


def gpt2_block(run, shape, flows):
    """layer norm, attention whose q, k and v come from one layer, layer norm, feed-forward with gelu_new."""
    n, e, d, needs = run.n, run.e, shape.d, run.needs
    kept = Kept()
    kept.terms["norms"] += layer_norm(run, d, flows)
    flows = flows or needs.norms
    kept.terms["linear inputs"] += e * n * d * ("qkv" in needs.inputs)
    flows = flows or "qkv" in needs.inputs
    kept.terms["attention"] += attention(run, shape, (flows, flows, flows))
    kept.terms["linear inputs"] += e * n * d * ("o" in needs.inputs and not (flows and run.attention == "sdpa"))
    flows = flows or "o" in needs.inputs
    kept.terms["norms"] += layer_norm(run, d, flows)
    flows = flows or needs.norms
    kept.terms["linear inputs"] += e * n * d * ("up" in needs.inputs)
    flows = flows or "up" in needs.inputs
    kept.terms["feed-forward"] += gelu_new(run, shape.d_ff) * flows
    kept.terms["linear inputs"] += e * n * shape.d_ff * ("down" in needs.inputs)
    kept.flows = flows or "down" in needs.inputs
    return kept


def opt_block(run, shape, flows):
    """layer norm, attention, layer norm, feed-forward with relu, whose output is the next layer's input."""
    n, e, d, needs = run.n, run.e, shape.d, run.needs
    kept = Kept()
    kept.terms["norms"] += layer_norm(run, d, flows)
    flows = flows or needs.norms
    qkv = tuple(flows or name in needs.inputs for name in "qkv")
    kept.terms["linear inputs"] += e * n * d * bool({"q", "k", "v"} & needs.inputs)
    kept.terms["attention"] += attention(run, shape, qkv)
    shared = run.attention == "sdpa" and any(qkv)
    kept.terms["linear inputs"] += e * n * shape.q_dim * ("o" in needs.inputs and not shared)
    flows = any(qkv) or "o" in needs.inputs
    kept.terms["norms"] += layer_norm(run, d, flows)
    flows = flows or needs.norms
    kept.terms["linear inputs"] += e * n * d * ("up" in needs.inputs)
    flows = flows or "up" in needs.inputs
    kept.terms["feed-forward"] += e * n * shape.d_ff * (flows or "down" in needs.inputs)
    kept.flows = flows or "down" in needs.inputs
    return kept


def bert_block(run, shape, flows):
    """attention, layer norm after the residual addition, feed-forward with gelu, layer norm again.

    The norm's output is the next layers' input and the residual: kept once if any of them trains.
    """
    n, e, d, needs = run.n, run.e, shape.d, run.needs
    kept = Kept()
    qkv = tuple(flows or name in needs.inputs for name in "qkv")
    kept.terms["linear inputs"] += e * n * d * bool({"q", "k", "v"} & needs.inputs)
    kept.terms["attention"] += attention(run, shape, qkv)
    shared = run.attention == "sdpa" and any(qkv)
    kept.terms["linear inputs"] += e * n * d * ("o" in needs.inputs and not shared)
    flows = any(qkv) or "o" in needs.inputs
    kept.terms["norms"] += layer_norm(run, d, flows)
    flows = flows or needs.norms
    kept.terms["linear inputs"] += e * n * d * ("up" in needs.inputs)
    flows = flows or "up" in needs.inputs
    kept.terms["feed-forward"] += e * n * shape.d_ff * flows  # gelu reads its input
    kept.terms["linear inputs"] += e * n * shape.d_ff * ("down" in needs.inputs)
    flows = flows or "down" in needs.inputs
    kept.terms["norms"] += layer_norm(run, d, flows)
    kept.flows = flows or needs.norms
    return kept


BLOCKS = {"llama": llama_block, "gemma": llama_block, "gpt2": gpt2_block, "opt": opt_block, "bert": bert_block}


# ------------------------------------------------------------------------------------------------------ the model


def activations(shape, run):
    """Bytes that one forward pass with a loss keeps for its backward pass, as Kept with named terms.

    With checkpointing every block keeps only its input; what one block keeps is then needed again while its backward
    pass runs, as `recomputed` says.
    """
    kept = Kept(flows=run.needs.start)
    embedding(kept, shape, run)
    for needs in run.blocks or (run.needs,) * shape.layers:
        inside = BLOCKS[shape.block](replace(run, needs=needs), shape, kept.flows)
        if run.checkpointing:
            kept.terms["block inputs"] += run.e * run.n * shape.d
        else:
            kept.terms += inside.terms
        kept.flows = inside.flows
    (bert_head if shape.block == "bert" else decoder_head)(kept, shape, run)
    return kept


def embedding(kept, shape, run):
    """A trained embedding keeps the numbers it looked up: 8 n for tokens, and those of learned positions."""
    if not run.needs.embedding:
        return
    positions = {"opt": 8 * run.n, "gpt2": 8 * run.length, "bert": 8 * run.length}
    kept.terms["token numbers"] += 8 * run.n + positions.get(shape.block, 0)
    if shape.block == "bert":
        kept.terms["norms"] += layer_norm(run, shape.d, True)


def decoder_head(kept, shape, run):
    """The last norm, the output layer and the loss of a causal language model."""
    if shape.block in ("llama", "gemma") and kept.flows:
        kept.terms["rotary tables"] += rotary_tables(run, shape)
    kept.terms["norms"] += FINAL_NORM[shape.block](run, shape.d, kept.flows)
    kept.terms["linear inputs"] += run.e * run.n * shape.d * run.needs.head
    kept.terms["loss"] += token_loss(run, shape)


def bert_head(kept, shape, run):
    """A pooled classifier: tanh keeps its output, which is the classifier's input. A trained pooler holds on to all of
    the last hidden states, since the first token's are a view of them."""
    e, batch = run.e, run.batch
    kept.terms["linear inputs"] += e * run.n * shape.d * run.needs.head
    kept.terms["head"] += e * batch * shape.d
    kept.terms["loss"] += e * batch * shape.labels + 8 * batch + e


FINAL_NORM = {"llama": rms_norm, "gemma": gemma_norm, "gpt2": layer_norm, "opt": layer_norm}
