"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks (Liu et al. 2022).

https://arxiv.org/abs/2110.07602

Prefix Tuning's keys and values in every layer, put to another use: understanding text with models of BERT's kind. What
the paper changes is around the prefix:

    logits = W_c pool(h) + b_c         a classification head, trained with the prefix, where prompts asked for a word
    no network by default              whether tanh(E W1^T + b1) W2^T + b2 helps depends on the task (`hidden`)
    dropout on the prefix              with the model's own probability, 0.1 for BERT

    2 L l d + (d + 1) c                numbers, for c classes, a flat prefix and a head of one linear layer

pool takes the first real token's state ([CLS]): the prefix has keys and values, but no place in the sequence. A prompt
in the input ("shallow") trains l d numbers and has to push what it says through every layer; this one speaks to each
layer by itself ("deep").

Worked example: BERT-large has 24 layers of width 1024. With l = 20 and 2 classes, 2 x 24 x 20 x 1024 = 983,040 numbers
of the prefix and 1025 x 2 = 2,050 of the head, 0.29 % of 340 million; the shallow prompt would have 20,480.

The computation and the file are those of utils/methods/prefix.py: PEFT writes both methods as PREFIX_TUNING, and so a
loaded adapter calls itself PrefixTuning.
"""

from dataclasses import dataclass

from utils.methods.prefix import PrefixTuning, prefix_num_params
from utils.targeting import whole_modules

# ---------------------------------------------------------------------------------------------- the equations


def ptuning_v2_num_params(num_virtual_tokens, layers, d, classes):
    """How many numbers P-Tuning v2 trains with a flat prefix and a head of one linear layer.

    d: width of the model   classes: c
    returns 2 L l d + (d + 1) c, an int
    """
    return prefix_num_params(num_virtual_tokens, layers, d) + (d + 1) * classes


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """What to attach. Trains 2 L l d_kv numbers and a head (Liu et al. 2022, arXiv:2110.07602).

    num_virtual_tokens  l, the length of the prefix: the paper has under 20 for simple tasks, about 100 for hard ones
    hidden              width of the network that makes the prefix while it is trained; None: none
    dropout             probability, on the prefix's keys and values, in training mode only
    init_std            of the normal start
    modules_to_save     modules trained whole: the head; None: the classification head of the model
    """

    dropout: float = 0.1

    def parts(self, model):
        if not whole_modules(model, self):
            raise ValueError(
                f"P-Tuning v2 trains a head with the prefix, and this {type(model).__name__} has none: name one in "
                "modules_to_save, or use PrefixTuning"
            )
        return super().parts(model)
