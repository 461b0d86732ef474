"""What torch may ask an op for besides its result: gradients, tangents (forward-mode AD), batches (``vmap``), and the
dtype of autocast.

``torch.library.register_autograd`` knows gradients alone: under ``torch.func`` it raises, and forward-mode AD gives
zeros. Here an op is a ``torch.autograd.Function`` wherever a derivative or a transform is asked for, and below autograd
else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import forward_ad

from lowbit.backends.reference import without_autocast

# An object of C++, made anew for each use: wherever an exception comes, even from a signal, its end restores what was.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd
_AFTER_AUTOGRAD: Any = torch._C._after_autograd_keyset


@dataclass(frozen=True)
class Rules:
    """The staticmethods of a ``torch.autograd.Function``; each takes and gives what these do."""

    save: Callable[..., None]
    gradients: Callable[..., tuple[Tensor | None, ...]]
    tangent: Callable[..., Tensor | None]
    batch: Callable[..., tuple[Tensor, int]]


def register(
    library: torch.library.Library, op: torch._ops.OpOverload, rules: Rules, *, follows_autocast: bool = False
) -> None:
    """Let ``op`` follow ``rules`` under autograd, forward-mode AD and the transforms of ``torch.func``.

    ``follows_autocast``: as ``F.linear`` does, it takes its first argument in autocast's dtype, where that is a float
    other than float64 on autocast's device. Its other arguments stay what they are.
    """

    def forward(*args: Any) -> Any:
        with below_autograd():
            return op(*args)

    name = op._schema.name.split("::")[1]
    members: dict[str, Any] = {
        "forward": forward,
        "setup_context": rules.save,
        "backward": rules.gradients,
        "jvp": rules.tangent,
        "vmap": rules.batch,
    }
    function: Any = type(
        "".join(part.capitalize() for part in name.split("_")),
        (torch.autograd.Function,),
        {key: staticmethod(rule) for key, rule in members.items()},
    )
    # as Function.apply does, which first looks at the signature of `forward` in each call
    apply: Any = super(torch.autograd.Function, function).apply

    def autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return apply(*args)
        with below_autograd():
            return op.redispatch(keyset & _AFTER_AUTOGRAD, *args)

    def autocast(x: Tensor, *args: Any) -> Any:
        device_type = x.device.type
        if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        with without_autocast():
            return op(x, *args)

    def transform(*args: Any) -> Any:
        if follows_autocast and torch.is_autocast_enabled(args[0].device.type):
            return autocast(*args)
        return custom_function_call(function, *args)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    library.impl(name, transform, "FuncTorchDynamicLayerFrontMode")
    if follows_autocast:
        for key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
            library.impl(name, autocast, key)
