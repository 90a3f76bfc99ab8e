"""Chapter 03, merging into 4 bits."""

from numbers import Real

import torch

from utils.checks.compare import close, nearly_all
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.checks.values import kind_of
from utils.quantization.codebooks import nf4_codebook
from utils.quantization.weights import quantize_weight, requantized_merge


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
