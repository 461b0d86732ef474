"""What tests and benchmarks share, and what checks a backend, layout or kernel from outside the package.

- :mod:`~lowbit.testing.numerics`: the one tolerance rule, against float64 arithmetic.
- :mod:`~lowbit.testing.where`: every backend and ISA of this machine.
- :mod:`~lowbit.testing.packed_cases`, :mod:`~lowbit.testing.codebook_cases`, :mod:`~lowbit.testing.kron_cases`: the
  case lists: every format of a family × shapes, random weights, and their float64 oracles.
- :mod:`~lowbit.testing.interpreter`, :mod:`~lowbit.testing.ptx_emulator`: Triton kernels without a GPU, run in Triton's
  interpreter and as compiled PTX. They need triton.
- :mod:`~lowbit.testing.samples`: trained models and texts that some tests use. It needs pytest.

``import lowbit`` imports none of these.
"""
