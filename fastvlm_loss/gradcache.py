"""Gradient caching: the gradient of the whole batch, for the memory of one micro-batch in the encoders.

pass 1   f_k = encode(x_k) of every micro-batch k; nothing but the features is kept
loss     L(f) on the features of the whole batch: d = dL/df, and the gradients of what is inside the loss
pass 2   f_k = encode(x_k) again, with the random numbers of pass 1, and d_k backward through it
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .nested import each, leaves, split
from .scores import check

__all__ = ["cached_step"]


def cached_step(
    encode_image: Callable[[Any], Any],
    encode_text: Callable[[Any], Any],
    images: Any,
    texts: Any,
    loss: Callable[[Any, Any], Tensor],
    *,
    micro_batch: int | None,
    modules: Sequence[nn.Module] | None = None,
    backward: Callable[[Tensor], object] | None = None,
    check_replay: bool = False,
) -> Tensor:
    """Forward and backward of a batch for whose activations there is no room.

    Use it once the loss no longer fills the memory and the encoders do. Gradients are those of one backward through the
    whole batch, to the rounding of a sum over micro-batches; they are added to `.grad`, as `backward` adds them. Every
    encoder with something to train runs forward twice. The loss runs once, so that one over a process group works as it
    is, called by every rank once a step.

    Args:
        encode_image, encode_text: modules or functions of a micro-batch that return its features: a tensor with the
            batch in dimension 0, or a tuple, list or mapping of such. One without anything to train runs once.
        images, texts: the batch: a tensor with the batch in dimension 0, or a tuple, list or mapping of such (or of
            None), nested at will, all split alike. The encoder gets the same form; a mapping as a dict.
        loss: function of the image and the text features of the whole batch, in the form that the encoders return (a
            mapping as a dict), with a scalar value. What it trains itself, `logit_scale` say, gets its gradient here.
        micro_batch: rows >= 1 of a micro-batch; None is the step without a cache, one forward and one backward. (A
            batch of one micro-batch still takes two passes: ranks must not differ in what they do.)
        modules: those that the encoders call, for `DistributedDataParallel` and for buffers, see below; None finds them
            where an encoder is a module, a method or `partial` of one, or a function that names one.
        backward: called with the loss instead of `loss.backward()`: to scale it (`GradScaler`), or to divide it by
            accumulation steps.
        check_replay: raise where pass 2 makes other features than pass 1, which makes gradients wrong (synchronises).

    Returns:
        The loss, detached.

    - Random numbers of torch, on the CPU and on CUDA devices, are the same in both passes, and so are dropout's masks;
      afterwards the generators are where pass 1 and the loss left them.
    - Autocast is the caller's in both passes and in the loss; backward runs without, as PyTorch wants it.
    - Every `DistributedDataParallel` module reduces its gradients once, in the last backward that reaches it; also one
      of whose parameters each encoder uses some. Encoders must call the wrapper, not its `.module`. Inside the module's
      `no_sync()` nothing is reduced. Ranks may differ in the number of micro-batches.
    - Buffers are afterwards what pass 1 made of them, so that running statistics count a micro-batch once. But batch
      norm normalises a micro-batch, not the batch: its gradients are not those of the whole batch.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range, or what an encoder or the loss returns,
            named.

    Source: Gao et al. 2021 (GradCache), section 3; Pham et al. 2021 (BASIC).
    """
    check.flag("check_replay", check_replay)
    found = _found(modules, (encode_image, encode_text))
    if micro_batch is None:
        return _backward(loss(encode_image(images), encode_text(texts)), backward)
    size = check.whole("micro_batch", micro_batch, low=1)
    towers = (
        _Tower("encode_image", encode_image, split("images", images, size), check_replay),
        _Tower("encode_text", encode_text, split("texts", texts, size), check_replay),
    )
    parallel = [m for m in found if isinstance(m, DistributedDataParallel)]
    with _quiet(parallel):
        for tower in towers:
            tower.first(parallel)
    called = [m for m in parallel if any(m in tower.called for tower in towers)]
    if len(called) < len(parallel):
        raise ValueError(
            "modules: got a DistributedDataParallel whose forward no encoder called, wanted encoders that call the "
            "wrapper and not its .module (or modules=() to reduce gradients yourself)"
        )
    with _quiet(called):
        value = _backward(loss(*(tower.features for tower in towers)), backward)
    # the last tower wins
    last = {m: tower for tower in towers if tower.wanted for m in called if m in tower.called}
    with _restored(found):
        for tower in towers:
            if tower.wanted:
                tower.second([m for m in last if last[m] is tower], [m for m in last if last[m] is not tower])
    for m in called:
        if m not in last:
            _reduce(m)
    return value


class _Tower:
    """An encoder and its micro-batches; after pass 1 their features, and the random state before each."""

    def __init__(self, name: str, encode: Callable[[Any], Any], parts: list[Any], check_replay: bool) -> None:
        self.name, self.encode, self.parts, self.check_replay = name, encode, parts, check_replay
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + next(iter(leaves(name, part).values())).shape[0])
        self.rows = [slice(a, b) for a, b in pairwise(ends)]
        self.states: list[_Random] = []
        self.called: set[nn.Module] = set()
        self.features: Any = None  # of the whole batch, in the encoder's form
        self.whole: list[Tensor] = []  # the same, flat

    @property
    def wanted(self) -> bool:
        """Whether there is a gradient to take through the encoder; known after the loss's backward."""
        return any(whole.grad is not None for whole in self.whole)

    def first(self, parallel: Iterable[nn.Module]) -> None:
        """Pass 1; sees which of the modules are called.

        Gradients are enabled, although every graph is dropped at once: so both passes run the same kernels, which draw
        the same random numbers, and it shows which features need a gradient.
        """
        handles = [m.register_forward_pre_hook(lambda m, _: self.called.add(m)) for m in parallel]
        try:
            needs = [self._keep(k) for k in range(len(self.parts))]
        finally:
            for handle in handles:
                handle.remove()
        for whole, need in zip(self.whole, zip(*needs, strict=True), strict=True):
            whole.requires_grad_(any(need))

    def _keep(self, k: int) -> list[bool]:
        self.states.append(_Random())
        form, made = self._encode(k)
        if not self.whole:
            # copies: the features of one token would be a view that holds those of all
            self.features = each(lambda _, f: f.new_empty(self.rows[-1].stop, *f.shape[1:]), self.name, form)
            self.whole = [*leaves(self.name, self.features).values()]
        got, before = ([list(f.shape[1:]) for f in features] for features in (made, self.whole))
        if got != before:
            raise ValueError(f"{self.name}: got rows of shape {got} after {before}, wanted all micro-batches alike")
        for whole, f in zip(self.whole, made, strict=True):
            whole[self.rows[k]] = f.detach()
        return [f.requires_grad for f in made]

    def second(self, finished: list[nn.Module], others: list[nn.Module]) -> None:
        """Pass 2; at its end the modules in `finished` reduce their gradients, and those in `others` do not."""
        for k in range(len(self.parts)):
            final = finished if k == len(self.parts) - 1 else []
            with _quiet(others if final else [*finished, *others]):
                self.states[k].restore()
                self._descend(k, final)

    def _descend(self, k: int, final: list[nn.Module]) -> None:
        roots, gradients = [], []
        for f, whole in zip(self._encode(k)[1], self.whole, strict=True):
            if self.check_replay:
                self._compare(f.detach(), whole.detach()[self.rows[k]], self.rows[k])
            if f.requires_grad and whole.grad is not None:
                roots.append(f)
                gradients.append(whole.grad[self.rows[k]])
        for p in (p for module in final for p in _waiting(module)):
            roots.append(p)
            gradients.append(p.new_zeros(()).expand_as(p))
        if roots:
            with _no_autocast(roots):
                torch.autograd.backward(roots, gradients)

    def _encode(self, k: int) -> tuple[Any, list[Tensor]]:
        form = self.encode(self.parts[k])
        made, rows = leaves(self.name, form), self.rows[k].stop - self.rows[k].start
        for path, f in made.items():
            if f.shape[0] != rows:
                raise ValueError(f"{path}: got features of shape {list(f.shape)} for {rows} rows, wanted [{rows}, ...]")
        return form, [*made.values()]

    def _compare(self, again: Tensor, before: Tensor, rows: slice) -> None:
        if not before.numel() or not before.is_floating_point():
            return
        error, size = (again - before).abs().amax().item(), before.abs().amax().item()
        # far above a rounding, far below another dropout mask
        if not error <= torch.finfo(before.dtype).eps ** 0.5 * size:
            raise ValueError(
                f"{self.name}: got features of rows {rows.start} to {rows.stop - 1} that differ by {error:.2g} between "
                "the passes, wanted none but torch's random numbers and no state that forward both uses and changes"
            )


class _Random:
    """The state of torch's generators."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _backward(value: object, backward: Callable[[Tensor], object] | None) -> Tensor:
    """Backward of the loss, if it is one; detached."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: got a function that returns {type(value).__name__}, wanted a scalar tensor")
    if value.numel() != 1:
        raise ValueError(f"loss: got a function that returns shape {list(value.shape)}, wanted a scalar tensor")
    if not value.requires_grad:
        raise ValueError("loss: got a value that depends on nothing to train, wanted one with a gradient")
    with _no_autocast([value]):
        if backward is None:
            value.backward()
        else:
            backward(value)
    return value.detach()


@contextmanager
def _no_autocast(tensors: Sequence[Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in {"cpu", *(t.device.type for t in tensors)}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Random numbers and buffers are afterwards what they were before."""
    state = _Random()
    # an expanded buffer cannot be written in place, by forward neither
    buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False) if 0 not in b.stride()]
    try:
        yield
    finally:
        state.restore()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _found(modules: Sequence[nn.Module] | None, encoders: tuple[object, ...]) -> list[nn.Module]:
    """All modules of the step, each once."""
    roots = [m for encoder in encoders for m in _named(encoder)] if modules is None else [*modules]
    for k, m in enumerate(roots):
        if not isinstance(m, nn.Module):
            raise TypeError(f"modules[{k}]: got {type(m).__name__}, wanted a torch.nn.Module")
    found = [*dict.fromkeys(m for root in roots for m in root.modules())]
    if any(isinstance(m, DistributedDataParallel) and m.static_graph for m in found):
        raise ValueError(
            "modules: got a DistributedDataParallel with static_graph=True, wanted False "
            "(PyTorch's static_graph does not work with no_sync())"
        )
    return found


def _named(encoder: object) -> Iterator[nn.Module]:
    """The modules that an encoder names, as far as can be seen without a call."""
    if isinstance(encoder, nn.Module):
        yield encoder
    elif isinstance(encoder, functools.partial):
        for part in (encoder.func, *encoder.args, *encoder.keywords.values()):
            yield from _named(part)
    elif inspect.ismethod(encoder):
        yield from _named(encoder.__self__)
    elif inspect.isfunction(encoder):
        names = inspect.getclosurevars(encoder)
        yield from (m for m in {**names.globals, **names.nonlocals}.values() if isinstance(m, nn.Module))


@contextmanager
def _quiet(modules: Iterable[nn.Module]) -> Iterator[None]:
    """None of the modules reduces gradients."""
    with ExitStack() as stack:
        for m in modules:
            if isinstance(m, DistributedDataParallel):
                stack.enter_context(m.no_sync())
        yield


def _reduce(module: DistributedDataParallel) -> None:
    """Average the gradients of a module that no encoder's backward reaches, only the loss's, which was quiet."""
    if module.require_backward_grad_sync:
        for p in module.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad, group=module.process_group)
                p.grad /= dist.get_world_size(module.process_group)


def _waiting(module: nn.Module) -> list[Tensor]:
    """Parameters that have a gradient: the reducer waits for each, but the last backward may not reach it, so that it
    takes part with a gradient of 0."""
    if not isinstance(module, DistributedDataParallel) or module.find_unused_parameters:
        return []  # it finds them itself, those used inside no_sync() too
    return [p for p in module.parameters() if p.requires_grad and p.grad is not None and not p.grad.is_sparse]
