"""The simulator of paged memory: pages, faults and evictions by hand, and what paging is good for in a training."""

import pytest
import torch

from utils.paging import PAGE, PagedMemorySimulator, Step, moment_tensors, simulate_training

GB = 10**9


def counters(memory):
    return memory.faults, memory.bytes_in, memory.bytes_out


# ---- pages


def test_pages_come_when_they_are_touched():
    """25 bytes in pages of 10 are pages of 10, 10 and 5."""
    memory = PagedMemorySimulator(100, page=10)
    memory.allocate("m", 25, paged=True)
    assert memory.pages == {"m": [10, 10, 5]} and memory.used == memory.on_gpu("m") == 0
    assert memory.touch("m") == 3
    assert counters(memory) == (3, 25, 0) and memory.used == memory.on_gpu("m") == memory.peak == 25
    assert memory.touch("m") == 0 and counters(memory) == (3, 25, 0)


def test_the_least_recently_touched_pages_make_room():
    """40 bytes: a and b fill them with 20 each; a is touched again, so that 15 more drive out b's two pages of 10."""
    memory = PagedMemorySimulator(40, page=10)
    for name in "ab":
        memory.allocate(name, 20, paged=True)
        memory.touch(name)
    memory.touch("a")
    memory.allocate("activations", 15)
    assert (memory.on_gpu("a"), memory.on_gpu("b"), memory.used) == (20, 0, 35)
    assert counters(memory) == (4, 40, 20) and memory.peak == 40
    # b's first page goes to where 5 are free: a's first page leaves. Its second drives out a's second.
    assert memory.touch("b") == 2
    assert (memory.on_gpu("a"), memory.on_gpu("b")) == (0, 20) and counters(memory) == (6, 60, 40)
    memory.free("activations")
    assert memory.touch("a") == 2 and memory.used == 40 and memory.bytes_out == 40


def test_only_the_pages_that_are_needed_leave():
    memory = PagedMemorySimulator(40, page=10)
    memory.allocate("m", 40, paged=True)
    memory.touch("m")
    memory.allocate("activations", 11)
    assert memory.on_gpu("m") == 20 and memory.used == 31  # whole pages: 20 bytes left for 11
    assert memory.touch("m") == 4  # the first two come, and drive out the last two before their turn
    assert memory.on_gpu("m") == 20


def test_resident_memory_that_does_not_fit():
    memory = PagedMemorySimulator(40, page=10)
    memory.allocate("m", 40, paged=True)
    memory.touch("m")
    memory.allocate("weights", 30)
    with pytest.raises(torch.OutOfMemoryError, match="activations needs 11 bytes, and 30 of the GPU's 40 cannot be"):
        memory.allocate("activations", 11)
    assert memory.resident == {"weights": 30} and memory.on_gpu("m") == 10 and counters(memory) == (4, 40, 30)
    memory.allocate("activations", 10)
    with pytest.raises(torch.OutOfMemoryError, match="m needs 10 bytes"):  # not one page of it
        memory.touch("m")


def test_memory_comes_back():
    memory = PagedMemorySimulator(40, page=10)
    memory.allocate("m", 25, paged=True)
    memory.touch("m")
    memory.allocate("weights", 15)
    assert memory.touch("weights") == 0
    memory.free("m")
    memory.free("weights")
    assert memory.used == 0 and not memory.pages and not memory.resident
    memory.allocate("m", 40)
    assert memory.used == 40 and memory.bytes_out == 0


def test_bad_requests():
    memory = PagedMemorySimulator(40)
    assert memory.page == PAGE == 2 * 1024 * 1024
    memory.allocate("m", 1)
    for paged in (False, True):
        with pytest.raises(ValueError, match="There is a tensor named 'm' already"):
            memory.allocate("m", 1, paged)
    for verb in (memory.touch, memory.free):
        with pytest.raises(ValueError, match="There is no tensor named 'v'"):
            verb("v")
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="size is .*; it must be a whole number from 1 up"):
            memory.allocate("v", size)
    for settings, name in (((0,), "gpu_bytes"), ((40, 0), "page")):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            PagedMemorySimulator(*settings)


# ---- a training

MOMENTS = {"m": (20, True), "v": (20, True)}


def test_a_spike_moves_pages_once():
    """100 bytes, 40 of weights, 40 of moments. Activations of 20 fit. 45 do not: 25 are missing, three pages of 10,
    which go and come back. The step after moves nothing."""
    steps = simulate_training(100, 40, MOMENTS, [20, 45, 20], page=10)
    assert steps == [Step(100), Step(40 + 10 + 45, faults=3, bytes_in=30, bytes_out=30), Step(100)]
    assert [step.moved for step in steps] == [0, 60, 0]


def test_without_paging_the_spike_ends_the_run():
    steps = simulate_training(100, 40, MOMENTS, [20, 45, 20], paged=False, page=10)
    assert steps == [Step(100), Step(125, fits=False)]


def test_not_steady_state():
    """The same 45 bytes in every step: every step moves 60."""
    assert [step.moved for step in simulate_training(100, 40, MOMENTS, [45] * 5, page=10)] == [60] * 5


def test_moments_that_never_fit_move_as_a_whole():
    """40 bytes of moments where there are 30: the page that is needed next is always the one that has just left."""
    steps = simulate_training(70, 40, MOMENTS, [10, 10], page=10)
    assert [(step.faults, step.bytes_in) for step in steps] == [(4, 40), (4, 40)]
    assert [step.bytes_out for step in steps] == [40, 40]
    assert all(step.peak == 70 for step in steps)


def test_paging_does_not_help_weights_and_activations():
    assert simulate_training(100, 40, MOMENTS, [61], page=10) == [Step(101, fits=False)]
    with pytest.raises(torch.OutOfMemoryError, match="weights and gradients needs 101"):
        simulate_training(100, 101, MOMENTS, [1], page=10)
    with pytest.raises(torch.OutOfMemoryError, match="v needs 20 bytes"):
        simulate_training(75, 40, MOMENTS, [1], paged=False, page=10)


def test_the_example_of_the_docstring():
    """24 GB, 20 of weights, 2 of moments; 1 GB is missing for the long batch: 477 pages of 2 MiB."""
    moments = moment_tensors({f"layer {i}": 25 * 10**6 for i in range(10)})
    assert sum(size for size, _ in moments.values()) == 2 * GB
    short, long = GB, 3 * GB
    plain = simulate_training(24 * GB, 20 * GB, moments, [short, long, short], paged=False)
    assert [step.fits for step in plain] == [True, False] and plain[1].peak == 25 * GB
    paged = simulate_training(24 * GB, 20 * GB, moments, [short, long, short])
    assert [step.moved for step in paged][::2] == [0, 0]
    assert paged[1].bytes_in == paged[1].bytes_out == pytest.approx(GB, rel=0.002)
    assert all(step.peak <= 24 * GB for step in paged)
    always = simulate_training(24 * GB, 20 * GB, moments, [long] * 3)
    assert [step.moved for step in always] == [pytest.approx(2 * GB, rel=0.002)] * 3


# ---- which moments are paged


def test_moments_by_hand():
    assert moment_tensors({"A": 100_000, "bias": 99_999}) == {
        "A.m": (400_000, True), "A.v": (400_000, True), "bias.m": (399_996, False), "bias.v": (399_996, False),
    }  # fmt: skip
    assert moment_tensors({"A": 100_000, "norm": 4095}, bits=8) == {
        "A.m": (100_000, True), "A.m_absmax": (4 * 391, False), "A.v": (100_000, True), "A.v_absmax": (4 * 391, False),
        "norm.m": (4 * 4095, False), "norm.v": (4 * 4095, False),
    }  # fmt: skip
    with pytest.raises(ValueError, match="bits is 16; moments have 32 or 8 bits"):
        moment_tensors({"A": 1}, bits=16)
    with pytest.raises(ValueError, match="the count of A is 0"):
        moment_tensors({"A": 0})


def test_little_of_a_small_lora_is_paged():
    """Llama-2-7B: at rank 16, A and B of an attention weight have 16 * 4096 = 65,536 numbers, too few to be paged. At
    QLoRA's rank 64 they are 262,144."""
    for rank, paged in ((16, False), (64, True)):
        assert {may for _, may in moment_tensors({"q_proj.A": rank * 4096}).values()} == {paged}


@pytest.mark.parametrize("bits", [32, 8])
def test_bitsandbytes_keeps_so_many_bytes(bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    numbers = {"A": 5000, "norm": 300, "odd": 4097}
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in numbers.values()]
    optimizer = {32: bitsandbytes.optim.AdamW32bit, 8: bitsandbytes.optim.AdamW8bit}[bits](parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [t.nbytes for s in optimizer.state.values() for k, t in s.items() if k.startswith(("state", "absmax"))]
    assert sum(kept) == sum(size for size, _ in moment_tensors(numbers, bits).values())
