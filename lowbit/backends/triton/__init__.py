"""What the Triton kernels of all families share: the layout of codes on a GPU, device functions, launching, tuning.

``codes``, ``activations`` and ``float32_dot`` hold device functions: they alone import triton when they are imported.
"""
