"""The settings that methods share, brought into one form, or refused with one sentence before any model is touched."""

import math
import re
from collections.abc import Mapping

import torch


def names(setting, value, or_regex=True):
    """Which modules: a tuple of names, or a str, which is one regular expression over whole paths; None stays None.

    setting: what it is called in the configuration, for the message
    or_regex: False where no regular expression is meant: there a str is a single name
    raises ValueError for anything else
    """
    if value is None:
        return None
    if isinstance(value, str):
        return regex(setting, value) if or_regex else (value,)
    if not isinstance(value, (tuple, list, set, frozenset)) or not all(isinstance(n, str) and n for n in value):
        form = "a tuple of names of modules" + (", or one regular expression as a str" if or_regex else "")
        raise ValueError(f"{setting} is {value!r}; it can be {form}")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def regex(setting, value):
    """The str itself, or ValueError when it is not a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{setting} is not a regular expression: {value!r} ({error})") from None
    return value


def layer_numbers(value):
    """A tuple of whole numbers, or None for all layers."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list, set, range)) or not all(type(n) is int for n in value):
        raise ValueError(f"layers is {value!r}; it can be None or a tuple of layer numbers")
    return tuple(value)


def per_module(setting, value, check):
    """A {name or regex: value} dict; every value goes through `check`."""
    value = {} if value is None else value
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"{setting} is {value!r}; it must be a dict {{name or regular expression: value}}")
    return {regex(setting, key): check(v) for key, v in value.items()}


def rank(value):
    """A whole number from 1 up."""
    return whole("the rank", value)


def whole(setting, value, least=1):
    """A whole number from `least` up, for anything that is counted. True is a number to Python, and a slip here."""
    if type(value) is not int or value < least:
        raise ValueError(f"{setting} is {value!r}; it must be a whole number from {least} up")
    return value


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive(setting, value):
    """A finite number above zero."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{setting} is {value!r}; it must be a positive number")
    return value


def probability(setting, value):
    """A number from 0 up to, not including, 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{setting} is {value!r}; it is a probability from 0 up to, not including, 1")
    return value


def float_dtype(setting, value):
    """A torch.dtype that can be trained in, or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise ValueError(f"{setting} is {value!r}; it can be None or a floating-point torch.dtype")
    return value


def one_of(setting, value, known):
    """One of a few words or numbers. True equals 1 to Python, and is another word here."""
    if not any(type(value) is type(word) and value == word for word in known):
        raise ValueError(f"{setting} is {value!r}; it can be {', '.join(map(repr, known))}")
    return value


def peft_targets(fields):
    """Which modules an adapter_config.json means, as the settings of ours that say so."""
    layers = fields.get("layers_to_transform")
    return {
        "targets": fields.get("target_modules"),
        "layers": ((layers,) if isinstance(layers, int) else layers) or None,
        "exclude": fields.get("exclude_modules") or (),
        "modules_to_save": fields.get("modules_to_save") or (),
    }
