"""The sentence for attempts that no mistake in the registry explains."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from utils.checks import check, find
from utils.checks.core import GRADING, judge
from utils.methods.lora import LoRAFunction

SEEDS = range(5)
SENTENCES = {}


def attempt(exercise, *expected):
    """Register an attempt with the parts of the sentence that it should get."""

    def register(function):
        SENTENCES[function.__name__] = exercise, function, expected
        return function

    return register


@attempt("lora_delta", "It returned None. Is there a return statement")
def returns_none(A, B, alpha):
    pass


@attempt("lora_delta", "First difference at [0, 0]: yours 1, expected", "A (8, 32)")
def constant(A, B, alpha):
    return torch.ones(B.shape[0], A.shape[1])


@attempt("lora_delta", "Yours returned an int, and a Tensor is expected.")
def a_number(A, B, alpha):
    return 3


@attempt("lora_delta", "It is called as lora_delta(A, B, alpha); yours takes (A, B).")
def parameter_missing(A, B):
    return B @ A


@attempt("lora_delta", "calls itself without end")
def endless(A, B, alpha):
    return endless(A, B, alpha)


@attempt("lora_delta", "`rank = A.shape[2]`, raises IndexError: tuple index out of range.")
def raises(A, B, alpha):
    rank = A.shape[2]
    return rank


@attempt("lora_delta", "raises SystemExit")
def leaves(A, B, alpha):
    sys.exit("bye")


@attempt("lora_delta", "Your output is exactly 2 times the expected one.")
def doubled(A, B, alpha):
    return 2 * alpha / len(A) * B @ A


@attempt("lora_delta", "Your output is 0.3536 times the expected one, which is 1/sqrt(r), and r is 8.")
def root_too_many(A, B, alpha):
    return alpha / len(A) ** 1.5 * B @ A


@attempt("lora_delta", "has the wrong sign")
def negative(A, B, alpha):
    return -alpha / len(A) * B @ A


@attempt("lora_delta", "off by the same 0.5 everywhere")
def shifted(A, B, alpha):
    return alpha / len(A) * B @ A + 0.5


@attempt("lora_delta", "holds NaN or infinite values")
def not_a_number(A, B, alpha):
    return alpha / len(A) * B @ A / 0.0


@attempt("lora_delta", "Rows 0, 1 of 32 are wrong, the others right.")
def two_rows(A, B, alpha):
    return torch.cat([B[:2] @ A, alpha / len(A) * B[2:] @ A])


@attempt("lora_delta", "Rows 0, 1, 2, 3, 4, 5 and 4 more of 32 are wrong, the others right. First difference at [0, ")
def ten_rows(A, B, alpha):
    return torch.cat([B[:10] @ A, alpha / len(A) * B[10:] @ A])


@attempt("nf4_codebook", "Wrong shape: yours (3,), expected (16,), with the defaults.")
def three_in_a_tensor(offset=0.97):
    return torch.tensor([-1.0, 0, 1])


@attempt("nearest_code", "First difference at [", "expected ", ". The case: values (")
def a_place_too_far(values, code):
    return (find("nearest_code").reference(values, code).int() * 3 % 16).to(torch.uint8)


@attempt("requantized_merge", "merged: Largest difference at [", "kind='nf4', block_size=64, double_quant=False.")
def scales_in_half(W, delta, *settings):
    merged, lost = find("requantized_merge").reference(W, delta, *settings)
    if merged.nested is None:
        merged.absmax = merged.absmax * 1.0006
    return merged, lost


@attempt("lora_delta", "Wrong device: the inputs are on cpu, you returned a tensor on meta.")
def on_meta(A, B, alpha):
    return (alpha / len(A) * B @ A).to("meta")


@attempt("lora_delta", "Wrong dtype: float32 is expected, you returned complex64.")
def complex_numbers(A, B, alpha):
    return (alpha / len(A) * B @ A).to(torch.complex64)


@attempt("lora_delta", "Right values, wrong dtype: A is float32, you returned float64.")
def too_precise(A, B, alpha):
    return (alpha / len(A) * B @ A).to(torch.float64 if A.dtype == torch.float32 else A.dtype)


@attempt("lora_delta", "Values are right but the gradient of A is not. Your gradient is exactly 2 times")
def gradient_doubled(A, B, alpha):
    return alpha / len(A) * B @ (2 * A - A.detach())


@attempt("lora_delta", "Values are right until the inputs want gradients.", "numpy()")
def through_numpy(A, B, alpha):
    return alpha / len(A) * torch.from_numpy(B.float().numpy() @ A.float().numpy()).to(A.dtype)


@attempt("lora_delta", "This is right only when the layer is square.")
def square_only(A, B, alpha):
    scale = alpha / len(A) if len(B) == A.shape[1] else 1.0
    return scale * B @ A


@attempt("lora_forward", "This is right only when the layer is square.", "shapes cannot be multiplied")
def square_or_exception(x, W, A, B, alpha):
    y = F.linear(x, W) + alpha / len(A) * F.linear(F.linear(x, A), B)
    return y if W.shape[0] == W.shape[1] else x @ W


@attempt("lora_forward", "raises RuntimeError: mat1 and mat2", "W x becomes x @ W.T in code.")
def columns_without_rank(x, W, A, B, alpha):
    return W @ x + alpha * (B @ (A @ x))


@attempt("lora_forward", "Your update is exactly 3 times the expected one.")
def update_tripled(x, W, A, B, alpha):
    return x @ W.T + 3 * alpha / len(A) * (x @ A.T @ B.T)


@attempt("lora_forward", "Your function changed A (max difference")
def scales_A(x, W, A, B, alpha):
    A *= alpha / A.shape[0]
    return x @ W.T + x @ A.T @ B.T


@attempt("fuse_loras", "Your function changed As", "Leave the inputs as they were.")
def pops(As, Bs):
    As.insert(0, As[0])
    return torch.cat(As[1:]), torch.block_diag(*Bs)


@attempt("match_targets", "Your function changed names", "Leave the inputs as they were.")
def sorts_names(names, targets):
    right = find("match_targets").reference(names, targets)
    names.sort()
    return right


@attempt("LoRAFunction", "A class is expected, and yours is a function.")
def no_class(x, W, bias, A, B, scale, mask):
    return x


@attempt("match_targets", " names, targets=('q_proj', 'v_proj'): yours has the right entries, but in another order")
def reversed_names(names, targets):
    return find("match_targets").reference(names, targets)[::-1]


@attempt("match_targets", "yours lacks 'model.layers.0.self_attn.v_proj', and should have it.")
def first_target_only(names, targets):
    return [n for n in names if n.endswith(f".{targets[0]}")]


@attempt("model_states", "Yours lacks 'weights, frozen'; it holds 'weights'.")
def other_names(trained, frozen, recipe):
    return {"weights": trained * recipe.weight + frozen * recipe.frozen}


@attempt("model_states", "Yours holds 'activations' as well, which is not asked for.")
def with_activations(trained, frozen, recipe):
    return find("model_states").reference(trained, frozen, recipe) | {"activations": 0}


@attempt("shard", "gradients: With terms (weights, frozen 0; weights, trained ", "stage=0: yours ", "expected ")
def one_byte_more(terms, devices, stage):
    return {name: size + (name == "gradients") for name, size in find("shard").reference(terms, devices, stage).items()}


@attempt("llama_parameters", "With vocab=32,000, d=4,096, ", "yours 6,738,415,617, expected 6,738,415,616; 1 too much.")
def one_parameter_more(*sizes):
    return find("llama_parameters").reference(*sizes) + 1


@attempt("attention_kept", "yours 1, expected ", " too little.")
def one_byte(*sizes):
    return 1


@attempt("block_kept", "; 264 too much.")
def a_little_more(*sizes):
    return find("block_kept").reference(*sizes) + 264


@attempt("units", "With size=13,476,831,232: your second value is 12.5, expected 12.55.")
def rounded_down(size):
    return size / 1e9, size / 2**30 // 0.5 * 0.5


@attempt("next_remedy", "You return None for a step that does not fit.", "add all five terms")
def gives_up_after_the_adapter(step, room, tried=()):
    return None if "adapter" in tried else find("next_remedy").reference(step, room, tried)


@attempt("next_remedy", "take exactly the room")
def rows_when_nothing_is_left(step, room, tried=()):
    states = step["weights"] + step["gradients"] + step["optimizer"]
    last = states == room and "4 bits" in tried and "shorter rows" not in tried
    return "shorter rows" if last else find("next_remedy").reference(step, room, tried)


@attempt("quantize_blockwise", "Right values, wrong dtype: absmax is to be float32, you returned float64.")
def absmax_in_float64(*inputs):
    index, absmax = find("quantize_blockwise").reference(*inputs)
    return index, absmax.double()


@attempt("adamw_update", "Right values, wrong dtype: p is bfloat16, you returned float32.")
def p_in_float32(p, *others):
    new, m, v = find("adamw_update").reference(p, *others)
    return new.float(), m, v


@attempt("shard", "With terms (weights, frozen ", "stage=-1, ValueError is expected, and yours returned {")
def stage_minus_one(terms, devices, stage):
    return {"total": sum(terms.values())} if stage == -1 else find("shard").reference(terms, devices, stage)


@attempt("LoRAFunction", "Write @staticmethod above backward, and let ctx be its first parameter")
class WithSelf(LoRAFunction):
    def backward(self, ctx, grad):
        return LoRAFunction.backward(ctx, grad)


@pytest.mark.parametrize("name", SENTENCES)
def test_general_diagnosis(name):
    exercise, function, expected = SENTENCES[name]
    for seed in SEEDS:
        verdict, sentence = judge(find(exercise), function, seed)
        assert verdict == "wrong"
        assert all(part in sentence for part in expected), sentence
        assert len(sentence) < 600


def test_a_finer_point_does_not_hide_a_plain_mistake():
    """Wrong in float32 and careless about dtypes or bad names too: the sentence is about the former."""

    def unscaled(W, A, B, alpha):
        return W + B @ A

    def root_of_both(alpha, r, scaling="standard"):
        return alpha / r if scaling == "standard" else math.sqrt(alpha / r)

    assert "alpha / r is missing" in judge(find("lora_merge"), unscaled, 0)[1]
    assert "the root is of r alone" in judge(find("lora_scale"), root_of_both, 0)[1]


def blank_backward(right):
    """A class with its forward pass alone: the right one, or one without the update."""

    class LoRAFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W, bias, A, B, scale, mask):
            update = F.linear(F.linear(x if mask is None else x * mask, A.to(x.dtype)), B.to(x.dtype))
            return F.linear(x, W, bias) + (scale if right else 0) * update

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    return LoRAFunction


def test_a_class_whose_backward_is_blank(capsys, monkeypatch):
    monkeypatch.delenv(GRADING, raising=False)
    assert check(blank_backward(right=True)) is find("LoRAFunction").reference
    assert "its backward is not written yet" in capsys.readouterr().out
    check(blank_backward(right=False))
    assert capsys.readouterr().out.startswith("LoRAFunction: In forward: Your output is the frozen path alone.")
