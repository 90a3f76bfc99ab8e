"""Chapter 01, what checkpoints leave, and what the loss needs."""

from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory import activations

# ------------------------------------------------------------------------------------------------- checkpoint_kept


def checkpoint_cases(rng):
    block, boundary = pick(rng, 1000, 1300), pick(rng, 30, 70)
    drawn = [
        ((pick(rng, 12, 24), block, boundary), ()),
        ((12, block, boundary, 4), ()),
        ((32, block, boundary, pick(rng, 5, 6, 7)), ("remainder",)),
        ((10, boundary, block, 3), ("remainder",)),
        ((11, block, boundary, 3), ("remainder",)),
        ((pick(rng, 6, 8), block, boundary, pick(rng, 10, 50)), ("beyond",)),
    ]
    names = ("layers", "block", "boundary", "every")
    return [
        Case(dict(zip(names, values, strict=False)), kinds, {"layers": values[0], "every": (*values, 1)[3]},
             later="beyond" in kinds)
        for values, kinds in drawn
    ]


def checkpointed(segments=lambda layers, every: -(-layers // every), open_blocks=min, plus=0):
    """A checkpoint_kept with another count of segments, or of blocks whose activations are there together."""

    def checkpoint_kept(layers, block, boundary, every=1):
        return segments(layers, every) * boundary + open_blocks(every, layers) * block + plus * boundary

    return checkpoint_kept


def round_nearest(layers, every):
    return round(layers / every)


def checkpoints_by_walk(layers, block, boundary, every=1):
    most, starts = 0, list(range(0, layers, every))
    for start in starts:
        most = max(most, len(starts) * boundary + (min(start + every, layers) - start) * block)
    return most


CHECKPOINT_KEPT = Exercise(
    name="checkpoint_kept",
    reference=activations.checkpoint_kept,
    cases=checkpoint_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("every_boundary", checkpointed(segments=lambda layers, every: layers),
                "You kept a boundary for each of the {layers} blocks. Between checkpoints nothing is kept: one for "
                "each segment."),
        Mistake("floor", checkpointed(segments=lambda layers, every: max(1, layers // every)),
                "You rounded the number of segments down. The last, shorter segment has a boundary too: round up."),
        Mistake("floor_to_zero", checkpointed(segments=lambda layers, every: layers // every),
                "You rounded the number of segments down. The last, shorter segment has a boundary too: round up."),
        Mistake("nearest", checkpointed(segments=round_nearest),
                "round() takes the nearest whole number, up or down. The last, shorter segment has a boundary too, "
                "however short: round up always."),
        Mistake("nearest_not_zero", checkpointed(segments=lambda layers, every: max(1, round_nearest(layers, every))),
                "round() takes the nearest whole number, up or down. The last, shorter segment has a boundary too, "
                "however short: round up always."),
        Mistake("fraction", checkpointed(segments=lambda layers, every: layers / every),
                "Your number of segments is a fraction. The last, shorter segment has a whole boundary: round up."),
        Mistake("one_too_many", checkpointed(segments=lambda layers, every: layers // every + 1),
                "layers // every + 1 is one segment too many when every divides layers. Round up instead."),
        Mistake("one_block", checkpointed(open_blocks=lambda every, layers: 1),
                "You opened one block at a time. The backward pass of a segment needs all of its blocks computed again "
                "first: `every` of them."),
        Mistake("all_blocks", checkpointed(open_blocks=lambda every, layers: layers),
                "You kept the activations of all blocks. Then nothing is saved: only those of one segment are there "
                "together."),
        Mistake("no_blocks", checkpointed(open_blocks=lambda every, layers: 0),
                "Those are the boundaries alone. While a segment's backward pass runs, its blocks' activations are "
                "there as well."),
        Mistake("no_boundaries", checkpointed(segments=lambda layers, every: 0),
                "The boundaries are missing: the input of each segment is kept, to compute it again from there."),
        Mistake("one_boundary", checkpointed(segments=lambda layers, every: 1),
                "You kept one boundary. All segments' inputs are kept until their backward pass comes."),
        Mistake("output_too", checkpointed(plus=1),
                "You kept one boundary more, after the last block. That is the input of no segment."),
        Mistake("one_short", checkpointed(plus=-1),
                "You are one boundary short. The first segment is computed again too: its input, the output of the "
                "embedding, is kept like the others."),
        Mistake("every_boundaries", checkpointed(segments=lambda layers, every: every),
                "You kept `every` boundaries. `every` is how many blocks a segment has; there is one boundary for each "
                "segment, and layers / every of those, rounded up."),
        Mistake("last_segment", checkpointed(open_blocks=lambda every, layers: layers % every or every),
                "You opened the last segment, which may be shorter. Asked for is the most: a full segment."),
        Mistake("every_is_segments", checkpointed(segments=lambda layers, every: every,
                                                  open_blocks=lambda every, layers: -(-layers // every)),
                "You kept `every` boundaries, and as many blocks as there are segments. It is the other way round: "
                "`every` is how many blocks a segment has."),
        Mistake("no_limit", checkpointed(open_blocks=lambda every, layers: every),
                "With every = {every} and {layers} layers a segment has {layers} blocks, not {every}."),
        Mistake("doubled", lambda *inputs: 2 * checkpoints_by_walk(*inputs), None, "exactly 2 times"),
    ),
    alternatives=(
        checkpoints_by_walk,
        checkpointed(segments=lambda layers, every: (layers + every - 1) // every),
        checkpointed(segments=lambda layers, every: layers // every + (layers % every > 0)),
    ),
    kinds={
        "remainder": "Right when every divides layers and wrong when it does not: the last segment is shorter then.",
        "beyond": "Wrong when a segment is longer than the model: it then has as many blocks as the model.",
    },
    fact="The minimum is near every = sqrt(layers boundary / block): for the 32 blocks of Llama-2-7B in half precision "
    f"{(32 * 2 * 4096 / activations.block_kept(1, 4096, 11008, 32, 32, 128)) ** 0.5:.1f}. A checkpoint after every "
    "block is as good as it gets.",
)

# ------------------------------------------------------------------------------------------------- loss_peak


def loss_cases(rng):
    drawn = [(pick(rng, 512, 1024), 32000), (2048, 128256), (pick(rng, 100, 300), 50257), (1, pick(rng, 7, 97))]
    return [Case({"n": n, "vocab": vocab}, numbers={"n": n, "vocab": vocab}) for n, vocab in drawn]


def loss_by_tensors(n, vocab):
    gradient_of_log_probabilities = gradient_of_logits = 4 * n * vocab
    return gradient_of_log_probabilities + gradient_of_logits


LOSS_PEAK = Exercise(
    name="loss_peak",
    reference=activations.loss_peak,
    cases=loss_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("four", lambda n, vocab: 4 * n * vocab,
                "Half of it is missing. Two tensors are made, and both are in float32 even if the model is not: the "
                "gradient of log-softmax's output, and that of the logits."),
        Mistake("two", lambda n, vocab: 2 * n * vocab,
                "You counted 2 bytes per logit: one tensor in half precision. Two are made, and both in float32."),
        Mistake("one_in_half", lambda n, vocab: 6 * n * vocab,
                "You took one of the two tensors in half precision. The loss is computed in float32, so both gradients "
                "are."),
        Mistake("kept_too", lambda n, vocab: 12 * n * vocab,
                "You counted log-softmax's output as well. It is kept by the forward pass and counted there; asked for "
                "is what comes on top."),
        Mistake("logits_too", lambda n, vocab: 16 * n * vocab,
                "You counted log-softmax's input and output as well. Asked for is what the backward pass makes on top: "
                "two gradients."),
        Mistake("numbers", lambda n, vocab: n * vocab,
                "You counted logits, not bytes: each of them needs 4 bytes in each of two tensors."),
        Mistake("per_token", lambda n, vocab: 8 * n,
                "vocab is missing. Every token has a logit, and a gradient, for each of the {vocab} words."),
        Mistake("one_token", lambda n, vocab: 8 * vocab,
                "You counted one token. In training every position predicts its next token: n of them."),
        Mistake("sum", lambda n, vocab: 8 * (n + vocab), "You added n and vocab. The logits are a matrix, n by vocab."),
        Mistake("with_labels", lambda n, vocab: 8 * n * vocab + 8 * n,
                "You counted the labels, 8 bytes per token, as well. They were kept already."),
        Mistake("squared", lambda n, vocab: 8 * n**2 * vocab, None, "the expected one, and n is"),
        Mistake("gibibytes", lambda n, vocab: 8 * n * vocab / 2**30,
                "That is GiB. Return bytes; `units` turns them into GiB."),
    ),
    alternatives=(loss_by_tensors, lambda n, vocab: 2 * n * vocab * 4, lambda n, vocab: sum([n * vocab] * 2) * 4.0),
    fact=f"8,192 tokens of Llama-3 need {activations.loss_peak(8192, 128256) / 2**30:.1f} GiB here, beside the "
    f"{4 * 8192 * 128256 / 2**30:.1f} GiB that were kept. Its vocabulary is four times Llama-2's, and so is this.",
)

EXERCISES = (CHECKPOINT_KEPT, LOSS_PEAK)
