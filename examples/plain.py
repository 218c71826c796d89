"""A plain loop: layers fused, an elastic net inside the optimizer's step, early stopping.

python examples/plain.py
"""

import argparse

import torch
from torch import nn

import fusereg
from fusereg.demo.data import first_of_each, load_bundled


def network(pixels: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(pixels, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(128, 10),
    )


def main(epochs: int, quick: bool) -> None:
    torch.manual_seed(0)
    data = load_bundled()  # 5,000 handwritten digits
    if quick:
        data = first_of_each(data, train=20, test=10)

    model = network(data.pixels)
    fusereg.convert(model)  # batch norm, ReLU and dropout become one kernel
    groups = fusereg.optim.param_groups_weight_decay(model, 0.01, l1=0.1, l2=0.01, prox="decoupled")
    optimizer = fusereg.optim.AdamW(groups, lr=2e-3, max_grad_norm=1.0)
    stopper = fusereg.EarlyStopping(model, patience=4, mode="max")

    for epoch in stopper.epochs(epochs):
        model.train()
        for batch in torch.randperm(len(data.train_images)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(data.train_images[batch]), data.train_labels[batch]
            )
            loss.backward()
            optimizer.step()  # AdamW, clipping and the proximal step, in one pass
        accuracy = evaluate(model, data.test_images, data.test_labels)
        stopper.step(accuracy, epoch=epoch)
        print(f"epoch {epoch}: accuracy {accuracy:.3f}, penalty {optimizer.penalty_value:.3f}")

    print(stopper.explain())
    accuracy = evaluate(model, data.test_images, data.test_labels)
    print(f"restored: accuracy {accuracy:.3f}, {fusereg.sparsity(model):.0%} of the weights are 0")


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
