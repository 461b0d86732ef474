"""The quantizer that transformers' loader calls, and streaming loads of saved transformers models.

Names inside transformers that this file depends on were checked with 5.0, 5.4, 5.8, 5.14, 5.20 and 5.24.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint import card, foreign, libraries, stream
from lowbit.checkpoint.metadata import Metadata, apply, parse, place_of, shared_tensors, tied_groups, train_again
from lowbit.checkpoint.reader import Checkpoint, Entry, read_json
from lowbit.core.activations import ActivationSpec
from lowbit.integrations import tensor_parallel
from lowbit.model.accelerate import canonical_state_dict
from lowbit.model.candidates import embedding_extras
from lowbit.model.convert import convert, dequantize
from lowbit.model.foreign import why_foreign
from lowbit.model.resize import resized
from lowbit.model.surgery import put
from lowbit.nn.layer import Layer, LayerConfig, layer_class, layers

METHOD = "lowbit"

# Without lowbit, transformers would only warn and start packed layers at random. So a saved file also holds, for every
# packed layer, an empty tensor under the name of its float weight: transformers stops at the mismatch of its size. What
# it prints then lists this name too.
NOTICE = "this_model_needs_lowbit.pip_install_lowbit.import_lowbit_before_from_pretrained"


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a packed model: the description of its layers; or what to convert while loading.

    Args:
        spec: with ``from_pretrained`` of a *float* model: what :func:`lowbit.convert` is to be called with
            after loading; ``skip``, ``calibration`` and ``loss`` go with it.
        description: the fields of :mod:`lowbit.checkpoint.metadata`, as saved.

    Raises:
        ValueError: naming the layer and the field of a description that is not valid.
    """

    def __init__(
        self, spec: Any = None, *, skip: Any = (), calibration: Any = None, loss: Any = None, **description: Any
    ) -> None:
        description.pop("quant_method", None)
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
        _apply(model, self.quantization_config.metadata)
        retie(model, held=False)
        packed = layers(model, duplicates=True)
        if not hasattr(HfQuantizer, "get_new_dtype"):
            _forget_kept_dtypes(model, packed)
        for name, layer in packed.items():
            self._stored.update(f"{name}.{tensor}" for tensor in layer.format.tensors())
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        ignored = [] if ignored is None else ignored  # a set in later versions
        patterns = [rf"^{re.escape(f'{name}.weight')}$" for name in packed] + [re.escape(NOTICE)]
        model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, *patterns])  # type: ignore[assignment]
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        # the last call before tensors are read; versions before 5.21 do not say of which model
        given = () if model is None else (model,)
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *given)
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
        train_again(model, described.renamed(_names_in(model, described)))
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


def guards(model: Any) -> dict[str, Tensor]:
    """What stops transformers without lowbit: see ``NOTICE``."""
    tied = {target.rpartition(".")[0] for target in model.all_tied_weights_keys}
    found = {f"{name}.weight": layer for name, layer in layers(model).items() if name not in tied}
    names = [name for name in found if _is_saved_as_is(model, name)]
    return {name: torch.empty(0, dtype=found[name].dtype) for name in names} | {NOTICE: torch.empty(0)}


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


def _is_saved_as_is(model: Any, name: str) -> bool:
    """Whether transformers does not compute what it saves for ``name`` from several tensors."""
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = _conversions(model)
    if not any(isinstance(conversion, WeightConverter) for conversion in conversions):
        return True
    try:
        return all(tensor.numel() == 0 for tensor in revert_weight_conversion(model, {name: torch.empty(0)}).values())
    except Exception:  # an operation that needs a weight of its own shape, or all of them
        return False


def _is_guard(name: str, entry: Entry) -> bool:
    """Whether this is a guard, of a model whose packed layer has this name."""
    return entry.shape == (0,) and (name == NOTICE or name.rpartition(".")[2] == "weight")


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
    _mark(model)


def _mark(model: nn.Module) -> None:
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
    for name, part in _submodels(model):
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
    if layers(model):
        _check_others(model, quantizer)
        _restore_conv1d(model)
        attach(model)
    elif is_own:  # every packed layer was taken out
        detach(model)
    elif around:
        del config.quantization_config
    try:
        yield
    finally:
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

    _install_card(PreTrainedModel)
    _install_resize(PreTrainedModel)


def _install_card(cls: Any) -> None:
    upload = getattr(cls, "_upload_modified_files", None)
    if upload is None:
        return

    def upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if layers(self):  # push_to_hub has put a card of its own there
            card.write(self, working_dir, library="transformers")
        return upload(self, working_dir, *args, **kwargs)

    cls._upload_modified_files = upload_modified_files


def _install_resize(cls: Any) -> None:
    """``resize_token_embeddings``: transformers resizes a float copy, and its new rows are packed as the others are."""
    embeddings, head, both = cls._get_resized_embeddings, cls._get_resized_lm_head, cls._resize_token_embeddings

    def get_resized_embeddings(
        self: Any, old: Any, new_num_tokens: int | None = None, multiple: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        multiple = kwargs.pop("pad_to_multiple_of", multiple)
        if not isinstance(old, Layer):
            return embeddings(self, old, new_num_tokens, multiple, *args, **kwargs)
        size = old.format.out_features if new_num_tokens is None else new_num_tokens
        if isinstance(multiple, int):
            size = -(-size // multiple) * multiple
        if size == old.format.out_features:
            return old
        return _packed_again(self, old, embeddings(self, old.to_float(), new_num_tokens, multiple, *args, **kwargs))

    def get_resized_lm_head(self: Any, old: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(old, Layer):
            return head(self, old, new_num_tokens, *args, **kwargs)
        if new_num_tokens is None or new_num_tokens == old.format.out_features:
            return old
        return _packed_again(self, old, head(self, old.to_float(), new_num_tokens, *args, **kwargs))

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not layers(self):
            return both(self, *args, **kwargs)
        getters = self.get_input_embeddings, self.get_output_embeddings
        before, tied = [get() for get in getters], tied_groups(self)
        group = next((names for names in tied if any(self.get_submodule(name) is before[0] for name in names)), [])
        packed = [end if isinstance(end, Layer) else None for end in before]
        trained = [{n: p.requires_grad for n, p in end.named_parameters()} if end else {} for end in packed]
        both(self, *args, **kwargs)
        _follow(self, group)
        for get, names in zip(getters, trained, strict=True):  # transformers looks at .weight for what is trained
            for name, parameter in get().named_parameters() if names else ():
                parameter.requires_grad_(names.get(name, parameter.requires_grad))
        retie(self)
        return self.get_input_embeddings()

    cls._get_resized_embeddings, cls._get_resized_lm_head = get_resized_embeddings, get_resized_lm_head
    cls._resize_token_embeddings = resize_token_embeddings


def _packed_again(model: Any, old: Layer, made: Any) -> nn.Module:
    """The float layer that transformers resized, in the form of ``old``; as it is, with a warning, where that cannot
    be."""
    new = resized(old, made.weight.detach(), getattr(made, "bias", None), getattr(made, "padding_idx", None))
    if new is not None:
        return new
    name = next((name for name, module in model.named_modules() if module is old), type(old).__name__)
    warnings.warn(
        f"{name}: {old.format.describe()} cannot be resized row by row: it is a float layer now. To pack it again, "
        f"call lowbit.convert(model, {{{name!r}: spec}})",
        stacklevel=4,
    )
    return made  # type: ignore[no-any-return]


def _follow(model: Any, names: list[str]) -> None:
    """Layers that shared the weight of the input embedding share that of the resized one."""
    source = model.get_input_embeddings()
    for name in names:
        layer: Any = model.get_submodule(name)
        if layer is source:
            continue
        if not isinstance(source, Layer):
            if isinstance(layer, Layer):  # transformers did not resize it
                layer = layer.to_float()
                put(model, name, layer)
            layer.weight = source.weight
            continue
        if layer.format.out_features != source.format.out_features:
            layer = _like(layer, source)
            put(model, name, layer)
        layer.share_weight(source)


def _like(layer: Layer, source: Layer) -> Layer:
    """``layer``, for the weight of ``source``, which has another number of rows."""
    config = LayerConfig.of(layer)
    size = source.format.out_features
    new = replace(config, format=source.format.with_activation(layer.format.activation)).build(layer.dtype)
    new.store(source.canonical())
    own = {name: t for name, t in layer.canonical().items() if name not in layer.format.weight_tensors()}
    new.store(own)
    if layer.bias is not None:
        bias = nn.functional.pad(layer.bias.detach(), (0, size - len(layer.bias)))
        new.bias = nn.Parameter(bias, layer.bias.requires_grad)
    return new.train(layer.training).prepare()


def detach(model: nn.Module) -> None:
    """Make a dequantized model a plain float one again: its ties, its Conv1D layers, its config."""
    _restore_conv1d(model)
    for _, part in _submodels(model):
        part.__dict__.pop("_tied_weights_keys", None)
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr,operator]
    for _, part in _submodels(model):
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


def _submodels(model: nn.Module) -> list[tuple[str, Any]]:
    from transformers.modeling_utils import PreTrainedModel

    return [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]


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


def retie(model: Any, *, held: bool = True) -> None:
    """Rewrite the tied names from ``x.weight`` to the packed tensors of ``x``, in ``model`` and its submodels.

    A pair of which only one side is packed is not tied: each side is saved. ``held``: the tensors are what they will
    be, and names whose tensors differ are not tied; otherwise float ones are still to be read. transformers reads the
    names from ``_tied_weights_keys`` when it saves and from ``all_tied_weights_keys`` when it loads.
    """
    declared = {**(_declared(model) if held else {}), **getattr(model, "all_tied_weights_keys", {})}
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    tied: dict[str, str] = {}
    for target, source in declared.items():
        (first, leaf), (second, source_leaf) = target.rpartition(".")[::2], source.rpartition(".")[::2]
        mine, other = modules.get(first), modules.get(second)
        if mine is None or other is None:
            continue
        packed = [
            isinstance(mine, Layer) and leaf != "bias",
            isinstance(other, Layer) and source_leaf != "bias",
        ]
        if not any(packed):
            tensor = mine._parameters.get(leaf)
            if not held or (tensor is not None and tensor is other._parameters.get(source_leaf)):
                tied[target] = source
        elif all(packed) and mine is not other:
            assert isinstance(mine, Layer)
            assert isinstance(other, Layer)
            theirs = other.named_tensors()
            names = shared_tensors(mine, other)
            if all(mine.named_tensors()[name] is theirs[name] for name in names):
                tied.update({f"{first}.{name}": f"{second}.{name}" for name in names})
    for group in tied_groups(model):  # and those that only lowbit tied
        root = next((name for name in group if not any(t.startswith(name + ".") for t in tied)), group[0])
        for other in group:
            if other != root and not any(t.startswith(other + ".") for t in tied):
                names = shared_tensors(modules[root], modules[other])
                tied.update({f"{other}.{name}": f"{root}.{name}" for name in names})
    for name, part in _submodels(model):
        prefix = f"{name}." if name else ""
        inside = {
            target.removeprefix(prefix): source.removeprefix(prefix)
            for target, source in tied.items()
            if target.startswith(prefix) and source.startswith(prefix)
        }
        part.all_tied_weights_keys = dict(inside)
        part._tied_weights_keys = inside


def _declared(model: Any) -> dict[str, str]:
    """The ties that the classes declare, as far as their names are those of parameters now."""
    for _, part in _submodels(model):
        part.__dict__.pop("_tied_weights_keys", None)
    try:
        declared: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    except ValueError:  # a pattern for float weights only, all of which are packed
        return {}
    return declared


# -------------------------------------------------------------------------------------------- names and files


@dataclass
class Match:
    """How a checkpoint's names correspond to a model's.

    Attributes:
        names: name in the model's state_dict -> name in the checkpoint.
        unexpected: what the model has no place for: the model's name it would have -> name in the checkpoint.
        transformed: model names that transformers computes from several tensors or by an operation -> the names of
            those in the checkpoint.
    """

    names: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, list[str]] = field(default_factory=dict)


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions: list[Any] = get_model_conversion_mapping(model)
    return conversions


def match(model: Any, checkpoint: Iterable[str], conversions: list[Any] | None = None) -> Match:
    """Match names as transformers' loader does: its renamings, the base model's prefix added or removed."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if conversions is None:
        conversions = _conversions(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = Match()
    for key in checkpoint:
        name, operation = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, operation = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            found.unexpected[name] = key
        elif operation is not None:
            found.transformed.setdefault(name, []).append(key)
        else:
            found.names[name] = key
    return found


def check(model: Any, checkpoint: Checkpoint, found: Match, saved: Sequence[str] | None = None) -> None:
    """Compare the headers with a model whose layers were swapped in; raises ``ValueError`` naming file and tensor.

    Packed layers must find exactly their tensors. For the rest, loading the class that was saved is strict as
    well; another class (a base model, another head) may leave tensors out or start new ones, as in
    transformers.
    """
    provided = set(found.names) | set(found.transformed)
    tied = {**model.all_tied_weights_keys}
    for target, source in tied.items():
        if {target, source} & provided:
            provided |= {target, source}
    same_class = _same_class(model, saved)
    packed = layers(model, duplicates=True)
    ignored = "|".join(model._keys_to_ignore_on_load_missing or ()) or "(?!)"
    folder = next(iter(checkpoint.entries.values())).file.parent if checkpoint.entries else "the checkpoint"
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        # a head that was packed only because its weight is tied starts with a new bias
        is_new = leaf == "bias" and f"{owner}.packed" not in found.names
        mandatory = (owner in packed and not is_new) or (same_class and re.search(ignored, name) is None)
        if mandatory and name not in provided:
            raise ValueError(f"{folder}: tensor {name!r} is missing: {tensor.dtype} {list(tensor.shape)} is required")
    ignored = _left_out(model)
    for name, key in found.unexpected.items():
        file = checkpoint.entries[key].file
        if _is_guard(name, checkpoint.entries[key]) and (name == NOTICE or name.rpartition(".")[0] in packed):
            continue
        if name.rpartition(".")[0] in packed:
            raise ValueError(f"{file}: tensor {key!r} does not belong to the described format of its layer")
        if same_class and re.search(ignored, name) is None:
            raise ValueError(f"{file}: tensor {key!r} belongs to no module of {type(model).__name__}")
    stream.check_shapes(model, checkpoint, found.names)


def _left_out(model: Any) -> str:
    """A pattern of the names of tensors that transformers leaves out without a word, as its loader has it."""
    buffers = [name for name, _ in model.named_buffers()]
    more = {  # those that are no longer saved, and may have another owner than in the files
        r"rotary_emb\.inv_freq": any(name.endswith("rotary_emb.inv_freq") for name in buffers),
        r"(^|\.)position_ids$": any(name.endswith("position_ids") for name in buffers),
    }
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *(p for p, wanted in more.items() if wanted)]
    return "|".join(f"({pattern})" for pattern in patterns) or "(?!)"


def check_float(model: Any, entries: Mapping[str, Entry], found: Match) -> None:
    """Check the headers of a *float* model: a tensor that no module takes may belong to a quantized format.

    What transformers leaves out without a word is left out. So is what belongs to a module that ``model`` does not
    have, such as a head, with a warning.

    Raises:
        ValueError: naming file, tensor and format: a tensor beside the weight of a module that does not take it, one
            in the model's layers with the name of a scale or of codes, or a weight that is not stored in float16,
            bfloat16, float32 or float64.
    """
    state, cls, prefix = model.state_dict(), type(model).__name__, model.base_model_prefix + "."
    buffers = {name for name, _ in model.named_buffers()}
    children = {name for name, _ in model.named_children()}
    owners = {name for name, m in model.named_modules(remove_duplicate=False) if m._parameters and name} | set(state)
    ignored, left_out = _left_out(model), []
    for name, key in found.unexpected.items():
        names = (name, name.removeprefix(prefix), prefix + name)  # a base model's file, or a file of a base model
        if re.search(ignored, name) or buffers.intersection(names):
            continue
        owner, _, leaf = name.rpartition(".")
        sign = foreign.sign_of(leaf)
        beside = any(n.rpartition(".")[0] in owners or any(n.startswith(f"{t}_") for t in state) for n in names)
        if beside or (sign is not None and any(n.partition(".")[0] in children for n in names[:2])):
            kind = f", as {sign} has it" if sign else ""
            raise ValueError(
                f"{entries[key].file}: tensor {key!r} ({_dtype(entries[key])}) of layer "
                f"{owner.removesuffix('.weight')!r} belongs to no module of {cls}: the folder is not a plain float "
                f"model{kind}. lowbit does not read other quantized formats: give the float model"
            )
        left_out.append(key)
    for name, keys in [*((name, [key]) for name, key in found.names.items()), *found.transformed.items()]:
        for key in keys:
            if state[name].is_floating_point() and entries[key].dtype not in foreign.FLOATS:
                raise ValueError(
                    f"{entries[key].file}: tensor {key!r} is stored as {_dtype(entries[key])}: {cls} has a float "
                    "tensor there. lowbit does not read quantized formats of other libraries: give the float model"
                )
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(f"left out, {cls} has no module for it: {', '.join(left_out[:5])}{more}", stacklevel=2)


def _dtype(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _same_class(model: Any, saved: Sequence[str] | None) -> bool:
    """Whether ``model`` is of the class that was saved: one of ``saved``, or of what its own config says."""
    return type(model).__name__ in _saved_classes(model, saved)


def _saved_classes(model: Any, saved: Sequence[str] | None) -> Sequence[str]:
    return saved or model.config.architectures or ()


def _apply(model: Any, described: Metadata, saved: Sequence[str] | None = None) -> None:
    """Swap the described layers into a transformers skeleton, under the names this class has for them."""
    described = described.renamed(_names_in(model, described, saved))
    if not _same_class(model, saved):
        described = _with_tied_partners(model, described)
    plan = _dtype_plan(model)
    wanted = model.config.dtype

    def dtype_of(name: str, saved: torch.dtype) -> torch.dtype:
        return _kept_dtype(plan, f"{name}.weight") or wanted or saved

    apply(model, described, dtype_of=dtype_of)


def _forget_kept_dtypes(model: Any, packed: Iterable[str]) -> None:
    # versions before 5.21 would cast every tensor of the modules that they keep in float32, codes too
    names = [f"{name}.weight" for name in packed]
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "dtype_plan"):
        kept = getattr(model, attribute, None)
        if kept:
            free = [p for p in kept if not any(re.search(p.replace("*", ".*"), name) for name in names)]
            setattr(model, attribute, {p: kept[p] for p in free} if isinstance(kept, dict) else type(kept)(free))


def _dtype_plan(model: Any) -> dict[str, torch.dtype]:
    plan: dict[str, torch.dtype] = (
        model._get_dtype_plan(model.config.dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan  # 5.0
    )
    return plan


def _kept_dtype(plan: dict[str, torch.dtype], name: str) -> torch.dtype | None:
    # transformers keeps some modules in float32 whatever the dtype of the model
    return next((dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name)), None)


def _names_in(model: Any, described: Metadata, saved: Sequence[str] | None = None) -> dict[str, str]:
    """Name of each described layer -> its name in ``model``, which may be a base model or have another head.

    A layer may be missing only with everything around it (a head, a decoder) and only from another class than
    the one that was saved: a layer that silently stayed float would run on random weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix, same_class = model.base_model_prefix + ".", _same_class(model, saved)
    names: dict[str, str] = {}
    missing = []
    for name in described.layers:
        options = (name, name.removeprefix(prefix), prefix + name)
        found = next((n for n in options if place_of(modules, n) is not None), None)
        if found is not None:
            names[name] = found
        elif same_class or any("." in n and n.rpartition(".")[0] in modules for n in options[:2]):
            missing.append(name)
    has_base = hasattr(model, model.base_model_prefix)
    is_related = same_class or (names and not has_base) or not any("." in name for name in described.layers)
    if not missing and not is_related and not any(name.startswith(prefix) for name in names.values()):
        missing = list(described.layers)[:1]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no layer {missing[0]!r}: "
            f"the packed model was saved from {', '.join(_saved_classes(model, saved)) or 'another class'}"
        )
    return names


def _with_tied_partners(model: Any, described: Metadata) -> Metadata:
    """Describe also the new layers that this class ties to described ones, such as a head on a base model."""
    configs, tied = dict(described.layers), [list(group) for group in described.tied]
    for pair in model.all_tied_weights_keys.items():
        names = [name.removesuffix(".weight") for name in pair]
        known = [name for name in names if name in described.layers]
        if len(known) != 1 or any(name in described.skipped for name in names):
            continue
        (partner,) = (name for name in names if name not in known)
        module = model.get_submodule(partner)
        like = configs[known[0]]
        is_embedding = isinstance(module, nn.Embedding)
        made = layer_class(like.layer_class.family, "embedding" if is_embedding else "linear")
        bias = not is_embedding and module.bias is not None
        extras = embedding_extras(module) if is_embedding else {}
        if extras is None:  # a forward of its own: its weight is tied, and float
            continue
        extras = made.check_extras(bias, extras)
        config = LayerConfig(made, like.format.with_activation(ActivationSpec()), bias, like.dtype, extras)
        configs[partner] = config
        group = next((group for group in tied if known[0] in group), None)
        if group is None:
            tied.append([known[0], partner])
        else:
            group.append(partner)
    return replace(described, layers=configs, tied=tuple(tuple(group) for group in tied))


# ------------------------------------------------------------------------------------------------- loading


def skeleton(folder: Path) -> Any | None:
    """The model named in ``config.json``, parameters on meta, buffers real; ``None`` for an unknown class."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        return None
    with stream.empty_parameters():
        model = cls._from_config(config)
    return model


def load(folder: Path, model: Any | None, device: torch.device | str) -> Any:
    """:func:`lowbit.load` for a transformers folder: skeleton, swap, check headers, then stream tensors."""
    import transformers
    from transformers.modeling_utils import PreTrainedModel

    file = folder / "config.json"
    declared = foreign.declared(folder)
    if declared is not None:
        raise declared.error()
    description = read_json(file).get("quantization_config")
    if not description:
        raise ValueError(
            f"{folder} holds a float model: {file.name} has no quantization_config with quant_method 'lowbit'. "
            "lowbit.convert_folder converts it; or load it with from_pretrained and call lowbit.convert"
        )
    if not isinstance(description, dict) or description.get("quant_method") != METHOD:
        raise ValueError(f"{file}: quantization_config must have quant_method 'lowbit': got {description!r:.200}")
    try:
        described = LowbitConfig(**description).metadata
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    assert described is not None
    checkpoint, saved = Checkpoint.of_folder(folder), read_json(file).get("architectures") or ()
    if model is None:
        model = skeleton(folder)
        if model is None:
            raise ValueError(
                f"{file}: architectures must name a class of transformers: "
                "a model with code of its own is loaded by from_pretrained"
            )
        if match(model, checkpoint).transformed:
            return type(model).from_pretrained(folder, dtype="auto").to(device)
    elif not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{folder} holds a {', '.join(saved) or 'model'} of transformers: it cannot be loaded into a "
            f"{type(model).__name__}. Call lowbit.load(folder), which builds the model itself"
        )
    with stream.unchanged_on_error(model):
        _fill(model, described, checkpoint, device, saved)
    _mark(model)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _fill(
    model: Any, described: Metadata, checkpoint: Checkpoint, device: torch.device | str, saved: Sequence[str]
) -> None:
    _apply(model, described, saved)
    retie(model, held=False)
    found = match(model, checkpoint)
    if found.transformed:
        raise ValueError(f"the tensors of the folder do not map one to one to {type(model).__name__}")
    check(model, checkpoint, found, saved)
    stream.fill(model, checkpoint, found.names, device)
    model.tie_weights(recompute_mapping=False)
    stream.check_complete(model)
    stream.validate(model, owned=True)
    train_again(model, described.renamed(_names_in(model, described, saved)))
    _move_rest(model, device)


def _move_rest(model: nn.Module, device: torch.device | str) -> None:
    """What no file holds, such as buffers that are not saved: to ``device``, where all tensors that were read are."""
    for module in model.modules():
        for parameter in module._parameters.values():
            moved = None if parameter is None else parameter.data.to(device)
            if parameter is not None and moved is not None and moved.device != parameter.device:
                parameter.data = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def load_float(folder: Path) -> Any:
    """The float model of ``folder``, all of it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{folder / 'config.json'}: architectures must name a class of transformers: got {name!r}")
    model, entries = skeleton(folder), foreign.headers(folder)
    check_float(model, entries, match(model, entries))
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: tensor {missing[0]!r} of {name} is missing ({len(missing)} in all)")
    return model


def open_float(folder: Path, checkpoint: Checkpoint) -> FloatFolder | None:
    """The skeleton of the float model; ``None`` for an unknown class, or where tensors are computed from several."""
    model = skeleton(folder)
    if model is None:
        return None
    found = match(model, checkpoint)
    if found.transformed:
        return None
    check_float(model, checkpoint.entries, found)
    for target, source in model.all_tied_weights_keys.items():
        key = found.names.get(source) or found.names.get(target)
        if key is not None:
            found.names[target] = found.names[source] = key
    return FloatFolder(model, found.names)


class FloatFolder(libraries.FloatFolder):
    """A transformers model on meta, and the names of its tensors in the files."""

    model: Any

    def __init__(self, model: Any, names: dict[str, str]) -> None:
        self.model, self.names = model, names
        self._kept = _dtype_plan(model)
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The model's dtype, or float32 where transformers keeps it so."""
        return _kept_dtype(self._kept, name) or self._dtypes[name]

    def retie(self) -> None:
        retie(self.model, held=False)

    def finish(self) -> nn.Module:
        self.model.tie_weights(recompute_mapping=False)
        stream.check_complete(self.model)
        _mark(self.model)
        return self.model.eval()  # type: ignore[no-any-return]
