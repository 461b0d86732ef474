"""lowbit: compressed transformer models made real, small and fast.

    model = lowbit.convert(model)                                        # trained quantized: swap what was trained
    model = lowbit.convert(model, lowbit.Packed(bits=4, group_size=64))  # float: quantize, then swap
    print(lowbit.report(model))
    lowbit.save(model, "folder"); model = lowbit.load("folder")
"""

from lowbit import compat, train
from lowbit.backends import registry
from lowbit.backends.invariance import batch_invariant
from lowbit.backends.registry import backends, use_backend
from lowbit.checkpoint import convert_folder, export, load, save
from lowbit.codebook.format import Codebook, CodebookFormat, CodebookWeight
from lowbit.codebook.lossless import codebook_of
from lowbit.codebook.module import CodebookEmbedding, CodebookExperts, CodebookLinear
from lowbit.core.quantizer import Quantizer, Statistics
from lowbit.core.quantizer import register as register_quantizer
from lowbit.core.version import VERSION
from lowbit.integrations import averaging as _averaging
from lowbit.integrations import bitsandbytes as _bitsandbytes
from lowbit.integrations import experts as _experts
from lowbit.integrations import peft as _peft
from lowbit.integrations import savers as _savers
from lowbit.integrations import torch_ao as _torch_ao
from lowbit.integrations import transformers as _transformers
from lowbit.kron.format import Kronecker, KroneckerFormat, KroneckerWeight
from lowbit.kron.module import KroneckerEmbedding, KroneckerExperts, KroneckerLinear
from lowbit.model.convert import convert, dequantize
from lowbit.model.experts import ExpertStack, register_experts
from lowbit.model.report import Report, report
from lowbit.model.sources import Source, register_source
from lowbit.model.warmup import tune, warmup
from lowbit.nn.layer import freeze, make_trainable
from lowbit.packed.format import Packed, PackedFormat, PackedWeight
from lowbit.packed.module import PackedEmbedding, PackedExperts, PackedLinear
from lowbit.quality.budget import BudgetPlan, plan
from lowbit.quality.evaluate import Evaluation, evaluate

__version__ = VERSION
__all__ = [
    "BudgetPlan", "Codebook", "CodebookEmbedding", "CodebookExperts", "CodebookFormat", "CodebookLinear",
    "CodebookWeight", "Evaluation", "ExpertStack", "Kronecker", "KroneckerEmbedding", "KroneckerExperts",
    "KroneckerFormat", "KroneckerLinear", "KroneckerWeight", "Packed", "PackedEmbedding", "PackedExperts",
    "PackedFormat", "PackedLinear", "PackedWeight", "Quantizer", "Report", "Source", "Statistics", "backends",
    "batch_invariant", "codebook_of", "convert", "convert_folder", "dequantize", "evaluate", "export", "freeze", "load",
    "make_trainable", "plan", "register_experts", "register_quantizer", "register_source", "report", "save", "train",
    "tune", "use_backend", "warmup",
]  # fmt: skip

registry.initialize()
_averaging.register()
_bitsandbytes.register()
_experts.register()
_peft.register()
_savers.register()
_torch_ao.register()
_transformers.register()
compat.install()
