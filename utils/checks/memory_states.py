"""Chapter 01, the states of training: bytes per parameter."""

from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.memory import states
from utils.memory.states import RECIPES, Recipe


def states_cases(rng):
    trained, frozen = pick(rng, 700, 1100, 1300), pick(rng, 5000, 8000)
    own = Recipe(2, 3, 4, pick(rng, 10, 12), 1, 2, 0, "made up, so that no two numbers agree")
    drawn = [(trained, 0, RECIPES["bf16 + master"]), (trained, 0, RECIPES["autocast"]), (trained, 0, RECIPES["SGD"]),
             (trained, frozen, RECIPES["adapters in fp32"]), (trained, frozen, RECIPES["8-bit Adam"]),
             (trained, frozen, own)]  # fmt: skip
    return [
        Case({"trained": t, "frozen": f, "recipe": recipe}, ("frozen",) if f else (), {"moments": recipe.moments})
        for t, f, recipe in drawn
    ]


def with_terms(**rules):
    """A model_states in which some terms follow another rule of (trained, frozen, recipe)."""
    names = {"frozen_weights": "weights, frozen", "weights": "weights, trained", "master": "master copy"}

    def model_states(trained, frozen, recipe):
        other = {names.get(name, name): rule(trained, frozen, recipe) for name, rule in rules.items()}
        return states.model_states(trained, frozen, recipe) | other

    return model_states


def states_by_loop(trained, frozen, recipe):
    found = {"weights, frozen": frozen * recipe.frozen}
    for name, field in (("weights, trained", "weight"), ("master copy", "master"), ("gradients", "gradient"),
                        ("optimizer", "moments")):  # fmt: skip
        found[name] = getattr(recipe, field) * trained
    return found


def states_by_difference(trained, frozen, recipe):
    left = recipe.per_trained - recipe.weight - recipe.gradient - recipe.master
    return dict(
        optimizer=trained * left, gradients=trained * recipe.gradient,
        **{"master copy": trained * recipe.master, "weights, trained": trained * recipe.weight,
           "weights, frozen": frozen * recipe.frozen},
    )  # fmt: skip


def always_sixteen(trained, frozen, recipe):
    return states_by_loop(trained, frozen, RECIPES["bf16 + master"])


def always_float32(trained, frozen, recipe):
    return states_by_loop(trained, frozen, RECIPES["fp32"])


def all_is_trained(trained, frozen, recipe):
    return states_by_loop(trained + frozen, 0, recipe)


def master_in_optimizer(trained, frozen, recipe):
    terms = states_by_loop(trained, frozen, recipe)
    return terms | {"optimizer": terms["optimizer"] + terms.pop("master copy")}


def in_units(terms, unit):
    return {name: size / unit for name, size in terms.items()}


IN_OPTIMIZER = (
    'You counted the master copy under "optimizer", as the ZeRO paper does. Here it is a term of its own, "master '
    'copy".'
)
WHOLE = (
    "You made whole numbers of the bytes. Leave the fractions: 8-bit moments have one scale for 256 numbers, {moments} "
    "bytes each on average."
)

MODEL_STATES = Exercise(
    name="model_states",
    reference=states.model_states,
    cases=states_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("no_master", with_terms(master=lambda t, f, recipe: 0),
                "The master copy is missing: recipe.master bytes per trained number, beside the weight that the "
                "forward pass reads."),
        Mistake("master_in_weights", with_terms(
                weights=lambda t, f, recipe: t * (recipe.weight + recipe.master), master=lambda t, f, recipe: 0),
                'You counted the master copy among the trained weights. It is a term of its own, "master copy".'),
        Mistake("master_in_optimizer", with_terms(
                optimizer=lambda t, f, recipe: t * (recipe.moments + recipe.master), master=lambda t, f, recipe: 0),
                IN_OPTIMIZER),
        Mistake("no_term_for_the_master", master_in_optimizer, IN_OPTIMIZER),
        Mistake("master_twice", with_terms(optimizer=lambda t, f, recipe: t * (recipe.moments + recipe.master)),
                'You counted the master copy twice: under "master copy", and once more under "optimizer".'),
        Mistake("gradient_and_master_swapped", with_terms(
                gradients=lambda t, f, recipe: t * recipe.master, master=lambda t, f, recipe: t * recipe.gradient),
                "Gradients and master copy are swapped: recipe.gradient is what backward leaves on a weight, "
                "recipe.master the second copy of the weight."),
        Mistake("gigabytes", lambda *inputs: in_units(states_by_loop(*inputs), 1e9),
                "Those are GB. Return bytes; `units` turns them into GB and GiB."),
        Mistake("gibibytes", lambda *inputs: in_units(states_by_loop(*inputs), 2**30),
                "Those are GiB. Return bytes; `units` turns them into GB and GiB."),
        Mistake("whole", lambda *inputs: {k: int(v) for k, v in states_by_loop(*inputs).items()}, WHOLE),
        Mistake("rounded", lambda *inputs: {k: round(v) for k, v in states_by_loop(*inputs).items()}, WHOLE),
        Mistake("master_of_frozen", with_terms(master=lambda t, f, recipe: (t + f) * recipe.master),
                "Your frozen weights have a master copy. A copy is there to be updated: trained numbers alone have "
                "one."),
        Mistake("gradients_of_frozen", with_terms(gradients=lambda t, f, recipe: (t + f) * recipe.gradient),
                "Your frozen weights have gradients. Freezing saves exactly these."),
        Mistake("moments_of_frozen", with_terms(optimizer=lambda t, f, recipe: (t + f) * recipe.moments),
                "Your frozen weights have moments. An optimizer keeps them for trained numbers alone."),
        Mistake("all_is_trained", all_is_trained,
                "You charged frozen numbers like trained ones. They cost recipe.frozen bytes each and nothing more."),
        Mistake("frozen_like_trained", with_terms(frozen_weights=lambda t, f, recipe: f * recipe.weight),
                "A frozen number takes recipe.frozen bytes; you took recipe.weight, which is for trained ones."),
        Mistake("frozen_free", with_terms(frozen_weights=lambda t, f, recipe: 0),
                "Your frozen weights are free. They are not updated, and the forward pass still needs every one of "
                "them."),
        Mistake("moments_twice", with_terms(optimizer=lambda t, f, recipe: 2 * t * recipe.moments),
                "Your moments are counted twice: recipe.moments, here {moments}, is for both of Adam's already."),
        Mistake("one_moment", with_terms(optimizer=lambda t, f, recipe: t * recipe.moments / 2),
                "You counted one of Adam's two moments. recipe.moments is for both: do not halve it."),
        Mistake("weight_of_activations", with_terms(weights=lambda t, f, recipe: t * recipe.e),
                "recipe.e is for activations. Under autocast products are taken in 2 bytes, and the weights stay in 4: "
                "take recipe.weight."),
        Mistake("always_sixteen", always_sixteen,
                "You took 2 + 2 + 4 + 8 = 16 bytes whatever the recipe. That is one recipe among several: read the "
                "numbers from it."),
        Mistake("always_float32", always_float32,
                "You took 4 + 4 + 8 = 16 bytes whatever the recipe. That is float32 training; read the numbers from "
                "the recipe."),
        Mistake("total", lambda trained, frozen, recipe: trained * recipe.per_trained + frozen * recipe.frozen, None,
                "a float, and a dict is expected"),
        Mistake("per_number", lambda trained, frozen, recipe: states_by_loop(1, 1, recipe), None, "weights, frozen: "),
        Mistake("halved", with_terms(gradients=lambda t, f, recipe: t * recipe.gradient / 2), None,
                "gradients: Your answer is 1/2 of the expected one"),
    ),
    alternatives=(states_by_loop, states_by_difference,
                  with_terms(optimizer=lambda t, f, recipe: 1.0 * t * recipe.moments)),  # fmt: skip
    kinds={"frozen": "Right when everything is trained, wrong when a part is frozen. What does a frozen number cost?"},
    fact="Bytes per trained number: "
    + "; ".join(
        f"{name} {RECIPES[name].per_trained:g}"
        for name in ("fp32", "bf16 + master", "bf16 + master, fp32 gradients", "bf16, fp32 moments", "pure bf16", "SGD")
    )
    + ".",
)

EXERCISES = (MODEL_STATES,)
