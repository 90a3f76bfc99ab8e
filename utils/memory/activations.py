"""What autograd keeps for the backward pass of one forward pass, term by term, as formulas.

Every formula follows from three rules:
    1. A product x W^T keeps x if W is trained (for dL/dW = g^T x), and W, which is there anyway, if x needs a gradient.
    2. Any other function keeps what its own derivative reads: softmax its output, silu its input, a product of two
       activations both of them, an addition nothing.
    3. What two functions keep of the same tensor is kept once.
A frozen weight therefore saves the memory of its input, unless an adapter beside it reads the same x.

n = batch x length tokens; e = bytes of an activation (4 in float32, 2 in half precision); numbers marked 4 are in
float32 whatever e is. This file holds the single functions; `blocks` puts them together, and what an adapter keeps
beside is in `methods`.
"""

from collections import Counter
from dataclasses import dataclass, field

from utils.memory.methods import noise

# ------------------------------------------------------------------------------------------ what a run depends on


@dataclass(frozen=True)
class Needs:
    """Which tensors training asks for.

    inputs     names of the linear layers whose input is kept, because they or an adapter beside them train
    norms      whether the weights of the norms train        embedding, head: whether those two do
    start      whether the input of the first block needs a gradient (a trained embedding, or a prompt in front)
    parts      name of a linear layer, a norm, or "attention" -> the parts of an adapter there, see `methods`
    distances  whether the biases by distance train, of T5's attention
    prompt     tokens that a prompt puts in front of the text
    extra      bytes kept once, whatever the batch: of the network that makes a prompt or a prefix
    """

    inputs: frozenset = frozenset()
    norms: bool = False
    embedding: bool = False
    head: bool = False
    start: bool = False
    parts: dict = field(default_factory=dict)
    distances: bool = False
    prompt: int = 0
    extra: int = 0


_LLAMA = {f"{part}.{role}_proj": role for part, roles in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
          for role in roles}  # fmt: skip
LINEAR = {  # path within a block -> what the formulas call the linear layer there
    "llama": _LLAMA,
    "gemma": _LLAMA,
    "gpt2": {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    "opt": {f"self_attn.{name}_proj": name[0] for name in ("q", "k", "v", "out")} | {"fc1": "up", "fc2": "down"},
    "bert": {f"attention.self.{name}": name[0] for name in ("query", "key", "value")}
    | {"attention.output.dense": "o", "intermediate.dense": "up", "output.dense": "down"},
    "t5": {f"layer.0.SelfAttention.{name}": name for name in "qkvo"}
    | {f"layer.1.EncDecAttention.{name}": f"cross {name}" for name in "qkvo"}
    | {f"layer.{i}.DenseReluDense.{path}": name for i in (1, 2)
       for path, name in (("wi", "up"), ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))},
}  # fmt: skip
NORMS = {  # path within a block -> what the formulas call the norm there
    "llama": {
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
        "self_attn.q_norm": "q norm",
        "self_attn.k_norm": "k norm",
    },
    "gemma": {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"},
    "gpt2": {"ln_1": "norm1", "ln_2": "norm2"},
    "opt": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "bert": {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"},
    "t5": {f"layer.{i}.layer_norm": f"norm{i + 1}" for i in range(3)},
}
# what a family's dropout acts on in its attention: the probabilities, or only what comes out
DROPS = {"llama": None, "gemma": None, "opt": "outputs"} | dict.fromkeys(("gpt2", "bert", "t5"), "probabilities")


def everything(shape):
    """The Needs of full fine-tuning."""
    return Needs(frozenset(LINEAR[shape.block].values()), norms=True, embedding=True, head=True, start=True,
                 distances=shape.block == "t5")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One forward pass.

    needs   a Needs, which holds for the ends of the model and for all blocks, unless `blocks` has one for each
    e       bytes per activation        attention: "sdpa" or "eager"        device: "cpu" or "cuda"
    checkpointing  True, or how many of the first blocks keep only their inputs
    quantized, dropout  whether the linear layers are in 4 bits, and whether the model's own dropout is on
    target  tokens of an encoder-decoder's answer, where `length` is the question's; None: the same
    """

    batch: int
    length: int
    needs: Needs
    e: int = 4
    attention: str = "sdpa"
    checkpointing: bool | int = False
    blocks: tuple[Needs, ...] = ()
    target: int | None = None
    device: str = "cpu"
    quantized: bool = False
    dropout: bool = False

    @property
    def n(self):
        return self.batch * self.length


@dataclass
class Kept:
    """Bytes by term. flows: whether the tensor that comes out needs a gradient   rotates: whether q or k do"""

    terms: Counter = field(default_factory=Counter)
    flows: bool = False
    rotates: bool = False

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


def t5_norm(run, d, flows):
    """As rms_norm, but only the squares are taken in float32: in half precision x is kept in both. + e n d"""
    both = run.e * run.n * d if flows and run.e < 4 else 0
    return rms_norm(run, d, flows) + both


def layer_norm(run, d, flows):
    """y = w (x - mean) / std + b, in one kernel: keeps x, and mean and 1/std per token. e n d + 2 e n

    On CUDA mean and 1/std are in float32: 8 n.
    """
    statistics = 4 if run.device == "cuda" else run.e
    return (run.e * d + 2 * statistics) * run.n if flows or run.needs.norms else 0


def attention(run, shape, flows, columns=0):
    """softmax(q k^T / sqrt(head_dim)) v, with (q, k, v) or fewer of them needing a gradient.

    sdpa    keeps q, k, v, the output and one float32 per row and head: e n (2 q_dim + 2 kv_dim) + 4 n heads
    eager   keeps q, k and v repeated to all heads, and the probabilities: in float32 as the softmax made them, and
            in half precision once more for the product with v: 3 e n q_dim + 4 n length heads (+ e n length heads)
    flows: three booleans, for q, k and v
    Dropout of probabilities adds its draws and the dropped ones in eager; sdpa on CUDA keeps but a seed (on a CPU it
    has no such kernel and is as eager, which is not counted).
    columns: keys in front, of a prefix. A causal mask with room for them is written out, which sdpa keeps,
    e length (length + columns), and for which it has k and v repeated to all heads. BERT has no mask.
    """
    q, k, v = flows
    if not (q or k or v):
        return 0
    m = run.batch * (run.length + columns)  # keys
    fused = shape.block == "gpt2" and columns  # q is a view of q, k and v together; the k and v in it are of no use
    left = 2 * run.e * run.n * shape.d if fused and (run.attention == "sdpa" or run.batch == 1) else 0
    if run.attention == "sdpa":
        masked = columns and shape.block != "bert"
        mask = run.e * run.length * (run.length + columns) if masked else 0
        kv = shape.q_dim if masked and shape.kv_heads > 1 else shape.kv_dim  # one head is repeated without a copy
        return run.e * (2 * run.n * shape.q_dim + 2 * m * kv) + 4 * run.n * shape.heads + mask + left
    alone = run.batch == shape.kv_heads == 1  # one head for all of one sequence is repeated without a copy
    repeated = shape.kv_dim if alone else shape.q_dim
    kept = run.e * (run.n * shape.q_dim * k + m * repeated * q + m * repeated * (q or k))  # q for dk, k for dq, v
    square = run.n * (run.length + columns) * shape.heads
    as_computed = run.e if shape.block in ("gpt2", "bert") else 4  # these two do not ask for a softmax in float32
    softmax = q or k
    dropped = run.dropout and DROPS[shape.block] == "probabilities"  # another tensor, and the draws
    copy = v and (dropped or not (softmax and as_computed == run.e))
    kept += dropout_masks(run, square) if dropped and softmax else 0
    return kept + square * (as_computed * softmax + run.e * copy) + left


def gated(run, d_ff, flows):
    """act(gate) * up: keeps gate for the activation, act(gate) and up for the product. 3 e n d_ff"""
    gate, up = flows
    return run.e * run.n * d_ff * (int(gate) + int(gate) + int(up))


def gelu_new(run, d_ff):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) written out: x, 0.5 x, the tanh and 1 + tanh. 4 e n d_ff"""
    return 4 * run.e * run.n * d_ff


def dropout_masks(run, numbers):
    """What dropout keeps of its draws, whatever its probability: e bytes each on a CPU, one byte each on CUDA."""
    return noise(run, run.dropout, numbers)


def rotary_tables(run, shape):
    """cos and sin, once for the whole model, as every layer reads the same two. 2 e length head_dim"""
    return 2 * run.e * run.length * shape.head_dim


def attention_kept(n, length, heads, kv_heads, head_dim, e=2, kernel="sdpa"):
    """What attention keeps when q, k and v all need a gradient, in bytes.

    n: tokens   length: of a row   e: bytes per number, 4 or 2   kernel: "sdpa" or "eager"
    sdpa    q, k, v and the output, and a float32 for each token and head
    eager   q, and k and v repeated to all heads; and the probabilities, in float32 as the softmax makes them, and where
            e is 2 once more for the product with v
    """
    q, kv = heads * head_dim, kv_heads * head_dim
    if kernel == "sdpa":
        return e * n * (2 * q + 2 * kv) + 4 * n * heads
    return 3 * e * n * q + n * length * heads * (4 if e == 4 else 4 + e)


def block_kept(n, d, d_ff, heads, kv_heads, head_dim, e=2):
    """What one block of a Llama keeps in full fine-tuning with sdpa, in bytes.

    two norms        x and 1/rms in float32, and x / rms for the norm's own weight
    linear inputs    of q, k and v together, of gate and up together, of down; o reads what attention keeps
    attention        `attention_kept`
    act(gate) * up   gate, act(gate) and up
    n: tokens   d, d_ff: widths   e: bytes per number, 4 or 2
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
    """Bytes that the loss's backward pass makes beyond what is kept: two float32 tensors of n vocab numbers.

    They are the gradient of log-softmax's output and that of the logits. n: tokens   vocab: V
    """
    return 8 * n * vocab


def token_loss(run, shape):
    """Cross-entropy over the vocabulary: log-softmax keeps its float32 output, and the labels. 4 n vocab + 8 n + 4

    (Labels are shifted by one: a single row is a view of the padded row, one longer.)
    """
    return 4 * run.n * shape.vocab + 8 * (run.n + (run.batch == 1)) + 4
