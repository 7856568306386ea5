"""`torch.library.opcheck` on every operator of the library, with what the losses ask of it."""

import functools

import pytest
import torch
from step_cases import LOSSES, made, train
from torch.utils._python_dispatch import TorchDispatchMode

import fastvlm_loss
from fastvlm_loss.backends import cpp
from fastvlm_loss.losses import documented

ON_A_GPU = ["triton"]
ALONE = {"late_interaction_loss", "multiscale_itm_loss"}  # that chunked PyTorch alone has


def operators():
    """Every operator of the library that takes tensors, by name."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fastvlm_loss::"):
            packet, _, overload = name.removeprefix("fastvlm_loss::").partition(".")
            found = getattr(getattr(torch.ops.fastvlm_loss, packet), overload or "default")
            marks = [pytest.mark.gpu] if overload in ON_A_GPU else []
            if overload == "cpp" and cpp.unavailable():
                marks.append(pytest.mark.skip(reason=cpp.unavailable()))
            if any(isinstance(a.type, torch.TensorType) for a in found._schema.arguments):
                yield pytest.param(found, id=name.removeprefix("fastvlm_loss::"), marks=marks)


class Calls(TorchDispatchMode):
    """Arguments of the library's operators: of each the first with every statistic."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "fastvlm_loss":
            statistic = tuple(a for a in arguments if isinstance(a, str))
            plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
            self.found.setdefault(function, {}).setdefault(statistic, plain)
        return function(*arguments, **(named or {}))


@functools.cache
def calls(backend, device):
    """What training steps with all losses and their options ask of the operators."""
    with Calls() as recorded, fastvlm_loss.backend(backend):
        for name in LOSSES:
            for k in range(len(documented[name].variants) if name in documented else 1):
                if backend == "torch" or name not in ALONE:
                    step = made(name, k, device)
                    train(step, step)
    return recorded.found


@pytest.mark.parametrize("operator", sorted(operators(), key=lambda p: p.id))
def test_opcheck(operator):
    overload = operator._overloadname
    backend = "torch" if overload == "default" else overload
    asked = calls(backend, "cuda" if backend in ON_A_GPU else "cpu").get(operator)
    assert asked, f"no loss reaches {operator}"
    for arguments in asked.values():
        torch.library.opcheck(operator, arguments)
