"""The out-of-memory doctor: what to change first in a training step that does not fit."""


def next_remedy(step, room, tried=()):
    """The cheapest remedy that can help and is not in place yet; sharding, the last resort, can be had again.

    step: bytes of "weights", "gradients", "optimizer", "activations" and "loss", which add up at the peak
    room: bytes that the device has for them   tried: names of the remedies in place
    returns a name of the table, or None when the step fits. From the cheapest to the dearest:

        remedy          shrinks                         can help                        costs
        smaller batch   activations, loss               if the states leave room        nothing: gradients accumulate
        checkpointing   activations                     if states and loss leave room   a third more time
        adapter         gradients, optimizer            always                          most weights stay as they are
        4 bits          frozen weights                  once an adapter is in place     slower steps, a rounded base
        shorter rows    activations, loss               if the states leave room        what the rows lose
        sharding        weights, gradients, optimizer   always, and again               more devices

    The states are weights, gradients and optimizer; they leave room if together they take less than `room`.
    """
    states = step["weights"] + step["gradients"] + step["optimizer"]
    if states + step["activations"] + step["loss"] <= room:
        return None
    can_help = {
        "smaller batch": states < room,
        "checkpointing": states + step["loss"] < room,
        "adapter": True,
        "4 bits": "adapter" in tried,
        "shorter rows": states < room,
    }
    return next((name for name, helps in can_help.items() if helps and name not in tried), "sharding")
