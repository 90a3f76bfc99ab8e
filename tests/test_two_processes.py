"""Two processes that share a batch train every method's adapter to the numbers of one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_table import METHODS, config_of
from small_models import VOCAB, move, small_model
from torch.nn.parallel import DistributedDataParallel

from utils import attach

ARCHITECTURES = ("llama_gqa", "bert")
STEPS = 3


def batch_of(model, step, rows):
    """The inputs of a step for some of its four rows, labels included. No padding: each row weighs the same."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCAB, (4, 9), generator=g)
    labels = torch.randint(3, (4,), generator=g) if hasattr(model, "classifier") else ids
    return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": labels[rows]}


def trained(method, architecture, rows, wrap=lambda model: model):
    """The adapter's numbers after a few steps of SGD on these rows of each batch."""
    torch.manual_seed(0)
    model = small_model(architecture)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    model.eval()  # no dropout: the two would draw other masks than the one
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for step in range(STEPS):
        wrapped(**batch_of(model, step, rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in adapter.named_parameters()}


def cases():
    return [(m, a) for a in ARCHITECTURES for m, method in METHODS.items() if a in method.on]


def work(rank, port, folder):
    """One of the two processes: trains every case on its half of the rows and leaves the numbers in a file."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    found = {case: trained(*case, rows, DistributedDataParallel) for case in cases()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("method, architecture", cases())
def test_two_processes_train_what_one_does(two, method, architecture):
    one = trained(method, architecture, slice(0, 4))
    first, second = (found[method, architecture] for found in two)
    assert one.keys() == first.keys()
    for name in one:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one[name], rtol=0, atol=1e-5)
