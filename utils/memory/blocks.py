"""Blocks of six families and whole models: which functions come after which, and what all of them keep together.

    kept = activations(shape, Run(batch=4, length=512, needs=everything(shape)))
    kept.total, kept.terms

A Block walks a block's forward pass and writes every kept tensor down once. See `activations` for the three rules.
"""

from collections import Counter
from dataclasses import dataclass, replace

from utils.memory.activations import (
    DROPS,
    NORMS,
    Kept,
    attention,
    dropout_masks,
    gated,
    gelu_new,
    gemma_norm,
    layer_norm,
    rms_norm,
    rotary_tables,
    t5_norm,
    token_loss,
)
from utils.memory.methods import AT_ATTENTION, AT_LINEAR, AT_NORM, copies, of


@dataclass
class Activation:
    """A tensor on its way: so many numbers, whether it needs a gradient, whether something keeps it already."""

    numbers: int
    flows: bool
    kept: bool = False


class Block:
    """One block on its way forward. It writes down what is kept, every tensor once (rule 3).

    stream: the residual stream   attention_input, ffn: what the two parts read   rotates: whether q or k need cos, sin
    """

    def __init__(self, run, shape, flows):
        self.run, self.shape, self.needs, self.e, self.n = run, shape, run.needs, run.e, run.n
        self.terms = Counter()
        self.stream = self.tensor(shape.d, flows)
        self.ffn = self.attention_input = None
        self.rotates = False
        self.masked = run.attention == "eager" and shape.block != "bert"  # a mask is written out

    def tensor(self, width, flows):
        """A new tensor with `width` numbers per token."""
        return Activation(self.n * width, flows)

    def like(self, x, flows=None):
        """A new tensor of x's size."""
        return Activation(x.numbers, x.flows if flows is None else flows)

    def is_norm(self, path):
        """Whether this path in a model ends in one of the block's norms."""
        return path.endswith(tuple(NORMS[self.shape.block]))

    def keep(self, x, term):
        if not x.kept:
            self.terms[term] += self.e * x.numbers
            x.kept = True

    def linear(self, name, x, width):
        """y = W x, which keeps x if W is trained (rule 1), and what a method has put there."""
        y = self.tensor(width, x.flows or name in self.needs.inputs)
        if name in self.needs.inputs:
            self.keep(x, "linear inputs")
        for part in self.needs.parts.get(name, ()):
            y = of(part, AT_LINEAR)(self, part, x, y)
        return y

    def norm(self, name, x):
        """The family's norm of x, and what a method has put there."""
        flows = x.flows
        for part in self.needs.parts.get(name, ()):
            x, flows = of(part, AT_NORM)(self, part, x, flows)
        self.terms["norms"] += self.kept_by_norm(flows)
        in_float32 = NORM[self.shape.block] in (rms_norm, gemma_norm)  # in half precision that is another tensor
        x.kept = flows and (self.e == 4 or not in_float32)
        return self.like(x, flows or self.needs.norms)

    def head_norm(self, name, x, heads):
        """Qwen3 norms every head's queries and keys: `heads` times as many rows of head_dim numbers."""
        run, width = replace(self.run, batch=self.run.batch * heads), self.shape.head_dim
        self.terms["norms"] += rms_norm(run, width, x.flows)
        self.terms["adapters"] += (
            sum(copies(self, *p.copies.values()) for p in self.needs.parts.get(name, ())) * x.flows
        )
        return self.like(x, x.flows or self.needs.norms)

    def kept_by_norm(self, flows):
        return NORM[self.shape.block](self.run, self.shape.d, flows)

    def attend(self, q, k, v):
        """softmax(q k^T) v, with what a method has put there. sdpa keeps its output itself."""
        parts = self.needs.parts.get("attention", ())
        columns = sum(of(part, AT_ATTENTION)(self, part, q) for part in parts)
        flows = (q.flows, k.flows or columns > 0, v.flows or columns > 0)
        self.rotates = q.flows or k.flows
        self.terms["attention"] += attention(self.run, self.shape, flows, columns)
        own = any(flows) and self.run.attention == "sdpa" and len(parts) == (columns > 0)
        return Activation(self.n * self.shape.q_dim, any(flows) or len(parts) > 0, kept=own)

    def drop(self, x):
        """The model's own dropout."""
        self.terms["dropout"] += dropout_masks(self.run, x.numbers) * x.flows
        return self.like(x) if self.run.dropout else x

    def add(self, x):
        """The residual addition, which keeps nothing. Where a family has dropout, it drops what is added."""
        if DROPS[self.shape.block]:
            x = self.drop(x)
        self.stream = self.tensor(self.shape.d, self.stream.flows or x.flows)

    @property
    def done(self):
        return Kept(self.terms, self.stream.flows, self.rotates)


# --------------------------------------------------------------------------------------------------------- blocks


def llama_block(run, shape, flows):
    """norm, attention with rotary positions, norm, gated feed-forward: Llama, Mistral, Qwen, and Gemma."""
    block = Block(run, shape, flows)
    h = block.attention_input = block.norm("norm1", block.stream)
    q, k, v = block.linear("q", h, shape.q_dim), *(block.linear(name, h, shape.kv_dim) for name in "kv")
    if shape.head_norms:
        q, k = block.head_norm("q norm", q, shape.heads), block.head_norm("k norm", k, shape.kv_heads)
    block.add(block.linear("o", block.attend(q, k, v), shape.d))
    block.ffn = block.norm("norm2", block.stream)
    gate, up = (block.linear(name, block.ffn, shape.d_ff) for name in ("gate", "up"))
    block.terms["feed-forward"] += gated(run, shape.d_ff, (gate.flows, up.flows))
    inside = block.tensor(shape.d_ff, gate.flows or up.flows)
    block.add(block.linear("down", inside, shape.d))
    return block.done


def gpt2_block(run, shape, flows):
    """layer norm, attention whose q, k and v come from one layer, layer norm, feed-forward with gelu_new."""
    block = Block(run, shape, flows)
    block.attention_input = block.norm("norm1", block.stream)
    qkv = block.linear("qkv", block.attention_input, 3 * shape.d)
    block.add(block.linear("o", block.attend(qkv, qkv, qkv), shape.d))
    block.ffn = block.norm("norm2", block.stream)
    up = block.linear("up", block.ffn, shape.d_ff)
    block.terms["feed-forward"] += gelu_new(run, shape.d_ff) * up.flows
    block.add(block.linear("down", block.tensor(shape.d_ff, up.flows), shape.d))
    return block.done


def opt_block(run, shape, flows):
    """layer norm, attention, layer norm, feed-forward with relu, whose output is the next layer's input."""
    block = Block(run, shape, flows)
    h = block.attention_input = block.norm("norm1", block.stream)
    q, k, v = (block.linear(name, h, shape.d) for name in "qkv")
    block.add(block.linear("o", block.attend(q, k, v), shape.d))
    block.ffn = block.norm("norm2", block.stream)
    up = block.linear("up", block.ffn, shape.d_ff)
    inside = block.tensor(shape.d_ff, up.flows)
    if inside.flows:
        block.keep(inside, "feed-forward")  # relu keeps its output
    block.add(block.linear("down", inside, shape.d))
    return block.done


def bert_block(run, shape, flows):
    """attention, layer norm after the residual addition, feed-forward with gelu, layer norm again.

    The norm's output is the next layers' input and the residual: kept once if any of them trains.
    """
    block = Block(run, shape, flows)
    h = block.attention_input = block.stream
    q, k, v = (block.linear(name, h, shape.d) for name in "qkv")
    block.add(block.linear("o", block.attend(q, k, v), shape.d))
    block.stream = block.ffn = block.norm("norm1", block.stream)
    up = block.linear("up", block.ffn, shape.d_ff)
    if up.flows:
        block.keep(up, "feed-forward")  # gelu reads its input
    block.add(block.linear("down", block.tensor(shape.d_ff, up.flows), shape.d))
    block.stream = block.norm("norm2", block.stream)
    return block.done


def t5_attention(block, name, q, k, v, keys, trained_bias=False):
    """softmax(q k^T + bias) v, with scores that are biased by distance. keys: per row

    sdpa    takes the bias as a mask: a copy in every layer, and in cross-attention, where it is zeros, one for all
    eager   as in GPT-2, and so does sdpa when the bias is trained, whose kernels on a CPU have no gradient for it, but
            then all in float32
    A decoder's bias has minus infinity for tokens to come; a trained one keeps the booleans of that, in sdpa.
    """
    run, shape = block.run, block.shape
    if name != "cross":
        columns = sum(of(part, AT_ATTENTION)(block, part, q) for part in block.needs.parts.get("attention", ()))
        front = run.batch * columns * shape.q_dim
        k, v = (Activation(t.numbers + front, t.flows or columns > 0) for t in (k, v))
        keys += columns
    flows = q.flows or k.flows or v.flows or trained_bias
    out = Activation(q.numbers, flows)
    scores = run.n * keys * shape.heads
    if run.attention == "sdpa" and not trained_bias and flows:
        block.terms["attention"] += run.e * (2 * q.numbers + k.numbers + v.numbers) + 4 * run.n * shape.heads
        if name != "cross":
            block.terms["attention"] += run.e * scores // run.batch
        out.kept = True
    elif flows:
        softmax = q.flows or k.flows or trained_bias
        kept = q.numbers * k.flows + k.numbers * q.flows + v.numbers * softmax + scores * run.dropout * v.flows
        block.terms["dropout"] += dropout_masks(run, scores) * softmax
        block.terms["attention"] += (4 if run.attention == "sdpa" else run.e) * (kept + scores)
    if trained_bias and run.attention == "sdpa" and name == "decoder":
        block.terms["attention"] += run.length * keys
    return out


def t5_block(run, shape, flows, encoded=None, trained_bias=False):
    """norm, attention, in a decoder norm and attention to what the encoder put out, norm, feed-forward.

    encoded: what the encoder put out, an Activation; None in the encoder itself
    """
    block = Block(run, shape, flows)
    block.masked &= encoded is not None
    h = block.attention_input = block.norm("norm1", block.stream)
    q, k, v = (block.linear(name, h, shape.q_dim) for name in "qkv")
    kind = "encoder" if encoded is None else "decoder"
    block.add(block.linear("o", t5_attention(block, kind, q, k, v, run.length, trained_bias), shape.d))
    last = "norm2"
    if encoded is not None:
        last, keys = "norm3", encoded.numbers // shape.d // run.batch
        q = block.linear("cross q", block.norm("norm2", block.stream), shape.q_dim)
        like_encoded = Block(replace(run, length=keys), shape, False)
        like_encoded.terms = block.terms
        k, v = (like_encoded.linear(f"cross {name}", encoded, shape.q_dim) for name in "kv")
        block.add(block.linear("cross o", t5_attention(block, "cross", q, k, v, keys), shape.d))
    block.ffn = block.norm(last, block.stream)
    up = block.linear("up", block.ffn, shape.d_ff)
    if shape.gated:
        gate = block.linear("gate", block.ffn, shape.d_ff)
        block.terms["feed-forward"] += gelu_new(run, shape.d_ff) * gate.flows
        block.terms["feed-forward"] += run.e * run.n * shape.d_ff * (gate.flows + up.flows)
        inside = block.tensor(shape.d_ff, gate.flows or up.flows)
    else:
        inside = block.like(up)
        if up.flows:
            block.keep(inside, "feed-forward")  # relu keeps its output
    block.add(block.linear("down", block.drop(inside), shape.d))
    return block.done


BLOCKS = {"llama": llama_block, "gemma": llama_block, "gpt2": gpt2_block, "opt": opt_block, "bert": bert_block}
BLOCKS["t5"] = t5_block


# ------------------------------------------------------------------------------------------------------ the model


def activations(shape, run):
    """Bytes that one forward pass with a loss keeps for its backward pass, as Kept with named terms.

    With checkpointing every block keeps only its input; what one block keeps is then needed again while its backward
    pass runs, see `estimate`.
    """
    if shape.block == "t5":
        return t5_activations(shape, run)
    kept = Kept(flows=run.needs.start)
    longer = replace(run, length=run.length + run.needs.prompt)  # of the tokens, with a prompt in front
    embedding(kept, shape, run, longer)
    rotates = False
    for number, needs in enumerate(run.blocks or (run.needs,) * shape.layers):
        inside = BLOCKS[shape.block](replace(longer, needs=needs), shape, kept.flows)
        if checkpointed(run.checkpointing, number):
            kept.terms["block inputs"] += run.e * longer.n * shape.d
        else:
            kept.terms += inside.terms
        kept.flows, rotates = inside.flows, rotates or inside.rotates
    if rotates and shape.block in ("llama", "gemma"):
        kept.terms["rotary tables"] += rotary_tables(longer, shape)
    kept.terms["made by a network"] += run.needs.extra
    (bert_head if shape.block == "bert" else decoder_head)(kept, shape, run, longer)
    return kept


def checkpointed(checkpointing, number):
    """Whether block `number` keeps only its input. checkpointing: True, False, or how many of the first blocks do"""
    return checkpointing is True or number < checkpointing


def t5_activations(shape, run):
    """The same for an encoder-decoder: run.length tokens go in, and the loss is on run.target of them."""
    decoding = replace(run, length=run.length if run.target is None else run.target)
    run = replace(run, length=run.length + run.needs.prompt)
    blocks = run.blocks or (run.needs,) * (shape.layers + shape.decoder_layers)
    kept, encoded = Kept(), None
    trained_bias = run.needs.distances
    for one, needs_of_stack in ((run, blocks[: shape.layers]), (decoding, blocks[shape.layers :])):
        flows = run.needs.embedding or (run.needs.start and encoded is None)
        kept.terms["dropout"] += dropout_masks(run, one.n * shape.d) * flows
        for number, needs in enumerate(needs_of_stack, 0 if encoded is None else shape.layers):
            inside = t5_block(replace(one, needs=needs), shape, flows, encoded, trained_bias)
            if checkpointed(run.checkpointing, number):
                kept.terms["block inputs"] += run.e * one.n * shape.d
            else:
                kept.terms += inside.terms
            flows = inside.flows
        if run.needs.embedding:
            kept.terms["token numbers"] += 8 * one.batch * (one.length - (encoded is None) * run.needs.prompt)
        if trained_bias:
            kept.terms["token numbers"] += 8 * one.length**2
        block = Block(one, shape, flows)
        if encoded is not None:
            block.needs = replace(block.needs, parts={"last norm": block.needs.parts.get("decoder norm", ())})
        h = block.drop(block.norm("last norm", block.stream))
        kept.terms += block.terms
        if encoded is not None and run.attention == "sdpa":
            kept.terms["attention"] += run.e * one.length * encoded.numbers // shape.d // run.batch * shape.heads
        encoded = h
    kept.terms["linear inputs"] += run.e * decoding.n * shape.d * run.needs.head
    kept.terms["loss"] += run.e * decoding.n * shape.vocab + 8 * decoding.n + run.e  # in the logits' own dtype
    kept.terms["made by a network"] += run.needs.extra
    kept.flows = h.flows
    return kept


def embedding(kept, shape, run, longer):
    """A trained embedding keeps the numbers it looked up: 8 n for tokens, and those of learned positions and segments,
    where they are not the same for every row (RoBERTa counts both anew for each)."""
    if run.needs.embedding:
        positions = {"opt": 8 * run.n, "gpt2": 8 * run.length, "bert": 8 * run.length, "roberta": 16 * run.n}
        kept.terms["token numbers"] += 8 * run.n + positions.get(shape.family, positions.get(shape.block, 0))
    block = Block(longer, shape, kept.flows)
    if shape.block == "bert":
        block.stream = block.norm("embedding norm", block.stream)
    if shape.block in ("bert", "gpt2"):
        block.drop(block.stream)
    kept.terms += block.terms
    kept.flows = block.stream.flows


def decoder_head(kept, shape, run, longer):
    """The last norm, the output layer and the loss of a causal language model."""
    block = Block(longer, shape, kept.flows)
    h = block.norm("last norm", block.stream)
    kept.terms += block.terms
    if run.needs.head:
        kept.terms["linear inputs"] += run.e * longer.n * shape.d  # all of it: what is cut off a prompt is a view
    kept.flows = h.flows
    kept.terms["loss"] += token_loss(run, shape)


def bert_head(kept, shape, run, longer):
    """A pooled classifier: tanh keeps its output, which is the classifier's input. A pooler that is trained or adapted
    holds on to all of the last hidden states, since the first token's, which it reads, are a view of them."""
    e, batch = run.e, run.batch
    block = Block(replace(longer, length=1), shape, kept.flows)
    first = block.stream
    block.linear("pooler", first, shape.d)
    others = first.kept * e * (longer.n - batch) * shape.d
    kept.terms += block.terms + Counter({"linear inputs": others + run.needs.head * e * longer.n * shape.d})
    kept.terms["head"] += e * batch * shape.d
    if run.dropout:  # the classifier reads another tensor then
        kept.terms["dropout"] += dropout_masks(run, batch * shape.d) + e * batch * shape.d
    kept.terms["loss"] += e * batch * shape.labels + 8 * batch + e


NORM = {"llama": rms_norm, "gemma": gemma_norm, "t5": t5_norm} | dict.fromkeys(("gpt2", "opt", "bert"), layer_norm)
