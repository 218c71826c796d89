"""Accelerate: the loop is yours, so there is no callback to give; two lines of it change.

pip install "fusereg[demo]" accelerate; python examples/accelerate_digits.py
(or: accelerate launch examples/accelerate_digits.py)
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusereg
from fusereg.demo.data import first_of_each, load_bundled


def main(epochs: int, quick: bool) -> None:
    torch.manual_seed(0)
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    model = nn.Sequential(
        nn.Linear(data.pixels, 128), nn.ReLU(), fusereg.nn.Dropout(0.2), nn.Linear(128, 10)
    )
    # fusereg's optimizers are torch's kind: l1= in place of the penalty below would do as well.
    optimizer = fusereg.optim.AdamW(model.parameters(), lr=2e-3)
    train = DataLoader(TensorDataset(data.train_images, data.train_labels), 64, shuffle=True)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)

    # After prepare, which may have replaced the parameters. Accelerate decides when the optimizer
    # steps (every second batch here) and whether gradients are scaled; the hook follows both.
    penalty = fusereg.WeightPenalty(accelerator.unwrap_model(model), l1=1e-5, l2=1e-4)
    attached = penalty.attach(optimizer)
    stopper = fusereg.EarlyStopping(model, patience=4, mode="max")

    for epoch in stopper.epochs(epochs):
        model.train()
        for images, labels in train:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        model.eval()
        with torch.no_grad():
            hits = model(data.test_images).argmax(1) == data.test_labels
        accuracy = float(hits.float().mean())
        stopper.step(accuracy, epoch=epoch)  # on every process: one decision for all
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.3f}, penalty {attached.value:.3f}")
    accelerator.print(stopper.explain())
    accelerator.print(f"restored: accuracy {stopper.best:.3f}; {penalty.steps} optimizer steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
