"""Base models and tokenizers by profile: the tiny ones in data/models, or named models of the Hugging Face hub.

    model = load_base("decoder")                                        # tiny Llama, causal language model
    model = load_base("encoder", head="classify", num_labels=8)         # tiny BERT, a new seeded classifier
    model = load_base("decoder", profile="colab", dtype=torch.float16)  # Qwen2.5-0.5B, needs the hub once
"""

import torch

from .paths import DATA

PROFILES = {
    "tiny": {"decoder": str(DATA / "models" / "tiny-llama"), "encoder": str(DATA / "models" / "tiny-bert")},
    "colab": {"decoder": "Qwen/Qwen2.5-0.5B", "encoder": "google-bert/bert-base-uncased"},
    "gpu": {"decoder": "Qwen/Qwen2.5-7B", "encoder": "FacebookAI/roberta-large"},
}
HEADS = ("lm", "classify", "tag", None)


def base_name(kind, profile="tiny"):
    """The folder or hub name of a base. Raises ValueError if there is no such profile or kind."""
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if kind not in PROFILES[profile]:
        raise ValueError(f"there is no kind of model {kind!r}; choose one of {', '.join(PROFILES[profile])}")
    return PROFILES[profile][kind]


def hub_reachable():
    """Whether the hub answers within 5 seconds.

    The hub's client retries a failed connection for about 25 seconds per file; asking once first keeps that away.
    Proxies and HF_HUB_OFFLINE are respected, because the question goes through the client's own session.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the session's own classes differ between hub versions; each of them means "no answer"
        return False
    return True


def _auto_class(kind, head):
    import transformers

    language_model = {"decoder": transformers.AutoModelForCausalLM, "encoder": transformers.AutoModelForMaskedLM}
    return {
        "lm": language_model[kind],
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
        None: transformers.AutoModel,
    }[head]


def _from_pretrained(auto_class, name, profile, **options):
    """auto_class.from_pretrained, which looks only at local files if the hub does not answer."""
    from transformers import AutoConfig

    local_only = profile == "tiny" or not hub_reachable()
    try:
        if local_only:
            # fails at once where a model's from_pretrained would first ask the hub for an adapter
            AutoConfig.from_pretrained(name, local_files_only=True)
        return auto_class.from_pretrained(name, local_files_only=local_only, **options)
    except OSError as error:
        if profile == "tiny":
            raise OSError(f"{name} is incomplete; restore it from git or make it again: python -m data.make") from error
        if not local_only:
            raise
        raise OSError(
            f"{name} is not on this machine and the hub cannot be reached: "
            "use profile='tiny', or run once with a network"
        ) from error


def load_base(kind="decoder", profile="tiny", *, head="lm", num_labels=None, dtype=None, seed=0):
    """A pretrained model in eval mode on the CPU.

    kind: "decoder" or "encoder". head: "lm" (causal or masked language model), "classify" (one label per text),
    "tag" (one label per token) or None (hidden states only); the last two heads are new, drawn from `seed`, and need
    num_labels. dtype: None keeps what the checkpoint's config says (tiny: float32; its files hold float16).

    Raises ValueError for an unknown profile, kind or head, and OSError if the model can be read neither here nor
    from the hub.
    """
    name = base_name(kind, profile)
    if head not in HEADS:
        raise ValueError(f"there is no head {head!r}; choose one of {', '.join(map(repr, HEADS))}")
    if (head in ("classify", "tag")) != (num_labels is not None):
        raise ValueError(f"num_labels goes with head='classify' or 'tag', but head={head!r} and {num_labels=}")
    options = {"dtype": dtype or "auto"}
    if num_labels is not None:
        options["num_labels"] = num_labels
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        model = _from_pretrained(_auto_class(kind, head), name, profile, **options)
    if model.config.pad_token_id is None:
        # without it transformers refuses to classify more than one text at a time
        model.config.pad_token_id = load_tokenizer(kind, profile).pad_token_id
    return model.eval()


def load_tokenizer(kind, profile="tiny"):
    """The tokenizer of a base. Padding is on the side that the base was made with."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, base_name(kind, profile), profile)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class _quiet:
    """Keeps transformers from reporting that a new head is new and that the old one is unused: both are meant."""

    def __enter__(self):
        from transformers.utils import logging

        self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_):
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
