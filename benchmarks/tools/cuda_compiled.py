"""The record of compiled CUDA C++ kernels: what nvcc and ptxas say of every instance on every architecture that ships.

    python -m benchmarks.tools.cuda_compiled --write    compiles what changed, and writes cuda_compiled.json
    python -m benchmarks.tools.cuda_compiled            compares the record with the sources; --sample N compiles some

An entry holds registers, spilled bytes, bytes of shared memory, blocks of a processor, and the widths of the loads of
weights. A fingerprint of the sources says which texts it was made from, so a test needs no compiler to see that it is
out of date. No GPU is needed.
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

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
BITS = tuple(range(1, 9))
FLAGS = ("-std=c++17", "-O3")
SOURCES = (
    "csrc/cuda/primitives.h", "csrc/cuda/library.h", "csrc/cuda/codes.h", "csrc/cuda/packed/decode.cuh",
    "csrc/cuda/packed/decode.cu", "csrc/cuda/packed/decode.h", "csrc/common/packed.h",
    "csrc/common/operands.h", "csrc/common/dtype.h",
)  # fmt: skip
DTYPES = {2: "float16", 3: "bfloat16"}  # lowbit::DType
THREADS = 256
# of a processor: registers, bytes of shared memory, threads; CUDA C++ programming guide, "technical specifications"
PROCESSORS = {
    "sm_80": (65536, 164 << 10, 2048), "sm_89": (65536, 100 << 10, 1536), "sm_90a": (65536, 228 << 10, 2048),
    "sm_100": (65536, 228 << 10, 2048), "sm_120": (65536, 100 << 10, 1536),
}  # fmt: skip

Entry = dict[str, Any]
Entries = dict[str, dict[str, Entry]]


def fingerprint() -> str:
    """Of the sources without their comments, and of the flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in SOURCES:
        text = re.sub(r"//[^\n]*", "", (ROOT / name).read_text(encoding="utf-8"))
        digest.update("\0".join((name, *text.split())).encode())
    return digest.hexdigest()[:16]


def instance(mangled: str) -> str | None:
    """What an instance is called here: ``4-bit float16 M<=8``, ``splits float16``; None for another function."""
    adding = re.search(r"packed_decode10add_splitsILNS_5DTypeE(\d)E", mangled)
    if adding is not None:
        return f"splits {DTYPES[int(adding[1])]}"
    match = re.search(r"packed_decode6kernelILi(\d)ELNS_5DTypeE(\d)ELi(\d)ELb([01])E", mangled)
    if match is None:
        return None
    bits, dtype, m_tiles, cut = (int(n) for n in match.groups())
    return f"{bits}-bit {DTYPES[dtype]} M<={8 * m_tiles}{', groups of any size' if cut else ''}"


def mangled(bits: int, dtype: str, m_tiles: int, cut: bool, ptx: str) -> str:
    """The name of an instance in a PTX text."""
    number = next(n for n, name in DTYPES.items() if name == dtype)
    parameters = f"Li{bits}ELNS_5DTypeE{number}ELi{m_tiles}ELb{int(cut)}E"
    found = re.search(rf"\.entry (\w*packed_decode6kernelI{parameters}\w*)\(", ptx)
    assert found is not None, (bits, dtype, m_tiles, cut)
    return found[1]


def shared_bytes(m: int) -> int:
    """As ``shared_bytes`` of decode.cuh."""
    tiles = 1 if m <= 8 else 2
    return max((3 if tiles == 1 else 2) * m * (2 * 1024 + 64), 4 * 32 * 8 * tiles * 4)


def blocks(architecture: str, registers: int, shared: int) -> int:
    """Blocks that a processor holds: registers are given out in units of 8 a thread, shared memory with 1 KiB more."""
    in_registers, in_shared, in_threads = PROCESSORS[architecture]
    return min(in_registers // (-(-registers // 8) * 8 * THREADS), in_shared // (shared + 1024), in_threads // THREADS)


def nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else None


def run_nvcc(architecture: str, bits: int, output: Path, *flags: str) -> str:
    """What nvcc prints; raises where it fails or warns."""
    source = ROOT / "csrc" / "cuda" / "packed" / "decode.cu"
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={architecture}", f"-DLOWBIT_BITS={bits}", *flags]
    done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode or "warning" in text:
        raise RuntimeError(f"{architecture}, {bits} bits:\n{text}")
    return text


def compile_ptx(architecture: str, bits: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run_nvcc(architecture, bits, Path(folder, "decode.ptx"), "-ptx")
        return Path(folder, "decode.ptx").read_text()


def compiled(architecture: str, bits: int) -> dict[str, Entry]:
    """The entries of the instances of one width."""
    with tempfile.TemporaryDirectory() as folder:
        keep = ("-cubin", "-Xptxas", "-v", "--keep", "--keep-dir", folder)
        text = run_nvcc(architecture, bits, Path(folder, "decode.cubin"), *keep)
        ptx = "".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))
    loads: dict[str, list[int]] = {}
    for part in re.split(r"(?=\.entry )", ptx)[1:]:
        name = instance(part.split("(")[0])
        if name is not None:
            found = re.findall(r"ld\.global\.nc\.L1::no_allocate\S*\.v(\d)\.u32", part)
            loads[name] = sorted({4 * int(words) for words in found})
    entries: dict[str, Entry] = {}
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        name = instance(part)
        if name is None:
            continue
        spills = re.findall(r"(\d+) bytes spill", part)
        (registers,) = re.findall(r"Used (\d+) registers", part)
        shared = 0 if name.startswith("splits") else shared_bytes(16 if "M<=16" in name else 8)
        entries[name] = dict(
            registers=int(registers), spills=sum(map(int, spills)), shared=shared,
            blocks=blocks(architecture, int(registers), shared), weight_loads=loads[name],
        )  # fmt: skip
    return entries


def complaints(name: str, entry: Entry) -> Iterator[str]:
    """What an entry must not say."""
    if entry["spills"]:
        yield f"spills: must be 0 bytes: got {entry['spills']}"
    if entry["blocks"] < 1:
        yield f"blocks of a processor: must be at least 1: got {entry['blocks']}"
    bits = 0 if name.startswith("splits") else int(name[0])
    expected = [*([8] if bits % 2 else []), *([16] if bits > 1 else [])]  # a plane of one bit has 8 bytes
    if entry["weight_loads"] != expected:
        yield f"bytes of the loads of weights: must be {expected}: got {entry['weight_loads']}"


def read_record(path: Path = RECORD) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_record(version: str, mark: str, entries: Entries, path: Path = RECORD) -> None:
    """One line for each instance."""
    parts = []
    for architecture, names in entries.items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in names.items())
        parts.append(f"  {json.dumps(architecture)}: {{\n{lines}\n  }}")
    head = f'{{\n "nvcc": {json.dumps(version)},\n "fingerprint": {json.dumps(mark)},\n "entries": {{\n'
    path.write_text(head + ",\n".join(parts) + "\n }\n}\n", encoding="utf-8")


def differences(record: dict[str, Any], chosen: list[tuple[str, int]]) -> Iterator[str]:
    """Where what is compiled anew is not what the record says; registers may differ with another nvcc."""
    exact = record["nvcc"] == nvcc_version()
    for architecture, bits in chosen:
        for name, entry in compiled(architecture, bits).items():
            found = list(complaints(name, entry))
            if exact and entry != record["entries"][architecture].get(name):
                found.append(f"compiled anew: {entry}, in the record: {record['entries'][architecture].get(name)}")
            yield from (f"{architecture} {name}: {what}" for what in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="compile everything, unless the record is up to date")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="compile N pairs of architecture and width")
    options = parser.parse_args()
    current = RECORD.is_file() and read_record()["fingerprint"] == fingerprint()
    if options.write and not current:
        version = nvcc_version()
        if version is None:
            raise SystemExit("nvcc was not found: it must be on PATH")
        mark, entries = fingerprint(), {}
        for architecture in ARCHITECTURES:
            entries[architecture] = {}
            for bits in BITS:
                entries[architecture].update(compiled(architecture, bits))
                print(f"{architecture} {bits} bits", file=sys.stderr, flush=True)
        write_record(version, mark, entries)
    elif not current:
        raise SystemExit("the record is of other sources: python -m benchmarks.tools.cuda_compiled --write")
    record = read_record()
    pairs = [(architecture, bits) for architecture in ARCHITECTURES for bits in BITS]
    found = [
        f"{architecture} {name}: {what}"
        for architecture, names in record["entries"].items()
        for name, entry in names.items()
        for what in complaints(name, entry)
    ]
    found += differences(record, random.sample(pairs, min(options.sample, len(pairs))))
    print("\n".join(found) or f"{sum(map(len, record['entries'].values()))} instances, nothing to complain of")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
