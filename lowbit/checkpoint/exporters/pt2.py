"""``.pt2``: a package of AOTInductor, which runs without transformers and without the model's Python code.

    torch._inductor.aoti_load_package(path)(input_ids, attention_mask)    equals    model(input_ids, attention_mask)

with any batch and length. Inductor compiles the graph to C++; the ops of packed layers stay calls of the dispatcher, to
which ``import lowbit`` gives the kernels. The tensors of a layer are in the package as the layer holds them, prepared
for the kernels of this machine; the number of their layout is in the graph.

Source: docs.pytorch.org (torch.export, torch.compiler_aot_inductor).
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch.export import Dim
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from lowbit.checkpoint.exporters.exporter import Exporter
from lowbit.checkpoint.exporters.graph import Graph, dynamic_inputs, require_input_ids
from lowbit.model.surgery import float_modules, put
from lowbit.nn.layer import Layer, layers


class Pt2(Exporter):
    format = "pt2"
    suffix = ".pt2"
    can_share = True  # the package has each tensor once
    round_trip = "not read; outputs to 1e-5"

    def problem(self, name: str, layer: Layer) -> str | None:
        if layer.device.type == "meta":
            return "must have its tensors in memory: they are on meta"
        if layer.trained():
            return f"must be frozen (lowbit.freeze): its {', '.join(layer.trained())} are trained"
        return None

    def check(self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], tokenizer: Any) -> None:
        super().check(model, kept, floats, tokenizer)
        require_input_ids(model, self.format)
        builder = importlib.import_module("torch._inductor.cpp_builder")
        try:
            builder.get_cpp_compiler()
        except Exception as error:  # a class of inductor's own
            raise ValueError(f"to export as 'pt2', a C++ compiler must be installed: {_first_line(error)}") from error

    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any
    ) -> None:
        # modules of its own, the tensors are the model's
        twin: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        for name, module in float_modules({name: layers(twin)[name] for name in floats}).items():
            put(twin, name, module)
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program_of(twin), package_path=str(target))


def program_of(model: Any) -> torch.export.ExportedProgram:
    """The graph of a model, for any batch, and for any length that the model has positions for.

    Raises ``ValueError`` naming the class and torch.export's reason: what depends on the data, say, or on one length.
    """
    inputs, sizes = dynamic_inputs(next(model.parameters()).device)
    graph = Graph(model).eval()
    try:
        try:
            return torch.export.export(graph, inputs, dynamic_shapes=sizes)
        except UserError as error:
            if "Suggested fixes" not in str(error):
                raise
            narrower: Any = refine_dynamic_shapes_from_suggested_fixes(str(error), [*sizes])
            if any(not isinstance(size, Dim) for own in narrower for size in own.values()):  # one size alone
                raise
            return torch.export.export(graph, inputs, dynamic_shapes=narrower)
    except Exception as error:  # of as many classes as there are reasons
        raise ValueError(f"{type(model).__name__} must be a graph for torch.export to be written as 'pt2': "
                         f"{_first_line(error)}") from error  # fmt: skip


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.300}"
