"""The CUDA C++ kernels on the CPU: compiled by g++ on ``csrc/cuda/emulated/emulation.h``, called by a pybind11 module.

The module is for tests alone: ninja builds it when a test first asks for it, into ``build/cuda_emulated``. A planted
bug is a substitution in a copy of the sources, compiled the same way.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.triton.tiles import tile, tiles_per_row
from lowbit.testing import cuda_sources
from lowbit.testing.kron_cases import Factor as KronFactor
from lowbit.testing.kron_cases import Weight as KronWeight
from lowbit.testing.packed_cases import Weight

ROOT = Path(__file__).resolve().parents[2]
# tests/sanitize.py: instrumented, of some widths, compiled fast
SANITIZE, SANITIZED = "LOWBIT_EMULATED_SANITIZE", os.environ.get("LOWBIT_EMULATED_SANITIZE", "")
WIDTHS = tuple(map(int, SANITIZED.split(","))) if SANITIZED else tuple(range(1, 9))
NAME = "lowbit_cuda_emulated"
BUILD = ROOT / "build" / "cuda_emulated"
KERNELS = BUILD / ("sanitized" if SANITIZED else "kernels")
FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
    "-DLOWBIT_EMULATED",
)  # fmt: skip
INSTRUMENTED = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
RULES = """\
rule compile
  command = g++ $flags {flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared $in -o $out
"""


def why_not() -> str | None:
    """Why the module cannot be built here; None: it can."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "not run from a source checkout"
    if shutil.which("g++") is None:
        return "no g++"
    if ninja() is None:
        return "no ninja"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h"
    return None


def ninja() -> str | None:
    try:
        import ninja as package  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return shutil.which("ninja")
    return str(Path(package.BIN_DIR, "ninja"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Tests run in several processes: one of them builds, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(folder: Path, edges: str, flags: str) -> None:
    """Has ninja make ``edges`` in ``folder``, where nothing else is."""
    text = f"builddir = {folder}\n{RULES.format(flags=' '.join((*FLAGS, flags)))}{edges}"
    with locked(folder):
        (folder / "build.ninja").write_text(text)
        command = [str(ninja()), "-f", str(folder / "build.ninja"), "-j2", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels do not build:\n{done.stdout}{done.stderr}")


@cache
def module() -> ModuleType:
    """The pybind11 module, which loads kernels: its class ``Kernels``."""
    csrc, folder = ROOT / "csrc", BUILD / "module"
    includes = f"-isystem {Path(torch.__file__).parent / 'include'} -isystem {sysconfig.get_path('include')}"
    target = folder / f"{NAME}.so"
    edges = (
        f"build {folder}/module.o: compile {csrc}/cuda/emulated/module.cpp\n  flags = -I{csrc} {includes}\n"
        f"build {target}: link {folder}/module.o\n"
    )
    build(folder, edges, "-O0")
    spec = importlib.util.spec_from_file_location(NAME, target)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def build_all() -> None:
    """What :func:`kernels` loads."""
    module()
    for bits in (None, *WIDTHS):
        built_library(ROOT / "csrc", KERNELS, bits)


@cache
def kernels(bits: int | None) -> Any:
    """The kernels of one width, as they are; with None, those that have none."""
    return module().Kernels(str(built_library(ROOT / "csrc", KERNELS, bits)))


def library_of(*bits: int) -> Path:
    """One library with the kernels of some widths, as they are."""
    return built_library(ROOT / "csrc", KERNELS, *bits)


def built_library(csrc: Path, folder: Path, *bits: int | None, changed: str | None = None) -> Path:
    """The library of the sources in ``csrc`` for some widths, built in ``folder``.

    A source that contains LOWBIT_BITS is compiled once for each width, and one that chooses among widths, by
    ``cuda/widths.h``, for each library. With ``changed``, a file below ``csrc/cuda``, what does not include that is
    linked from :data:`KERNELS`. Kernels of sm_90a ask for what the emulation has not: they are executed as PTX
    (:mod:`lowbit.testing.cuda_ptx`).
    """
    widths = [width for width in bits if width is not None]
    name = f"w{''.join(map(str, widths))}"
    here = [source for source in sorted((csrc / "cuda").rglob("*.cu")) if not source.stem.endswith("_sm90")]
    edges, fresh, others = "", [], []
    for source in [*here, csrc / "cuda" / "emulated" / "library.cpp"]:
        below = source.relative_to(csrc).as_posix()
        stem = "_".join(source.relative_to(csrc / "cuda").with_suffix("").parts)
        texts = cuda_sources.included(csrc, below)
        for width in cuda_sources.widths(csrc, below, widths):
            chooses = width is None and "cuda/widths.h" in texts
            place = f"{name}/{stem}.o" if chooses else f"{stem}.o" if width is None else f"{stem}_{width}.o"
            if changed and f"cuda/{changed}" not in texts:
                others.append(str(KERNELS / place))
                continue
            defined = f" -DLOWBIT_WIDTHS={','.join(map(str, widths))}" if chooses else ""
            defined = defined if width is None else f" -DLOWBIT_BITS={width}"
            edges += f"build {folder / place}: compile {source}\n  flags = -x c++ -I{csrc}{defined}\n"
            fresh.append(str(folder / place))
    target = folder / name / "kernels.so"
    # of an inline function that several objects have, the linker takes the first: that of the change
    edges += f"build {target}: link {' '.join((*fresh, *others))}\n"
    # a bug may leave something unused, which is no error
    build(folder, edges, INSTRUMENTED if SANITIZED else "-O1 -Wno-error" if changed else "-O1")
    return target


@contextmanager
def changed_sources(file: str, old: str, new: str) -> Iterator[Path]:
    """A copy of ``csrc`` in which ``old``, which must be once in ``cuda/<file>``, is ``new``."""
    with tempfile.TemporaryDirectory(prefix="lowbit-planted-") as name:
        csrc = Path(name, "csrc")
        for part in ("cuda", "common"):
            shutil.copytree(ROOT / "csrc" / part, csrc / part)
        text = (csrc / "cuda" / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"old must be in {file} once: got {text.count(old)} times {old!r}")
        (csrc / "cuda" / file).write_text(text.replace(old, new), encoding="utf-8")
        yield csrc


def planted(file: str, old: str, new: str, bits: int | None) -> Any:
    """The kernels of a copy of the sources in which ``old``, which must be there once, is ``new`` for ``bits``."""
    with changed_sources(file, old, new) as csrc:  # what is loaded stays
        kernels(bits)  # what the change does not touch is linked from there
        return module().Kernels(str(built_library(csrc, csrc.parent / "build", bits, changed=file)))


def packed_linear(
    weight: Weight, x: Tensor, bias: Tensor | None = None, *, order: int = 0, of: Any = None, by_group: bool = False,
    int8: bool = False, x_scale: Tensor | None = None, x_group: int = 0, batch_invariant: bool = False,
    processors: int = 1, architecture: int = 80, shared_bytes: int = 163 << 10,
) -> Tensor:  # fmt: skip
    """``y = x @ W.T + bias`` by ``csrc/cuda/packed``, on the layer's own tensors in tiles.

    Args:
        order: 0: the warps of a block run first to last; 1: last to first.
        of: what :func:`planted` gave; None: the kernels as they are.
        processors: of the GPU; with many of them K is cut into splits. So are architecture and shared_bytes.
        by_group: scales and zeros lie group after group.
    """
    y = torch.full((len(x), weight.format.out_features), torch.nan, dtype=x.dtype)
    of_weight, kept = packed_arguments(weight, by_group)
    arguments: dict[str, Any] = dict(
        of_weight, M=len(x), int8=int8, batch_invariant=batch_invariant, order=order,
        device=(architecture, processors, shared_bytes), x=array(x), dtype=name(x), bias=array(bias),
        bias_dtype=name(bias), y=array(y), x_scale=array(x_scale), x_group=x_group,
    )  # fmt: skip
    result = (of or kernels(weight.format.bits)).packed_linear(arguments)
    assert result == 0, result
    del kept
    return y


def packed_arguments(weight: Weight, by_group: bool) -> tuple[dict[str, Any], list[Tensor | None]]:
    """The weight's part of the arguments, and what must stay as long as these are used."""
    f = weight.format
    n, k, bits, (values, columns, rows) = f.out_features, f.in_features, f.bits, weight.outliers
    tiles = aligned(tile(weight.packed, bits, k))
    groups, scales, zeros = weight.scales.shape[1], weight.scales, weight.zeros
    if by_group:
        scales, zeros = scales.t().contiguous(), None if zeros is None else zeros.t().contiguous()
    arguments: dict[str, Any] = dict(
        N=n, K=k, G=groups, group_size=f.group_size, bits=bits, row_bytes=tiles_per_row(k) * 32 * bits,
        per_tensor=weight.scales.shape[0] == 1 and n > 1, scales_row=1 if by_group else groups,
        scales_group=n if by_group else 1, packed=array(tiles), scales=array(scales), scales_dtype=name(scales),
        zeros=array(zeros), zeros_dtype=name(zeros), outlier_values=array(values), outlier_dtype=name(values),
        outlier_columns=array(columns), outlier_rows=array(rows),
        wide=columns is not None and columns.dtype == torch.int32,
    )  # fmt: skip
    return arguments, [tiles, scales, zeros]


def packed_experts(
    weight: Weight, x: Tensor, ids: Tensor, num_experts: int, bias: Tensor | None = None, *, order: int = 0,
    of: Any = None, by_group: bool = False, batch_invariant: bool = False, int8: bool = False,
    shared_bytes: int = 163 << 10,
) -> Tensor:  # fmt: skip
    """``y[i] = x[i // r] @ W[ids[i]].T + bias[ids[i]]`` by ``csrc/cuda/packed/experts.cuh``.

    The weight is the whole stack; the other arguments are those of :func:`packed_linear`.
    """
    s = len(ids)
    y = torch.full((s, weight.format.out_features // num_experts), torch.nan, dtype=x.dtype)
    of_weight, kept = packed_arguments(weight, by_group)
    arguments: dict[str, Any] = dict(
        of_weight, M=len(x), S=s, E=num_experts, ids=array(ids), wide_ids=ids.dtype == torch.int64, int8=int8,
        batch_invariant=batch_invariant, order=order, device=(80, 1, shared_bytes), x=array(x), dtype=name(x),
        bias=array(bias), bias_dtype=name(bias), y=array(y),
    )  # fmt: skip
    result = (of or kernels(weight.format.bits)).packed_experts(arguments)
    assert result == 0, result
    del kept
    return y


def packed_rows(
    weight: Weight, ids: Tensor | None, dtype: torch.dtype, *, order: int = 0, of: Any = None, by_group: bool = False,
    misaligned: bool = False,
) -> Tensor:  # fmt: skip
    """``W[ids]``, or W where ids is None, by ``csrc/cuda/packed/gather.cuh``; the arguments are those of
    :func:`packed_linear`.

    Args:
        misaligned: the result begins at no multiple of 16 bytes.
    """
    n, k = weight.format.out_features, weight.format.in_features
    count = n if ids is None else len(ids)
    room = aligned(torch.full((count * k + 1,), torch.nan, dtype=dtype))
    out = (room[1:] if misaligned else room[:-1]).view(count, k)
    of_weight, kept = packed_arguments(weight, by_group)
    arguments: dict[str, Any] = dict(
        of_weight, ids=array(ids), wide_ids=ids is not None and ids.dtype == torch.int64, count=count, out=array(out),
        dtype=name(out), device=(80, 1, 163 << 10), order=order,
    )  # fmt: skip
    result = (of or kernels(weight.format.bits)).packed_rows(arguments)
    assert result == 0, result
    del kept
    return out


def kron_linear(
    weight: KronWeight, x: Tensor, bias: Tensor | None = None, *, order: int = 0, of: Any = None, processors: int = 2,
    shared_bytes: int = 163 << 10, misaligned: bool = False,
) -> Tensor:  # fmt: skip
    """``y = x @ W.T + bias`` by ``csrc/cuda/kron``; the arguments are those of :func:`packed_linear`.

    Args:
        misaligned: nothing begins at a multiple of 16 bytes.
    """

    (m, _), n, x = x.shape, weight.n, placed(x, misaligned)
    y = placed(torch.full((m, n), torch.nan, dtype=x.dtype), misaligned)
    factors, kept = kron_arguments(weight, misaligned)
    arguments: dict[str, Any] = dict(
        factors, M=m, x=array(x), dtype=name(x), bias=array(bias), bias_dtype=name(bias), int8=False, y=array(y),
        batch_invariant=False, device=(80, processors, shared_bytes), order=order,
    )  # fmt: skip
    result = (of or kernels(None)).kron_linear(arguments)
    assert result == 0, result
    del kept
    return y


def kron_rows(
    weight: KronWeight, ids: Tensor | None, dtype: torch.dtype, *, order: int = 0, of: Any = None,
    shared_bytes: int = 163 << 10, misaligned: bool = False,
) -> Tensor:  # fmt: skip
    """``W[ids]``, or W where ids is None, by ``csrc/cuda/kron``; the arguments are those of :func:`kron_linear`."""
    count = weight.n if ids is None else len(ids)
    out = placed(torch.full((count, weight.k), torch.nan, dtype=dtype), misaligned)
    factors, kept = kron_arguments(weight, misaligned)
    arguments: dict[str, Any] = dict(
        factors, ids=array(ids), wide_ids=ids is not None and ids.dtype == torch.int64, count=count, out=array(out),
        dtype=name(out), device=(80, 1, shared_bytes), order=order,
    )  # fmt: skip
    result = (of or kernels(None)).kron_rows(arguments)
    assert result == 0, result
    del kept
    return out


def kron_arguments(weight: KronWeight, misaligned: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """The weight's part of the arguments, and what must stay as long as these are used."""
    kept: list[Tensor] = []

    def factor(f: KronFactor) -> dict[str, Any]:
        rank, n, k = f.values.shape
        bits, group_size = f.numbers
        kept.append(placed(f.tensor, misaligned))
        return dict(
            N=n, K=k, G=1 if f.scales is None else f.scales.shape[1], group_size=group_size, bits=bits,
            row_bytes=4 * f.tensor.shape[1] if bits else 0, values=array(kept[-1]),
            dtype=None if bits else name(f.tensor), scales=array(f.scales), scales_dtype=name(f.scales),
            zeros=array(f.zeros), zeros_dtype=name(f.zeros),
            per_tensor=f.scales is not None and f.scales.shape[0] < rank * n,
        )  # fmt: skip

    arguments = dict(
        a=factor(weight.a), b=factor(weight.b), R=weight.rank, input_permutation=array(weight.input_permutation),
        output_permutation=array(weight.output_permutation),
    )  # fmt: skip
    return arguments, kept


def placed(t: Tensor, misaligned: bool) -> Tensor:
    """A copy that begins at a multiple of 16 bytes, or does not."""
    return aligned(torch.cat([t.new_zeros(1), t.flatten()]))[1:].view(t.shape) if misaligned else aligned(t)


def aligned(t: Tensor) -> Tensor:
    """A copy that begins at a multiple of 16 bytes, as torch's allocator gives on a GPU."""
    room = torch.empty(t.nbytes + 16, dtype=torch.uint8)
    skip = -room.data_ptr() % 16
    return room[skip : skip + t.nbytes].view(t.dtype).view(t.shape).copy_(t)


def array(t: Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (t.data_ptr(), t.nbytes)


def name(t: Tensor | None) -> str | None:
    return None if t is None else str(t.dtype).removeprefix("torch.")
