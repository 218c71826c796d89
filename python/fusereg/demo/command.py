"""`fusereg demo`: a network trained on real digits, with and without each technique."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusereg.cli.errors import require_packages
from fusereg.cli.output import add_json

DEFAULT_OUT = "demo-results"
DEFAULT_EPOCHS = 32


def _whole(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"a whole number from {low} is wanted, got {text!r}")
        return int(text)

    return parse


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small network on real digits with each technique, and compare",
        description=(
            "Trains the network 784-128-10 (ReLU, SGD, cross-entropy) on real MNIST images: "
            "without regularization and with each technique, with fusereg's kernels and in plain "
            "PyTorch from the same weights over the same batches. Prints a table; writes plots and "
            "a JSON."
        ),
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(DEFAULT_OUT),
        metavar="DIR",
        help=f"folder for the plots and results.json (default: ./{DEFAULT_OUT})",
    )
    add(
        "--data",
        type=Path,
        nargs="+",
        metavar="PATH",
        help=(
            "your own IDX data, .gz or not: a folder with train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte and, if there, t10k-images-idx3-ubyte, "
            "t10k-labels-idx1-ubyte; or 2 files (images, labels: a fifth is kept for testing); or "
            "4 files (train images, train labels, test images, test labels). Any image size, "
            "labels 0 to 9, all images are used"
        ),
    )
    add("--epochs", type=_whole(1), metavar="N", help=f"epochs a run (default: {DEFAULT_EPOCHS})")
    add(
        "--only",
        metavar="NAME,NAME",
        help="only these techniques, as the table names them in its first column",
    )
    add(
        "--seed", type=_whole(0), default=0, metavar="N", help="of weights and batches (default: 0)"
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: auto, CUDA if torch and fusereg both have it)",
    )
    add(
        "--threads",
        type=_whole(1),
        default=1,
        metavar="N",
        help=(
            "CPU threads (default: 1; this network is too small to gain from more, and threads "
            "that wait for each other are slow where other programs use the cores too)"
        ),
    )
    add("--quick", action="store_true", help="a smoke test: 500 training images, 2 epochs")
    add("--no-baseline", action="store_true", help="leave out the runs in plain PyTorch")
    add_json(parser, "results and machine, as in results.json,")


def run(args: argparse.Namespace) -> int:
    """Run `fusereg demo`."""
    require_packages("demo", "demo", "numpy", "rich", "matplotlib")
    from fusereg.demo.run import Settings, run_demo

    names = args.only and [name.strip() for name in args.only.split(",") if name.strip()]
    return run_demo(
        Settings(
            out=args.out,
            data=args.data,
            epochs=args.epochs or (2 if args.quick else DEFAULT_EPOCHS),
            only=names,
            seed=args.seed,
            device=args.device,
            threads=args.threads,
            quick=args.quick,
            baseline=not args.no_baseline,
            json=args.json,
        )
    )
