"""The record of other estimators is what they say, and the prediction is what is counted."""

import json

import pytest

from utils.architectures import architecture
from utils.memory.compare import RECORD, accelerate_says, count_step, predicted, table
from utils.memory.counts import parameters_of

ROWS = json.loads(RECORD.read_text())["rows"]
COUNTED = [row for row in ROWS if row["counted"]]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"{row['model']}-{row['batch']}x{row['length']}")
def test_the_prediction_is_what_was_counted(row):
    assert predicted(row).peak == pytest.approx(row["counted"], rel=0.01)


def test_what_is_recorded_is_counted_again():
    row = COUNTED[0]
    assert count_step(row["model"], row["batch"], row["length"]) == pytest.approx(row["counted"], rel=0.001)


def test_accelerate_counts_four_copies_of_the_weights():
    for row in COUNTED:
        assert row["accelerate"] == accelerate_says(row["model"], "float32")
        assert row["accelerate"] == pytest.approx(16 * parameters_of(architecture(row["model"]).config), rel=0.001)


def test_deepspeed_counts_20_bytes_per_parameter():
    """In stage 2, 2 on every GPU and 18 in all; in stage 3, 18 in all and 4 for each number of the largest layer."""
    for row in ROWS:
        if row["stage"]:
            n = parameters_of(architecture(row["model"]).config)
            there = 2 * n if row["stage"] == 2 else 4 * 32000 * 4096
            assert row["DeepSpeed"] == there + int(18 * n / row["devices"])


def test_neither_knows_activations():
    """The same size for one short row and for eight long ones, which take eight times as much."""
    short, long = COUNTED[:2]
    assert short["accelerate"] == long["accelerate"] and long["counted"] > 7 * short["counted"]


def test_table():
    lines = table().splitlines()
    assert len(lines) == len(ROWS) + 1 and all(row["model"] in line for row, line in zip(ROWS, lines[1:], strict=True))
