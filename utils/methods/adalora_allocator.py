"""AdaLoRA's allocator: the part that follows the optimizer, prunes triplets, and holds A and B near orthonormal.

The equations are those of utils/methods/adalora.py. One allocator sees all layers of a model, because triplets compete
for one budget. An optimizer's step drives it, through a hook that torch has for every optimizer there is.
"""

import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from utils.methods.adalora import adalora_budget, adalora_mask, adalora_sensitivity, gram_distance, triplet_importance
from utils.methods.parts import Guest


class AdaLoRAAllocator(Guest):
    """The part that sees the whole model: it decides after each step which triplets live, and adds the regulariser.

    `after_step` is called for every optimizer that has stepped, and `allocate` follows once all of this adapter's E
    have been stepped, by one optimizer or by several. The gradients must still be there then; one that is None counts
    as zero. An optimizer that is no torch.optim.Optimizer needs a call of `allocate` after its step, and one that has
    another inside (Lookahead) would be counted twice.

    config: AdaLoRA   layers: {path: AdaLoRALinear}
    """

    mergeable = True

    def __init__(self, config, layers):
        super().__init__()
        self.config, self.layers = config, layers
        self.step = 0
        self.averages = {}  # (path, "lora_A") -> (I_bar, U_bar)
        self.stepped = set()  # ids of the E that an optimizer has stepped since the last allocation
        self.b0 = sum(layer.r for layer in layers.values())
        self.bT = config.target_r * len(layers)
        self.end = config.total_steps - config.tfinal

    @property
    def finished(self):
        """Whether the ranks are final."""
        return self.step >= self.end or bool(self.config.rank_pattern)

    # ---- following the optimizer

    def enter(self, model, path):
        super().enter(model, path)
        WATCHING.add(self)

    def leave(self, model, path):
        WATCHING.discard(self)
        super().leave(model, path)

    def __setstate__(self, state):  # a copy of the model, or one that was pickled
        super().__setstate__(state)
        self.stepped = set()
        WATCHING.add(self)

    def after_step(self, optimizer):
        """Allocate if this was the step of this adapter."""
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a GradScaler's step by themselves
        if not self.on or (overflow is not None and overflow.item()):
            return
        own = {id(layer.E): layer.E for layer in self.layers.values() if layer.E.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} & own.keys()
        if all(own[i].grad is None for i in held):
            return
        self.stepped |= held
        if self.stepped >= own.keys():
            self.stepped.clear()
            self.allocate()

    @torch.no_grad()
    def allocate(self):
        """What follows a step of the optimizer: average the sensitivities, and prune to the budget when it is time."""
        if self.config.rank_pattern:
            return
        self.step += 1
        c, t = self.config, self.step
        if t < self.end or not self.averages:
            self.update_averages()
        if t == self.end or (c.tinit < t < self.end and t % c.delta_t == 0):
            self.prune(adalora_budget(t, self.b0, self.bT, c.tinit, c.tfinal, c.total_steps))
        if t >= self.end:
            self.averages.clear()
            for layer in self.layers.values():  # Adam's momentum moves a pruned E away from zero again
                layer.prune(layer.kept)
                layer.finished = True

    def update_averages(self):
        for path, layer in self.layers.items():
            for key, p in layer.tensors().items():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                I_bar, U_bar = (t.to(p.device) for t in self.averages_of(path, key))
                self.averages[path, key] = adalora_sensitivity(
                    wide(p), wide(grad), I_bar, U_bar, self.config.beta1, self.config.beta2
                )

    def averages_of(self, path, key):
        """(I_bar, U_bar) of a tensor; zeros before the first step."""
        p = self.layers[path].tensors()[key]
        return self.averages.get((path, key)) or (torch.zeros_like(wide(p)), torch.zeros_like(wide(p)))

    def prune(self, budget):
        """Let the `budget` most important triplets of all layers live."""
        scores = []
        for path in self.layers:
            pairs = [self.averages_of(path, key) for key in ("lora_A", "lora_E", "lora_B")]
            scores.append(triplet_importance(*(I_bar * U_bar for I_bar, U_bar in pairs)))
        mask = adalora_mask(torch.cat([s.to(scores[0].device) for s in scores]), budget)
        layers = self.layers.values()
        for layer, keep in zip(layers, mask.split([layer.r for layer in layers]), strict=True):
            layer.prune(keep.to(layer.E.device))

    # ---- the regulariser

    def regulariser(self):
        """The mean of `orthogonality` over the layers, a number with a gradient."""
        alike = {}
        for layer in self.layers.values():
            for M in (layer.A, layer.B.mT):
                alike.setdefault((M.shape, M.device), []).append(wide(M))
        with torch.autocast(layer.A.device.type, enabled=False):  # the differences to 1 are small
            distances = [GramDistances.apply(*matrices) for matrices in alike.values()]
        return sum(d.to(distances[0]) for d in distances) / (2 * len(self.layers))

    def after(self, host, args, kwargs, output):
        """Add the regulariser to the loss, in training only: PEFT adds it in evaluation too."""
        weight = self.config.orth_weight
        if not host.training or weight == 0:
            return output
        if isinstance(output, tuple) and kwargs.get("labels") is not None:  # return_dict=False
            return (output[0] + weight * self.regulariser().to(output[0]), *output[1:])
        loss = getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor):
            output.loss = loss + weight * self.regulariser().to(loss)
        return output

    # ---- files and interrupted runs

    def tensors(self):
        return {}

    def merged_tensors(self):
        return {}

    def progress(self):
        state = {"step": torch.tensor(self.step)}
        for path, layer in self.layers.items():
            state[f"{path}.kept"] = torch.ones(layer.r, dtype=torch.bool) if layer.kept is None else layer.kept
            if not self.finished:
                for key in layer.tensors():
                    state[f"{path}.{key}.I_bar"], state[f"{path}.{key}.U_bar"] = self.averages_of(path, key)
        return state

    def resume(self, progress):
        self.step = int(progress["step"])
        self.averages = {}
        for path, layer in self.layers.items():
            layer.kept = progress[f"{path}.kept"].to(layer.E.device)
            layer.finished = self.finished
            for key in () if self.finished else layer.tensors():
                self.averages[path, key] = progress[f"{path}.{key}.I_bar"], progress[f"{path}.{key}.U_bar"]

    def training_state(self):
        return {} if self.finished else self.progress()

    def load(self, tensors, state, trainable):
        if state:
            step = int(state["step"])
            if not 0 <= step < self.end:
                raise ValueError(f"the file for further training is at step {step} of a schedule of {self.end}")
            self.resume(state)

    def facts(self):
        live = sum(layer.rank for layer in self.layers.values())
        if self.config.rank_pattern:
            return f"{live} triplets, their number final"
        return f"step {self.step} of {self.config.total_steps}: {live} of {self.b0} triplets live, {self.bT} in the end"


WATCHING = weakref.WeakSet()  # the allocators of all models that have one


def _after_step(optimizer, args, kwargs):
    for allocator in list(WATCHING):
        allocator.after_step(optimizer)


register_optimizer_step_post_hook(_after_step)  # torch calls it after the step of every optimizer there is


def regulariser(adapter):
    """The term to add to a loss of one's own: orth_weight times the mean of `orthogonality` over the layers.

    A model that computes its loss itself (because it got labels) has added it in training mode already.
    """
    return adapter.config.orth_weight * adapter.parts[""].regulariser()


class GramDistances(torch.autograd.Function):
    """The sum of `gram_distance` over many matrices of one shape, in a few large products; keeps nothing of their size.

    apply(M_1, ..., M_n) -> a number   M_i: (r, d), float32 or float64
    """

    @staticmethod
    def forward(ctx, *matrices):
        ctx.save_for_backward(*matrices)
        return gram_distance(torch.stack(matrices)).sum()

    @staticmethod
    def backward(ctx, grad):
        # d||R|| = R : dR / ||R|| with R = M M^T - I, so the gradient is 2 R M / ||R||; where R = 0 it is taken as 0
        M = torch.stack(ctx.saved_tensors)  # (n, r, d)
        R = M @ M.mT - torch.eye(M.shape[1], dtype=M.dtype, device=M.device)
        norm = torch.linalg.vector_norm(R, dim=(1, 2), keepdim=True)
        direction = torch.where(norm > 0, R / norm.clamp(min=torch.finfo(M.dtype).tiny), 0.0)
        return (2 * grad * direction @ M).unbind()


def wide(tensor):
    """The tensor in float32 or more: products of sensitivities leave the range of half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
