"""Makes everything under data/models and data/tasks again: `python -m data.make` from the repository's root.

words, messages, world   the invented world and its documents (standard library only, seeded)
tasks                    the task files
tokenizer                one byte-level BPE, saved once for the decoder and once for the encoder
decoder, encoder         the two pretrainings
probes                   what the finished decoder must be able to do
"""
