"""Builds the native library lowbit/_C.abi3.so. Everything else about the package is in pyproject.toml.

Environment:
    LOWBIT_NO_NATIVE=1                    install pure Python, whatever is available
    LOWBIT_SANITIZE=address,undefined     build an instrumented library (see tests/sanitize.py)
    CXX, CXXFLAGS, LDFLAGS                as usual

The library uses torch's stable ABI and no Python API: one build serves Python >= 3.10 and torch >= 2.10.
Without torch or a compiler the package is installed as pure Python, and says so.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Object -> its source and the flags of its instruction set (one source may be compiled more than once).
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
_ISAS = {"scalar": ("cpu_scalar.cpp", [])}
if platform.machine() in ("x86_64", "AMD64"):
    _ISAS |= {
        "avx2": ("cpu_avx2.cpp", ["-mavx2", "-mfma", "-mf16c"]),
        "avx512": ("cpu_avx512.cpp", _AVX512),
        "avx512vnni": ("cpu_avx512.cpp", [*_AVX512, "-mavx512vnni", "-mavx512vbmi"]),
        "avx512bf16": ("cpu_avx512.cpp", [*_AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"]),
    }
OBJECTS: dict[str, tuple[str, list[str]]] = {
    "library": ("csrc/library.cpp", []),
    "isa": ("csrc/common/isa.cpp", []),
    "scratch": ("csrc/common/scratch.cpp", []),
    "blocks_ops": ("csrc/common/blocks_ops.cpp", []),
    "codebook_kmeans": ("csrc/codebook/kmeans.cpp", []),
    "codebook_quantize_ops": ("csrc/codebook/quantize_ops.cpp", []),
}
for _family in ("packed", "codebook", "kron"):
    OBJECTS[f"{_family}_ops"] = (f"csrc/{_family}/ops.cpp", [])
    OBJECTS |= {f"{_family}_{isa}": (f"csrc/{_family}/{file}", flags) for isa, (file, flags) in _ISAS.items()}

# -ffp-contract=off: a product and a sum round as written, the same in every object file.
# -Wno-(maybe-)uninitialized: GCC 12 warns about undefined operands in its own AVX-512 intrinsics (bug 105593).
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030a0000"]


def compiler() -> list[str]:
    """The C++ compiler's command, empty when there is none."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    return []


def why_not() -> str | None:
    """Why the native library cannot be built here, or None."""
    if os.environ.get("LOWBIT_NO_NATIVE", "0") not in ("", "0"):
        return "LOWBIT_NO_NATIVE is set"
    if sys.platform == "win32":
        return "the native library is not built on Windows yet"
    if not compiler():
        return "no C++ compiler found (tried CXX, c++, g++, clang++)"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build environment (use --no-build-isolation)"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return None if version >= (2, 10) else f"torch >= 2.10 is needed to build: found {torch.__version__}"


class Build(build_ext):
    """Compiles every object with its own flags, several at a time, and links them."""

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        sanitize = os.environ.get("LOWBIT_SANITIZE", "")
        mode = ["-O3", "-g0"]
        link: list[str] = []
        if sanitize:
            link = [f"-fsanitize={sanitize}"]
            mode = ["-O2", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *link]
        user = shlex.split(os.environ.get("CXXFLAGS", ""))
        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(name: str) -> str:
            source, isa = OBJECTS[name]
            target = str(folder / f"{name}.o")
            flags = [*FLAGS, *mode, *isa, *DEFINES, *includes, *user]
            subprocess.run([*compiler(), *flags, "-c", source, "-o", target], check=True)
            return target

        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        # The slowest files first, so that none is left over for the end.
        names = sorted(OBJECTS, key=lambda name: "ops" not in name and "avx512" not in name)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_one, names))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in library_paths()]
        user = shlex.split(os.environ.get("LDFLAGS", ""))
        command = [*compiler(), "-shared", *objects, *link, *libraries, *user, "-ltorch_cpu", "-ltorch"]
        subprocess.run([*command, "-o", str(output)], check=True)
        # CUDA kernels will be a second, torch-free library built here: nvcc, csrc/*/*.cu -> liblowbit_cuda.so


reason = why_not()
if reason:
    print(f"lowbit: building without native kernels ({reason}): the reference will run", file=sys.stderr)
    setup()
else:
    setup(
        ext_modules=[Extension("lowbit._C", [source for source, _ in OBJECTS.values()], py_limited_api=True)],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
