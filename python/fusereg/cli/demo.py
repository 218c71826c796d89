"""`fusereg demo`: a network trained on real digits, with and without each penalty."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusereg.cli.errors import require_packages

DEFAULT_OUT = "demo-results"
DEFAULT_EPOCHS = 60
DEFAULT_THREADS = 1


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is wanted, got {text!r}")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"a whole number from 0 is wanted, got {text!r}")
    return value


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small network on real digits with each technique, and compare",
        description=(
            "Trains the network 784-128-10 (ReLU, SGD, cross-entropy) on 5,000 real MNIST images: "
            "without a penalty and with each one, by fusereg's kernels and by plain PyTorch "
            "from the "
            "same weights over the same batches. Prints a table; writes plots and a JSON."
        ),
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(DEFAULT_OUT),
        metavar="DIR",
        help=f"folder for the plots and the JSON (default: ./{DEFAULT_OUT})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="PATH",
        help=(
            "your own IDX data, .gz or not: a folder with train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte and, if there, t10k-images-idx3-ubyte, "
            "t10k-labels-idx1-ubyte; "
            "or 2 files (images, labels: a fifth is kept for testing); or 4 files (train images, "
            "train labels, test images, test labels). Any image size, labels 0 to 9"
        ),
    )
    parser.add_argument(
        "--epochs", type=_positive, metavar="N", help=f"epochs a run (default: {DEFAULT_EPOCHS})"
    )
    parser.add_argument(
        "--only",
        metavar="NAME,NAME",
        help="only these techniques, as the table names them in its first column",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights and batches (default: 0)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: auto, CUDA if torch and fusereg both have it)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=DEFAULT_THREADS,
        metavar="N",
        help=(
            f"CPU threads (default: {DEFAULT_THREADS}; this network is too small to gain from "
            "more, and "
            "threads that wait for each other are slow where other programs use the cores too)"
        ),
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: 500 training images, 2 epochs"
    )
    parser.add_argument(
        "--no-baseline", action="store_true", help="leave out the runs in plain PyTorch"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `fusereg demo`."""
    require_packages("demo", "demo", "numpy", "rich", "matplotlib")
    from fusereg.demo.run import Settings, run_demo

    names = None
    if args.only is not None:
        names = [name.strip() for name in args.only.split(",") if name.strip()]
    epochs = args.epochs or (2 if args.quick else DEFAULT_EPOCHS)
    return run_demo(
        Settings(
            out=args.out,
            data=args.data,
            epochs=epochs,
            only=names,
            seed=args.seed,
            device=args.device,
            threads=args.threads,
            quick=args.quick,
            baseline=not args.no_baseline,
        )
    )
