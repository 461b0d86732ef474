"""What the Triton kernels of all families share: the layout of codes on a GPU, device functions, launching, tuning.

Nothing here imports triton when it is itself imported, except :mod:`lowbit.gpu.blocks`, which holds device functions.
"""
