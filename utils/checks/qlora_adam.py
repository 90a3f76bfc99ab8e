"""Chapter 03, AdamW with moments of 8 bits."""


import torch

from utils.checks.compare import close, nearly_all
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.checks.memory_adamw import L2_in_the_gradient, adamw, by_torch
from utils.checks.values import kind_of, short
from utils.optimizers import BLOCK, adamw8bit_update, adamw_update, moment_codebooks
from utils.quantization.blocks import dequantize_blockwise, quantize_blockwise

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
