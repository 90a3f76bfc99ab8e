"""Chapter 03, which layers to adapt."""


from torch import nn

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.checks.values import kind_of
from utils.methods.layers import is_conv1d
from utils.quantization.base import NF4, quantize_base
from utils.targeting import inside, is_linear, linear_names, task_head


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
