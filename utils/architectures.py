"""Published models without their weights: built on torch's meta device, to count parameters and read shapes.

The sizes are in data/architectures.json, each with its source. A model on the meta device has every module and every
shape, and no numbers, so even Llama-2-70B takes no memory.
"""

import difflib
import json
from functools import cache

import torch

from utils.paths import DATA


@cache
def known():
    """name -> {"config", "model", "fields", "source"}, as in data/architectures.json."""
    return json.loads((DATA / "architectures.json").read_text())["models"]


def architecture(name, model=None, **changes):
    """A published model's skeleton on the meta device.

    name: "Llama-2-7B", "GPT-2-M", "BERT-base", ...; `known()` has them all
    model: another transformers class for the same sizes, say "BertForSequenceClassification"
    changes: fields of the config that shall differ, say num_labels=2
    raises ValueError for a name that is not listed, with the nearest ones
    """
    if name not in known():
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in known()], 3, 0.5)
        names = [n for n in known() if n.lower() in near] or list(known())
        raise ValueError(f"{name!r} is not in data/architectures.json; there are: {', '.join(names)}")
    import transformers

    facts = known()[name]
    config = getattr(transformers, facts["config"])(**facts["fields"] | changes)
    kind = getattr(transformers, model or facts["model"])  # not below: its modules' tensors would be on meta too
    with torch.device("meta"):
        return kind(config)
