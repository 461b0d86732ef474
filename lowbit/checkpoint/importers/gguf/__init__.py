"""GGUF, the files of llama.cpp: the container, and the types of its tensors. Nothing here knows a model.

:mod:`lowbit.integrations.gguf` puts the tensors of a file into a model of transformers.
"""
