"""Parameter-efficient fine-tuning, readable: one file per method, the same verbs for all of them."""

import importlib
import logging
import warnings

# On a CPU, importing peft beside bitsandbytes prints a warning about a kernel that only inference on a CPU would use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# peft 0.21 asks transformers 5 for a property that was renamed; nothing a reader can do about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

# At once, not lazily: the function must win over the submodule of the same name.
from utils.attach import Adapter, adapters, attach  # noqa: E402
from utils.methods.registry import HOME as METHODS  # noqa: E402

HOME = METHODS | {
    "lora_plus_groups": "utils.methods.lora_plus",
    "NF4": "utils.quantization.base",
    "FP4": "utils.quantization.base",
    "INT4": "utils.quantization.base",
    "quantize_base": "utils.quantization.base",
    "dequantize_base": "utils.quantization.base",
    "save_quantized": "utils.quantization.base",
    "load_adapter": "utils.checkpoint",
    "load_base": "utils.models",
    "load_tokenizer": "utils.models",
    "load_task": "utils.tasks",
    "train": "utils.training",
    "check": "utils.checks",
}
__all__ = ["Adapter", "adapters", "attach", *HOME]


def __getattr__(name):
    """Import a name when it is first used (PEP 562): a chapter that needs no transformers does not wait for it."""
    if name not in HOME:
        raise AttributeError(f"module 'utils' has no attribute {name!r}")
    return getattr(importlib.import_module(HOME[name]), name)
