"""Builds the native library lowbit/_C.abi3.so. Everything else about the package is in pyproject.toml.

Environment:
    LOWBIT_NO_NATIVE=1                    install pure Python: a slow reference runs instead of the kernels
    LOWBIT_SANITIZE=address,undefined     build an instrumented library (see tests/sanitize.py)
    MAX_JOBS                              how many compilers run at a time (default: one per core)
    CXX, CXXFLAGS, LDFLAGS                as usual
    LOWBIT_CUDA                           1: build the CUDA kernels (liblowbit_cuda.so), where no GPU is, too; 0: none.
                                          Unset: where nvcc and a GPU are found, for that GPU
    LOWBIT_CUDA_ARCHITECTURES=90a,120     what they are compiled for
    NVCC, NVCCFLAGS                       the compiler, and flags for it; else nvcc on PATH, in /usr/local/cuda, or in
                                          the Python package nvidia-cuda-nvcc

This file writes build/native/build.ninja, and ninja builds what has changed. The objects stay in that folder.

The library uses torch's stable ABI and no Python API: one build serves Python >= 3.10 and torch >= 2.10.
Without torch, a compiler or ninja the build fails and names the remedy. Metadata and sdists need none of these.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Instruction set -> its flags. Each family's kernel is compiled once for each.
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
_VNNI = [*_AVX512, "-mavx512vnni", "-mavx512vbmi"]
ISAS: dict[str, list[str]] = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": _AVX512,
        "avx512vnni": _VNNI,
        "avx512bf16": [*_VNNI, "-mavx512bf16"],
    }
KERNELS = ("packed", "codebook", "kron", "packed/blocks", "gradients")  # folders of csrc/cpu
OPS = ("packed", "codebook", "kron", "gradients")
# Object -> its source and flags. The slowest come first: ninja starts them in this order, so none is left over for the
# end.
# LOWBIT_ISAS=avx2,scalar: others are left out, for a build that is soon done.
COMPILED = os.environ.get("LOWBIT_ISAS", "").split(",") if os.environ.get("LOWBIT_ISAS") else list(ISAS)
OBJECTS: dict[str, tuple[str, list[str]]] = {
    f"{family}_{isa}": (f"csrc/cpu/{family}/kernel.cpp", [f"-DLOWBIT_ISA={isa}", *flags])
    for family in KERNELS
    for isa, flags in reversed(ISAS.items())
    if isa in COMPILED
}
OBJECTS |= {
    f"no_{isa}": ("csrc/cpu/left_out.cpp", [f"-DLOWBIT_ISA={isa}", f"-DLOWBIT_ALL_BF16={int(isa == 'avx512bf16')}"])
    for isa in ISAS
    if isa not in COMPILED
}
OBJECTS |= {f"{family}_ops": (f"csrc/cpu/{family}/ops.cpp", []) for family in OPS}
OBJECTS |= {
    "library": ("csrc/library.cpp", []),
    "cuda_library": ("csrc/cuda/ops/library.cpp", []),
    "cuda_codebook_ops": ("csrc/cuda/ops/codebook.cpp", []),
    "cuda_kron_ops": ("csrc/cuda/ops/kron.cpp", []),
    "cuda_packed_ops": ("csrc/cuda/ops/packed.cpp", []),
    "older_runtimes": ("csrc/older_runtimes.cpp", []),
    "blocks_layout_ops": ("csrc/cpu/blocks_layout_ops.cpp", []),
    "codebook_quantize_ops": ("csrc/cpu/codebook/quantize_ops.cpp", []),
    "codebook_kmeans": ("csrc/cpu/codebook/kmeans.cpp", []),
    "isa": ("csrc/cpu/isa.cpp", [f"'-DLOWBIT_ISAS=\",{','.join(COMPILED)},\"'"]),
    "scratch": ("csrc/cpu/scratch.cpp", []),
}

# -ffp-contract=off: a product and a sum round as written, the same in every object file.
# -Wno-(maybe-)uninitialized: GCC 12 warns about undefined operands in its own AVX-512 intrinsics (bug 105593).
FLAGS = ["-std=c++17", "-Icsrc", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030a0000"]
CUDA_LIBRARY = "liblowbit_cuda.so"
# Which have what csrc/cuda/older_glibc.cpp jumps to
OLDER_LIBRARIES = (
    ["-Xlinker=--push-state,--no-as-needed,-l:libpthread.so.0,-l:libdl.so.2,-l:librt.so.1,--pop-state"]
    if platform.libc_ver()[0] == "glibc" and platform.machine() == "x86_64"
    else []
)
CUDA_WIDTHS = range(1, 9)
CUDA_ARCHITECTURES = ("80", "89", "90a", "100", "120")
# The front end makes the same PTX for both (a test compares it): it runs once, and ptxas makes the code of each.
CUDA_PTX = {"89": "80", "120": "100"}

# -MD, not -MMD: another version of torch or of the compiler rebuilds too.
RULES = """\
builddir = {folder}
rule compile
  command = {cxx} {flags} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = {cxx} -shared $in {link} -o $out
  description = link $out
rule cuda
  command = {nvcc} $architectures $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule cuda_link
  command = {nvcc} -shared $in {nvcc_link} -o $out
  description = link $out
"""


def compiler() -> list[str]:
    """The C++ compiler's command, empty when there is none."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    return []


def ninja() -> str | None:
    """The path of ninja: that of the Python package, else one on PATH."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR, "ninja"))


def find_nvcc() -> str | None:
    """The path of CUDA's compiler: NVCC, else one on PATH, in CUDA's own folder, or in the Python package of it."""
    named = os.environ.get("NVCC")
    if named:
        return shutil.which(named)
    packages = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))
    return next(filter(None, map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc", *map(str, packages)))), None)


def cuda_architectures(nvcc: str) -> list[str]:
    """For which GPUs to compile; of those here, each by the newest code that runs on it. Empty: for none."""

    def without(reason: str) -> list[str]:
        print(f"lowbit: building without CUDA kernels: {reason}", file=sys.stderr)
        return []

    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    able = [name for name in CUDA_ARCHITECTURES if f"sm_{name.rstrip('a')}" in listed]
    if "90a" not in able:
        return without(f"CUDA 12 or later is needed, {nvcc} is older")
    named = os.environ.get("LOWBIT_CUDA_ARCHITECTURES", "")
    if named:
        return named.replace(",", " ").split()
    if os.environ.get("LOWBIT_CUDA"):  # asked for, for whichever GPU
        return able
    known = {int(name.rstrip("a")): name for name in able}
    best = {max((n for n in known if n // 10 == each // 10 and n <= each), default=0) for each in gpus_here()}
    found = [known[n] for n in sorted(best) if n]
    return found or without("there is no GPU here for them (LOWBIT_CUDA=1 compiles them for all, in about ten minutes)")


def gpus_here() -> set[int]:
    """The compute capabilities of the GPUs of this machine, 10 * major + minor."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)}


# Windows has no kernels yet.
PURE_PYTHON = os.environ.get("LOWBIT_NO_NATIVE", "0") not in ("", "0") or sys.platform == "win32"
BUILD_HERE = "pip install torch ninja 'setuptools>=77' wheel, then: pip install --no-build-isolation ."


def missing() -> str | None:
    """What the native library cannot be built without here, and the remedy; or None."""
    if not compiler():
        return "no C++ compiler was found (tried CXX, c++, g++, clang++): install g++, or name yours in CXX"
    if not ninja():
        return f"ninja was not found: {BUILD_HERE}"
    try:
        import torch
    except ImportError:
        return f"torch cannot be imported where the build runs. pip hides it by build isolation: {BUILD_HERE}"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        return f"torch >= 2.10 is needed: found {torch.__version__}. pip install 'torch>=2.10', then again"
    if unknown := set(COMPILED) - set(ISAS):
        return f"LOWBIT_ISAS must name some of {','.join(ISAS)}: got {','.join(sorted(unknown))}"
    return None


def environment_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def path_text(path: object) -> str:
    """A path as ninja's own syntax spells it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def edge(output: Path, rule: str, *inputs: object, **variables: str) -> str:
    lines = [f"build {path_text(output)}: {rule} {' '.join(map(path_text, inputs))}"]
    return "\n".join([*lines, *(f"  {name} = {value}" for name, value in variables.items()), ""])


def gencode(architectures: Sequence[str]) -> str:
    """What nvcc compiles for: machine code of each, PTX where the front end must make another."""
    of_ptx: dict[str, list[str]] = {}
    for name in architectures:
        of_ptx.setdefault(CUDA_PTX.get(name, name), []).append(f"sm_{name}")
    return shlex.join(f"-gencode=arch=compute_{ptx},code=[{','.join(codes)}]" for ptx, codes in of_ptx.items())


def cuda_edges(folder: Path, architectures: Sequence[str]) -> list[str]:
    """Edges of liblowbit_cuda.so: every csrc/cuda/**/*.cu.

    The library has C entry points and knows no torch, so that one build serves every torch. A source that contains
    LOWBIT_BITS is compiled once for each width of codes. One without a kernel is compiled for one architecture, as is
    a kernel of one alone (*_sm90.cu). The slowest come first.
    """
    numbers = r"\,".join(f"{name.rstrip('a')}0" for name in architectures)  # nvcc splits at a comma that is not escaped
    sources = sorted(Path("csrc/cuda").rglob("*.cu"), key=lambda path: (path.stem != "decode", path))
    objects, edges = [], []
    for source in sources:
        stem, text = folder / "cuda" / source.relative_to("csrc/cuda").with_suffix(""), source.read_text("utf-8")
        own = [name for name in architectures if source.stem.endswith(f"_sm{name.rstrip('a')}")]
        one = ".cuh" not in text or "_sm" in source.stem
        variables = {"architectures": gencode(own or (architectures[:1] if one else architectures))}
        if '"cuda/host.h"' in text:
            variables["flags"] = shlex.quote(f"-DLOWBIT_ARCHITECTURES={numbers}")
        for width in CUDA_WIDTHS if "LOWBIT_BITS" in text else [None]:
            if width is not None:
                variables["flags"] = f"-DLOWBIT_BITS={width}"
            target = stem.with_name(f"{stem.name}.o" if width is None else f"{stem.name}_{width}.o")
            edges.append(edge(target, "cuda", source, **variables))
            objects.append(target)
    older = folder / "cuda" / "older_glibc.o"
    edges.append(edge(older, "compile", Path("csrc/cuda/older_glibc.cpp")))
    return [*edges, edge(folder / CUDA_LIBRARY, "cuda_link", *objects, older)]


def write_ninja(folder: Path, library: str) -> list[str]:
    """Writes ``folder``/build.ninja; returns the libraries that it makes in ``folder``: ``library`` and CUDA's.

    Every flag is part of a command, so that ninja rebuilds when one changes.
    """
    import torch

    sanitize = os.environ.get("LOWBIT_SANITIZE", "")
    mode, link = ["-O3", "-g0"], []
    if sanitize:
        link = [f"-fsanitize={sanitize}"]
        mode = ["-Og", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *link]
    root = Path(torch.__file__).parent
    includes = ["-isystem", str(root / "include"), "-isystem", str(root / "include/torch/csrc/api/include")]
    link += [f"-L{root / 'lib'}", *environment_flags("LDFLAGS"), "-ltorch_cpu", "-ltorch"]
    wanted = os.environ.get("LOWBIT_CUDA", "1") not in ("", "0") and not sanitize
    nvcc = find_nvcc() if wanted else None
    architectures = cuda_architectures(nvcc) if nvcc else []
    nvcc_command = [nvcc or "nvcc", "-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    if architectures and "compress-mode" in subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout:
        nvcc_command += ["--compress-mode=size"]  # a fifth of the bytes
    shell = {
        "cxx": compiler(),
        "flags": [*FLAGS, *mode, *DEFINES, *includes, *environment_flags("CXXFLAGS")],
        "link": link,
        "nvcc": [*nvcc_command, *environment_flags("NVCCFLAGS")],
        # The Python package of the compiler has its libraries in lib, where it does not look.
        "nvcc_link": [f"-L{Path(nvcc).resolve().parents[1] / 'lib'}", *OLDER_LIBRARIES] if nvcc else [],
    }
    commands = {name: shlex.join(words).replace("$", "$$") for name, words in shell.items()}
    objects = [folder / f"{name}.o" for name in OBJECTS]
    edges = [
        edge(target, "compile", source, flags=" ".join(flags))
        for target, (source, flags) in zip(objects, OBJECTS.values(), strict=True)
    ]
    cuda = cuda_edges(folder, architectures) if architectures else []
    edges += [edge(folder / library, "link", *objects), *cuda]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(RULES.format(folder=path_text(folder), **commands) + "\n".join(edges))
    return [library, *([CUDA_LIBRARY] if cuda else [])]


class Build(build_ext):
    """Has ninja compile and link, and puts what it made where setuptools wants it."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.native_temp: Path | None = None
        self.made: list[str] = []

    def finalize_options(self) -> None:
        # An editable build's own folder of temporary files is removed after it: objects stay where --build-temp says.
        self.native_temp = Path(self.build_temp or "build/native")
        super().finalize_options()

    def run(self) -> None:
        lacks = missing() if self.extensions else None
        if lacks:
            raise SystemExit(
                f"lowbit: the kernels cannot be compiled: {lacks}\n"
                "(LOWBIT_NO_NATIVE=1 installs pure Python: a slow reference in torch)"
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        self.made = write_ninja(self.native_temp, output.name)
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        if run_ninja([ninja(), "-f", str(self.native_temp / "build.ninja"), f"-j{jobs}"]):
            raise SystemExit("lowbit: the native libraries do not build: see above (LOWBIT_CUDA=0: none for GPUs)")
        output.parent.mkdir(parents=True, exist_ok=True)
        for library in self.made:
            replace(self.native_temp / library, output.with_name(library))

    def copy_extensions_to_source(self) -> None:
        for library in self.made:
            replace(Path(self.build_lib, "lowbit", library), Path("lowbit", library))


def hidden_from() -> TextIO | None:
    """The terminal of the user from whom pip hides what a build prints; None where it is shown, or where none is."""
    if sys.stdout.isatty():
        return None
    try:
        return open("/dev/tty", "w")
    except OSError:
        return None


def run_ninja(command: list[str]) -> int:
    """Runs ninja; its exit status. What it does is seen on the terminal, too, while pip keeps its output to itself."""
    terminal = hidden_from()
    if terminal is None:
        return subprocess.run(command).returncode
    with terminal, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("["):  # [5/21] compile build/native/packed_avx2.o
                print(f"  lowbit: {line}", end="", file=terminal, flush=True)
    return process.returncode


def replace(source: Path, target: Path) -> None:
    """Copies; whoever has the old ``target`` loaded keeps it."""
    temporary = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, temporary)
    shutil.copymode(source, temporary)
    temporary.replace(target)


if PURE_PYTHON:
    print("lowbit: building without native kernels: the reference will run", file=sys.stderr)
    setup()
else:
    setup(
        ext_modules=[Extension("lowbit._C", [source for source, _ in OBJECTS.values()], py_limited_api=True)],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
