"""The memory of a training step, predicted from the model's sizes alone.

    print(estimate("Llama-2-7B", LoRA(r=16, targets="all-linear"), batch=4, length=1024))

    peak = states + the largest of
        loss             the kept activations, and two float32 tensors of n vocab numbers that the loss works with
        last block       the kept activations, the head's gradient, and what the backward pass of one block works with
        first block      the gradients of everything above it, what it keeps, and what it works with
        optimizer step   all gradients, and one temporary tensor for each tensor that AdamW updates

States are here what stays from step to step: weights, master copies, moments. Between the last and the first block the
kept activations shrink as the gradients grow, evenly, so one of the two ends is larger than all between.
"""

import copy
import math
import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from utils.architectures import architecture
from utils.attach import adapters, attach, count_parameters
from utils.memory.activations import LINEAR, NORMS, Needs, Run, loss_peak
from utils.memory.blocks import BLOCKS, Activation, activations, checkpointed, t5_block
from utils.memory.methods import prompt_network
from utils.memory.shapes import Shape, shape_of
from utils.memory.states import RECIPES, kv_cache, model_states, nf4_bytes, shard
from utils.methods.families import family_of, own_modules
from utils.methods.houlsby import TrainedNorm
from utils.methods.layers import linear_shape, unpacked_numbers
from utils.methods.prompt import Prompts
from utils.targeting import is_linear

GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Bytes. states: what stays between steps, by term   gradients: all   kept: by the forward pass, by term

    moments: name -> bytes beyond the states at that moment of a step; the largest is the peak's
    trained, total: numbers
    """

    states: dict
    gradients: float
    kept: dict
    moments: dict
    trained: int
    total: int
    title: str

    @property
    def peak(self):
        return sum(self.states.values()) + max(self.moments.values())

    def __str__(self):
        lines = [f"{self.title}: trains {self.trained:,} of {self.total:,} numbers"]
        for head, terms in (("stays between steps", self.states), ("kept by the forward pass", self.kept)):
            lines.append(f"{head:<34}{sum(terms.values()) / GB:>10.3f} GB")
            lines += [f"    {name:<30}{size / GB:>10.3f}" for name, size in terms.items() if size]
        lines.append("beyond what stays, at the")
        lines += [f"    {name:<30}{size / GB:>10.3f}" for name, size in self.moments.items()]
        lines.append(f"{'peak':<34}{self.peak / GB:>10.3f} GB = {self.peak / 2**30:.3f} GiB")
        return "\n".join(lines)


def estimate(model, method=None, **options):
    """The Estimate of one training step.

    model: a name of data/architectures.json, or any transformers model (the meta device will do); it is not changed
    method: a configuration such as LoRA(...), or None: whatever the model trains as it is
    options: those of `predict`; `quantized` is True unless said otherwise for a model that is in 4 bits already
    raises ValueError for names that are not known, or a family without formulas
    """
    in_four_bits = not isinstance(model, str) and any(map(unpacked_numbers, model.modules()))
    return predict(facts_of(model, method), **{"quantized": in_four_bits} | options)


@dataclass(frozen=True)
class Facts:
    """All that an estimate needs to know of a model with a method attached: counts, sizes, and what is kept.

    trained, total: numbers   in_blocks: of the frozen linear layers in the blocks   first: trained numbers that have no
    gradient yet when the first block's backward begins   ends, blocks: the Needs of the model's ends and of each block
    """

    name: str
    shape: Shape
    trained: int
    total: int
    in_blocks: int
    first: int
    ends: Needs
    blocks: tuple


def facts_of(model, method=None):
    """The Facts of a model, which is not changed. model, method: as in `estimate`"""
    name = model if isinstance(model, str) else type(model).__name__
    if method is not None:
        name = f"{type(method).__name__} on {name}"
    if isinstance(model, str):
        model = architecture(model)
    elif method is not None:
        model = on_meta(model)
    if method is not None:
        attach(model, method, "estimated")
    shape = shape_of(model)
    in_blocks = sum(math.prod(linear_shape(linear)) for linear in frozen_in_blocks(model))
    trained, total = count_parameters(model)
    # a weight that is in 4 bits already counts with the numbers it stands for, and not with the bytes that hold them
    total += sum(math.prod(linear_shape(m)) - m.weight.numel() for m in model.modules() if is_linear(m))
    return Facts(name, shape, trained, total, in_blocks, trained_in_first_block(model), *needs_of(model, shape))


def predict(facts, recipe=None, batch=1, length=512, attention="sdpa", checkpointing=False, quantized=False,
            double_quant=True, devices=1, stage=0, accumulate=1, dropout=False, target=None,
            device="cuda"):  # fmt: skip
    """The Estimate for a model's Facts.

    recipe: a name in states.RECIPES; None: "fp32" for a full fine-tuning, else "adapters in fp32"
    batch, length: rows and tokens   target: tokens of an encoder-decoder's answer, None: as many as the question's
    attention: "sdpa" or "eager" (flash attention keeps what sdpa keeps)
    checkpointing: True: all blocks keep only their inputs; a number k: the first k blocks do, the others all they need
    (in transformers, `gradient_checkpointing_enable()` and then `gradient_checkpointing = False` on the others)
    quantized, double_quant: the frozen linear layers of the blocks in NF4, and their scales in 8 bits
    devices, stage: of ZeRO (3 is FSDP's full sharding)
    accumulate: batches before a step: from the second on, gradients are there while activations are kept
    dropout: whether the model's own dropout is on   device: "cuda" or "cpu", whose kernels differ in small things
    """
    shape, trained, total = facts.shape, facts.trained, facts.total
    if recipe is None:
        recipe = "fp32" if trained == total else "adapters in fp32"
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it can be {', '.join(map(repr, RECIPES))}")
    costs = RECIPES[recipe]
    run = Run(
        batch, length, facts.ends, costs.e, attention, checkpointing, facts.blocks, target, device, quantized, dropout
    )
    in_four_bits = facts.in_blocks if quantized else 0
    terms = model_states(trained, total - trained - in_four_bits, costs)
    terms["weights, 4 bits"] = nf4_bytes(in_four_bits, double_quant=double_quant)
    states = shard(terms, devices, stage)
    gradients = states.pop("gradients")
    kept = activations(shape, run)
    above_first = gradients - facts.first * costs.gradient / (devices if stage >= 2 else 1)
    head = kept.terms["loss"] + kept.terms["rotary tables"]
    trains_head = facts.ends.head and not shape.labels
    of_head = costs.gradient * shape.vocab * shape.d / (devices if stage >= 2 else 1)
    first, last = one_block(shape, run), one_block(shape, run, last=True)
    work = backward_of_block(shape, run) + quantized * unpacked(shape, costs.e)
    again_first, again_last = checkpointed(checkpointing, 0), checkpointed(checkpointing, len(facts.blocks) - 1)
    so_far = gradients if accumulate > 1 else 0  # of the batches before
    logits = loss_peak(run.n if target is None else batch * target, shape.vocab) * (shape.block != "bert")
    moments = {
        "loss": so_far + kept.total + logits,
        "last block": (so_far or of_head * trains_head) + kept.total - head + work + last * again_last,
        "first block": (so_far or above_first) + first + work + costs.e * run.n * shape.d * again_first,
        "optimizer step": gradients + costs.temporary * (trained / devices if stage else trained),
    }
    title = f"{facts.name}, {recipe}, batch {batch}, {length} tokens"
    return Estimate(states, gradients, dict(kept.terms), moments, trained, total, title)


def on_meta(model):
    """A copy of a model without its numbers. What is attached is copied too."""
    return copy.deepcopy(model, {id(t): meta_like(t) for t in (*model.parameters(), *model.buffers())})


def meta_like(tensor):
    """A tensor of the same shape and kind on the meta device."""
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def frozen_in_blocks(model):
    """The frozen linear layers in the blocks: what quantization of the base applies to."""
    for family in family_of(model, "an estimate"):
        inside = re.compile(rf"{family.layer}\..+")
        for path, module in own_modules(model):
            if inside.fullmatch(path) and is_linear(module) and not trains(module):
                yield module


def needs_of(model, shape):
    """What a model, as it is trained now, asks the forward pass to keep: (Needs of its ends, a Needs per block)."""
    stacks = [(family, layer) for family in family_of(model, "an estimate") for layer in family.layers(model)]
    own = dict(own_modules(model))
    parts = {path: [] for path in ("", *own)}  # path -> what an adapter has there
    for adapter in adapters(model).values():
        for path, part in adapter.parts.items():
            if part.on:
                parts[path].append(part)
    copied = any(isinstance(part, TrainedNorm) for found in parts.values() for part in found)
    norms = {path for path, module in own.items() if is_norm(module) and trains(module)}
    blocks = []
    for family, layer in stacks:
        points = {f"{layer}.{path}": name for path, name in (LINEAR[shape.block] | NORMS[shape.block]).items()}
        points = {path: name for path, name in points.items() if path in own}
        inputs = {name for path, name in points.items() if trains(own[path]) and not is_norm(own[path])}
        points |= {f"{layer}.{family.attention}": "attention"}
        points |= {f"{layer}.{family.attention_out}": "o", f"{layer}.{family.ffn_out}": "down"}
        here = {}
        for path, name in points.items():
            here.setdefault(name, []).extend(parts[path])
        here = {name: tuple(found) for name, found in here.items() if found}
        blocks.append(Needs(frozenset(inputs), copied or any(p.startswith(layer + ".") for p in norms), parts=here))
    inside = tuple(layer + "." for _, layer in stacks)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    here = {}
    for path, found in parts.items():
        if found and path.endswith("pooler.dense"):
            here["pooler"] = tuple(found)
        if found and not path.startswith(inside) and is_norm(own.get(path)):
            name = "embedding" if "embeddings" in path else "decoder" if path.startswith("decoder.") else "last"
            here[f"{name} norm"] = tuple(found)
    prompt = next((part for found in parts.values() for part in found if isinstance(part, Prompts)), None)
    ends = Needs(
        norms=copied or any(not path.startswith(inside) for path in norms),
        embedding=trains(embedding),
        head=reads_all_states(parts, own) if head is None else trains(head),
        start=trains(embedding) or prompt is not None,
        parts=here,
        distances=any(trains(own[path]) for path in own if path.endswith("relative_attention_bias")),
        prompt=0 if prompt is None else prompt.length,
        extra=0 if prompt is None else prompt_network(prompt),
    )
    return ends, tuple(blocks)


def reads_all_states(parts, own):
    """Whether a layer that reads the first token's last hidden state is trained: BERT's pooler, RoBERTa's head."""
    whole = any(hasattr(part.copy, "dense") for found in parts.values() for part in found if hasattr(part, "copy"))
    return whole or any(trains(own[path]) for path in own if path.endswith(("pooler.dense", "classifier.dense")))


def is_norm(module):
    return type(module).__name__.endswith("Norm")


def trains(module):
    """Whether a module's own weight is trained."""
    return getattr(module, "weight", None) is not None and module.weight.requires_grad


def trained_in_first_block(model):
    """How many trained numbers have no gradient yet when the first block's backward begins: its, the embedding's."""
    path = family_of(model, "an estimate")[0].layers(model)[0]
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    modules = [model.get_submodule(path)] + ([] if tied else [embedding])
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def one_block(shape, run, last=False):
    """What a single block keeps, the first or the last."""
    needs = run.blocks[-1 if last else 0] if run.blocks else run.needs
    run = replace(run, needs=needs, length=run.length + run.needs.prompt)
    if shape.block == "t5" and last:
        encoded = Activation(run.n * shape.d, True, kept=True)
        run = replace(run, length=run.length if run.target is None else run.target)
        return t5_block(run, shape, True, encoded, run.needs.distances).total
    return BLOCKS[shape.block](run, shape, True).total


def unpacked(shape, e):
    """A weight in 4 bits is unpacked for each product, one layer at a time, the largest of d d_ff numbers. e d d_ff"""
    return e * shape.d * shape.d_ff


def backward_of_block(shape, run):
    """What the backward pass of a block has at hand when it has not freed anything yet: gradients of the feed-forward
    part's inside and of the residual stream, twice; GPT-2's long-hand gelu holds two of the inside."""
    wide = 2 * shape.d_ff if shape.block == "gpt2" else shape.d_ff + 2 * shape.d
    return run.e * run.n * wide


# -------------------------------------------------------------------------------------------------- generation


def generation(model, batch=1, length=512, recipe="pure bf16", quantized=False, double_quant=True):
    """The Estimate of generating: the weights, the keys and values of `length` tokens per row, the last one's logits.

    model: as in `estimate`   length: of prompt and answer together   recipe: for bytes per weight and activation
    The prompt's own forward pass, which keeps nothing, is not in it.
    """
    model = architecture(model) if isinstance(model, str) else on_meta(model)
    facts = facts_of(model.requires_grad_(False))
    shape, costs = facts.shape, RECIPES[recipe]
    in_four_bits = facts.in_blocks if quantized else 0
    states = {
        "weights, frozen": (facts.total - in_four_bits) * costs.frozen,
        "weights, 4 bits": nf4_bytes(in_four_bits, double_quant=double_quant),
    }
    layers = shape.decoder_layers or shape.layers
    cache = kv_cache(layers, shape.kv_heads, shape.head_dim, batch, length, costs.e)
    moments = {"last token": cache + (costs.e + 4) * batch * shape.vocab}  # logits, and in float32 to draw from
    title = f"{facts.name} generates, {batch} rows of {length} tokens"
    return Estimate(states, 0, {}, moments, 0, facts.total, title)
