"""The record of compiled CUDA C++ kernels: what nvcc and ptxas say of every instance on every architecture that ships.

    python -m benchmarks.tools.cuda_compiled --write [KERNEL ...]   compiles what changed, and writes its records
    python -m benchmarks.tools.cuda_compiled                        compares the records with the sources
    python -m benchmarks.tools.cuda_compiled --sample N             and compiles some

The kernels are those of cuda_kernels.py. Each has a record of its own, ``cuda_records/<kernel>.json``. An entry holds
registers, spilled bytes, bytes of shared memory, blocks of a processor, and the widths of the loads of weights. The
fingerprint of a record is that of the texts that its source includes, so a test needs no compiler to see that it is out
of date, and a change of one kernel leaves the others' records alone. No GPU is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.testing import cuda_names, cuda_sources

from .cuda_kernels import CSRC, KERNELS, Instance, Kernel

RECORDS = Path(__file__).with_name("cuda_records")
FLAGS = ("-std=c++17", "-O3")
# Included, but not by nvcc; and tables of the host, which no kernel depends on
NOT_COMPILED = ("cuda/emulated/emulation.h", "cuda/library.h")
# of a processor: registers, bytes of shared memory, threads; CUDA C++ programming guide, "technical specifications"
PROCESSORS = {
    "sm_80": (65536, 164 << 10, 2048), "sm_89": (65536, 100 << 10, 1536), "sm_90a": (65536, 228 << 10, 2048),
    "sm_100": (65536, 228 << 10, 2048), "sm_120": (65536, 100 << 10, 1536),
}  # fmt: skip

Entry = dict[str, Any]
Record = dict[str, Any]
Compilation = tuple[Kernel, str, int | None]  # with an architecture and LOWBIT_BITS


# --- fingerprints ----------------------------------------------------------------------------------------------------


def texts(kernel: Kernel) -> dict[str, str]:
    return cuda_sources.included(CSRC, f"cuda/{kernel.source}", NOT_COMPILED)


def fingerprint(kernel: Kernel) -> str:
    """Of what the kernel is compiled from, and of the flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for part in cuda_sources.used(texts(kernel)):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


# --- compiling -------------------------------------------------------------------------------------------------------


def nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else None


def run_nvcc(compilation: Compilation, output: Path, *flags: str) -> str:
    """What nvcc prints; raises where it fails or warns."""
    kernel, architecture, bits = compilation
    command = ["nvcc", *FLAGS, f"-I{CSRC}", f"-arch={architecture}", *flags]
    command += [] if bits is None else [f"-DLOWBIT_BITS={bits}"]
    done = subprocess.run([*command, str(kernel.path), "-o", str(output)], capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode or "warning" in text or "(C75" in text:  # C75..: products of a warpgroup that are serialized
        raise RuntimeError(f"{kernel.name}, {architecture}, {bits} bits:\n{text}")
    return text


def compile_ptx(kernel: Kernel, architecture: str, bits: int | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run_nvcc((kernel, architecture, bits), Path(folder, "kernel.ptx"), "-ptx")
        return Path(folder, "kernel.ptx").read_text()


def instance(kernel: Kernel, name: str) -> Instance | None:
    """What a function of the compiled code is; None: none of the kernel's functions."""
    found = cuda_names.parse(name)
    function = next((one for one in kernel.functions if found and one.name == found[0]), None)
    return function and found and function.instance(found[1])


def blocks(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that a processor holds: registers are given out in units of 8 a thread, shared memory with 1 KiB more."""
    in_registers, in_shared, in_threads = PROCESSORS[architecture]
    return min(in_registers // (-(-registers // 8) * 8 * threads), in_shared // (shared + 1024), in_threads // threads)


def compiled(compilation: Compilation) -> dict[str, Entry]:
    """The entries of the instances of one compilation."""
    kernel, architecture, _ = compilation
    with tempfile.TemporaryDirectory() as folder:
        keep = ("-c", "-Xptxas", "-v", "--keep", "--keep-dir", folder)  # -c: the host's code too, which -cubin skips
        text = run_nvcc(compilation, Path(folder, "kernel.o"), *keep)
        ptx = "".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))
    codes = {part.split(maxsplit=2)[1].split("(")[0]: part for part in re.split(r"(?=\.entry )", ptx)[1:]}
    entries: dict[str, Entry] = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name = part.split("'")[1]
        one = instance(kernel, name)
        if one is None:
            raise RuntimeError(f"{kernel.name}: cuda_kernels.py does not know {cuda_names.demangled(name)}")
        spills, (registers,) = re.findall(r"(\d+) bytes spill", part), re.findall(r"Used (\d+) registers", part)
        static = re.search(r"(\d+) bytes smem", part)
        shared = one.shared + (int(static[1]) if static else 0)
        entries[one.label] = dict(
            registers=int(registers), spills=sum(map(int, spills)), shared=shared,
            blocks=blocks(architecture, one.threads, int(registers), shared), weight_loads=one.loads(codes[name]),
        )  # fmt: skip
    return entries


# --- records ---------------------------------------------------------------------------------------------------------


def complaints(one: Instance, entry: Entry) -> Iterator[str]:
    """What an entry must not say."""
    if entry["spills"]:
        yield f"spills: must be 0 bytes: got {entry['spills']}"
    if entry["blocks"] < one.function.blocks:
        yield f"blocks of a processor: must be at least {one.function.blocks}: got {entry['blocks']}"
    if entry["weight_loads"] != one.weight_loads:
        yield f"bytes of the loads of weights: must be {one.weight_loads}: got {entry['weight_loads']}"


def problems(kernel: Kernel, record: Record) -> Iterator[str]:
    """What is wrong with a record by itself."""
    instances = kernel.instances()
    for architecture in kernel.architectures:
        entries = record["entries"].get(architecture, {})
        for label in sorted(instances.keys() ^ entries.keys()):
            yield f"{architecture} {label}: {'missing' if label in instances else 'not in cuda_kernels.py'}"
        for label in instances.keys() & entries.keys():
            yield from (f"{architecture} {label}: {what}" for what in complaints(instances[label], entries[label]))


def path(kernel: Kernel) -> Path:
    return RECORDS / f"{kernel.name}.json"


def read_record(kernel: Kernel) -> Record:
    record: Record = json.loads(path(kernel).read_text(encoding="utf-8"))
    return record


def is_current(kernel: Kernel) -> bool:
    return path(kernel).is_file() and read_record(kernel)["fingerprint"] == fingerprint(kernel)


def write_record(kernel: Kernel, record: Record) -> None:
    """One line for each instance."""
    parts = []
    for architecture, names in record["entries"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(names.items()))
        parts.append(f"  {json.dumps(architecture)}: {{\n{lines}\n  }}")
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(record[key])}" for key in ("nvcc", "fingerprint"))
    RECORDS.mkdir(exist_ok=True)
    path(kernel).write_text(
        f'{{\n{head},\n "entries": {{\n' + ",\n".join(parts) + "\n }\n}\n", encoding="utf-8"
    )  # fmt: skip


def make_record(kernel: Kernel) -> Record:
    """Compiles all of a kernel."""
    version = nvcc_version()
    if version is None:
        raise SystemExit("nvcc was not found: it must be on PATH")
    entries: dict[str, dict[str, Entry]] = {}
    for architecture in kernel.architectures:
        entries[architecture] = {}
        for bits in kernel.compilations:
            entries[architecture].update(compiled((kernel, architecture, bits)))
            print(f"{kernel.name} {architecture} {bits or 'all'} bits", file=sys.stderr, flush=True)
    return dict(nvcc=version, fingerprint=fingerprint(kernel), entries=entries)


def compilations() -> list[Compilation]:
    """All that ships."""
    return [
        (kernel, architecture, bits)
        for kernel in KERNELS.values()
        for architecture in kernel.architectures
        for bits in kernel.compilations
    ]


def differences(compilation: Compilation) -> Iterator[str]:
    """Where what is compiled anew is not what the record says; registers may differ with another nvcc."""
    kernel, architecture, _ = compilation
    record, instances = read_record(kernel), kernel.instances()
    exact = record["nvcc"] == nvcc_version()
    for label, entry in compiled(compilation).items():
        found = list(complaints(instances[label], entry))
        held = record["entries"][architecture].get(label)
        if exact and entry != held:
            found.append(f"compiled anew: {entry}, in the record: {held}")
        yield from (f"{kernel.name} {architecture} {label}: {what}" for what in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="KERNEL", help="compile what is out of date (of these kernels)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="compile N of a kernel, width, architecture")
    options = parser.parse_args()
    if unknown := sorted(set(options.write or ()) - set(KERNELS)):
        raise SystemExit(f"KERNEL must be one of {', '.join(KERNELS)}: got {', '.join(unknown)}")
    found = []
    for kernel in KERNELS.values():
        if options.write is not None and kernel.name in (options.write or KERNELS) and not is_current(kernel):
            write_record(kernel, make_record(kernel))
        if is_current(kernel):
            found += [f"{kernel.name} {what}" for what in problems(kernel, read_record(kernel))]
        else:
            found.append(f"{kernel.name}: the record is of other sources: --write {kernel.name}")
    every = compilations()
    for compilation in random.sample(every, min(options.sample, len(every))):
        found += differences(compilation)
    print("\n".join(found) or f"{sum(len(kernel.instances()) for kernel in KERNELS.values())} instances, no complaints")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
