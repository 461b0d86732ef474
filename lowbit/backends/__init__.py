"""Where ops run: the registry of backends, the layouts of codes, and one folder for each backend of the package."""

from lowbit.backends.cpu import backend as _cpu
from lowbit.backends.cuda import backend as _cuda
from lowbit.backends.triton import backend as _triton

__all__: list[str] = []
del _cpu, _cuda, _triton  # they are in the registry now
