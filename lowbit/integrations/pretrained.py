"""The quantizer that transformers' loader calls, and what marks a model that holds packed layers.

Names inside transformers that this file depends on were checked with 5.0, 5.4, 5.8, 5.14, 5.20 and 5.24.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint import card, foreign, stream
from lowbit.checkpoint.metadata import Metadata, parse, train_again
from lowbit.checkpoint.reader import Checkpoint
from lowbit.integrations import resize, tensor_parallel, unread
from lowbit.integrations.matching import (
    NOTICE_PATTERN,
    check,
    check_float,
    conversions_to_save,
    forget_kept_dtypes,
    guards,
    match,
    names_in,
    of_float,
    swap_in,
)
from lowbit.integrations.ties import retie, submodels
from lowbit.model.accelerate import canonical_state_dict
from lowbit.model.convert import convert, dequantize
from lowbit.model.experts import float_name
from lowbit.model.foreign import why_foreign
from lowbit.model.plan import check_arguments
from lowbit.nn.layer import Layer, layers

METHOD = "lowbit"


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a packed model: the description of its layers; or what to convert while loading.

    Args:
        spec: with ``from_pretrained`` of a *float* model: what :func:`lowbit.convert` is to be called with
            after loading; ``skip``, ``calibration`` and ``loss`` go with it.
        description: the fields of :mod:`lowbit.checkpoint.metadata`, as saved.

    Raises:
        ValueError: naming the layer and the field of a description that is not valid.
        TypeError: for what is no spec.
    """

    def __init__(
        self, spec: Any = None, *, skip: Any = (), calibration: Any = None, loss: Any = None, **description: Any
    ) -> None:
        description.pop("quant_method", None)
        skip = check_arguments(spec, skip)
        self.spec, self.skip, self.calibration, self.loss = spec, skip, calibration, loss
        self._describe(None if spec is not None else parse(description), description)

    @classmethod
    def of(cls, model: nn.Module) -> LowbitConfig:
        """The description of a packed model as it is: our own, which needs no check."""
        config = cls.__new__(cls)
        config.spec, config.skip, config.calibration, config.loss = None, (), None, None
        metadata = Metadata.of(model)
        config._describe(metadata, metadata.to_dict())
        return config

    def _describe(self, metadata: Metadata | None, description: dict[str, Any]) -> None:
        self.quant_method = METHOD
        self.metadata, self.description = metadata, description

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **self.description}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@register_quantizer(METHOD)
class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the described layers in while ``from_pretrained`` has the model on meta; checks what it loads."""

    requires_calibration = False

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized and quantization_config.metadata is None:
            raise ValueError("the model is packed already: LowbitConfig(spec=...) converts float models only")
        self._files: list[Path] = []
        self._model: Any = None  # until its files are checked
        self._stored: set[str] = set()
        self._styles: dict[str, str] = {}  # of tensor parallelism, by layer name

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # Trainer refuses it otherwise: norms, biases and what make_trainable chose have gradients

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        install()
        # files of another kind than safetensors have no header to check; transformers 5 does not write any
        self._model = model
        self._files = [Path(f) for f in kwargs.get("checkpoint_files") or [] if str(f).endswith(".safetensors")]
        if not self.pre_quantized:
            declared = foreign.declared(self._files[0].parent) if self._files else None
            if declared is not None:
                raise declared.error()
            return model
        assert self.quantization_config.metadata is not None
        swap_in(model, self.quantization_config.metadata)
        retie(model, held=False)
        packed = layers(model, duplicates=True)
        if not hasattr(HfQuantizer, "get_new_dtype"):
            forget_kept_dtypes(model, packed)
        for name, layer in packed.items():
            self._stored.update(f"{name}.{tensor}" for tensor in layer.format.tensors())
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        ignored = [] if ignored is None else ignored  # a set in later versions
        prefix = rf"^({re.escape(str(model.base_model_prefix))}\.)?"
        patterns = [rf"{prefix}{re.escape(float_name(name, layer.kind))}$" for name, layer in packed.items()]
        model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, *patterns, NOTICE_PATTERN])  # type: ignore[assignment]
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        # the last call before tensors are read; versions before 5.21 do not say of which model
        given = () if model is None else (model,)
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *given)
        if self.pre_quantized and self._model is not None:
            conversions = of_float(self._model, conversions)
        self._check_files(conversions)
        return conversions

    def get_weight_conversions(self) -> list[Any]:
        if not hasattr(HfQuantizer, "update_weight_conversions"):  # before 5.6
            self._check_files(None)
        return []

    def _check_files(self, conversions: list[Any] | None) -> None:
        """Check the files' headers against the description."""
        model, self._model = self._model, None
        if not self._files or model is None:
            return
        checkpoint = Checkpoint(self._files)
        found = match(model, checkpoint, conversions)
        if self.pre_quantized:
            check(model, checkpoint, found)
        else:
            check_float(model, checkpoint.entries, found)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        self._styles.update(tensor_parallel.styles(model, plan))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # packed tensors keep their stored dtype whatever dtype the model is loaded in
        if converter.target_patterns[0] in self._stored:
            return None
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            config = self.quantization_config
            return convert(  # type: ignore[no-any-return]
                model, config.spec, skip=config.skip, calibration=config.calibration, loss=config.loss
            )
        stream.validate(model)
        tensor_parallel.split(model, self._styles)
        described = self.quantization_config.metadata
        assert described is not None
        train_again(model, described.renamed(names_in(model, described)))
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        # called by save_pretrained before it writes config.json: describe the model as it is now
        tensor_parallel.refuse_saving(model)
        _skip_zero_biases(model)
        config = LowbitConfig.of(model)
        self.quantization_config = model.config.quantization_config = config  # type: ignore[union-attr]
        state = {**_each_once(model), **guards(model)}
        return state, {"lowbit_format_version": config.description["format_version"]}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model)


def _each_once(model: Any) -> dict[str, Any]:
    """The tensors to be saved. Layers that share some only, as where one of two tied ones is trained, are two then."""
    state, tied = canonical_state_dict(model), model.all_tied_weights_keys
    seen: set[int] = set()
    for name, layer in layers(model).items():
        for key in (f"{name}.{tensor}" for tensor in layer.named_tensors()):
            if state[key].data_ptr() in seen and key not in tied and key not in tied.values():
                state[key] = state[key].clone()
            seen.add(state[key].data_ptr())
    return state


def _skip_zero_biases(model: Any) -> None:
    # BART and its relatives have a [1, vocabulary] float buffer that is zero in nearly every model, and which
    # transformers starts at zero where a file does not hold it: as large as 2 % of a 2-bit model
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "final_logits_bias":
            ignored = set(model._keys_to_ignore_on_save or ())
            model._keys_to_ignore_on_save = ignored - {name} if bool(buffer.any()) else ignored | {name}


# ------------------------------------------------------------------------------------------------ in memory


def attach(model: nn.Module) -> None:
    """Make a converted model one that transformers knows to be quantized, and can save and tie."""
    retie(model)
    mark(model)


def mark(model: nn.Module) -> None:
    """:func:`attach` of a model whose packed tensors are tied by name already."""
    install()
    config = LowbitConfig.of(model)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.hf_quantizer = LowbitQuantizer(config, pre_quantized=True)
    model.is_quantized = True  # type: ignore[assignment]
    for bits in (4, 8):  # bitsandbytes' marks: its layers are gone
        model.__dict__.pop(f"is_loaded_in_{bits}bit", None)
    model.quantization_method = METHOD  # type: ignore[assignment]
    _assign_is_quantized(model)
    skipped = config.description.get("skipped", {})
    for name, part in submodels(model):
        if name and part.config is not model.config and _is_ours(part.config):
            del part.config.quantization_config  # a part that was converted on its own: the outer one says it now
        if name:  # so that a part knows it too when it is saved alone
            mine = {n.removeprefix(name + "."): why for n, why in skipped.items() if n.startswith(name + ".")}
            part.lowbit_skipped = mine


def _is_ours(config: Any) -> bool:
    section = getattr(config, "quantization_config", None)
    return isinstance(section, LowbitConfig) or (isinstance(section, dict) and section.get("quant_method") == METHOD)


@contextmanager
def _saving(model: Any) -> Iterator[None]:
    """Inside, ``model`` and its config say what it holds now, wherever its layers were converted or put in.

    A part may share its config with the model around it: that one's description is put back.
    """
    config, quantizer = model.config, model.__dict__.get("hf_quantizer")
    is_own, around = isinstance(quantizer, LowbitQuantizer), _is_ours(config)
    before = config.quantization_config if around and not is_own else None  # that of the model around it
    conversions, kept = model.__dict__.get("_weight_conversions"), conversions_to_save(model)
    if layers(model):
        _check_others(model, quantizer)
        _restore_conv1d(model)
        attach(model)
    elif is_own:  # every packed layer was taken out
        detach(model)
    elif around:
        del config.quantization_config
    try:
        if kept is not None:
            model._weight_conversions = kept
        yield
    finally:
        if kept is not None:
            del model._weight_conversions
        if conversions is not None:
            model._weight_conversions = conversions
        if before is not None:
            config.quantization_config = before


def _check_others(model: nn.Module, quantizer: Any) -> None:
    if quantizer is None or isinstance(quantizer, LowbitQuantizer):
        return
    for name, module in model.named_modules():
        reason = None if isinstance(module, Layer) else why_foreign(module)
        if reason is not None:
            raise ValueError(
                f"a model with packed layers and with layers of another library cannot be saved: {name} is {reason}"
            )


def install() -> None:
    """Teach ``PreTrainedModel`` what packed layers need, once: its ``dtype``, ``get_parameter``, and saving."""
    _install_reading()
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if original.__module__ == __name__:
        return

    def save_pretrained(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        with _saving(self):
            result = original(self, save_directory, is_main_process, *args, **kwargs)
            if is_main_process and Path(save_directory).is_dir() and layers(self):
                card.write(self, save_directory, library="transformers")
        return result

    save_pretrained.__doc__, save_pretrained.__wrapped__ = original.__doc__, original  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained

    for name in ("half", "float"):
        _install_cast(PreTrainedModel, name)
    _install_card(PreTrainedModel)
    resize.install(PreTrainedModel)
    unread.install(PreTrainedModel)


def _install_cast(cls: Any, name: str) -> None:
    """``model.half()`` and ``model.float()``, which transformers refuses quantized models: packed layers know them."""
    original, plain = getattr(cls, name), getattr(nn.Module, name)

    @functools.wraps(original)
    def cast(self: Any, *args: Any) -> Any:
        is_ours = isinstance(getattr(self, "hf_quantizer", None), LowbitQuantizer)
        return (plain if is_ours else original)(self, *args)

    setattr(cls, name, cast)


def _install_card(cls: Any) -> None:
    upload = getattr(cls, "_upload_modified_files", None)
    if upload is None:
        return

    def upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if layers(self):  # push_to_hub has put a card of its own there
            card.write(self, working_dir, library="transformers")
        return upload(self, working_dir, *args, **kwargs)

    cls._upload_modified_files = upload_modified_files


def detach(model: nn.Module) -> None:
    """Make a dequantized model a plain float one again: its ties, its Conv1D layers, its config."""
    _restore_conv1d(model)
    for _, part in submodels(model):
        part.__dict__.pop("_tied_weights_keys", None)
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr,operator]
    for _, part in submodels(model):
        part.config._is_quantized = False
        pairs = part.get_expanded_tied_weights_keys(all_submodels=True)
        part.all_tied_weights_keys = {
            target: source
            for target, source in pairs.items()
            if part.get_parameter(target) is part.get_parameter(source)
        }


def _restore_conv1d(model: Any) -> None:
    # GPT-2's Conv1D saves its weight as [in, out]: an nn.Linear in its place would be saved transposed
    from transformers.pytorch_utils import Conv1D

    has_conv = hasattr(sys.modules[type(model).__module__], "Conv1D")
    if not has_conv or not any(type(module) is nn.Linear for module in model.modules()):
        return
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for name, module in skeleton.named_modules():
        plain = model.get_submodule(name) if isinstance(module, Conv1D) else None
        if isinstance(plain, nn.Linear):
            with torch.device("meta"):
                conv = Conv1D(plain.out_features, plain.in_features)
            conv.weight = nn.Parameter(plain.weight.detach().t().contiguous())
            bias = plain.bias if plain.bias is not None else plain.weight.new_zeros(plain.out_features)
            conv.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], conv.train(plain.training))


def _install_reading() -> None:
    """``model.dtype`` is that of the first floating parameter, which may belong to a norm that is kept in float32: let
    a packed layer answer with its compute dtype. ``save_pretrained`` records it, models cast inputs to it.
    ``model.get_parameter`` is asked for tied tensors: those of packed layers are buffers.
    """
    from transformers.modeling_utils import ModuleUtilsMixin, PreTrainedModel

    original = ModuleUtilsMixin.dtype.fget
    if original.__module__ == __name__:
        return

    def dtype(self: nn.Module) -> torch.dtype:
        for module in self.modules():
            if isinstance(module, Layer):
                return module.dtype
            for tensor in module._parameters.values():
                if tensor is not None and tensor.is_floating_point():
                    return tensor.dtype
        return original(self)  # type: ignore[no-any-return]

    def get_parameter(self: nn.Module, target: str) -> Any:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if isinstance(module, Layer) and name in module._buffers:
            return module._buffers[name]
        return nn.Module.get_parameter(self, target)

    ModuleUtilsMixin.dtype = property(dtype, doc=original.__doc__)
    PreTrainedModel.get_parameter = get_parameter
