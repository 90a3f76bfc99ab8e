"""The out-of-memory doctor: his rules, and a patient who takes one remedy after the other."""

import pytest

from utils.memory.doctor import next_remedy

TERMS = ("weights", "gradients", "optimizer", "activations", "loss")


def patient(*gigabytes):
    return dict(zip(TERMS, gigabytes, strict=True))


@pytest.mark.parametrize(
    "step, room, tried, remedy",
    [
        (patient(2, 2, 8, 3, 1), 16, (), None),
        (patient(2, 2, 8, 3, 1), 15.9, (), "smaller batch"),
        (patient(2, 2, 8, 3, 3), 16, ("smaller batch",), "checkpointing"),
        (patient(2, 2, 8, 1, 5), 16, ("smaller batch",), "adapter"),  # the loss is no activation of a block
        (patient(2, 2, 8, 3, 3), 11, (), "adapter"),  # the states alone are too much
        (patient(14, 0.1, 0.4, 3, 1), 12, ("adapter",), "4 bits"),
        (patient(4, 0.1, 0.4, 3, 9), 12, ("smaller batch", "checkpointing", "adapter", "4 bits"), "shorter rows"),
        (patient(36, 0.1, 0.4, 3, 1), 24, ("adapter", "4 bits"), "sharding"),
        (patient(36, 0.1, 0.4, 3, 1), 24, ("adapter", "4 bits", "sharding"), "sharding"),
    ],
)
def test_rules(step, room, tried, remedy):
    assert next_remedy(step, room, tried) == remedy


def test_a_patient_who_takes_every_remedy():
    """7B in full with 16 bytes per parameter and four long rows, on 24 GB: treated until the step fits."""
    step, tried = patient(14, 14, 84, 60, 8), []
    shrink = {"smaller batch": {"activations": 4, "loss": 4}, "checkpointing": {"activations": 30},
              "adapter": {"gradients": 175, "optimizer": 262}, "4 bits": {"weights": 3.5}}  # fmt: skip
    while remedy := next_remedy(step, 24, tried):
        tried.append(remedy)
        step = {name: size / shrink[remedy].get(name, 1) for name, size in step.items()}
    assert tried == ["adapter", "smaller batch", "checkpointing"]
    assert sum(step.values()) < 24
