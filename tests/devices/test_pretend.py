"""The pretended device refuses what CUDA refuses, and computes what the CPU does. On a GPU the same holds of CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

REFUSED = {
    "a sum": lambda there, here: there + here,
    "a sum with one number in a vector": lambda there, here: there + here[:1],
    "a number of the device and a vector of the CPU": lambda there, here: there[0] + here,
    "a sum in place": lambda there, here: here.add_(there),
    "a sum into a number of the CPU": lambda there, here: here[0].add_(there[0]),
    "a choice by a mask of the CPU": lambda there, here: torch.where(here > 0, there, 0.0),
    "a fill by a mask of the CPU": lambda there, here: there.masked_fill(here > 0, 0.0),
    "putting vectors together": lambda there, here: torch.cat([there, here]),
    "putting numbers together": lambda there, here: torch.stack([there[0], here[0]]),
    "a product": lambda there, here: there @ here,
    "a look-up": lambda there, here: torch.nn.functional.embedding(here.long(), there[:, None]),
    "a selection": lambda there, here: there.gather(0, here.long()),
    "places among edges": lambda there, here: torch.bucketize(there, here),
    "a comparison": lambda there, here: torch.equal(there, here),
    "an index of the device into the CPU": lambda there, here: here[there.long()],
    "a mask of the device into the CPU": lambda there, here: here[there > 0],
    "values of the CPU at places of the device": lambda there, here: there.index_put_((here.long(),), here),
    "whole numbers multiplied as matrices": lambda there, here: there.long()[None] @ there.long()[:, None],
    "a histogram": lambda there, here: torch.histogram(there, bins=3),
    "random numbers of the CPU's generator": lambda there, here: torch.rand(
        3, device=there.device, generator=torch.Generator()
    ),
    "a layer's weights elsewhere": lambda there, here: torch.nn.Linear(3, 2).to(there.device)(here),
}
ALLOWED = {
    "a number of the CPU": lambda x, here: x * here[1],
    "a choice of numbers": lambda x, here: torch.where(x > 0, x, here[1]),
    "an index of the CPU": lambda x, here: x[here.long()],
    "a mask of the CPU": lambda x, here: x[here > 0],
    "a number put at places of the CPU": lambda x, here: x.clone().index_put_((here.long(),), here[2]),
    "a copy": lambda x, here: x.clone().copy_(here),
    "a vector and a matrix": lambda x, here: x @ torch.outer(x, x),
}


@pytest.fixture
def there(device):
    return torch.arange(3.0, device=device)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what, there):
    with pytest.raises((RuntimeError, NotImplementedError)):
        REFUSED[what](there, torch.arange(3.0))


@pytest.mark.parametrize("what", ALLOWED)
def test_what_cuda_allows_is_computed_as_on_the_cpu(what, there):
    here = torch.arange(3.0)
    found = ALLOWED[what](there, here)
    assert found.is_cuda
    assert_close(found.cpu(), ALLOWED[what](here, here))


def test_memory_of_the_device_is_not_read_from_python_and_numbers_are(there):
    for read in (lambda: there.numpy(), lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="can't convert cuda"):
            read()
    assert (there.tolist(), there[1].item(), float(there[2]), int(there.sum())) == ([0, 1, 2], 1, 2, 3)
    assert there.cpu().numpy().tolist() == [0, 1, 2]


def test_tensors_get_to_the_device_and_back(device):
    made = [
        torch.tensor([1.0, 2.0], device=device), torch.as_tensor(np.array([1.0, 2.0]), device=device),
        torch.tensor([1.0, 2.0]).to(device), torch.tensor([1.0, 2.0]).cuda(),
        torch.tensor([1, 2]).to("cuda:0", torch.float64),
        torch.empty(2, device="cuda").copy_(torch.tensor([1.0, 2.0])),
    ]  # fmt: skip
    for tensor in made:
        assert (tensor.device, tensor.device.type, tensor.is_cuda) == (torch.device("cuda", 0), "cuda", True)
        assert tensor.to(tensor.device) is tensor
        assert tensor.cpu().tolist() == [1, 2]
        assert not torch.zeros_like(tensor, device="cpu").is_cuda
        assert tensor.new_zeros(1).is_cuda


def test_gradients_go_to_where_the_weights_are(device):
    here, there = torch.ones(3, requires_grad=True), torch.ones(3, device=device, requires_grad=True)
    (here.to(device) * there * 2).sum().backward()
    assert (here.grad.is_cuda, there.grad.is_cuda) == (False, True)
    assert here.grad.equal(there.grad.cpu())


def test_a_module_moves_with_its_shared_weights_and_trains(device):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.to(device)
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, torch.nn.Parameter)
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 3, device=device)).sum().backward()
    torch.optim.Adam(model.parameters(), lr=0.1).step()
    assert not before.equal(model[0].weight)
