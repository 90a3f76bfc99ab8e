"""Chapter 02, finding the modules to adapt."""

import re

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.targeting import match_targets


def match_cases(rng):
    layers = [f"model.layers.{i}.self_attn" for i in range(pick(rng, 2, 3))]
    names = ["model", "model.embed_tokens", *(f"{layer}.{n}" for layer in layers for n in
             ("q_proj", "q_proj_norm", "fq_proj", "k_proj", "v_proj", "no_proj", "o_proj")), "lm_head", "head"]
    whole = f"{layers[1]}.k_proj"
    drawn = [
        (("q_proj", "v_proj"), ()),
        (("v_proj", "q_proj", "o_proj"), ()),  # not the model's order
        (("head",), ()),
        ((whole,), ()),
        (("self_attn.q_proj", "q_proj"), ()),  # one module fits twice
        (("c_attn",), ("c_attn",)),
        (("q_proj", "query", "value"), ("query", "value")),  # some match, two do not
        (("proj",), ("proj",)),
    ]
    return [
        Case({"names": names, "targets": targets}, numbers={"missing": " and ".join(map(repr, missing))},
             mentions=missing, later=bool(missing))
        for targets, missing in drawn
    ]


def matching(rule=lambda n, t: n == t or n.endswith("." + t), missing=lambda ts: ts, says=", ".join):
    """A match_targets with another rule, another choice of what counts as unmatched, or another message."""

    def match_targets(names, targets):
        unmatched = missing([t for t in targets if not any(rule(n, t) for n in names)])
        if unmatched:
            raise ValueError(says(unmatched))
        return [n for n in names if any(rule(n, t) for t in targets)]

    return match_targets


def fits(name, target):
    return name == target or name.endswith("." + target)


def match_by_regex(names, targets):
    found, used = [], set()
    for name in names:
        hits = {t for t in targets if re.fullmatch(rf"(.*\.)?{re.escape(t)}", name)}
        found += [name] if hits else []
        used |= hits
    if set(targets) - used:
        raise ValueError(f"nothing matches {sorted(set(targets) - used)}")
    return found


def match_by_parts(names, targets):
    def ends(name, target):
        tail = target.split(".")
        return name.split(".")[-len(tail) :] == tail

    return matching(ends)(names, targets)


def silent_when_some_match(names, targets):
    found = [n for n in names if any(fits(n, t) for t in targets)]
    if not found:
        raise ValueError(f"nothing matches {targets}")
    return found


def by_target(names, targets):
    matching()(names, targets)  # raises as it should
    return [n for t in targets for n in names if fits(n, t)]


def first_of_each(names, targets):
    matching()(names, targets)
    return [next(n for n in names if fits(n, t)) for t in targets]


def substring_by_target(names, targets):
    return [n for t in targets for n in names if t in n]


def twice(names, targets):
    matching()(names, targets)
    return [n for n in names for t in targets if fits(n, t)]


IN_NAME = "`in` also finds q_proj_norm and fq_proj: compare whole parts of the name."
NO_DOT = 'endswith without the dot: q_proj finds fq_proj, head finds lm_head. Ask for "." + target, or equality.'

MATCH_TARGETS = Exercise(
    name="match_targets",
    reference=match_targets,
    cases=match_cases,
    mistakes=(
        Mistake("substring", matching(lambda n, t: t in n),
                IN_NAME),
        Mistake("substring_silent", matching(lambda n, t: t in n, missing=lambda ts: ()), IN_NAME),
        Mistake("substring_by_target", substring_by_target, IN_NAME),
        Mistake("no_dot", matching(lambda n, t: n.endswith(t)),
                NO_DOT),
        Mistake("equality", matching(lambda n, t: n == t), None, "raises ValueError: q_proj"),
        Mistake("last_part", matching(lambda n, t: n.split(".")[-1] == t),
                "You compare the last part of the name alone, so a target with dots in it never matches, not even a "
                "whole path."),
        Mistake("always_silent", matching(missing=lambda ts: ()),
                "A target that matches nothing went unnoticed ({missing}). Training would run without it: raise "
                "ValueError and name it."),
        Mistake("silent_when_some_match", silent_when_some_match,
                "You raise only when nothing matches at all. With some targets matched, {missing} went unnoticed, and "
                "fewer layers would train than were asked for."),
        Mistake("no_dot_silent", matching(lambda n, t: n.endswith(t), missing=lambda ts: ()),
                NO_DOT),
        Mistake("nameless", matching(says=lambda ts: "some targets match nothing"), None, "does not name 'c_attn'"),
        Mistake("first_named", matching(says=lambda ts: ts[0]), None, "does not name 'value'"),
        Mistake("key_error", lambda names, targets: {t: [n for n in names if fits(n, t)] for t in targets if any(
                fits(n, t) for n in names)}[targets[0]], None, "yours lacks"),
        Mistake("by_target", by_target,
                "The names come in the order of the targets, and one that fits two targets comes twice. Go through the "
                "names, and keep the model's order."),
        Mistake("twice", twice, "A name that fits two targets is returned twice. Each module gets one LoRA."),
        Mistake("first_only", first_of_each,
                "Only the first match of each target is returned. Every layer has a q_proj, and all are meant."),
        Mistake("a_set", lambda names, targets: set(matching()(names, targets)), None, "a set, and a list of"),
    ),
    alternatives=(match_by_regex, match_by_parts, matching(lambda n, t: f".{n}".endswith(f".{t}"))),
    fact="The rule is peft's own, so a list of targets means the same modules there.",
)

EXERCISES = (MATCH_TARGETS,)
