"""How an operator of the library comes to be: its schema, what makes it, and a fake that knows its shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["operator"]

_library = torch.library.Library("fastvlm_loss", "FRAGMENT")


def operator(
    name: str, schema: str, made: Callable[..., Any] | None, fake: Callable[..., Any],
    devices: Sequence[str] = ("CPU", "CUDA"),
) -> Any:  # fmt: skip
    """The operator `fastvlm_loss::name`, or one of its overloads, `name.overload`.

    `made` None leaves its kernel to another library, for instance one in C++.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastvlm_loss::{name}", fake, lib=_library)
    for device in devices if made is not None else ():
        _library.impl(name, made, device)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.fastvlm_loss, packet), overload or "default")
