"""The quantization method ``lowbit`` of vLLM: what its layers, its loader and its models call.

Tensors are taken as vLLM's loader hands them over, one at a time, as the file has them. When the last one of a layer
is there, it is cut to this process's share; when all are loaded, fused layers are joined and the kernels' layout is
made, one layer at a time. Names inside vLLM that this file depends on were checked with 0.32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

from lowbit.checkpoint.metadata import parse
from lowbit.integrations.vllm.parts import (
    PLACES,
    STACKS,
    Description,
    FusedLinear,
    Part,
    block_of,
    cut_problem,
    file_patterns,
    rows_of,
)
from lowbit.nn.layer import LayerConfig, layer_class

METHOD = "lowbit"
_QKV = {"q": 0, "k": 1, "v": 2}
# Rows of these are put into another order while they are loaded, as far as vLLM knows the names of the tensors.
_REARRANGED = {
    "falcon": ("query_key_value",), "bloom": ("query_key_value",),
    "llama4": ("q_proj", "k_proj"), "llama4_text": ("q_proj", "k_proj"),
}  # fmt: skip
# What vLLM's models that give embeddings leave out on purpose.
_HEADS = {"pooler", "lm_head", "cls"}
# What fused layers consist of, for models that do not say it.
_PARTS = {QKVParallelLinear: ("q_proj", "k_proj", "v_proj"), MergedColumnParallelLinear: ("gate_proj", "up_proj")}


class LowbitConfig(QuantizationConfig):  # type: ignore[misc]
    """``quantization_config`` of a saved folder: which layers of vLLM's model are packed, and how.

    Raises ``ValueError`` for a description that is not valid, as :func:`lowbit.load` does.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        fields = {name: value for name, value in config.items() if name != "quant_method"}
        self.description = Description(parse(fields))
        self.methods: dict[str, Any] = {}  # by the name of a layer of the folder
        self._checked = False
        self._patterns = file_patterns(self.description)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowbitConfig:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.description.rename(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> Any:
        """What :func:`file_patterns` says."""
        return WeightsMapper(orig_to_new_regex=self._patterns)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            found = self.description.find(prefix)
            if found is None and not prefix:  # some models do not name their embeddings
                kind = "linear" if isinstance(layer, ParallelLMHead) else "embedding"
                found = self.description.of_shape(kind, layer.org_vocab_size, layer.embedding_dim, self.methods)
            return None if found is None else LowbitMethod(self, prefix, [found])
        if not isinstance(layer, LinearBase):
            return None
        names = self._parts(layer, prefix)
        found_names = [self.description.find(name) for name in names]
        if not any(found_names):
            return UnquantizedLinearMethod()
        self._refuse_rearranged(names)
        return LowbitMethod(self, prefix, [found or name for found, name in zip(found_names, names, strict=True)])

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        stacks = self.description.stacks
        prefix = prefix.removesuffix(".routed_experts")
        found = [self.description.stack_of(prefix, stack) for stack in STACKS]
        if not any(found) and block_of(prefix) not in map(block_of, stacks):
            return UnquantizedFusedMoEMethod(layer.moe_config)  # those of this block are float
        held = [None if name is None else self.description.layers[name] for name in found]
        problem = LowbitExperts.problem(layer, held)
        if problem is not None:
            raise ValueError(f"{found[0] or stacks[0]}: vLLM cannot run packed experts {problem}: "
                             "convert with skip=['*.experts*']")  # fmt: skip
        return LowbitExperts(self, layer.moe_config, dict(zip(STACKS, map(str, found), strict=True)))

    def _parts(self, layer: nn.Module, prefix: str) -> list[str]:
        """The names of the layers that ``layer`` consists of."""
        head, dot, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        if parts == [last] and self.description.find(prefix) is None:
            usual = next((parts for cls, parts in _PARTS.items() if isinstance(layer, cls)), ())
            if any(self.description.find(head + dot + part) for part in usual):
                parts = list(usual)
        return [head + dot + part for part in parts]

    def _refuse_rearranged(self, names: list[str]) -> None:
        config = get_current_vllm_config_or_none()
        model_type = None if config is None else config.model_config.hf_config.model_type
        for name in names:
            last = name.rpartition(".")[2]
            if last in _REARRANGED.get(str(model_type), ()):
                raise ValueError(f"{name}: vLLM puts the rows of this layer of a {model_type} into another order, "
                                 f"which it cannot do with packed ones: convert with skip=['*.{last}']")  # fmt: skip

    def check_all_served(self) -> None:
        """Raise ``ValueError`` naming the layers that vLLM's model has no place for."""
        if self._checked or get_pp_group().world_size > 1:
            return
        served = {*self.methods, *(other for name in self.methods for other in self.description.others(name))}
        config = get_current_vllm_config_or_none()
        pooling = config is not None and config.model_config.runner_type == "pooling"
        unused = {name for name in self.description.layers if pooling and _HEADS & set(name.split("."))}
        if missing := sorted(self.description.layers.keys() - served - unused):
            raise ValueError(f"vLLM's model has no packed layer {', '.join(missing[:5])} ({len(missing)} in all): "
                             "convert with skip=[...] of these")  # fmt: skip
        self._checked = True


class LowbitMethod(LinearMethodBase):  # type: ignore[misc]
    """Holds and runs the packed layers that one layer of vLLM stands for.

    ``names``: of its parts in the folder; those that the folder does not describe are float.
    """

    def __init__(self, config: LowbitConfig, prefix: str, names: list[str]) -> None:
        self.config, self.prefix, self.names = config, prefix, names
        self.loaded: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(names))}
        self.parts: dict[int, Part] = {}
        self.made = False
        config.methods.update(dict.fromkeys((n for n in names if n in config.description.layers), self))

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self.layer, self.dtype, self.here = layer, params_dtype, list(output_partition_sizes)
        if len(self.names) not in (1, len(self.here)):
            raise ValueError(f"{self.prefix}: vLLM joins {len(self.names)} layers into {len(self.here)} parts: "
                             f"convert with skip={self.names}")  # fmt: skip
        count = input_size // input_size_per_partition
        self.columns = (layer.tp_rank, count) if count > 1 else (0, 1)
        self._refuse_uncut(layer)
        types: dict[str, torch.dtype] = {"weight": params_dtype}  # of float parts; files have an empty one of others
        for name in self.names:
            config = self.config.description.layers.get(name)
            if config is not None:
                types |= {tensor: dtype for tensor, (_, dtype) in config.format.tensors().items()}
        for name, dtype in types.items():
            place = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(place, {"weight_loader": self._loader(name)})
            layer.register_parameter(name, place)
        self.places = tuple(types)

    def _refuse_uncut(self, layer: Any) -> None:
        """Raise ``ValueError`` naming a part of which this process cannot hold its share."""
        for i, name in enumerate(self.names):
            config = self.config.description.layers.get(name)
            here = sum(self.here) if len(self.names) == 1 else self.here[i]
            if config is not None and (why := cut_problem(config, here < config.rows, self.columns[1])):
                raise ValueError(f"{name}: with tensor_parallel_size={layer.tp_size}, {why}: "
                                 f"serve it with tensor_parallel_size=1, or convert with skip=[{name!r}]")  # fmt: skip

    def _loader(self, tensor_name: str) -> Callable[..., None]:
        def load(param: Any, loaded: Tensor, shard_id: Any = None) -> None:
            index = self._part(shard_id)
            if tensor_name == "weight" and loaded.numel() == 0:
                return
            if index in self.parts:
                raise ValueError(f"{self.names[index]}.{tensor_name}: vLLM loads it after its layer was complete")
            self.loaded[index][tensor_name] = loaded.detach().clone()
            wanted = self._wanted(index)
            if wanted <= self.loaded[index].keys():
                self._complete(index)

        return load

    def _part(self, shard_id: Any) -> int:
        """Which part of this layer vLLM's name of a shard means."""
        if (shard_id is None and len(self.names) == 1) or (shard_id == 0 and len(self.here) == 1):
            return 0
        index = _QKV.get(shard_id) if isinstance(shard_id, str) else shard_id
        if not isinstance(index, int) or len(self.names) == 1 or index not in range(len(self.names)):
            raise ValueError(f"{self.prefix}: vLLM loads the shard {shard_id!r} of it, which is none of its parts: "
                             f"convert with skip={self.names}")  # fmt: skip
        return index

    def _wanted(self, index: int) -> set[str]:
        config = self.config.description.layers.get(self.names[index])
        return {"weight"} if config is None else set(config.format.tensors())

    def _complete(self, index: int) -> None:
        """Cut what was loaded of a part to the share of this process."""
        name, layer = self.names[index], self.layer
        part = Part(name, self.config.description.layers.get(name), self.loaded[index])
        if isinstance(layer, VocabParallelEmbedding):
            first, last = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
            first = min(first, part.rows - 1)  # a process without rows has one, which nobody looks at
            rows = [slice(first, max(last, first + 1))]
        else:
            one = len(self.names) > 1 or len(self.here) == 1
            whole = [part.rows] if one else self._whole()
            try:
                rows = rows_of(whole, [self.here[index]] if one else self.here, layer.tp_rank, layer.tp_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self.parts[index] = part.share(rows, self.columns)
        self.loaded[index] = {}

    def _whole(self) -> list[int]:
        """Rows of the blocks of a layer that is fused in the file already."""
        layer = self.layer
        if isinstance(layer, QKVParallelLinear):
            kv = layer.total_num_kv_heads
            return [layer.total_num_heads * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
        return list(layer.output_sizes)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.made:
            return
        self.config.check_all_served()
        device = layer.weight.device
        if isinstance(layer, VocabParallelEmbedding):
            self._make_vocabulary(layer, device)
        else:
            for index in self.loaded:
                self._require_complete(index)
            layer.lowbit = FusedLinear([self.parts[i] for i in self.loaded], self.dtype).to(device)
        for name in self.places:
            if name != "weight":  # others ask for its dtype and device
                delattr(layer, name)
        self.parts, self.made = {}, True

    def _require_complete(self, index: int) -> None:
        if index not in self.parts:
            missing = sorted(self._wanted(index) - self.loaded[index].keys())
            raise ValueError(f"{self.names[index]}.{missing[0]} is missing: the folder has no such tensor")

    def _make_vocabulary(self, layer: Any, device: torch.device) -> None:
        """Embedding or head of a vocabulary; what is tied shares its tensors, whichever is made first."""
        description, name = self.config.description, self.names[0]
        config, others = description.layers[name], description.others(name)
        made: Any
        if 0 not in self.parts and (source := self._tied_layer(layer)) is not None:
            made = _sharing(source, config.layer_class.kind, config.format, self.dtype)
            for tensor_name, tensor in self.loaded[0].items():
                made.store({tensor_name: tensor})
            made.validate(name)
        else:
            self._require_complete(0)
            made = self.parts[0].module(config.layer_class.kind, self.dtype)
        layer.lowbit_vocabulary = made.prepare().to(device)
        heads = [other for other in others if description.layers[other].layer_class.kind == "linear"]
        if config.layer_class.kind == "linear":
            layer.lowbit = FusedLinear.of(made)
        elif heads and not any(head in self.config.methods for head in heads):
            # this model of vLLM has no head, and multiplies by its embedding
            head = description.layers[heads[0]]
            if "x_scale" in head.format.tensors():
                raise ValueError(f"{heads[0]}: {head.format.describe()}: vLLM's model has no such layer")
            layer.lowbit = FusedLinear.of(_sharing(made, "linear", head.format, self.dtype).prepare())

    def _tied_layer(self, layer: Any) -> Any:
        """A layer that has the tensors that this one is tied to; ``None``: there is none."""
        for other in self.config.description.others(self.names[0]):
            method = self.config.methods.get(other)
            if method is None or not isinstance(method.layer, VocabParallelEmbedding):
                continue
            if method.layer.shard_indices == layer.shard_indices and (method.made or 0 in method.parts):
                method.process_weights_after_loading(method.layer)
                return method.layer.lowbit_vocabulary
        return None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(layer, VocabParallelEmbedding) and bias is not None:
            bias = bias[: layer.lowbit.sizes[0]]  # vLLM pads vocabularies
        y: Tensor = layer.lowbit(x, bias)
        if isinstance(layer, VocabParallelEmbedding) and layer.tp_size > 1:
            padding = layer.num_embeddings_per_partition - y.shape[-1]
            y = nn.functional.pad(y, (0, padding))  # all processes' shares have one width
        return y

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        y: Tensor = layer.lowbit_vocabulary(input_)
        return y

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        return layer  # what is tied in the folder is tied here


class LowbitExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """Holds and runs the packed experts of a layer; ``names``: of its stacks in the folder.

        y = sum_j w[:, j] * down(act(gate(x)) * up(x)),    gate and up one below the other in ``gate_up_proj``

    Processes share the features between ``gate_up_proj`` and ``down_proj``: each gives a summand of y.
    """

    activations: ClassVar[dict[Any, Callable[[Tensor], Tensor]]] = {
        MoEActivation.SILU: nn.functional.silu,
        MoEActivation.GELU: nn.functional.gelu,
        MoEActivation.GELU_TANH: functools.partial(nn.functional.gelu, approximate="tanh"),
    }

    @classmethod
    def problem(cls, layer: Any, found: Sequence[LayerConfig | None]) -> str | None:
        """Why such a layer cannot be run; ``None``: it can."""
        up, down = found
        if up is None or down is None:
            return f"that are not {' and '.join(STACKS)} of {layer.layer_name.removesuffix('.routed_experts')}"
        moe = layer.moe_config
        parallel = moe.moe_parallel_config
        if layer.local_num_experts != layer.global_num_experts or parallel.use_ep or parallel.dp_size > 1:
            return "divided by experts or by requests: use tensor_parallel_size"
        if layer.activation not in cls.activations:
            return f"with the activation {layer.activation.value}"
        if moe.has_bias:
            return "with biases"
        limits = layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
        if layer.apply_router_weight_on_input or any(limit is not None for limit in limits):
            return "of this class"
        if type(layer).__name__ == "TransformersRoutedExperts" and _hidden_activation() not in ("silu", "swish", None):
            return f"with the activation {_hidden_activation()} in transformers' own code, which it runs with silu"
        world, rows = parallel.tp_size, parallel.tp_size > 1
        inner, hidden = moe.intermediate_size_per_partition * world, moe.hidden_dim
        for stack, config, n, k in zip(STACKS, (up, down), (2 * inner, hidden), (hidden, inner), strict=True):
            count, format = config.extras["num_experts"], cast(Any, config.format)
            if (count, config.rows // count, format.in_features) != (moe.num_experts, n, k):
                return (f"of other sizes than its own: {stack} is {[count, config.rows // count, format.in_features]}, "
                        f"must be {[moe.num_experts, n, k]}")  # fmt: skip
            why = cut_problem(config, rows, 1) if stack == "gate_up_proj" else cut_problem(config, False, world)
            if why is not None:
                return f"with tensor_parallel_size={world}: of {stack}, {why}"
        return None

    def __init__(self, config: LowbitConfig, moe: Any, names: dict[str, str]) -> None:
        super().__init__(moe)
        self.config, self.names = config, names
        self.loaded: dict[str, dict[str, Tensor]] = {stack: {} for stack in names}
        self.parts: dict[str, Part] = {}
        config.methods.update(dict.fromkeys(names.values(), self))

    def create_weights(self, layer: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        self.dtype = params_dtype
        layer.load_weights = self._load
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        for place, (stack, tensor_name) in self._places().items():
            dtype = self._tensors(stack)[tensor_name][1]
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": functools.partial(self._store, stack, tensor_name)})
            layer.register_parameter(place, parameter)

    def _tensors(self, stack: str) -> dict[str, Any]:
        """Shape and dtype of the tensors of a stack, by name."""
        found: dict[str, Any] = self.config.description.layers[self.names[stack]].format.tensors()
        return found

    def _places(self) -> dict[str, tuple[str, str]]:
        """Stack and name of each tensor, by what vLLM's loaders call it."""
        return {f"{PLACES[stack]}_{name}": (stack, name) for stack in self.names for name in self._tensors(stack)}

    def _load(self, weights: Any) -> Any:
        """For loaders that leave the tensors of experts to their layer."""
        places = self._places()
        for name, loaded in weights:
            place = places.get(name.removeprefix("routed_experts."))
            if place is None:
                raise ValueError(f"{name}: the packed experts {', '.join(self.names.values())} have no such tensor")
            self._store(*place, None, loaded)
            yield name

    def _store(self, stack: str, tensor_name: str, param: Any, loaded: Tensor) -> None:
        held = self.loaded[stack]
        held[tensor_name] = loaded.detach().clone()
        if held.keys() == self._tensors(stack).keys():
            name = self.names[stack]
            self.parts[stack] = self._share(stack, Part(name, self.config.description.layers[name], held))
            self.loaded[stack] = {}

    def _share(self, stack: str, part: Part) -> Part:
        """What this process holds of a stack."""
        rank, world = self.moe.moe_parallel_config.tp_rank, self.moe.moe_parallel_config.tp_size
        if world == 1:
            return part
        if stack == "down_proj":
            return part.share([slice(0, part.rows)], (rank, world))
        blocks = 2 * self.moe.num_experts  # gate and up of each expert
        n = part.rows // blocks // world
        return part.share([slice((i * world + rank) * n, (i * world + rank + 1) * n) for i in range(blocks)])

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check_all_served()
        for stack, name in self.names.items():
            if stack not in self.parts:
                missing = sorted(self._tensors(stack).keys() - self.loaded[stack].keys())
                raise ValueError(f"{name}.{missing[0]} is missing: the folder has no such tensor")
            made = self.parts.pop(stack).module("experts", self.dtype)
            setattr(layer, stack, made.prepare().to(layer.weight.device))
        for place in self._places():
            delattr(layer, place)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        ids = topk_ids.reshape(-1).long()
        gate, up = layer.gate_up_proj(x, ids).chunk(2, -1)
        y = layer.down_proj(self.activations[layer.activation](gate) * up, ids)
        y = (y * topk_weights.reshape(-1, 1)).view(*topk_ids.shape, -1).sum(1)
        result: Tensor = y.to(x.dtype)
        return result


def _hidden_activation() -> str | None:
    config = get_current_vllm_config_or_none()
    text = None if config is None else config.model_config.hf_text_config
    return getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)


def _sharing(source: Any, kind: str, format: Any, dtype: torch.dtype) -> Any:
    """A layer with the weight of ``source``, which takes x as ``format`` says."""
    held = source.format.with_activation(format.activation)
    layer = layer_class(source.family, kind)(held, False, dtype, "meta")
    layer.share_weight(source)
    return layer


def _offer_embeddings() -> None:
    """Let models that make their embeddings without a quantization method, as Gemma and BERT, have packed ones.

    In processes that serve a folder of lowbit only; embeddings that it does not describe are made as before.
    """
    original: Any = VocabParallelEmbedding.__init__
    if getattr(original, "_lowbit", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        config = get_current_vllm_config_or_none()
        ours = None if config is None else config.quant_config
        if isinstance(ours, LowbitConfig) and given.arguments["quant_config"] is None:
            given.arguments["quant_config"] = ours
        original(*given.args, **given.kwargs)

    init._lowbit = True  # type: ignore[attr-defined]
    VocabParallelEmbedding.__init__ = init


def _rename_in_files() -> None:
    """Let models with loaders of their own, as DeepSeek's, have the names of :func:`file_patterns`."""
    original: Any = DefaultModelLoader.get_all_weights
    if getattr(original, "_lowbit", False):
        return

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Any:
        weights = original(self, model_config, model)
        configs = (getattr(module, "quant_config", None) for module in model.modules())
        ours = next((config for config in configs if isinstance(config, LowbitConfig)), None)
        return weights if ours is None else ours.get_checkpoint_weight_mapper().apply(weights)

    get_all_weights._lowbit = True  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights


_rename_in_files()
_offer_embeddings()  # here, as workers of vLLM unpickle a config that another process made
