"""Executes compiled PTX on the CPU: what a GPU would run, checked without one.

:func:`execute` runs one kernel of a PTX text, :func:`run_launch` a compiled
:class:`~lowbit.backends.triton.launch.Launch`. Every thread of a batch of blocks is a lane of numpy arrays: one
register is one array, and an instruction is executed for all lanes that stand at it. Known is what Triton
and nvcc emit for sm_80 and sm_90a matrix products; anything else is a :class:`Fault` that names it. An error of the
program is a Fault too, where the hardware would only give wrong numbers:

- an access out of bounds or misaligned; shared memory read before it is written; a register that is not written yet,
  or was computed from one in this thread, as an address, a condition, a stored value or an operand of a matrix product;
- two warps of a block that touch the same shared bytes, one of them writing, with no ``bar.sync`` between;
- shared bytes read while a ``cp.async`` to them is in flight; accumulators or operands of a ``wgmma`` touched, or its
  shared operands overwritten, before its ``wait_group``; its registers written since the last ``wgmma.fence``, or its
  shared operands stored since the last ``fence.proxy.async``.

A program with clusters, mbarriers or barriers of some warps runs on memory that knows what happens before what
(``clocks.py``) and with waits and bulk copies (``barriers.py``). More Faults are:

- two warps of a cluster that touch the same shared word, one of them writing, where neither knows of the other by a
  barrier; what a bulk copy brought read without a wait for its mbarrier; a bulk copy to what a warp may still read;
- an mbarrier used by a warp that does not know of its initialisation, or by a bulk copy with no fence; more arrivals
  than it waits for; a ``try_wait`` without a loop;
- threads that wait for each other (a deadlock); a block that ends while others, or copies, use its memory.

Not modelled: speed, caches, memory ordering between blocks, races inside a warp, bulk copies from shared memory and
to several blocks. Matrix instructions sum one instruction's products in float64 and round once, so they are a little
more precise than tensor cores.

The parts: ``values.py`` numbers, ``program.py`` text, ``memory.py``, ``machine.py`` and ``launch.py`` execution,
``instructions.py`` and ``matrices.py`` what instructions do.

References: NVIDIA, "PTX ISA", sections "Instruction Set" (semantics), "Warp Level Matrix Instructions" (fragments),
"Asynchronous Warpgroup Level Matrix Instructions" (descriptors, swizzling), "Parallel Synchronization and
Communication Instructions" (mbarriers, clusters), "Tensors" (boxes, swizzling).
"""

from lowbit.testing.ptx_emulator.barriers import TensorMap
from lowbit.testing.ptx_emulator.launch import Compiled, execute, run_launch
from lowbit.testing.ptx_emulator.machine import Statistics
from lowbit.testing.ptx_emulator.values import Fault

__all__ = ["Compiled", "Fault", "Statistics", "TensorMap", "execute", "run_launch"]
