"""Readers of folders in other libraries' quantized formats: what is stored stays as it is, bit for bit.

One file per format. ``folder.py`` is what they share: a folder is opened as the float model that it stands for, each
layer is read, packed and forgotten, and the other tensors follow.
"""

from functools import partial

from lowbit.checkpoint import foreign
from lowbit.checkpoint.importers import auto_round
from lowbit.checkpoint.importers.any_precision import AnyPrecision
from lowbit.checkpoint.importers.awq import Awq
from lowbit.checkpoint.importers.bitnet import BitNet
from lowbit.checkpoint.importers.bitsandbytes import BitsAndBytes
from lowbit.checkpoint.importers.compressed_tensors import CompressedTensors
from lowbit.checkpoint.importers.folder import read_folder
from lowbit.checkpoint.importers.fp8 import Fp8
from lowbit.checkpoint.importers.gptq import Gptq
from lowbit.checkpoint.importers.hqq import Hqq
from lowbit.checkpoint.importers.mlx import Mlx
from lowbit.checkpoint.importers.modelopt import Modelopt
from lowbit.checkpoint.importers.mxfp4 import Mxfp4
from lowbit.checkpoint.importers.quanto import Quanto
from lowbit.checkpoint.importers.squeezellm import SqueezeLlm
from lowbit.checkpoint.importers.torchao import TorchAo

READERS = (
    Gptq, Awq, CompressedTensors, Fp8, Mxfp4, Modelopt, BitsAndBytes, Hqq, TorchAo, BitNet, Quanto, Mlx, SqueezeLlm,
    AnyPrecision,
)  # fmt: skip

foreign.importers.update({reader.format: partial(read_folder, reader) for reader in READERS})
foreign.importers[auto_round.FORMAT] = partial(read_folder, auto_round.auto_round)
