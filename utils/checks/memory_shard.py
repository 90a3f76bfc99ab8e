"""Chapter 01, the KV cache, and states spread over devices."""

from dataclasses import replace

from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory import states
from utils.memory.states import RECIPES

# ------------------------------------------------------------------------------------------------- kv_cache


def cache_cases(rng):
    drawn = [
        (32, 32, 128, 1, 4096, 2),
        (pick(rng, 12, 24), 2, 64, pick(rng, 3, 5), pick(rng, 100, 300), 4),
        (pick(rng, 28, 40), 8, pick(rng, 80, 96), 16, pick(rng, 1000, 3000), 1),
        (80, 8, 128, pick(rng, 3, 7), 2048),
    ]
    names = ("layers", "kv_heads", "head_dim", "batch", "length", "e")
    cases = [dict(zip(names, values, strict=False)) for values in drawn]
    return [Case(inputs, numbers={k: v for k, v in inputs.items() if k != "e"}) for inputs in cases]


def caching(rule):
    """A kv_cache with another formula."""
    return lambda layers, kv_heads, head_dim, batch, length, e=2: rule(layers, kv_heads, head_dim, batch, length, e)


def cache_by_loop(layers, kv_heads, head_dim, batch, length, e=2):
    total = 0
    for _ in range(layers):
        for _ in ("keys", "values"):
            total += batch * kv_heads * length * head_dim * e
    return total


KV_CACHE = Exercise(
    name="kv_cache",
    reference=states.kv_cache,
    cases=cache_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("one_of_two", caching(lambda L, h, c, b, n, e: L * h * c * b * n * e),
                "You counted keys or values, and not both. A query is compared with all keys and then mixes all "
                "values."),
        Mistake("queries_too", caching(lambda L, h, c, b, n, e: 3 * L * h * c * b * n * e),
                "You counted three tensors per layer. The query of an earlier token is never read again: keys and "
                "values alone are kept."),
        Mistake("one_layer", caching(lambda L, h, c, b, n, e: 2 * h * c * b * n * e),
                "You counted one layer. Each of the {layers} has keys and values of its own."),
        Mistake("one_row", caching(lambda L, h, c, b, n, e: 2 * L * h * c * n * e),
                "batch is missing: each of the rows has read a text of its own."),
        Mistake("one_head", caching(lambda L, h, c, b, n, e: 2 * L * c * b * n * e),
                "You counted one head. There are {kv_heads} for the keys, and as many for the values."),
        Mistake("always_32_heads", caching(lambda L, h, c, b, n, e: 2 * L * 32 * c * b * n * e),
                "You took 32 heads whatever the model. With grouped queries there are fewer: the argument kv_heads."),
        Mistake("no_width", caching(lambda L, h, c, b, n, e: 2 * L * h * b * n * e),
                "head_dim is missing: a key is a vector of {head_dim} numbers."),
        Mistake("last_token", caching(lambda L, h, c, b, n, e: 2 * L * h * c * b * e),
                "You counted the last token alone. The cache holds all tokens so far, {length} in each row."),
        Mistake("squared", caching(lambda L, h, c, b, n, e: 2 * L * h * c * b * n * n * e),
                "The cache grows with the length, not with its square: it holds keys and values, no attention scores."),
        Mistake("numbers", caching(lambda L, h, c, b, n, e: 2 * L * h * c * b * n),
                "You counted numbers. Each takes e bytes."),
        Mistake("always_half", caching(lambda L, h, c, b, n, e: 4 * L * h * c * b * n),
                "You took 2 bytes per number whatever e says."),
        Mistake("always_float32", caching(lambda L, h, c, b, n, e: 8 * L * h * c * b * n),
                "You took 4 bytes per number whatever e says. In half precision it is 2."),
        Mistake("gibibytes", caching(lambda L, h, c, b, n, e: 2 * L * h * c * b * n * e / 2**30),
                "That is GiB. Return bytes; `units` turns them into GiB."),
        Mistake("bits", caching(lambda L, h, c, b, n, e: 16 * L * h * c * b * n * e), None, "exactly 8 times"),
        Mistake("a_string", caching(lambda L, h, c, b, n, e: f"{2 * L * h * c * b * n * e} bytes"), None,
                "a str, and a number is expected"),
    ),
    alternatives=(
        cache_by_loop,
        caching(lambda L, h, c, b, n, e: (b * n * L) * (h * c * e) * 2),
        caching(lambda L, h, c, b, n, e: sum(e * b * n * h * c for _ in range(2 * L))),
    ),
    fact="Llama-2-70B has 8 heads for keys and values, and caches "
    f"{states.kv_cache(80, 8, 128, 1, 1) / 1024:.0f} KiB per token; with all 64 heads it would be "
    f"{states.kv_cache(80, 64, 128, 1, 1) / 1024:,.0f}.",
)

# ------------------------------------------------------------------------------------------------- shard


def shard_cases(rng):
    trained, frozen = pick(rng, 700, 1100, 1300), pick(rng, 5000, 8000)
    recipe = replace(RECIPES["bf16 + master"], gradient=3)
    full = states.model_states(trained, 0, recipe) | {"activations": 12345}
    part = states.model_states(trained, frozen, recipe) | {"weights, 4 bits": pick(rng, 2222, 3333)}
    drawn = [(full, 7, 0), (full, pick(rng, 3, 6), 1), (part, 4, 1), (full, 3, 2), (part, pick(rng, 5, 8), 2),
             (part, 8, 3), (full, pick(rng, 9, 11), 3)]  # fmt: skip
    cases = [
        Case({"terms": terms, "devices": devices, "stage": stage}, (f"stage {stage}",),
             {"devices": devices, "stage": stage})
        for terms, devices, stage in drawn
    ]
    unknown = (pick(rng, 4, 5), -1)
    return cases + [Case({"terms": part, "devices": 2, "stage": s}, ("unknown",), later=True) for s in unknown]


def sharding(stages, divide=lambda b, devices: b / devices, known=True):
    """A shard with other terms spread in its stages, or divided otherwise."""

    def shard(terms, devices, stage):
        if known and stage not in range(4):
            raise ValueError(stage)
        return {name: divide(b, devices) if name in stages.get(stage, ()) else b for name, b in terms.items()}

    return shard


def gradients_stay_whole(terms, devices, stage):
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"no stage {stage}")
    shards = {}
    for name, size in terms.items():
        spread = stage >= 1 and name in ("optimizer", "master copy")
        spread = spread or stage == 3 and (name == "gradients" or name.startswith("weights"))
        shards[name] = size / devices if spread else size
    return shards


def shard_by_level(terms, devices, stage):
    if not 0 <= stage <= 3:
        raise ValueError("stages go from 0 to 3")
    level = {"optimizer": 1, "master copy": 1, "gradients": 2}
    return {
        name: size / devices if stage >= level.get(name, 3 if name.startswith("weights") else 4) else size
        for name, size in terms.items()
    }


def shard_by_steps(terms, devices, stage):
    if stage not in {0, 1, 2, 3}:
        raise ValueError(stage)
    shards = dict(terms)
    spread = [("optimizer", "master copy"), ("gradients",), [name for name in terms if name.startswith("weights")]]
    for names in spread[:stage]:
        shards |= {name: terms[name] / devices for name in names}
    return shards


def shard_in_place(terms, devices, stage):
    terms |= states.shard(terms, devices, stage)
    return terms


def everything_in_stage_3(terms, devices, stage):
    whole = {name: b / devices for name, b in terms.items()}
    return whole if stage == 3 else states.shard(terms, devices, stage)


ONE, TWO, THREE = (states.STAGES[stage] for stage in (1, 2, 3))

SHARD = Exercise(
    name="shard",
    reference=states.shard,
    cases=shard_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("gradients_whole", gradients_stay_whole,
                "The bug is still there: one stage is wrong. Print what the function returns for all four stages, and "
                "follow one term at a time."),
        Mistake("weights_in_stage_2", sharding({1: ONE, 2: THREE, 3: THREE}),
                "Under stage 2 you spread the weights as well. They are whole on every device until stage 3."),
        Mistake("weights_never", sharding({1: ONE, 2: TWO, 3: TWO}),
                "Under stage 3 your weights stay whole. Stage 3 spreads them too, and gathers them when a block needs "
                "them."),
        Mistake("frozen_whole", sharding({1: ONE, 2: TWO, 3: (*TWO, "weights, trained")}),
                "Under stage 3 your frozen weights stay whole. It spreads all weights, frozen and 4-bit ones "
                "included."),
        Mistake("four_bits_whole", sharding({1: ONE, 2: TWO, 3: (*TWO, "weights, trained", "weights, frozen")}),
                "Under stage 3 your 4-bit weights stay whole. They are weights like the others."),
        Mistake("master_whole", sharding({1: ("optimizer",), 2: ("optimizer", "gradients"),
                                          3: [n for n in THREE if n != "master copy"]}),
                "Your master copy is never spread. It is read and written by the optimizer alone: it goes where the "
                "moments go, from stage 1 on."),
        Mistake("one_early", sharding({0: ONE, 1: TWO, 2: THREE, 3: THREE}),
                "Your stages come one too early. Stage 0 spreads nothing, stage 1 the optimizer's moments and the "
                "master copy."),
        Mistake("one_late", sharding({2: ONE, 3: TWO}),
                "Your stages come one too late. Stage 1 spreads the optimizer's moments and the master copy already."),
        Mistake("each_alone", sharding({1: ONE, 2: ("gradients",), 3: [n for n in THREE if n.startswith("weights")]}),
                "Each of your stages forgets the ones before. Stages add up: stage 3 spreads gradients and moments "
                "too."),
        Mistake("everything_always", sharding(dict.fromkeys(range(4), (*THREE, "activations"))),
                "You divided every term, whatever the stage. What is divided depends on it; under stage 0 nothing is."),
        Mistake("everything_in_stage_3", everything_in_stage_3,
                "Under stage 3 you divided the activations too. Every device runs a batch of its own through the whole "
                "model: sharding spreads weights, gradients and what the optimizer holds."),
        Mistake("multiplied", sharding(states.STAGES, divide=lambda b, devices: b * devices),
                "You multiplied by the number of devices. The answer is for one device, which holds a share."),
        Mistake("all_but_one", sharding(states.STAGES, divide=lambda b, devices: b / (devices - 1)),
                "You divided by devices - 1. Each device holds a share, none of them stands by."),
        Mistake("by_stage", lambda terms, devices, stage: shard_by_level(terms, max(stage, 1), stage),
                "You divided by the stage. Shares are made by the number of devices, here {devices}."),
        Mistake("unknown_accepted", sharding(states.STAGES, known=False),
                "There is no such stage, and yours went through as if it spread nothing. Raise ValueError."),
        Mistake("four_like_three", lambda terms, devices, stage: states.shard(terms, devices, min(stage, 3)),
                "There is no such stage, and yours went through as stage 3. Raise ValueError."),
        Mistake("negative_accepted", lambda terms, devices, stage: states.shard(terms, devices, max(stage, 0)),
                "There is no stage -1, and yours went through as if it spread nothing. Raise ValueError there too."),
        Mistake("negative_index", lambda terms, devices, stage: states.shard(
                terms, devices, 3 if stage == -1 else stage),
                "There is no stage -1, and yours went through as stage 3: in a list -1 is the last place. Raise "
                "ValueError."),
        Mistake("in_place", shard_in_place, None, "Your function changed terms"),
        Mistake("key_error", lambda terms, devices, stage: {
                name: b / devices if name in states.STAGES[stage] else b for name, b in terms.items()}, None,
                "ValueError is expected, and yours raised KeyError"),
        Mistake("total", lambda terms, devices, stage: sum(states.shard(terms, devices, stage).values()), None,
                "a float, and a dict is expected"),
    ),
    alternatives=(shard_by_level, shard_by_steps, sharding(states.STAGES)),
    kinds={f"stage {stage}": f"Wrong under stage {stage} only. Which terms does it spread?" for stage in range(4)},
    fact="ZeRO's own example, 7.5 billion numbers at 16 bytes on 64 devices: "
    + ", ".join(
        f"{sum(states.shard(states.model_states(7.5e9, 0, RECIPES['bf16 + master']), 64, s).values()) / 1e9:.1f} GB"
        for s in range(4)
    )
    + " per device in stages 0 to 3.",
)

EXERCISES = (KV_CACHE, SHARD)
