"""Writers of packed models in formats of other libraries: what a format can hold is the same bits, the rest is refused.

One file per format, with an :class:`~lowbit.checkpoint.exporters.exporter.Exporter`.
"""

from lowbit.checkpoint.exporters.compressed_tensors import CompressedTensors
from lowbit.checkpoint.exporters.exporter import Exporter, register, register_later
from lowbit.checkpoint.exporters.exporter import export as export
from lowbit.checkpoint.exporters.floats import Floats
from lowbit.checkpoint.exporters.gptq import Gptq

for _exporter in (Floats(), CompressedTensors(), Gptq()):
    register(_exporter)


def _onnx() -> Exporter:
    from lowbit.checkpoint.exporters.onnx import Onnx

    return Onnx()


def _pt2() -> Exporter:
    from lowbit.checkpoint.exporters.pt2 import Pt2

    return Pt2()


register_later("onnx", _onnx)
register_later("pt2", _pt2)
