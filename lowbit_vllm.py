"""The entry point ``vllm.general_plugins`` of lowbit: vLLM calls :func:`register` in each of its processes.

It stands outside of the package, so that serving any other model imports nothing of lowbit, and changes nothing.
"""

from __future__ import annotations

from typing import Any

METHOD = "lowbit"


def register() -> None:
    """Make the quantization method ``lowbit`` known to vLLM; called again, it does nothing."""
    from vllm.model_executor.layers import quantization

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    base: Any = quantization.QuantizationConfig

    class Lowbit(base):  # type: ignore[misc]
        """Stands for :class:`lowbit.integrations.vllm.quantization.LowbitConfig` until a folder needs it."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            from lowbit.integrations.vllm.quantization import LowbitConfig

            return LowbitConfig(config)

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 80

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            raise NotImplementedError("made by from_config")

    quantization.register_quantization_config(METHOD)(Lowbit)
