"""vLLM serves saved folders: ``quantization.py`` is what vLLM calls, ``parts.py`` needs no vLLM."""
