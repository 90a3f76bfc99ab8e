"""The instruments, on work whose bytes and operations can be counted by hand."""

import time

import torch
import torch.nn.functional as F
from torch import nn

from utils.measure import cpu_seconds, flops, peak_new_tensor, saved_by_shape, saved_bytes

N, IN, OUT, R = 8, 16, 32, 2


def layer():
    return nn.Linear(IN, OUT, bias=False).requires_grad_(False)


def test_a_frozen_layer_keeps_only_its_weight():
    linear, x = layer(), torch.randn(N, IN, requires_grad=True)
    assert saved_bytes(lambda: linear(x), exclude=[linear]) == 0
    assert saved_bytes(lambda: linear(x)) == 4 * IN * OUT


def test_a_trained_layer_keeps_its_input():
    linear = nn.Linear(IN, OUT, bias=False)
    x = torch.randn(N, IN)
    assert saved_by_shape(lambda: linear(x), exclude=[linear]) == {((N, IN), torch.float32): 4 * N * IN}
    assert saved_bytes(lambda: linear(x), exclude=[linear, x]) == 0
    assert saved_bytes(lambda: linear(x.bfloat16().float()), exclude=[linear]) == 4 * N * IN


def test_a_storage_counts_once_and_whole():
    a, b = (torch.randn(N, N, requires_grad=True) for _ in range(2))
    x = torch.randn(N, N)
    assert saved_bytes(lambda: x @ a + x @ b + x.T @ a, exclude=[a, b]) == 4 * N * N
    assert saved_bytes(lambda: x[:1, :1] * a[:1, :1], exclude=[a]) == 4 * N * N


def test_freed_graphs_do_not_hide_bytes():
    weight = torch.randn(N, N, requires_grad=True)

    def forward():  # the first product's graph is gone before the second is made, and its address may be used again
        torch.randn(N, N) @ weight
        return torch.randn(N, N) @ weight

    assert saved_bytes(forward, exclude=[weight]) == 2 * 4 * N * N


def test_largest_comes_first():
    w = torch.randn(IN, requires_grad=True)
    found = saved_by_shape(lambda: (torch.randn(2, IN) * w).sum() + (torch.randn(N, IN) * w).sum(), exclude=[w])
    assert list(found.values()) == [4 * N * IN, 4 * 2 * IN]


def test_flops_of_the_two_groupings():
    x, A, B = torch.randn(N, IN), torch.randn(R, IN), torch.randn(OUT, R)
    assert flops(lambda: (x @ A.T) @ B.T) == 2 * N * R * (IN + OUT)
    assert flops(lambda: x @ (B @ A).T) == 2 * IN * OUT * (R + N)


def test_flops_count_the_backward_pass_and_in_place_products():
    linear, x = nn.Linear(IN, OUT, bias=False), torch.randn(N, IN, requires_grad=True)
    assert flops(lambda: linear(x).sum().backward()) == 3 * 2 * N * IN * OUT
    y, a, b = torch.zeros(N, OUT), torch.randn(N, IN), torch.randn(IN, OUT)
    assert flops(lambda: y.addmm_(a, b)) == flops(lambda: torch.addmm(y, a, b)) == 2 * N * IN * OUT


def test_peak_new_tensor_tells_whether_ba_was_formed():
    x, A, B = torch.randn(2, IN), torch.randn(R, IN, requires_grad=True), torch.randn(OUT, R)
    W = torch.randn(OUT, IN)

    def narrow():
        (F.linear(x, W) + (x @ A.T) @ B.T).sum().backward()

    def wide():
        F.linear(x, W + B @ A).sum().backward()

    assert peak_new_tensor(narrow) == (4 * 2 * OUT, (2, OUT))
    assert peak_new_tensor(wide) == (4 * OUT * IN, (OUT, IN))


def test_views_and_in_place_results_are_not_new():
    x = torch.zeros(N, N)
    assert peak_new_tensor(lambda: (x.T, x.view(-1), x.add_(1), x.expand(9, N, N))) == (0, ())
    assert peak_new_tensor(lambda: torch.ones(1).expand(100)) == (4, (1,))


def test_cpu_seconds_counts_work_and_not_sleep():
    threads, calls = torch.get_num_threads(), []

    def work():
        calls.append("work")
        sum(range(200_000))

    def sleep():
        calls.append("sleep")
        time.sleep(0.02)

    seconds = cpu_seconds({"work": work, "sleep": sleep}, repeats=3)
    assert calls == ["work", "sleep"] * 4
    assert 0 < seconds["sleep"] < 0.02 and seconds["work"] > 0
    assert torch.get_num_threads() == threads
