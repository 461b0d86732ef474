"""Folders in a quantized format of another library: told by their config files and headers, before a weight is read.

Reading such a folder as a float one would give garbage: its scales belong to no module of the float model. A folder in
a format that has no importer (:mod:`lowbit.checkpoint.importers`) is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, Entry, read_json
from lowbit.core.folder import is_packed as is_packed
from lowbit.core.folder import sections
from lowbit.core.foreign import sign_of as sign_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Where libraries other than transformers say how they quantized: the file, and the format where it does not name it.
OWN_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": "auto-round",
    "quanto_qmap.json": "quanto",
}
_DETAILS = ("format", "fmt", "checkpoint_format", "packing_format", "quant_type", "quant_algo", "version")


@dataclass(frozen=True)
class Foreign:
    """What a folder says of its format.

    Attributes:
        format: the name of the format, as the library writes it: a key of :data:`importers`.
        file: the file that says so.
        detail: the format's variant, where the file names one.
    """

    format: str
    file: Path
    detail: str = ""

    def error(self) -> ValueError:
        """What to tell who gave this folder, with a layer in this format and its file."""
        layer = example(self.file.parent)
        detail = f" ({self.detail})" if self.detail else ""
        return ValueError(
            f"{self.file}: the model is quantized in the format {self.format!r}{detail}, which lowbit does not read"
            f"{f': {layer}' if layer else ''}. Give the float model that it was made from"
        )


Importer = Callable[[Path, Any, Any], nn.Module]
# Format -> a function of folder, spec and skip that gives the packed model: what is stored as it is, the rest by the
# spec; with None for a spec, what is stored as floats stays so. lowbit.model.foreign.IMPORTED has the package's own.
importers: dict[str, Importer] = {}
# Format -> a function of its folder or file and the packed folder, which writes there what the file holds beside
# weights, such as a tokenizer.
companions: dict[str, Callable[[Path, Path], None]] = {}


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file that holds a whole model of a foreign format."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def declared(folder: Path) -> Foreign | None:
    """The foreign format that a config file of ``folder`` names, or that its only weights are in; or that of a file."""
    if is_file(folder):
        return Foreign("gguf", folder)
    for section, file, default in named_sections(folder):
        return _foreign(section, file, default)
    files = sorted(folder.glob("*.gguf"))
    if files and not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)) and not _pickles(folder):
        return Foreign("gguf", files[0])
    return None


def named_sections(folder: Path) -> Iterator[tuple[dict[str, Any], Path, str]]:
    """What the config files of ``folder`` say of a foreign format, the files, and the format where none is named."""
    config = folder / "config.json"
    if config.is_file():
        content = read_json(config)
        mlx = content.get("quantization")
        if isinstance(mlx, dict) and {"bits", "group_size"} <= mlx.keys():
            yield {**mlx, "quant_method": "mlx"}, config, "mlx"
        anyprec = content.get("anyprec")
        if isinstance(anyprec, dict):
            yield {**anyprec, "quant_method": "any-precision"}, config, "any-precision"
        for section in sections(content):
            if section.get("quant_method") != "lowbit":
                yield section, config, "unknown"
    for name, format in OWN_FILES.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            nested = content.get("quantization")
            format = "squeezellm" if format == "awq" and "wbits" in content else format
            yield {**content, **(nested if isinstance(nested, dict) else {})}, folder / name, format


def importer_of(folder: Path) -> Importer | None:
    """What reads the format that ``folder`` declares; ``None`` where it declares none.

    Raises ``ValueError`` for a format that is not read.
    """
    found = declared(folder)
    if found is not None and found.format not in importers:
        raise found.error()
    return None if found is None else importers[found.format]


def companion_of(path: Path) -> Callable[[Path, Path], None] | None:
    """What of :data:`companions` belongs to the format that ``path`` declares."""
    found = declared(path)
    return None if found is None else companions.get(found.format)


def _foreign(section: dict[str, Any], file: Path, default: str) -> Foreign:
    method = section.get("quant_method") or default
    if method == "unknown" and section.get("quant_algo"):
        method = "modelopt"
    details = [section[name] for name in _DETAILS if isinstance(section.get(name), str) and section[name] != method]
    bits = section.get("bits", section.get("w_bit"))
    return Foreign(str(method), file, ", ".join([*details[:2], *([f"{bits} bits"] if isinstance(bits, int) else [])]))


def example(folder: Path) -> str:
    """One layer in the folder that is not stored as floats, and the file it is in."""
    try:
        entries = headers(folder)
    except (FileNotFoundError, ValueError):
        return ""  # dtypes that only this format has, or files of another kind
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if (leaf.startswith("weight") and entry.dtype not in FLOATS) or sign_of(leaf) is not None:
            layer = layer.removesuffix(".weight")
            mine = [n for n in entries if n.startswith(layer + ".")]
            stored = ", ".join(f"{n.removeprefix(layer + '.')} {_dtype(entries[n])}" for n in mine[:4])
            return f"layer {layer!r} in {entry.file.name} holds {stored}"
    return ""


def _dtype(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def headers(folder: Path) -> dict[str, Entry]:
    """The tensors in the files of ``folder`` by name, without their values; of pickled files too.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: naming a file that cannot be read.
    """
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return Checkpoint.of_folder(folder).entries
    files = _pickles(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE_FILE}, {INDEX_FILE} nor pytorch_model.bin")
    return dict(_pickled(files))


def _pickles(folder: Path) -> list[Path]:
    return sorted(folder.glob("pytorch_model*.bin"))


def _pickled(files: Iterable[Path]) -> Iterator[tuple[str, Entry]]:
    for file in files:
        try:
            content = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:
            raise ValueError(f"{file} cannot be read as plain tensors: {str(error)[:200]}") from None
        for name, tensor in content.items():
            if isinstance(tensor, torch.Tensor):
                yield name, Entry(file, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
