"""Chapter 03, what to ask transformers for."""


import torch

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.quantization.base import bitsandbytes_fields


def field_cases(rng):
    half = pick(rng, torch.float16, torch.bfloat16)
    drawn = [(), ("fp4", False, torch.float16), ("nf4", False, torch.float32), ("fp4", True, half)]
    names = ("kind", "double_quant", "compute_dtype")
    return [Case(dict(zip(names, values, strict=False)), ("asked",) if values else ()) for values in drawn]


MEANT = {  # BitsAndBytesConfig's argument -> what the finding is called
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "code book",
    "bnb_4bit_use_double_quant": "double quantization",
    "bnb_4bit_compute_dtype": "compute dtype",
}


def meant_by(attempt, *inputs):
    """What transformers makes of the fields; strings and dtypes that mean the same are the same."""
    import inspect

    from transformers import BitsAndBytesConfig

    fields = attempt(*inputs)
    if not isinstance(fields, dict):
        return fields
    unknown = sorted(set(fields) - set(inspect.signature(BitsAndBytesConfig).parameters))
    if unknown:
        return {"unknown": ", ".join(unknown)}
    config = BitsAndBytesConfig(**fields)
    return {"unknown": ""} | {name: str(getattr(config, field)) for field, name in MEANT.items()}


def asking(changes=(), without=(), use=lambda *given: given):
    """A bitsandbytes_fields with some fields changed or left out, made for use(kind, double_quant, compute_dtype)."""

    def bitsandbytes_fields_(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
        fields = bitsandbytes_fields(*use(kind, double_quant, compute_dtype)) | dict(changes)
        return {name: value for name, value in fields.items() if name not in without}

    return bitsandbytes_fields_


def misspelt(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_double_quant": double_quant,
            "bnb_4bit_compute_dtype": compute_dtype}  # fmt: skip


def short_names(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return {"load_in_4bit": True, "quant_type": kind, "use_double_quant": double_quant, "compute_dtype": compute_dtype}


def other_kind(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return {"load_in_4bits": True, "bnb_4bit_kind": kind, "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": compute_dtype}  # fmt: skip


def in_capitals(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return bitsandbytes_fields(kind, double_quant, compute_dtype) | {"bnb_4bit_quant_type": kind.upper()}


def eight_bits(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    fields = bitsandbytes_fields(kind, double_quant, compute_dtype) | {"load_in_8bit": True}
    del fields["load_in_4bit"]
    return fields


def the_config(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**bitsandbytes_fields(kind, double_quant, compute_dtype))


def dtype_by_name(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return dict(load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type=kind,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=str(compute_dtype).removeprefix("torch."))  # fmt: skip


def what_differs(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    """Only what differs from the defaults."""
    fields = {"load_in_4bit": True}
    if kind != "fp4":
        fields["bnb_4bit_quant_type"] = kind
    if double_quant:
        fields["bnb_4bit_use_double_quant"] = True
    if compute_dtype != torch.float32:
        fields["bnb_4bit_compute_dtype"] = compute_dtype
    return fields


def with_storage(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return bitsandbytes_fields(kind, double_quant, compute_dtype) | {"bnb_4bit_quant_storage": torch.uint8}


FIELDS = Exercise(
    name="bitsandbytes_fields",
    reference=bitsandbytes_fields,
    cases=field_cases,
    call=meant_by,
    mistakes=(
        Mistake("load_in_4bit_alone", lambda *_, **__: {"load_in_4bit": True},
                "You left the defaults: that is FP4, scales of 32 bits, and products in float32. None of the three is "
                "QLoRA's; each has a field of its own."),
        Mistake("no_kind", asking(without=("bnb_4bit_quant_type",)),
                'The code book is left at its default, which is "fp4". NF4 has to be asked for: bnb_4bit_quant_type.'),
        Mistake("no_double_quant", asking(without=("bnb_4bit_use_double_quant",)),
                "Double quantization is left at its default, which is off: bnb_4bit_use_double_quant."),
        Mistake("no_compute_dtype", asking(without=("bnb_4bit_compute_dtype",)),
                "The compute dtype is left at its default, float32: slow on every GPU with tensor cores. The field is "
                "bnb_4bit_compute_dtype."),
        Mistake("always_nf4", asking(use=lambda kind, double, dtype: ("nf4", double, dtype)),
                'You ask for "nf4" whatever kind says.'),
        Mistake("always_double", asking(use=lambda kind, double, dtype: (kind, True, dtype)),
                "You ask for double quantization whatever double_quant says."),
        Mistake("always_bfloat16", asking(use=lambda kind, double, dtype: (kind, double, torch.bfloat16)),
                "You ask for bfloat16 whatever compute_dtype says."),
        Mistake("always_qloras", asking(use=lambda *_: ("nf4", True, torch.bfloat16)),
                "Those are QLoRA's settings whatever was asked for: use the three arguments."),
        Mistake("double_quant_reversed", asking(use=lambda kind, double, dtype: (kind, not double, dtype)),
                "double_quant is taken the wrong way round."),
        Mistake("no_4bit", asking(without=("load_in_4bit",)),
                "load_in_4bit is missing. Without it nothing is quantized, and no error says so: the other fields only "
                "say how."),
        Mistake("eight_bits", eight_bits,
                "load_in_8bit is another method, LLM.int8(): 8 bits per weight. Fields for 4 bits do nothing then."),
        Mistake("both", asking({"load_in_8bit": True}), None, "only one can be used at the same time"),
        Mistake("misspelt", misspelt,
                "There is no bnb_4bit_double_quant; the field is bnb_4bit_use_double_quant. transformers takes unknown "
                "names without an error, and the default, off, stays."),
        Mistake("short_names", short_names,
                "The fields begin with bnb_4bit_. transformers takes unknown names without an error, and the defaults "
                "stay: FP4, scales of 32 bits, float32."),
        Mistake("other_kind", other_kind, None, "transformers knows no field bnb_4bit_kind, load_in_4bits;"),
        Mistake("in_capitals", in_capitals,
                'The kinds are written in small letters. transformers takes "NF4" without an error, and bitsandbytes '
                "refuses it when the model is loaded."),
        Mistake("the_config", the_config, None, "a BitsAndBytesConfig, and a dict is expected"),
        Mistake("unknown_dtype", asking({"bnb_4bit_compute_dtype": "bf16"}), None, "has no attribute 'bf16'"),
        Mistake("in_words", asking({"bnb_4bit_use_double_quant": "yes"}), None, "must be a boolean"),
    ),
    alternatives=(dtype_by_name, what_differs, with_storage),
    explain={
        "unknown": "transformers knows no field {yours}; it takes unknown names without an error, and they do nothing.",
        "no attribute 'bf16'": 'A dtype, or its full name: torch.bfloat16 or "bfloat16".',
    },
    kinds={"asked": "Right for QLoRA's settings and wrong when others are asked for: use the three arguments."},
    fact="load_in_4bit=True alone gives FP4, scales of 32 bits and products in float32: 4.5 bits per weight, and not "
    "what the paper describes.",
)
