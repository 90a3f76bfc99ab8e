"""The table of methods in the docs is what the code makes of itself."""

from utils.methods.registry import HOME, method
from utils.methods.table import FILE, row, table


def test_the_file_is_what_the_code_makes():
    assert FILE.read_text() == table(), "run python -m utils.methods.table"


def test_what_is_known_of_some_methods():
    lora, prefix, bitfit = (row(method(name)) for name in ("LoRA", "PrefixTuning", "BitFit"))
    assert lora["trains"] == "r (d_in + d_out) numbers per matched layer" and lora["merge"] == "yes"
    assert "peft" in lora["tested against"] and lora["PEFT type"] == "LORA"
    assert prefix["merge"].startswith("no: it adds keys and values")
    assert bitfit["PEFT type"].startswith("none") and bitfit["tested against"] == "its definition, by hand"


def test_every_method_is_exported():
    import utils

    assert all(getattr(utils, name) is method(name) for name in HOME)
