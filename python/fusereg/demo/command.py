"""`fusereg demo`: a network trained on real digits, with and without each technique."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from fusereg.cli.errors import require_packages
from fusereg.cli.options import Json

DEFAULT_EPOCHS = 32


def run(
    out: Annotated[
        Path, Option(metavar="DIR", help="Folder for the plots and results.json.")
    ] = Path("demo-results"),
    data: Annotated[
        list[Path] | None,
        Option(
            metavar="PATH...",
            help="Your own IDX data, .gz or not: a folder with train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte and, if there, t10k-images-idx3-ubyte, "
            "t10k-labels-idx1-ubyte; or 2 files (images, labels: a fifth is kept for testing); or "
            "4 files (train images, train labels, test images, test labels). Any image size, "
            "labels 0 to 9, all images are used.",
        ),
    ] = None,
    more_data: Annotated[list[Path] | None, Argument(hidden=True)] = None,
    epochs: Annotated[
        int | None, Option(metavar="N", min=1, help=f"Epochs a run ({DEFAULT_EPOCHS}).")
    ] = None,
    only: Annotated[
        str | None,
        Option(
            metavar="NAME,NAME",
            help="Only these techniques, as the table names them in its first column.",
        ),
    ] = None,
    seed: Annotated[
        int, Option(metavar="N", min=0, max=2**63 - 1, help="Of weights and batches.")
    ] = 0,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Option(help="Where to train; auto: CUDA if torch and fusereg both have it."),
    ] = "auto",
    threads: Annotated[
        int,
        Option(
            metavar="N",
            min=1,
            help="CPU threads. This network is too small to gain from more than one, and threads "
            "that wait for each other are slow where other programs use the cores too.",
        ),
    ] = 1,
    quick: Annotated[
        bool, Option("--quick", help="A smoke test: 500 training images, 2 epochs.")
    ] = False,
    no_baseline: Annotated[
        bool, Option("--no-baseline", help="Leave out the runs in plain PyTorch.")
    ] = False,
    json: Json = None,
) -> int:
    """Train a small network on real digits with each technique.

    The network is 784-128-10 (ReLU, SGD, cross-entropy), the digits are MNIST's: without
    regularization and with each technique, with fusereg's kernels and in plain PyTorch from the
    same weights over the same batches. Prints a table; writes plots and a JSON.
    """
    require_packages("demo", "demo", "numpy", "rich", "matplotlib")
    from fusereg.demo.run import Settings, run_demo

    return run_demo(
        Settings(
            out=out,
            data=[*(data or []), *(more_data or [])] or None,
            epochs=epochs or (2 if quick else DEFAULT_EPOCHS),
            only=None if only is None else only.split(","),
            seed=seed,
            device=device,
            threads=threads,
            quick=quick,
            baseline=not no_baseline,
            json=json,
        )
    )
