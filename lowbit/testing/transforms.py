"""Derivatives and transforms of a function of one tensor, as a table: what has to be right of every op and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowbit.testing.where import Where

Function = Callable[[Tensor], Tensor]
TOLERANCE = 5e-6  # relative, of float32 against float64: a derivative is a product or two, and sums of less than 100


def _loss(f: Function) -> Function:
    return lambda x: (f(x) / 4).tanh().square().sum()


def _forward_ad(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
    return tangent


def _backward(f: Function, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    _loss(f)(x).backward()
    assert x.grad is not None
    return x.grad


def _double_backward(f: Function, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def _reverse_over_forward(f: Function, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(_forward_ad(_loss(f), x), x)[0]


def _batch(x: Tensor) -> Tensor:
    return torch.stack([x, x.sin(), x.cos()], -1)


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "backward": _backward,
    "double backward": _double_backward,
    "forward AD": _forward_ad,
    "reverse over forward AD": _reverse_over_forward,
    "func.grad": lambda f, x: torch.func.grad(_loss(f))(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x).detach().cos())[0],
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(_loss(f)), (x,), (x.cos(),))[1],
    "grad of jvp": lambda f, x: torch.func.grad(lambda x: torch.func.jvp(_loss(f), (x,), (x.cos(),))[1])(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(_loss(f))(x),
    "jacrev of jacfwd": lambda f, x: torch.func.jacrev(torch.func.jacfwd(_loss(f)))(x),
    "vmap": lambda f, x: torch.vmap(f, -1, -1)(_batch(x)),
    "vmap of vmap": lambda f, x: torch.vmap(torch.vmap(f, -1), 0)(torch.stack([_batch(x), _batch(-x)])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(_loss(f)), -1)(_batch(x)),
    "grad of vmap": lambda f, x: torch.func.grad(lambda b: torch.vmap(_loss(f), -1)(b).sum())(_batch(x)),
    "vmap of jvp": lambda f, x: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1], -1)(_batch(x)),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward-mode jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "vectorized hessian": lambda f, x: torch.autograd.functional.hessian(_loss(f), x, vectorize=True),
    "forward-mode hessian": lambda f, x: torch.autograd.functional.hessian(
        _loss(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}


def assert_same(name: str, f: Function, exact: Function, x: Tensor) -> None:
    """A transform of ``f`` at float32 ``x`` against that of ``exact`` at float64 ``x``."""
    found, want = TRANSFORMS[name](f, x).double(), TRANSFORMS[name](exact, x.double())
    assert found.shape == want.shape, (name, found.shape, want.shape)
    norm = float(want.norm())
    assert norm > 0, f"{name}: a test needs a derivative that is not zero"
    error = float((found - want).norm()) / norm
    assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


def opcheck(where: Where, op: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> None:
    """``torch.library.opcheck`` of a call. Registrations and graphs lie above the backends: they are checked with the
    reference, and with the others what depends on a kernel, which is what it changes and the form of its result."""
    of_a_kernel = ("test_schema", "test_faketensor")
    everything = (*of_a_kernel, "test_autograd_registration", "test_aot_dispatch_dynamic")
    utilities = everything if where.backend == "reference" else of_a_kernel
    torch.library.opcheck(op, tuple(arguments), dict(named or {}), test_utils=utilities)
