"""Chapter 02, freezing and counting. Both exercises begin from a function with a bug in it."""

from types import SimpleNamespace

import torch
from torch import nn

from utils.attach import count_parameters, freeze
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick

# ------------------------------------------------------------------------------------------------- freeze


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = nn.MultiheadAttention(d, 2)  # q, k and v are one bare parameter, in_proj_weight
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, 2 * d)


class Toy(nn.Module):
    """A model with everything that freezing and counting get wrong: bare parameters, norms, names that begin alike."""

    def __init__(self, d, tied=False, frozen=()):
        super().__init__()
        self.embed = nn.Embedding(11, d)
        self.blocks = nn.ModuleList([Block(d)])
        self.head_norm = nn.BatchNorm1d(d)  # has buffers: running means are no parameters
        self.head = nn.Linear(d, 11)
        if tied:
            self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            parameter.requires_grad = not name.startswith(tuple(frozen))


def freeze_cases(rng):
    d = pick(rng, 4, 6)
    drawn = [((), ()), (("head",), ()), (("blocks.0.norm", "head.bias"), ("head", "blocks")), (("norm",), ()),
             (("blocks.0",), ("embed", "blocks.0")),
             (("head", "blocks.0.norm", "blocks.0"), ())]  # not the model's order, and one entry inside another
    return [Case({"model": Toy(d, frozen=frozen), "keep": keep}) for keep, frozen in drawn]


def freeze_findings(attempt, model, keep):
    returned = attempt(model, keep)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"still trained": trained, "returned": returned}


def freeze_linear_layers(model, keep=()):
    """Freeze every parameter of a model except those under the names in `keep`.

    keep: names of parameters, or of modules, whose parameters go on being trained
    returns the names of the parameters that are still trained, in the model's order
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad = False
            if module.bias is not None:
                module.bias.requires_grad = False
    trained = []
    for name, parameter in model.named_parameters():
        if any(name == k or name.startswith(k + ".") for k in keep):
            parameter.requires_grad = True
        if parameter.requires_grad:
            trained.append(name)
    return trained


def freezing(rule, names=lambda found: found):
    """A freeze that trains what rule(name, keep) says, and returns names(what it trains)."""

    def freeze(model, keep=()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = rule(name, keep)
        return names([name for name, parameter in model.named_parameters() if parameter.requires_grad])

    return freeze


def below(name, keep):
    return any(name == k or name.startswith(k + ".") for k in keep)


def freeze_modules(model, keep=()):
    for name, module in model.named_modules():
        module.requires_grad = name in keep
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def never_unfreeze(model, keep=()):
    for name, parameter in model.named_parameters():
        if not below(name, keep):
            parameter.requires_grad = False
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def freeze_the_others(model, keep=()):
    trained = []
    for name, parameter in model.named_parameters():
        if below(name, keep):
            trained.append(name)
        else:
            parameter.requires_grad = False
    return trained


def keep_outside(model, keep=()):
    model.requires_grad_(False)
    trained = []
    for k in keep:
        for name, parameter in model.named_parameters():
            if below(name, (k,)):
                parameter.requires_grad = True
                trained.append(name)
    return trained


def keep_outside_once(model, keep=()):
    return list(dict.fromkeys(keep_outside(model, keep)))


def freeze_then_open(model, keep=()):
    model.requires_grad_(False)
    found = [(name, parameter) for name, parameter in model.named_parameters() if below(name, keep)]
    for _, parameter in found:
        parameter.requires_grad_(True)
    return [name for name, _ in found]


NEVER_UNFREEZE = (
    "Names in keep that were frozen before must be set to True: what keep names trains after the call, whatever it did "
    "before."
)

FREEZE = Exercise(
    name="freeze",
    reference=freeze,
    cases=freeze_cases,
    call=freeze_findings,
    mistakes=(
        Mistake("linear_layers", freeze_linear_layers,
                "The bug is still there: embeddings, norms and the attention's in_proj_weight are trained although "
                "keep is empty. Print the names that it returns. Which parameters does the loop never see?"),
        Mistake("substring", freezing(lambda n, keep: any(k in n for k in keep)),
                'You keep every name that contains an entry of keep: "head" also opens head_norm, and "norm" opens all '
                'norms. Compare with the entry itself, or with the entry and a dot.'),
        Mistake("prefix_without_dot", freezing(lambda n, keep: n.startswith(tuple(keep))),
                'startswith without a dot: keep=("head",) also opens head_norm. Ask for the entry and ".".'),
        Mistake("only_modules", freezing(lambda n, keep: any(n.startswith(k + ".") for k in keep)),
                'An entry of keep may be a parameter itself, such as "head.bias". Allow equality as well.'),
        Mistake("only_parameters", freezing(lambda n, keep: n in keep),
                'An entry of keep may be a module, such as "head": then all parameters below it stay trained.'),
        Mistake("keep_ignored", freezing(lambda n, keep: False),
                "Everything is frozen, also what keep names."),
        Mistake("nothing_frozen", freezing(lambda n, keep: True),
                "Nothing is frozen: every parameter still trains."),
        Mistake("upside_down", freezing(lambda n, keep: not below(n, keep)),
                "Upside down: what keep names is frozen, and the rest trains."),
        Mistake("never_unfreeze", never_unfreeze,
                NEVER_UNFREEZE),
        Mistake("freeze_the_others", freeze_the_others, NEVER_UNFREEZE),
        Mistake("keep_outside", keep_outside,
                "The right parameters train, and the names that you return come in keep's order, some twice. Go "
                "through the parameters outside and keep inside: then they come in the model's order, each once."),
        Mistake("keep_outside_once", keep_outside_once,
                "The right parameters train, and the names that you return come in keep's order. Go through the "
                "parameters outside and keep inside: then they come in the model's order."),
        Mistake("module_attribute", freeze_modules, None, "yours still trains"),
        Mistake("returns_none", freezing(below, names=lambda found: None), None, "it returned None"),
        Mistake("returns_count", freezing(below, names=len), None, "return the names of the parameters"),
    ),
    alternatives=(freezing(below), freeze_then_open,
                  freezing(lambda n, keep: f"{n}.".startswith(tuple(f"{k}." for k in keep)))),
    explain={
        "still trained": "The wrong parameters train. After the call yours still trains {yours}, and it should be "
        "{expected}. requires_grad belongs to parameters: set it on those of model.named_parameters().",
        "returned": "The right parameters are frozen, and it returned {yours}: return the names of the parameters "
        "that are still trained, in the model's order.",
    },
    fact="A frozen parameter costs no gradient and no optimizer state; its own bytes and its activations stay.",
)

# ------------------------------------------------------------------------------------------------- count_parameters


def counting_cases(rng):
    d = pick(rng, 4, 6, 8)
    drawn = [Toy(d, tied=True), Toy(d, frozen=("embed", "blocks")), Toy(d, tied=True, frozen=("embed",)),
             Toy(d, frozen=("head", "embed", "blocks"))]
    return [Case({"model": model}) for model in drawn]


def count_by_module(model):
    """How many numbers a model trains and holds. A tensor used in two places (tied embeddings) counts once.

    returns (trainable, total), two ints
    """
    trainable = total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            total += parameter.numel()
            if parameter.requires_grad:
                trainable += parameter.numel()
    return trainable, total


def counting(
    total=lambda p: True,
    trained=lambda p: p.requires_grad,
    size=lambda p: p.numel(),
    answer=lambda trained, total: (trained, total),
):
    """A count_parameters with another idea of what is trained, what is there, or how large it is."""

    def count_parameters(model):
        parameters = list(model.parameters())
        return answer(sum(size(p) for p in parameters if trained(p)), sum(size(p) for p in parameters if total(p)))

    return count_parameters


def count_with_children(model):
    parameters = [p for module in model.modules() for p in module.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def count_with_seen_list(model):
    seen, trainable = [], 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen:
                continue
            seen.append(parameter)
            trainable += parameter.numel() * parameter.requires_grad
    return trainable, sum(p.numel() for p in seen)


def with_buffers(model):
    trainable, total = count_parameters(model)
    return trainable, total + sum(b.numel() for b in model.buffers())


def from_state_dict(model):
    tensors = model.state_dict().values()
    return sum(t.numel() for t in tensors if t.requires_grad), sum(t.numel() for t in tensors)


def count_by_id(model):
    found = {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}
    sizes = [SimpleNamespace(n=p.numel(), trained=p.requires_grad) for p in found.values()]
    return sum(s.n for s in sizes if s.trained), sum(s.n for s in sizes)


def count_by_name(model):
    total = trainable = 0
    for _, parameter in model.named_parameters():
        count = int(torch.tensor(parameter.shape).prod())
        total, trainable = total + count, trainable + count * parameter.requires_grad
    return trainable, total


IN_A_LIST = "`in` on a list compares values; keep ids or a set."

COUNT_PARAMETERS = Exercise(
    name="count_parameters",
    reference=count_parameters,
    cases=counting_cases,
    mistakes=(
        Mistake("by_module", count_by_module,
                "The bug is still there: for a model with tied embeddings yours gives {yours}, and it should be "
                "{expected}. Which tensor is met twice?"),
        Mistake("with_children", count_with_children,
                "parameters() of a module includes its children's, so each tensor is counted once per ancestor."),
        Mistake("seen_list", count_with_seen_list, None, "keep ids or a set"),
        Mistake("only_frozen", counting(total=lambda p: not p.requires_grad),
                "Your total leaves out what is trained. Total means all parameters."),
        Mistake("only_trained", counting(total=lambda p: p.requires_grad),
                "Your total counts only what is trained. Total means all parameters, frozen ones too."),
        Mistake("swapped", counting(answer=lambda trained, total: (total, trained)),
                "The two are swapped: trainable comes first, then total."),
        Mistake("frozen_first", counting(trained=lambda p: not p.requires_grad),
                "Your first number counts the frozen parameters. It should count those with requires_grad."),
        Mistake("tensors", counting(size=lambda p: 1),
                "You counted tensors, not the numbers in them. p.numel() says how many one holds."),
        Mistake("bytes", counting(size=lambda p: p.numel() * p.itemsize),
                "Those are bytes. Count the numbers: p.numel(), whatever their dtype."),
        Mistake("percentage", counting(answer=lambda trained, total: (trained, 100 * trained / total)),
                "Your second number is a percentage. Return two counts; the ratio is for whoever prints them."),
        Mistake("with_buffers", with_buffers,
                "Your total includes buffers, such as BatchNorm's running mean. They are no parameters."),
        Mistake("state_dict", from_state_dict,
                "state_dict() holds detached tensors and buffers: none of them has requires_grad, and tied weights "
                "come twice. Go through model.parameters()."),
        Mistake("one_number", counting(answer=lambda trained, total: trained), None, "a tuple of 2 is expected"),
        Mistake("none", counting(answer=lambda trained, total: None), None, "returned None"),
    ),
    alternatives=(count_by_id, count_by_name, counting()),
    explain={"must match the size": IN_A_LIST, "Boolean value of Tensor": IN_A_LIST},
    fact="parameters() gives each tensor once, even if two modules hold it; state_dict() gives it twice.",
)

EXERCISES = (FREEZE, COUNT_PARAMETERS)
