"""Chapter 01, the out-of-memory doctor."""

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory.doctor import next_remedy

TERMS = ("weights", "gradients", "optimizer", "activations", "loss")
ORDER = ("smaller batch", "checkpointing", "adapter", "4 bits", "shorter rows", "sharding")


def cases(rng):
    size = pick(rng, 3, 7, 13) * 10**8
    full, heads, frozen = (2, 2, 8, 7, 2), (2, 2, 8, 1, 9), (20, 0.1, 0.4, 6, 2)
    batch, again = "smaller batch", "checkpointing"
    drawn = [
        (full, 21, (), ("fits",)),  # to the last byte
        (full, 25, (), ("fits",)),
        (full, 20, (), ()),
        (full, 20, (batch,), ()),
        (full, 20, (again,), ()),
        (full, 20, (batch, again), ()),
        (heads, 20, (batch,), ("loss",)),
        (heads, 20, (), ()),
        (full, 11, (), ("states",)),
        (full, 11, (batch, again), ()),
        (frozen, 18, ("adapter",), ("states",)),
        (frozen, 18, ("adapter", batch), ("states",)),
        (frozen, 18, ("4 bits", "adapter"), ("states",)),
        (frozen, 25, ("adapter", batch, again), ()),
        (frozen, 25, ("adapter", batch, again, "4 bits"), ()),
        (frozen, 25, (batch, again, "adapter", "4 bits", "shorter rows"), ()),
        (frozen, 18, ORDER, ("states",)),
        (full, 12, (), ("equal, batch",)),  # the states take all of the room
        (full, 12, (batch, again, "adapter", "4 bits"), ("equal, rows",)),
        (heads, 21, (batch,), ("equal, checkpointing",)),  # states and loss do
    ]
    return [
        Case({"step": {name: round(part * size) for name, part in zip(TERMS, parts, strict=True)},
              "room": round(room * size), "tried": tried}, kinds, later="equal" in "".join(kinds))
        for parts, room, tried, kinds in drawn
    ]


def doctor(order=ORDER[:-1], fits=lambda step: sum(step.values()), heeds=True, last="sharding", **rules):
    """A next_remedy with another order or other rules. rules: name with _ -> whether it can help, of
    (states, loss, room, tried)"""
    can_help = {
        "smaller batch": lambda states, loss, room, tried: states < room,
        "checkpointing": lambda states, loss, room, tried: states + loss < room,
        "adapter": lambda states, loss, room, tried: True,
        "4 bits": lambda states, loss, room, tried: "adapter" in tried,
        "shorter rows": lambda states, loss, room, tried: states < room,
        "sharding": lambda states, loss, room, tried: True,
    } | {name.replace("_", " "): rule for name, rule in rules.items()}

    def next_remedy(step, room, tried=()):
        if fits(step) <= room:
            return None
        states = step["weights"] + step["gradients"] + step["optimizer"]
        for name in order:
            if can_help[name](states, step["loss"], room, tried) and not (heeds and name in tried):
                return name
        return last

    return next_remedy


def ordered(*names):
    """The order of the table with these names in front."""
    return (*names, *(name for name in ORDER[:-1] if name not in names))


def in_steps(step, room, tried=()):
    if sum(step.values()) <= room:
        return None
    states = sum(step[name] for name in ("weights", "gradients", "optimizer"))
    if states < room:
        if "smaller batch" not in tried:
            return "smaller batch"
        if "checkpointing" not in tried and states + step["loss"] < room:
            return "checkpointing"
    if "adapter" not in tried:
        return "adapter"
    if "4 bits" not in tried:
        return "4 bits"
    return "shorter rows" if states < room and "shorter rows" not in tried else "sharding"


def by_filter(step, room, tried=()):
    over = sum(step.values()) - room
    if over <= 0:
        return None
    left = [name for name in ORDER if name not in tried or name == "sharding"]
    if over >= step["activations"] + step["loss"]:
        left = [name for name in left if name not in ("smaller batch", "shorter rows")]
    if over >= step["activations"] and "checkpointing" in left:
        left.remove("checkpointing")
    if "adapter" not in tried and "4 bits" in left:
        left.remove("4 bits")
    return left[0]


def sharding_once(step, room, tried=()):
    return None if "sharding" in tried else next_remedy(step, room, tried)


def stops_at_sharding(step, room, tried=()):
    found = next_remedy(step, room, tried)
    return found if found is None else next(name for name in (found,) if name != "sharding" or name not in tried)


def the_wrong_way_round(step, room, tried=()):
    return None if sum(step.values()) > room else next_remedy(step, 0, tried)


def never_returns(step, room, tried=()):
    next_remedy(step, room, tried)


def yes(*_):
    return True


def changes_step(step, room, tried=()):
    found = next_remedy(dict(step), room, tried)
    step["states"] = step.pop("weights") + step.pop("gradients") + step.pop("optimizer")
    return found


def no_more_than(states, loss, room, tried):
    return states <= room


EQUAL = (
    "Wrong when the states, or states and loss, take exactly the room: then nothing is left for the rest. They have to "
    "take less than room: compare with <."
)
AGAIN = (
    "Once sharding is in tried, yours finds nothing more. Sharding can be had again, with more devices: it is the last "
    "resort, whether it was tried or not."
)

NEXT_REMEDY = Exercise(
    name="next_remedy",
    reference=next_remedy,
    cases=cases,
    mistakes=(
        Mistake("activations_first", doctor(smaller_batch=yes, checkpointing=yes, shorter_rows=yes),
                "You change the activations although weights, gradients and optimizer alone do not fit. Nothing about "
                "activations helps then: look at the states first."),
        Mistake("batch_always", doctor(smaller_batch=yes),
                "You ask for a smaller batch although weights, gradients and optimizer alone do not fit. Even a batch "
                "of none would not help."),
        Mistake("checkpointing_whatever_the_loss", doctor(checkpointing=lambda s, loss, room, tried: s < room),
                "You ask for checkpointing although states and loss alone do not fit. Checkpointing computes blocks "
                "again; the loss's tensors stay as large as they were."),
        Mistake("shorter_rows_always", doctor(shorter_rows=yes),
                "You shorten rows although weights, gradients and optimizer alone do not fit. Rows change activations "
                "and loss, and no states."),
        Mistake("4_bits_of_trained",
                doctor(**{"4_bits": yes}, order=ordered("smaller batch", "checkpointing", "4 bits")),
                "You ask for 4 bits before there is an adapter. Weights that are trained cannot be in 4 bits: freeze "
                "them first."),
        Mistake("never_4_bits", doctor(**{"4_bits": lambda *_: False}),
                "You never ask for 4 bits. Once an adapter is in place the weights are frozen, and can be in 4 bits."),
        Mistake("never_adapter", doctor(adapter=lambda *_: False),
                "You never ask for an adapter. It removes nearly all gradients and moments, three quarters or more of "
                "the states."),
        Mistake("adapter_for_states_alone", doctor(adapter=lambda s, loss, room, tried: s >= room),
                "You ask for an adapter only when the states do not fit. It makes room for activations as well, and "
                "comes before shorter rows."),
        Mistake("adapter_first", doctor(order=ordered("adapter")),
                "You begin with an adapter where a smaller batch would do. The cheaper remedies come first: a smaller "
                "batch with accumulation gives the same gradients."),
        Mistake("checkpointing_first", doctor(order=ordered("checkpointing")),
                "You ask for checkpointing before a smaller batch. Checkpointing costs a third more time; a smaller "
                "batch with accumulation costs next to nothing."),
        Mistake("rows_before_checkpointing", doctor(order=ordered("smaller batch", "shorter rows")),
                "You shorten rows too early. That throws text away; checkpointing and an adapter do not."),
        Mistake("rows_before_adapter", doctor(order=ordered("smaller batch", "checkpointing", "shorter rows")),
                "You shorten rows before you try an adapter. In the table adapter and 4 bits come first: they keep the "
                "text."),
        Mistake("sharding_first", doctor(order=("smaller batch", "checkpointing", "sharding")),
                "You ask for more devices too early. Sharding comes last, when nothing on one device is left to try."),
        Mistake("forgets_what_was_tried", doctor(heeds=False),
                "You name remedies that are in place already. Skip what is in tried."),
        Mistake("states_alone", doctor(fits=lambda step: step["weights"] + step["gradients"] + step["optimizer"]),
                "You find that a step fits when its states do. Activations and loss need room at the same time."),
        Mistake("loss_forgotten", doctor(fits=lambda step: sum(step.values()) - step["loss"]),
                "You forgot the loss when you asked whether the step fits. It is a term like the others."),
        Mistake("activations_forgotten", doctor(fits=lambda step: sum(step.values()) - step["activations"]),
                "You forgot the activations when you asked whether the step fits."),
        Mistake("never_fits", doctor(fits=lambda step: float("inf")),
                "You name a remedy for a step that fits. Return None then: what is not broken needs no repair."),
        Mistake("to_the_last_byte", doctor(fits=lambda step: sum(step.values()) + 1),
                "You name a remedy for a step that fills the room to the last byte. It fits: compare with <=."),
        Mistake("gives_up", doctor(last=None),
                "You return None when one device has nothing left to offer. None means that the step fits; the last "
                "remedy is sharding, which can be used again with more devices."),
        Mistake("sharding_once", sharding_once, AGAIN),
        Mistake("stops_at_sharding", stops_at_sharding, AGAIN),
        Mistake("largest_term", doctor(fits=lambda step: max(step.values())),
                "You compare the largest term with the room. The terms are there together: add all five."),
        Mistake("larger_of_two",
                doctor(fits=lambda step: sum(step.values()) - min(step["activations"], step["loss"])),
                "You took the larger of activations and loss. At the peak both are there: add them."),
        Mistake("the_wrong_way_round", the_wrong_way_round,
                "You return None for a step that does not fit, and a remedy for one that does: the comparison with "
                "room is the wrong way round."),
        Mistake("never_returns", never_returns, None, "None means that the step fits"),
        Mistake("states_equal_room", doctor(smaller_batch=no_more_than, shorter_rows=no_more_than), None, "exactly"),
        Mistake("states_and_loss_equal_room",
                doctor(checkpointing=lambda s, loss, room, tried: s + loss <= room), None, "exactly"),
        Mistake("both_equal_room", doctor(
                smaller_batch=no_more_than, shorter_rows=no_more_than,
                checkpointing=lambda s, loss, room, tried: s + loss <= room), None, "exactly"),
        Mistake("a_list", lambda step, room, tried=(): [next_remedy(step, room, tried)], None,
                "Yours returned a list of 1"),
        Mistake("changes_step", changes_step, None, "Your function changed step"),
    ),
    alternatives=(in_steps, by_filter, doctor()),
    kinds={
        "fits": "Right for a step that does not fit and wrong for one that does. Return None then.",
        "states": "Wrong when weights, gradients and optimizer alone do not fit. What can help then, and what cannot?",
        **dict.fromkeys(("equal, batch", "equal, rows", "equal, checkpointing"), EQUAL),
        "loss": "Wrong when the loss is what does not fit. Which remedies shrink it?",
    },
    explain={
        "None": "You return None for a step that does not fit. None means that the step fits, and is what a path "
        "without a return statement gives too: add all five terms, compare the sum with room, and return a name "
        "otherwise."
    },
    fact="The first two change no result: a smaller batch with accumulation and checkpointing both give the same "
    "gradients, up to rounding.",
)

EXERCISES = (NEXT_REMEDY,)
