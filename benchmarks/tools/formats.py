"""The table of formats in ``docs/interoperability.md``: of what importers, exporters and fixtures say of themselves.

    python -m benchmarks.tools.formats [--write]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lowbit  # noqa: F401  it registers what is listed here
from lowbit.checkpoint import foreign
from lowbit.checkpoint.exporters import exporter
from lowbit.checkpoint.importers.folder import Reader
from lowbit.checkpoint.reader import read_header

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "interoperability.md"
FIXTURES = ROOT / "tests" / "checkpoint" / "fixtures"
BEGIN, END = "<!-- python -m benchmarks.tools.formats --write -->\n", "<!-- end of the table of formats -->\n"
HEAD = "| format | import exact | export round trip | packer's version | fixtures |\n|---|---|---|---|---|\n"
# where a config does not say which program wrote it: the format -> the packages that the scripts here install
PACKERS = {"hqq": ["hqq"], "quanto": ["optimum-quanto"], "mlx": ["mlx"], "modelopt": ["nvidia-modelopt"],
           "mxfp4": ["compressed-tensors"], "gguf": ["gguf"]}  # fmt: skip
NOTHING = "–"


def exact(format: str) -> str:
    importer: Any = foreign.importers.get(format)
    if importer is None:
        return NOTHING
    reader = importer.args[0] if isinstance(importer, partial) else None
    return str(reader.exact if isinstance(reader, type) and issubclass(reader, Reader) else Reader.exact)


def round_trip(format: str) -> str:
    made = exporter._exporters.get(format)
    return NOTHING if made is None else made().round_trip


def sections() -> dict[Path, dict[str, Any]]:
    """Of each folder that a project packed, what its config says of the format."""
    found = {}
    for file in sorted((FIXTURES / "foreign").glob("*/model/config.json")):
        config = json.loads(file.read_text())
        found[file.parents[1]] = {**config["quantization_config"], "transformers": config["transformers_version"]}
    return found


def fixtures(format: str) -> list[str]:
    found = [folder.name for folder, section in sections().items() if section["quant_method"] == format]
    if any(name.startswith(f"{format}-") for name in read_header(FIXTURES / "foreign" / "libraries.safetensors")[0]):
        found.append("libraries.safetensors")
    if format == "gguf":
        found += [file.name for file in sorted((FIXTURES / "gguf").glob("*.gguf"))]
    return found


def packers(format: str) -> list[str]:
    """The programs that wrote the fixtures, as these say, or the scripts that ran them."""
    if format in PACKERS:
        text = "".join(file.read_text() for file in sorted(FIXTURES.glob("*/make*.py")))
        return [f"{name} {re.search(rf'[ ]{name}==([0-9.]*[0-9])', text)[1]}" for name in PACKERS[format]]  # type: ignore[index]
    found: dict[str, None] = {}
    for section in sections().values():
        if section["quant_method"] != format:
            continue
        said = (section.get("meta") or {}).get("quantizer")
        version = section.get("version") or section.get("autoround_version")
        own = [name.replace(":", " ") for name in said] if said else [f"{format} {version}"] if version else [
            f"transformers {section['transformers']}"]  # fmt: skip
        found.update(dict.fromkeys(own))
    return list(found)


def line(format: str) -> str:
    files = [f"`{name}`" for name in fixtures(format)]
    if not files and format in foreign.importers:
        files = ["loops in `test_importers_libraries.py`"]
    cells = [f"`{format}`", exact(format), round_trip(format), ", ".join(packers(format)) or NOTHING]
    return f"| {' | '.join([*cells, ', '.join(files) or NOTHING])} |\n"


def table() -> str:
    names = dict.fromkeys((*sorted(foreign.importers), *sorted(exporter._exporters)))
    return HEAD + "".join(line(name) for name in names)


def text() -> str:
    """The document with the table as it is now."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.formats", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/interoperability.md")
    if parser.parse_args(arguments).write:
        DOCUMENT.write_text(text(), encoding="utf-8")
    else:
        print(table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
