"""``layer.weight`` of a packed layer: a float weight that exists only where somebody reads its values."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

# What is answered from shape, dtype and device alone.
_METADATA: set[Any] = {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "get_device", "type", "__len__", "__hash__",
    )
}  # fmt: skip
_METADATA.update((torch.is_floating_point, torch.is_complex, torch.numel))
_ATTRIBUTES: set[Any] = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda",
        "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_xpu", "is_mps", "is_nested", "nbytes", "itemsize",
        "_version",
    )
}  # fmt: skip
_ITSELF = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
# An address outlives what it points to: two weights that are dequantized in turn would have the same one.
_ADDRESSES: set[Any] = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor._typed_storage}
_FREEZES = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]


class LazyWeight(Tensor):
    """The weight ``[out_features, in_features]`` of a packed layer, in its compute dtype, without values.

    Shape, dtype and device are at hand. An operation that reads values is computed with the weight that
    :meth:`~lowbit.nn.layer.Layer.dequantize` gives, and a warning says so, once per layer: each read dequantizes again.
    Writing raises ``RuntimeError``: the packed form has no place for it.
    """

    layer: Any  # a lowbit.nn.layer.Layer
    _is_hf_initialized: bool  # transformers then leaves it alone

    @classmethod
    def of(cls, layer: Any) -> LazyWeight:
        """The weight of ``layer``: the same object as long as somebody has it, for tied layers too."""
        key = _identity(layer)
        known = _shown.get(key)
        if known is not None and _identity(known.layer) == key:
            return known
        n, k, experts = layer.rows, layer.format.in_features, getattr(layer, "num_experts", None)
        shape = (n, k) if experts is None else (experts, n // experts, k)
        weight: LazyWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=layer.dtype, device=layer.device
        )
        weight.layer, weight._is_hf_initialized = layer, True
        _shown[key] = weight
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA or func in _ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ITSELF:
            return args[0]
        if func in _FREEZES and not (args[1] if args[1:] else kwargs.get("requires_grad", True)):
            return args[0]  # it never requires a gradient
        if func in _ADDRESSES:
            layer = args[0].layer
            raise RuntimeError(
                f"{layer.title()}: .weight has no memory of its own ({func.__name__}): take that of "
                "layer.dequantize(), and keep it"
            )
        if func is Tensor.__repr__:
            return repr(args[0])
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(LazyWeight, _values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # what reaches this came from C++, past __torch_function__
        _refuse_writing(func, args, kwargs or {})
        args, kwargs = tree_map_only(LazyWeight, _values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, of {type(self.layer).__name__})"


_shown: WeakValueDictionary[tuple[Any, ...], LazyWeight] = WeakValueDictionary()


def _identity(layer: Any) -> tuple[Any, ...]:
    """What layers have in common whose weights are one: the class of format, the very same tensors, and the dtype."""
    held = (*layer._buffers.values(), *(layer._parameters[name] for name in layer.trained()))
    return (type(layer.format), layer.dtype, *[id(tensor) for tensor in held if tensor is not None])


def _values(weight: LazyWeight) -> Tensor:
    layer = weight.layer
    if not layer.__dict__.get("_weight_was_read"):
        layer.__dict__["_weight_was_read"] = True
        warnings.warn(
            f"{layer.title()}: code reads the values of .weight: they are dequantized at every read. "
            "Where that is too slow, leave the layer as it is: skip=[its name] in lowbit.convert",
            stacklevel=4,
        )
    dense: Tensor = layer.dequantize()
    return dense


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where ``func`` changes its first argument, or an ``out``, and that is a weight."""
    name = getattr(func, "__name__", "").split(".")[0]
    dunder = name.startswith("__")
    in_place = (name.endswith("_") and not dunder) or name in ("__set__", "__setitem__", "__delitem__") or (
        dunder and name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__")
    )
    target = [*args, *kwargs.values()][:1] if in_place else []
    written = [*target, kwargs.get("out")]
    for weight in tree_flatten(written)[0]:
        if isinstance(weight, LazyWeight):
            raise RuntimeError(
                f"{weight.layer.title()}: .weight cannot be written ({name}): the layer holds the packed form. Go back "
                "to a float layer with lowbit.dequantize, train with lowbit.make_trainable, or leave the layer as it "
                "is with skip=[its name]"
            )
