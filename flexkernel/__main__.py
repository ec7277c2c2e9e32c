"""`python -m flexkernel`: what is done once, outside a notebook."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__
from .errors import FlexError
from .notebook import demo


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.do(args)
    except FlexError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flexkernel", description=__doc__)
    parser.add_argument("--version", action="version", version=f"flexkernel {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo-model", help="fetch the demo model once; print its folder")
    command.set_defaults(do=lambda args: print(demo.model()))

    command = commands.add_parser(
        "demo", help="execute the quickstart notebook; print the path of the HTML page"
    )
    command.add_argument(
        "--notebook", type=Path, default=demo.NOTEBOOK, help="another notebook to execute"
    )
    command.add_argument(
        "--into", type=Path, default=Path("build"), help="the folder for the page (default: build)"
    )
    command.set_defaults(do=lambda args: print(demo.quickstart(args.notebook, args.into)))

    command = commands.add_parser("install", help="register the FlexKernel kernelspec with Jupyter")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="for this user (the default)")
    where.add_argument(
        "--sys-prefix", action="store_const", const=sys.prefix, dest="prefix", help="in this venv"
    )
    where.add_argument("--prefix", help="under PREFIX/share/jupyter/kernels")
    command.set_defaults(do=_install)
    return parser


def _install(args: argparse.Namespace) -> None:
    from flexkernel.notebook.kernel import install

    print(install(user=args.prefix is None, prefix=args.prefix))


if __name__ == "__main__":
    sys.exit(main())
