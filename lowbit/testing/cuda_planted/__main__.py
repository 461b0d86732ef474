from __future__ import annotations

import argparse

from lowbit.testing import cuda_planted
from lowbit.testing.cuda_planted import DOCUMENT, caught, document, kernels, sections, suite


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lowbit.testing.cuda_planted", description=cuda_planted.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", choices=[[], *kernels()], help="(default: all)")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args()
    missed, tables = 0, {name: lines for name, lines in sections().items() if name in kernels()}
    for kernel in options.kernels or kernels():
        tables[kernel] = []
        for bug in suite(kernel).BUGS:
            found = caught(kernel, bug)
            missed += found is None
            tables[kernel].append(f"| {bug.name} | {bug.bits} | {found or '**nothing**'} |")
            print(tables[kernel][-1], flush=True)
    if options.write:
        DOCUMENT.write_text(document(tables), encoding="utf-8")
    if missed:
        raise SystemExit(f"{missed} bugs were not found")


if __name__ == "__main__":
    main()
