"""lowbit: compressed transformer models made real, small and fast.

    model = lowbit.convert(model)                                        # trained quantized: swap what was trained
    model = lowbit.convert(model, lowbit.Packed(bits=4, group_size=64))  # float: quantize, then swap
    print(lowbit.report(model))
    lowbit.save(model, "folder"); model = lowbit.load("folder")
"""

from lowbit import dispatch
from lowbit.checkpoint import convert_folder, load, save
from lowbit.convert import convert, dequantize
from lowbit.dispatch import backends, use_backend
from lowbit.integrations import torch_ao as _torch_ao
from lowbit.integrations import transformers as _transformers
from lowbit.packed.format import Packed, PackedFormat
from lowbit.packed.module import PackedEmbedding, PackedLinear
from lowbit.packed.quantize import Quantized
from lowbit.report import Report, report
from lowbit.sources import Source, register_source

__version__ = "0.1.0"
__all__ = [
    "Packed", "PackedEmbedding", "PackedFormat", "PackedLinear", "Quantized", "Report", "Source", "backends",
    "convert", "convert_folder", "dequantize", "load", "register_source", "report", "save", "use_backend",
]  # fmt: skip

dispatch.initialize()
_torch_ao.register()
_transformers.register()
