"""``convert_folder``: a float transformers checkpoint in, a packed one out, layer by layer."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowbit.backends import registry
from lowbit.checkpoint import card, foreign, stream
from lowbit.checkpoint.folder import save
from lowbit.checkpoint.libraries import FloatFolder, Library, library_of
from lowbit.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from lowbit.core.folder import is_packed
from lowbit.model.build import build_group
from lowbit.model.convert import convert
from lowbit.model.curvature import Loss
from lowbit.model.plan import Plan, Swap, all_finite, check_arguments, check_correction, make_plan, problem_of
from lowbit.model.report import report, warn_if_larger
from lowbit.model.surgery import put
from lowbit.nn.layer import layers

# weights, and what says that they are in a foreign format
_LEFT_BEHIND = (
    *foreign.OWN_FILES,
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json",
)  # fmt: skip


def convert_folder(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    spec: Any = None,
    *,
    skip: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    correction: float | None = None,
) -> None:
    """Convert the transformers model in folder ``src`` and save it as a packed one in folder ``dst``.

    ``src`` holds a float model, or one in a quantized format that docs/interoperability.md lists: of that, the layers
    in the format are kept as they are stored, bit for bit. It may be a GGUF file.

    One layer at a time is read, quantized and dropped, so that memory stays near the size of the result. The
    tokenizer, other small files and the folders of sentence-transformers' modules are copied. ``dst`` appears only
    when everything went well.

    Args:
        src: folder with ``config.json`` and ``model.safetensors`` (or its shards), in any float dtype or such a format;
            a GGUF file, or a folder with one.
        dst: a folder that does not exist yet, or is empty.
        spec, skip, calibration, loss, correction: as for :func:`lowbit.convert`. With a spec that needs calibration,
            and for models whose files do not map one to one to their modules, the whole float model is loaded
            instead. ``None`` is for folders in a quantized format alone: the float layers in it then stay float.

    Raises:
        FileNotFoundError, FileExistsError: ``src`` is not a model folder; ``dst`` is not empty.
        ValueError: as :func:`lowbit.convert`; for a malformed checkpoint, naming file, tensor and field; naming
            format, file and layer for a model in a quantized format that is not read; for one that is packed already.
        TypeError: for what is no spec.
    """
    skip = check_arguments(spec, skip)
    src, dst = Path(src), Path(dst)
    if not src.is_dir() and not foreign.is_file(src):
        raise FileNotFoundError(f"{src} is not a folder{' but a file' if src.exists() else ''}")
    if is_packed(src):
        raise ValueError(f"{src} is a lowbit folder already: lowbit.load reads it, lowbit.dequantize makes it float")
    importer = foreign.importer_of(src)
    library, companion = library_of(src), foreign.companion_of(src)
    if library is None and companion is None:
        raise FileNotFoundError(f"{src} is not a transformers model folder: it has no config.json")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} must not exist, or be an empty folder")
    model = None
    if importer is not None and (calibration is not None or loss is not None):
        raise ValueError(f"calibration and loss need a float model: {src} is in a quantized format")
    check_correction(correction, calibration)
    with registry.as_stored():  # it is written, not run: otherwise its codes would be here twice
        if importer is not None:
            model = importer(src, spec, skip)
        elif library is not None and calibration is None and loss is None:
            model = _convert_streaming(library, src, spec, skip)
    if model is None and library is not None:
        float_model = library.load_float(src)
        model = convert(float_model, spec, skip=skip, calibration=calibration, loss=loss, correction=correction)
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        assert model is not None
        save(model, temporary)
        if src.is_dir():
            copy_small_files(src, temporary)
        if companion is not None:
            companion(src, temporary)
        card.write(model, temporary, library="transformers", insert=True)  # the float model's card stays, below ours
        temporary.chmod(0o755)
        if dst.exists():
            dst.rmdir()
        temporary.rename(dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_small_files(src: Path, dst: Path, but: Sequence[str] = ()) -> None:
    """Copy the tokenizer, and whatever else is in ``src`` beside weights and the config."""
    for file in sorted(src.iterdir()):
        if file.is_file() and file.name not in ("config.json", *but) and not file.name.endswith(_LEFT_BEHIND):
            shutil.copyfile(file, dst / file.name)
    for name in _module_folders(src):
        shutil.copytree(src / name, dst / name, dirs_exist_ok=True)


def _module_folders(src: Path) -> list[str]:
    """The folders that sentence-transformers keeps modules behind the transformer in: they are float, and stay so."""
    file = src / "modules.json"
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} must list modules with their paths: {error!r}") from None
    # a plain name: a list of modules must not be able to name folders elsewhere
    return [path for path in paths if path.strip(".") and path == os.path.basename(path) and (src / path).is_dir()]


def _convert_streaming(library: Library, src: Path, spec: Any, skip: Sequence[str]) -> Any | None:
    """The converted model, or ``None`` where the whole float model is needed."""
    if not any((src / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        return None
    checkpoint = Checkpoint.of_folder(src)
    folder = library.open_float(src, checkpoint)
    if folder is None:
        return None
    model = folder.model
    plan = make_plan(model, spec, skip)
    if any(s.spec is None or (s.kind != "embedding" and s.spec.needs_calibration) for s in plan.swaps()):
        return None
    stream.check_shapes(model, checkpoint, folder.names)
    return fill_converted(folder, plan, checkpoint)


def fill_converted(folder: FloatFolder, plan: Plan, checkpoint: Checkpoint) -> nn.Module:
    """Read, quantize and swap in what the plan says, then read the other tensors of the model."""
    model, names = folder.model, folder.names
    for group in tqdm(plan.groups, desc="lowbit convert", unit="layer", disable=None):
        _convert_group(folder, group, checkpoint)
        return_freed_memory()
    model.lowbit_skipped = plan.skipped  # type: ignore[assignment]
    folder.retie()
    state = model.state_dict(keep_vars=True)  # the tensors themselves: otherwise contiguous copies
    packed = layers(model, duplicates=True)
    rest = {n: key for n, key in names.items() if n in state and n.rpartition(".")[0] not in packed}
    stream.fill(model, checkpoint, rest, dtype_of=folder.dtype_of)
    for name, read in folder.stacks.items():
        if name in state:  # they stay float
            experts = [read(e).to(folder.dtype_of(name)) for e in range(state[name].shape[0])]
            stream.assign(model, name, torch.stack(experts))
    finished = folder.finish()
    made = report(finished)
    warn_if_larger(made.total_before, made.total_after, stacklevel=3)
    return finished


def return_freed_memory() -> None:
    # glibc keeps freed blocks of up to 32 MB in a heap that fragments: without this, converting 1.1B weights to
    # 4 bits ends with 2.5 GB resident instead of 1.1 GB
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _convert_group(folder: FloatFolder, group: list[Swap], checkpoint: Checkpoint) -> None:
    """Read the weight of a group and its biases, quantize, swap the packed layers in, forget the weight."""
    first, names = group[0], folder.names
    if first.kind == "experts":
        first.read = partial(_read_expert, folder, checkpoint, first)
        put(folder.model, first.name, build_group(group)[first.name])
        return
    weight_names = [f"{name}.weight" for swap in group for name in swap.names]
    source = next((name for name in weight_names if name in names), None)
    if source is None:
        raise ValueError(f"{weight_names[0]!r} is missing in the checkpoint")
    weight = checkpoint.read(names[source]).to(folder.dtype_of(source))
    first.module.weight = nn.Parameter(weight, requires_grad=False)
    if problem := problem_of(first):
        raise ValueError(problem)
    for swap in group:
        biases = {n: names[n] for n in (f"{name}.bias" for name in swap.names) if n in names}
        stream.fill(folder.model, checkpoint, biases, dtype_of=folder.dtype_of)
    built = build_group(group)
    first.module.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    for swap in group:
        for name in swap.names:
            put(folder.model, name, built[swap.name])


def _read_expert(folder: FloatFolder, checkpoint: Checkpoint, swap: Swap, index: int) -> torch.Tensor:
    """The weight of one expert of a stack, and nothing else, from the files."""
    name = swap.name
    if name not in folder.names and name not in folder.stacks:
        raise ValueError(f"{name!r} is missing in the checkpoint")
    in_one = name in folder.names
    weight = (
        checkpoint.read_part(folder.names[name], index, swap.extras["num_experts"]) if in_one
        else folder.stacks[name](index)
    )  # fmt: skip
    if not all_finite(weight):
        raise ValueError(f"{name}: expert {index}: the weight must be finite: it holds NaN or infinity")
    return weight.to(folder.dtype_of(name))
