"""One byte-level BPE of 2048 tokens, saved in the Hugging Face format for the decoder and for the encoder."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import words, world

VOCAB_SIZE = 2048
SPECIAL = ["<pad>", "<bos>", "<eos>", "[CLS]", "[SEP]", "[MASK]"]


def training_text():
    """Two shards, plus sailor words: they become tokens here but are in no pretraining document."""
    yield from world.documents(0)
    yield from world.documents(world.EARLY_SHARDS)
    rng = random.Random(0)
    for _ in range(400):
        yield " ".join(["the", *rng.sample(words.SAILOR_WORDS, len(words.SAILOR_WORDS))])


def make_bpe():
    """Digits are single tokens, so that an order number is copied digit by digit."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(training_text(), trainer)
    return bpe


def decoder_tokenizer(bpe):
    """Text becomes `<bos> text`; the end of a document is <eos>, which whoever makes labels adds."""
    bpe = Tokenizer.from_str(bpe.to_str())
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False,
    )


def encoder_tokenizer(bpe):
    """Text becomes `[CLS] text [SEP]`."""
    bpe = Tokenizer.from_str(bpe.to_str())
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", pad_token="<pad>",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )
