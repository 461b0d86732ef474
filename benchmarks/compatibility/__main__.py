"""What works with lowbit, as its rows find it: ``docs/compatibility.md``.

    python -m benchmarks.compatibility                 which rows the document does not agree with
    python -m benchmarks.compatibility --write         run every row and write the document
    python -m benchmarks.compatibility Llama "PEFT LoRA"    what these rows find, with the traces of errors
"""

from __future__ import annotations

import argparse
import sys
import traceback

from . import document


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compatibility", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="the names of rows; all of them where none is given")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    options = parser.parse_args(arguments)
    names = options.rows or list(document.names())
    if options.write and options.rows:
        parser.error("--write runs every row")
    written, lines, problems = document.lines(), {}, 0
    for name in names:
        found = document.examine(name)
        lines[name] = document.line(name, found)
        if options.rows:
            print(lines[name])
            for error in found.errors:
                traceback.print_exception(error)
        elif lines[name] != written.get(name):
            problems += 1
            print(lines[name])
    if options.write:
        document.DOCUMENT.write_text(document.text(lines))
        return 0
    print(f"{problems} rows of {len(names)} are other than {document.DOCUMENT.name} says")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
