"""`python -m tools.benchmarks [--quick] [--repeats N] [--runs N] [row ...]`: measures the rows,
prints and writes them.

Ends with 1 only if a row could not be run; a goal that is missed is a figure like any other."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from .lab import Lab
from .rows import ROWS, Row
from .table import HEAD, RESULTS, Measured, load, written


def measured(row: Row, lab: Lab) -> Measured:
    """A row's figures; why it could not be run, if it could not."""
    before = load()
    try:
        figures = row.measure(lab)
        assert figures, f"{row.name} measured nothing"
        return Measured(row, figures, (before, load()))
    except Exception as error:  # the other rows are still worth measuring
        traceback.print_exc()
        return Measured(
            row, (), (before, load()), f"{type(error).__name__}: {error}".splitlines()[0]
        )


def main(asked: Sequence[str] | None = None) -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"all by default; {', '.join(names)}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="as small as can be, to see that it runs; writes nothing",
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of each way that are counted")
    parser.add_argument("--runs", type=int, default=1000, help="of the row `flat`")
    options = parser.parse_args(asked)
    unknown = set(options.rows) - set(names)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    began, done = load(), []
    print(HEAD, flush=True)
    with Lab(options.quick, options.repeats, options.runs) as lab:
        for row in ROWS:
            if not options.rows or row.name in options.rows:
                done.append(measured(row, lab))
                print(done[-1], flush=True)
                if not options.quick:
                    before = RESULTS.read_text() if RESULTS.exists() else ""
                    RESULTS.write_text(written(done, ROWS, (began, load()), before))
    return int(any(one.failure for one in done))


if __name__ == "__main__":
    sys.exit(main())
