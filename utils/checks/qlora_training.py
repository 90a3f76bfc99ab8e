"""Chapter 03: which layers to adapt, merging into 4 bits, and AdamW with moments of 8 bits."""

from numbers import Real

import torch
from torch import nn

from utils.checks.compare import close
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.checks.memory_adamw import L2_in_the_gradient, adamw, by_torch
from utils.checks.values import kind_of, short
from utils.methods.layers import is_conv1d
from utils.optimizers import BLOCK, adamw8bit_update, adamw_update, moment_codebooks
from utils.quantization.base import NF4, quantize_base
from utils.quantization.blocks import dequantize_blockwise, quantize_blockwise
from utils.quantization.codebooks import nf4_codebook
from utils.quantization.weights import quantize_weight, requantized_merge
from utils.targeting import inside, is_linear, linear_names, task_head


def nearly_all(got, want):
    """The same numbers but for one in fifty, which other roundings of the same sum may have sent to a neighbour."""
    if got.shape != want.shape:
        return False
    apart = (got.double() - want.double()).abs() > 1e-4 * want.double().abs().max().clamp_min(1e-9)
    return apart.sum().item() <= max(1, len(want.reshape(-1)) // 50)


# ------------------------------------------------------------------------------------------------- linear_names


def small_models(rng):
    """A decoder, one in 4 bits, one with Conv1D, a masked language model, two models with the head of a task, a layer
    or a module of layers, and one with linear layers outside its blocks.

    Beside the first head stands a layer whose name begins as the head's does."""
    import transformers as tf

    size = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 8}  # fmt: skip
    llama, bert = tf.LlamaConfig(**size), tf.BertConfig(**size)
    gpt2 = tf.GPT2Config(vocab_size=19, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1)
    classifier = pick(rng, "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering")
    with_head = getattr(tf, classifier)(bert)
    setattr(with_head, f"{task_head(with_head)}2", nn.Linear(8, 2))
    opt = tf.OPTConfig(vocab_size=19, hidden_size=8, ffn_dim=12, num_hidden_layers=1, num_attention_heads=2,
                       word_embed_proj_dim=4, max_position_embeddings=8)  # fmt: skip
    return [
        quantize_base(tf.LlamaForCausalLM(llama), NF4()),
        tf.GPT2LMHeadModel(gpt2),
        with_head,
        tf.RobertaForSequenceClassification(tf.RobertaConfig(**size)),
        tf.OPTForCausalLM(opt),
        tf.BertForMaskedLM(bert),
        tf.LlamaForCausalLM(llama),
    ]


def name_cases(rng):
    return [Case({"model": model}) for model in small_models(rng)]


def name_findings(attempt, model):
    found, kind = attempt(model), type(model).__name__
    if not isinstance(found, (tuple, list)):
        return {"returned": kind_of(found)}
    return {"returned": "a tuple", "names": f"a {kind}: {', '.join(map(str, found))}"}


def naming(linear=is_linear, keep=lambda model, path, module: True, name=lambda path: path.rsplit(".", 1)[-1],
           output=lambda model, path, module: module is model.get_output_embeddings(),
           head=lambda model, path: bool(task_head(model)) and inside(path, task_head(model)),
           done=lambda names: tuple(sorted(set(names)))):  # fmt: skip
    """A linear_names with another idea of what is linear, what is left out, or what a name is."""

    def linear_names(model):
        return done([
            name(path) for path, module in model.named_modules()
            if linear(module) and keep(model, path, module) and not output(model, path, module)
            and not head(model, path)
        ])  # fmt: skip

    return linear_names


def never(*_):
    return False


def called_lm_head(model, path, module):
    return path == "lm_head"


def by_class_name(model):
    heads = [model.get_output_embeddings(), getattr(model, task_head(model) or "", None)]
    names = []
    for path, module in model.named_modules():
        kind = type(module).__name__
        in_a_head = any(module is part for head in heads if head is not None for part in head.modules())
        if (kind.endswith("Linear") or kind == "Conv1D") and not in_a_head:
            names.append(path.split(".")[-1])
    return sorted(dict.fromkeys(names))


def without_heads(model):
    """Collects everything, then takes away what is not wanted."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    for path in list(found):
        if found[path] is model.get_output_embeddings() or inside(path, str(task_head(model))):
            del found[path]
    return tuple(sorted({path.rpartition(".")[2] for path in found}))


def last_dropped(model):
    paths = [path for path, module in model.named_modules() if is_linear(module)]
    return tuple(sorted({path.rsplit(".", 1)[-1] for path in paths[:-1]}))


ATTENTION = ("attn", "attention")
INSIDE = (
    "A head may hold layers of its own, as RoBERTa's holds dense and out_proj, and you took these in. "
    "inside(path, head) knows the head and everything in it."
)
FOUR_BITS = "type(module) is nn.Linear asks for that class alone. A layer in 4 bits is a subclass: ask isinstance. "
CONV1D = "GPT-2's linear layers are Conv1D, which is no nn.Linear."

LINEAR_NAMES = Exercise(
    name="linear_names",
    reference=linear_names,
    cases=name_cases,
    call=name_findings,
    mistakes=(
        Mistake("with_output", naming(output=never),
                "You took the output embedding in. It is linear, but it makes the logits, stays in 16 bits, and is as "
                "large as the vocabulary: model.get_output_embeddings() says which module it is."),
        Mistake("lm_head_by_name", naming(output=called_lm_head),
                'You left out the module called "lm_head". BERT calls it decoder, GPT-NeoX long had embed_out: ask '
                "the model, model.get_output_embeddings()."),
        Mistake("with_head", naming(head=never),
                "You took the head of a classifier in. It is new and trained whole, not adapted: task_head(model) has "
                "its name."),
        Mistake("head_alone", naming(head=lambda model, path: path == task_head(model)), INSIDE),
        Mistake("heads_name", lambda model: tuple(sorted(set(naming(head=never)(model)) - {task_head(model)})), INSIDE),
        Mistake("begins_like_the_head", naming(head=lambda model, path: path.startswith(task_head(model) or "?")),
                "A path may begin as the head's does without being in it: classifier2 is not in classifier. "
                "inside(path, head) looks for the dot."),
        Mistake("last_dropped", last_dropped,
                "You left out the last linear layer, wherever it belongs. The output embedding need not be the last, "
                "and a task's head may be followed by others: ask the model for both."),
        Mistake("in_blocks", naming(keep=lambda model, path, m: ".0." in path),
                "You looked at the first block alone. Linear layers stand elsewhere too, before the blocks or after."),
        Mistake("with_both", naming(output=never, head=never),
                "You took every linear layer. Two kinds are left out: the output embedding, and the head of a task."),
        Mistake("type_is", naming(linear=lambda m: type(m) is nn.Linear or is_conv1d(m)),
                FOUR_BITS + "As it stands, a model in 4 bits has no linear layers at all."),
        Mistake("type_is_no_conv1d", naming(linear=lambda m: type(m) is nn.Linear), FOUR_BITS + CONV1D),
        Mistake("no_conv1d", naming(linear=lambda m: isinstance(m, nn.Linear)),
                CONV1D + " Nothing is found there, and nothing would be adapted: is_linear knows both."),
        Mistake("every_matrix", naming(linear=lambda m: getattr(getattr(m, "weight", None), "ndim", 0) == 2),
                "You took every module that has a matrix. An embedding has one too, and only looks rows up in it."),
        Mistake("paths", naming(name=lambda path: path),
                "You returned whole paths. The short name is what follows the last dot; one name then means a layer in "
                "every block."),
        Mistake("last_two", naming(name=lambda path: ".".join(path.split(".")[-2:])),
                "You kept the last two parts of each path. The short name is the last one alone."),
        Mistake("attention_only", naming(keep=lambda model, path, m: any(a in path for a in ATTENTION)),
                "You kept the attention alone. Most of a block's weights are in its MLP, and QLoRA adapts those too."),
        Mistake("mlp_only", naming(keep=lambda model, path, m: not any(a in path for a in ATTENTION)),
                "You left the attention out. Its projections are linear layers as well."),
        Mistake("duplicates", naming(done=lambda names: tuple(sorted(names))),
                "Each name comes once per layer. Once is enough: a name in targets means that module in every layer."),
        Mistake("in_order", naming(done=lambda names: tuple(dict.fromkeys(names))),
                "The names are right, and in the model's order. Sort them, so that two runs and two models compare."),
        Mistake("in_order_twice", naming(done=tuple),
                "The names come in the model's order, once per layer. Each once, and sorted: sorted(set(names))."),
        Mistake("a_set", naming(done=set), None, "Yours returned a set"),
        Mistake("in_one_string", naming(done=", ".join), None, "Yours returned a str"),
        Mistake("none", naming(done=lambda names: None), None, "returned None"),
        Mistake("without_v", naming(keep=lambda model, path, m: not path.endswith("v_proj")), None,
                "Yours, for a LlamaForCausalLM: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj. Expected, for"),
    ),
    alternatives=(naming(), by_class_name, without_heads, naming(done=lambda names: sorted(set(names)))),
    explain={
        "returned": "Yours returned {yours}, and a tuple of names is expected.",
        "names": "Yours, for {yours}. Expected, for {expected}.",
    },
    fact='These are the layers that targets="all-linear" means, and that the script of the QLoRA paper collects.',
)

# ------------------------------------------------------------------------------------------------- requantized_merge


def merge_cases(rng):
    cases = []
    for shape, kind, block_size, double, size in (
        ((16, 16), "nf4", 64, False, 0.3),
        ((12, 40), "nf4", 64, False, pick(rng, 0.02, 0.05)),  # an update that is mostly lost
        ((10, 24), "fp4", 64, False, 0.4),
        ((9, 33), "int4", 64, False, 0.2),  # the last block is short
        ((14, 20), "nf4", pick(rng, 16, 32), False, 0.3),
        ((30, 24), "nf4", 64, True, 0.3),
    ):
        spread = torch.exp(0.8 * normal(rng, shape[0], 1))  # scales that differ, so that rounding them shows
        W = quantize_weight(spread * normal(rng, *shape), kind, block_size, double).dequantize()
        inputs = {"W": W, "delta": size * spread * normal(rng, *shape), "kind": kind, "block_size": block_size}
        cases.append(Case(inputs | {"double_quant": double}, (kind,) if kind != "nf4" else ()))
    return cases


def merge_findings(attempt, *inputs):
    returned = attempt(*inputs)
    parts = returned if isinstance(returned, (tuple, list)) else [returned]
    kinds = ["a float" if isinstance(p, Real) and not isinstance(p, bool) else kind_of(p) for p in parts]
    findings = {"returned": " and ".join(kinds)}
    if kinds != ["a QuantizedWeight", "a float"]:
        return findings
    merged, lost = returned
    findings |= {"kind": merged.kind, "block_size": merged.block_size, "double_quant": merged.nested is not None}
    return findings | {"shape": tuple(merged.shape), "merged": merged.dequantize().float(), "lost": float(lost)}


def same_merge(want, got):
    if not isinstance(got, dict) or got.keys() != want.keys():
        return False
    words = [key for key in want if key not in ("merged", "lost")]
    if any(got[key] != want[key] for key in words) or "merged" not in want:
        return all(got[key] == want[key] for key in words)
    return nearly_all(got["merged"], want["merged"]) and close(got["lost"], want["lost"], 1e-3)


def norms(error, delta):
    return (error.norm() / delta.norm()).item()


def merging(what=lambda W, delta: W + delta, error=lambda merged, W, delta: merged - (W + delta), measure=norms,
            fixed=None, answer=lambda merged, lost: (merged, lost)):  # fmt: skip
    """A requantized_merge that quantizes something else, compares it with something else, or ignores a setting."""

    def requantized_merge(W, delta, kind="nf4", block_size=64, double_quant=False):
        settings = {"kind": kind, "block_size": block_size, "double_quant": double_quant} | (fixed or {})
        merged = quantize_weight(what(W, delta), **settings)
        return answer(merged, measure(error(merged.dequantize(), W, delta), delta))

    return requantized_merge


def relative_to(other):
    """A requantized_merge whose error is a share of something else."""

    def requantized_merge(W, delta, kind="nf4", block_size=64, double_quant=False):
        merged = quantize_weight(W + delta, kind, block_size, double_quant)
        return merged, ((merged.dequantize() - (W + delta)).norm() / other(W, delta).norm()).item()

    return requantized_merge


def update_rounded_first(W, delta, kind="nf4", block_size=64, double_quant=False):
    update = quantize_weight(delta, kind, block_size, double_quant).dequantize()
    return merging(what=lambda W, delta: W + update)(W, delta, kind, block_size, double_quant)


def everything_rounded_first(W, delta, kind="nf4", block_size=64, double_quant=False):
    settings = (kind, block_size, double_quant)
    base, update = (quantize_weight(x, *settings).dequantize() for x in (W, delta))
    merged = quantize_weight(base + update, *settings)
    return merged, norms(merged.dequantize() - (W + delta), delta)


def rounding_of_W(W, delta, kind="nf4", block_size=64, double_quant=False):
    merged = quantize_weight(W + delta, kind, block_size, double_quant)
    rounded = quantize_weight(W, kind, block_size, double_quant).dequantize()
    return merged, ((rounded - W).norm() / delta.norm()).item()


def transposed(W, delta, kind="nf4", block_size=64, double_quant=False):
    merged = quantize_weight((W + delta).T, kind, block_size, double_quant)
    return merged, ((merged.dequantize() - (W + delta).T).norm() / delta.norm()).item()


def added_in_place(W, delta, *settings):
    W += delta
    merged = quantize_weight(W, *settings)
    return merged, ((merged.dequantize() - W).norm() / delta.norm()).item()


def merged_by_dist(W, delta, kind="nf4", block_size=64, double_quant=False):
    wanted = delta + W
    merged = quantize_weight(wanted, kind=kind, double_quant=double_quant, block_size=block_size)
    return merged, float(torch.dist(wanted, merged.dequantize(torch.float32)) / torch.linalg.norm(delta))


def merged_by_sums(W, delta, *settings):
    merged = quantize_weight((W.double() + delta.double()).float(), *settings)
    gap = merged.dequantize().double() - W - delta
    return [merged, ((gap**2).sum() / (delta.double() ** 2).sum()).item() ** 0.5]


TWICE = "You rounded the update to 4 bits, and then the sum once more. Only the sum is stored: round it once."

REQUANTIZED_MERGE = Exercise(
    name="requantized_merge",
    reference=requantized_merge,
    cases=merge_cases,
    call=merge_findings,
    agrees=same_merge,
    mistakes=(
        Mistake("update_alone", merging(what=lambda W, delta: delta),
                "You quantized the update alone. The codes take the place of the layer's, so they must stand for "
                "W + delta."),
        Mistake("update_alone_and_its_rounding",
                merging(what=lambda W, delta: delta, error=lambda m, W, delta: m - delta),
                "You quantized the update alone, and compared it with itself. The codes take the place of the layer's, "
                "so they must stand for W + delta."),
        Mistake("update_rounded_first", update_rounded_first, TWICE),
        Mistake("everything_rounded_first", everything_rounded_first, TWICE),
        Mistake("W_alone", merging(what=lambda W, delta: W),
                "You quantized W. It was on the numbers of the code book already, and the update is nowhere."),
        Mistake("W_alone_and_its_rounding", merging(what=lambda W, delta: W, error=lambda m, W, delta: m - W),
                "You quantized W and compared it with itself; delta only divides. Quantize W + delta."),
        Mistake("rounding_of_W", rounding_of_W,
                "lost measures the rounding of W, which hardly changes when it is quantized again. Measure that of the "
                "sum."),
        Mistake("movement", merging(error=lambda m, W, delta: m - W),
                "lost is how far the merged weight is from W, which is what arrived of the update and not what went "
                "missing. Compare with W + delta."),
        Mistake("W_counted", merging(error=lambda m, W, delta: m - delta),
                "You compared the merged weight with the update: all of W counts as an error then. Compare with "
                "W + delta."),
        Mistake("relative_to_W", relative_to(lambda W, delta: W),
                "You divided by |W|. Against W the error always looks small; the question is how much of the update is "
                "left. Divide by |delta|."),
        Mistake("relative_to_sum", relative_to(lambda W, delta: W + delta),
                "You divided by |W + delta|. The question is how much of the update is left: divide by |delta|."),
        Mistake("not_rounded", merging(error=lambda m, W, delta: (W + delta) - (W + delta)),
                "Your lost is 0: you compared the sum with itself. Compare what the codes stand for, "
                "merged.dequantize()."),
        Mistake("absolute", merging(measure=lambda error, delta: error.norm().item()),
                "lost is a share: divide by |delta|."),
        Mistake("squared", merging(measure=lambda error, delta: ((error**2).sum() / (delta**2).sum()).item()),
                "You divided squares. |x| is a norm: take the root of each sum of squares, or .norm()."),
        Mistake("largest", merging(measure=lambda error, delta: (error.abs().max() / delta.abs().max()).item()),
                "You compared the largest entries. |x| is the norm over all of them."),
        Mistake("mean", merging(measure=lambda error, delta: (error.abs().mean() / delta.abs().mean()).item()),
                "You compared means of magnitudes. |x| is a norm: the root of a sum of squares."),
        Mistake("entry_by_entry", merging(measure=lambda error, delta: (error / delta).abs().mean().item()),
                "You divided entry by entry: where an entry of delta is nearly zero, that says nothing. Divide norms."),
        Mistake("percent", merging(measure=lambda error, delta: 100 * norms(error, delta)),
                "lost is a share, 1 for all of it. Yours is in percent."),
        Mistake("what_is_left", merging(measure=lambda error, delta: 1 - norms(error, delta)),
                "You returned 1 - lost. lost itself is asked for, and it may be more than 1."),
        Mistake("inverted", merging(measure=lambda error, delta: 1 / norms(error, delta)),
                "Your ratio is upside down. lost is |merged - (W + delta)|, divided by |delta|."),
        Mistake("no_parentheses", merging(error=lambda m, W, delta: m - W + delta),
                "Parentheses are missing: merged - W + delta adds the update. merged - (W + delta) is meant."),
        Mistake("at_most_1", merging(measure=lambda error, delta: min(1.0, norms(error, delta))),
                "You cut lost off at 1. It may be more: rounding can move a weight farther than the update was long."),
        Mistake("rounded", merging(measure=lambda error, delta: round(norms(error, delta), 2)),
                "You rounded lost. Keep all digits here, and round where you print."),
        Mistake("subtracted", merging(what=lambda W, delta: W - delta, error=lambda m, W, delta: m - (W - delta)),
                "You took the update away. Merging adds it."),
        Mistake("no_double_quant", merging(fixed={"double_quant": False}),
                "double_quant is not used: the merged scales stay in float32, and the layer expects them in 8 bits."),
        Mistake("always_double", merging(fixed={"double_quant": True}),
                "You double quantize whatever double_quant says."),
        Mistake("kind_alone", merging(fixed={"block_size": 64, "double_quant": False}),
                "block_size and double_quant are not used: hand both on to quantize_weight."),
        Mistake("no_kind", merging(fixed={"kind": "nf4"}),
                "kind is not used: an FP4 or INT4 layer would read NF4's codes with its own code book."),
        Mistake("no_block_size", merging(fixed={"block_size": 64}),
                "block_size is not used: the layer would take the scales for those of other weights."),
        Mistake("no_settings", merging(fixed={"kind": "nf4", "block_size": 64, "double_quant": False}),
                "kind, block_size and double_quant are not used. The layer goes on decoding as before: hand all three "
                "on to quantize_weight."),
        Mistake("transposed", transposed,
                "You quantized the transpose. Blocks run along the rows of W as it lies in memory: leave it as it is."),
        Mistake("dense", merging(answer=lambda merged, lost: (merged.dequantize(), lost)),
                "You returned a dense weight. Return the QuantizedWeight itself, not its dequantize(): the layer keeps "
                "codes."),
        Mistake("a_tensor", merging(measure=lambda error, delta: error.norm() / delta.norm()), None,
                "Yours returned a QuantizedWeight and a Tensor"),
        Mistake("lost_alone", merging(answer=lambda merged, lost: lost), None, "Yours returned a float,"),
        Mistake("merged_alone", merging(answer=lambda merged, lost: merged),
                "lost is missing: return merged, lost. It is |merged - (W + delta)| / |delta|, a float."),
        Mistake("lost_first", merging(answer=lambda merged, lost: (lost, merged)),
                "You returned lost first. Swap the two: merged, lost."),
        Mistake("in_place", added_in_place, None, "Your function changed W (max difference "),
    ),
    alternatives=(merged_by_dist, merged_by_sums, merging()),
    explain={
        "returned": "Yours returned {yours}, and a QuantizedWeight and a float are expected (.item() makes a float).",
        "shape": "The merged weight has shape {yours}; W has {expected}.",
    },
    fact="W lies on the numbers of the code book. To move a weight by even one of them, the update must carry it half "
    f"the way: {50 * nf4_codebook().diff().min():.0f} % of its block's largest weight where NF4's are closest.",
)

# ------------------------------------------------------------------------------------------------- adamw8bit_update

SIGNED, UNSIGNED = moment_codebooks(torch.device("cpu"))


def adam_cases(rng):
    """As of adamw_update: large rates and decays, so that no two formulas agree. m and v come in 8 bits."""
    tiny = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.2}
    found = []
    for shape, step, settings, kind in (
        ((4, 3), 1, {}, ""),
        ((pick(rng, 300, 320),), pick(rng, 2, 3), tiny, ""),
        ((30, 80), pick(rng, 9, 20), {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.3}, ""),
        ((5, 60), pick(rng, 4, 6), {"beta1": 0.7, "beta2": 0.9, "eps": pick(rng, 0.1, 0.2), "weight_decay": 0.1}, ""),
        ((30, 10), 5, tiny, "bf16"),
    ):
        p, grad, m, root = (normal(rng, *shape) for _ in range(4))
        spread = torch.linspace(0.3, 3, p.numel()).view(shape)  # blocks and scales that differ
        m, v = (0.3 * spread * m, (spread * root) ** 2 + 0.05) if step > 1 else (0 * m, 0 * m)
        m, v = quantize_blockwise(m, SIGNED, BLOCK), quantize_blockwise(v, UNSIGNED, BLOCK)
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        inputs = {"p": p.to(dtype), "grad": (spread * grad).to(dtype), "m": m, "v": v, "step": step}
        inputs |= {"lr": pick(rng, 0.2, 0.3)} | settings
        found.append(Case(inputs, (kind,) if kind else (), {"step": step}, later=bool(kind)))
    return found


def form(value):
    """What a value is made of, in words: shape and dtype of each tensor."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {short(value.dtype)}"
    return f"({', '.join(map(form, value))})" if isinstance(value, (tuple, list)) else kind_of(value)


def adam_findings(attempt, p, *inputs):
    returned = attempt(p, *inputs)
    findings = {"form": form(returned)}
    n, scales = p.numel(), -(-p.numel() // BLOCK)
    moment = f"(({n},) uint8, ({scales},) float32)"
    if findings["form"] != f"({form(p)}, {moment}, {moment})":
        return findings
    findings["p"] = returned[0]
    for name, (index, absmax), code in zip("mv", returned[1:], (SIGNED, UNSIGNED), strict=True):
        findings |= {f"scales of {name}": absmax, name: dequantize_blockwise(index, absmax, code, BLOCK)}
    return findings


def same_step(want, got):
    if not isinstance(got, dict) or got.keys() != want.keys() or got["form"] != want["form"]:
        return False
    if "p" not in want:
        return True  # two attempts that returned the same wrong things
    exact = all(close(got[key], want[key]) for key in ("p", "scales of m", "scales of v"))
    return exact and all(nearly_all(got[key], want[key]) for key in "mv")


def eight_bit(update=adamw_update, decode=(SIGNED, UNSIGNED), encode=(SIGNED, UNSIGNED), block=BLOCK,
              from_8bit=dequantize_blockwise, stepped_with="new",
              returned=lambda p, m, v: (p, m, v)):  # fmt: skip
    """An adamw8bit_update with something else in it.

    stepped_with: the moments that p is updated with, "new", "old" or "encoded"
    """

    def adamw8bit_update(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
        settings = (step, lr, beta1, beta2, eps, weight_decay)
        old = [from_8bit(*x, code, block).view_as(p) for x, code in zip((m, v), decode, strict=True)]
        new_p, *new = update(p.float(), grad.float(), *old, *settings)
        stored = [quantize_blockwise(x, code, block) for x, code in zip(new, encode, strict=True)]
        if stepped_with == "old":
            new_p = update(p.float(), torch.zeros_like(p).float(), old[0] / beta1, old[1] / beta2, *settings)[0]
        if stepped_with == "encoded":
            rounded = [from_8bit(*x, code, block).view_as(p) for x, code in zip(stored, encode, strict=True)]
            zero = torch.zeros_like(p).float()
            new_p = update(p.float(), zero, rounded[0] / beta1, rounded[1] / beta2, *settings)[0]
        return returned(new_p.to(p.dtype), *stored)

    return adamw8bit_update


def kept_in_float32(p, grad, m, v, *settings):
    m = dequantize_blockwise(*m, SIGNED, BLOCK).view_as(p)
    v = dequantize_blockwise(*v, UNSIGNED, BLOCK).view_as(p)
    new, m, v = adamw_update(p.float(), grad.float(), m, v, *settings)
    return new.to(p.dtype), m, v


def whole_tensor(p, grad, m, v, *settings):
    new, m, v = kept_in_float32(p, grad, m, v, *settings)
    return new, quantize_blockwise(m, SIGNED, p.numel()), quantize_blockwise(v, UNSIGNED, p.numel())


def without_scales(index, absmax, code, block):
    return code[index.long()]


def indices_as_numbers(index, absmax, code, block):
    return index.float()


def moments_unchanged(p, grad, m, v, *settings):
    return adamw8bit_update(p, grad, m, v, *settings)[0], m, v


def v_unchanged(p, grad, m, v, *settings):
    return *adamw8bit_update(p, grad, m, v, *settings)[:2], v


def moments_encoded_as_they_came(p, grad, m, v, *settings):
    old = [dequantize_blockwise(*x, code, BLOCK) for x, code in ((m, SIGNED), (v, UNSIGNED))]
    new = adamw8bit_update(p, grad, m, v, *settings)[0]
    return new, quantize_blockwise(old[0], SIGNED, BLOCK), quantize_blockwise(old[1], UNSIGNED, BLOCK)


def written_back(p, grad, m, v, *settings):
    p, new_m, new_v = adamw8bit_update(p, grad, m, v, *settings)
    for old, new in ((m, new_m), (v, new_v)):
        old[0].copy_(new[0])
        old[1].copy_(new[1])
    return p, m, v


def p_in_float32(p, *others):
    return adamw8bit_update(p.float(), *others)


def in_bfloat16(p, grad, m, v, *settings):
    m = dequantize_blockwise(*m, SIGNED, BLOCK).view_as(p).to(p.dtype)
    v = dequantize_blockwise(*v, UNSIGNED, BLOCK).view_as(p).to(p.dtype)
    new, m, v = adamw_update(p, grad, m, v, *settings)
    return new, quantize_blockwise(m, SIGNED, BLOCK), quantize_blockwise(v, UNSIGNED, BLOCK)


def by_hand(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    """Without the functions of the chapter: a gather, a loop over the blocks and the nearest by argmin."""

    def decoded(moment, code):
        index, absmax = moment
        return torch.cat([code[i.long()] * a for i, a in zip(index.split(256), absmax, strict=True)]).view(p.shape)

    def encoded(x, code):
        index, scales = [], []
        for block in x.flatten().split(256):
            scales.append(block.abs().max())
            index.append((block[:, None] / scales[-1] - code).abs().argmin(1))
        return torch.cat(index).to(torch.uint8), torch.stack(scales)

    g, w = grad.float(), p.float()
    m = beta1 * decoded(m, SIGNED) + (1 - beta1) * g
    v = beta2 * decoded(v, UNSIGNED) + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    w = (1 - lr * weight_decay) * w - lr * m / (1 - beta1**step) / denominator
    return w.to(p.dtype), encoded(m, SIGNED), encoded(v, UNSIGNED)


def not_cast_to_float32(p, grad, m, v, *settings):
    """Right as well: beside float32 moments, torch takes a bfloat16 p and grad to float32 by itself, but for grad^2."""
    m = dequantize_blockwise(*m, SIGNED, BLOCK).view_as(p)
    v = dequantize_blockwise(*v, UNSIGNED, BLOCK).view_as(p)
    new, m, v = adamw_update(p, grad.float(), m, v, *settings)
    return [new.to(p.dtype), list(quantize_blockwise(m, SIGNED, BLOCK)), list(quantize_blockwise(v, UNSIGNED, BLOCK))]


ADAMW8BIT_UPDATE = Exercise(
    name="adamw8bit_update",
    reference=adamw8bit_update,
    cases=adam_cases,
    call=adam_findings,
    agrees=same_step,
    mistakes=(
        Mistake("books_swapped", eight_bit(decode=(UNSIGNED, SIGNED), encode=(UNSIGNED, SIGNED)),
                "The code books are swapped: m has a sign, v has none. moment_codebooks gives m's first."),
        Mistake("signed_for_both", eight_bit(decode=(SIGNED, SIGNED), encode=(SIGNED, SIGNED)),
                "v is kept with the signed code book. v is never negative: it has an unsigned one, twice as fine."),
        Mistake("unsigned_for_both", eight_bit(decode=(UNSIGNED, UNSIGNED), encode=(UNSIGNED, UNSIGNED)),
                "m is kept with the unsigned code book, where every negative number becomes 0: m needs the signed."),
        Mistake("decoded_with_swapped", eight_bit(decode=(UNSIGNED, SIGNED)),
                "You decode with the code books swapped, and encode with the right ones: m's is the signed one."),
        Mistake("encoded_with_swapped", eight_bit(encode=(UNSIGNED, SIGNED)),
                "You encode with the code books swapped, and decode with the right ones: m's is the signed one."),
        Mistake("without_scales", eight_bit(from_8bit=without_scales),
                "You decoded without absmax. A code is a share of its block's scale: dequantize_blockwise takes both."),
        Mistake("indices_as_numbers", eight_bit(from_8bit=indices_as_numbers),
                "You calculated with the indices. They are places in a code book: decode them first."),
        Mistake("no_correction", eight_bit(adamw(first=0, second=0)),
                "Bias correction is missing: m and v start at zero in 8 bits too. adamw_update has it."),
        Mistake("L2", eight_bit(L2_in_the_gradient),
                "You added weight_decay * p to the gradient. AdamW shrinks p itself: adamw_update does."),
        Mistake("no_decay", eight_bit(adamw(decay="none")), "Weight decay is missing: adamw_update has it."),
        Mistake("eps_inside", eight_bit(adamw(eps="inside")),
                "Your eps stands inside the root. It is added to the root: adamw_update does so."),
        Mistake("stale", eight_bit(stepped_with="old"),
                "You moved p with the old moments, without this step's gradient. First m and v, then p."),
        Mistake("encoded_first", eight_bit(stepped_with="encoded"),
                "You encoded the new moments first and moved p with what the codes stand for. The step is taken in "
                "float32: rounding comes after it, for the next step alone."),
        Mistake("moments_unchanged", moments_unchanged,
                "p is right, and m and v are returned as they came. They are what the next step starts from: encode "
                "the new ones."),
        Mistake("moments_encoded_as_they_came", moments_encoded_as_they_came,
                "p is right, and you encoded the old moments again. adamw_update returns the new ones: encode these."),
        Mistake("v_unchanged", v_unchanged,
                "p and m are right, and v is returned as it came. It is what the next step starts from: encode the new "
                "one."),
        Mistake("v_in_float32", eight_bit(returned=lambda p, m, v: (p, m, dequantize_blockwise(*v, UNSIGNED, BLOCK))),
                None, "came back; expected is"),
        Mistake("defaults", eight_bit(lambda p, grad, m, v, step, lr, *_: adamw_update(p, grad, m, v, step, lr)),
                "beta1, beta2, eps and weight_decay are not used: without them adamw_update takes its defaults. Hand "
                "them on, in its order."),
        Mistake("default_decay", eight_bit(lambda *settings: adamw_update(*settings[:-1])),
                "weight_decay is not used: without it adamw_update takes its default. Hand it on."),
        Mistake("step_too_far", eight_bit(lambda *given: adamw_update(*given[:4], given[4] + 1, *given[5:])),
                "You counted step one too far. It counts from 1 already: hand it on as it is."),
        Mistake("step_and_lr", eight_bit(lambda *given: adamw_update(*given[:4], given[5], given[4], *given[6:])),
                "step and lr are swapped on their way into adamw_update: step comes first."),
        Mistake("moments_swapped", eight_bit(lambda p, grad, m, v, *rest: adamw_update(p, grad, v, m, *rest)),
                "m and v are swapped on their way into adamw_update: m comes first."),
        Mistake("blocks_of_64", eight_bit(block=64),
                "Your blocks have 64 numbers. That is the size for weights; each scale of a moment is for 256."),
        Mistake("blocks_of_2048", eight_bit(block=2048),
                "Your blocks have 2048 numbers, as in the paper. Here a scale is for 256, as in bitsandbytes today."),
        Mistake("whole_tensor", whole_tensor,
                "You encoded with one scale for the whole tensor. A single large moment would then coarsen all the "
                "others: blocks of 256."),
        Mistake("kept_in_float32", kept_in_float32,
                "p is right, and you return m and v in float32. Then nothing is saved: encode them again."),
        Mistake("order", eight_bit(returned=lambda p, m, v: (p, v, m)),
                "m and v are returned in the wrong order: p, m, v."),
        Mistake("parameter_last", eight_bit(returned=lambda p, m, v: (m, v, p)), None, "(4, 3) float32) came back"),
        Mistake("parameter_alone", eight_bit(returned=lambda p, m, v: p), None, "(4, 3) float32 came back"),
        Mistake("indices_alone", eight_bit(returned=lambda p, m, v: (p, m[0], v[0])), None,
                "((4, 3) float32, (12,) uint8, (12,) uint8) came back"),
        Mistake("p_in_float32", p_in_float32,
                "Right but for the dtype: p comes in bfloat16 and goes out in bfloat16. Only the step is in float32."),
        Mistake("in_bfloat16", in_bfloat16, None, "Right in float32; here p is bfloat16"),
        Mistake("written_back", written_back, None, "Your function changed m (max difference "),
    ),
    alternatives=(by_hand, eight_bit(by_torch), not_cast_to_float32),
    kinds={"bf16": "Right in float32; here p is bfloat16. Take the step in float32, from p.float() and grad.float(), "
                   "and return p in its own dtype."},
    explain={"form": "{yours} came back; expected is {expected}: p in its dtype, and (index, absmax) of m and v."},
    fact=f"A moment costs {1 + 4 / BLOCK:.3f} bytes, its scale included. The 159,907,840 numbers of a LoRA of rank 64 "
    f"on Llama-2-7B have {2 * 159_907_840 * (1 + 4 / BLOCK) / 1e9:.2f} GB of moments instead of 1.28.",
)

EXERCISES = (LINEAR_NAMES, REQUANTIZED_MERGE, ADAMW8BIT_UPDATE)
