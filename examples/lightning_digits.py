"""Lightning: callbacks for a group lasso and for early stopping that restores the best weights.

pip install "fusereg[demo,lightning]"; python examples/lightning_digits.py
"""

import argparse

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusereg
from fusereg.demo.data import first_of_each, load_bundled
from fusereg.integrations.lightning import EarlyStoppingCallback, PenaltyCallback


class Digits(L.LightningModule):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(pixels, 128), nn.ReLU(), fusereg.nn.Dropout(0.2), nn.Linear(128, 10)
        )

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        out = self.net(images)
        self.log("val_loss", nn.functional.cross_entropy(out, labels))
        self.log("val_accuracy", (out.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int, quick: bool) -> None:
    L.seed_everything(0)
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)
    train = TensorDataset(data.train_images, data.train_labels)
    test = TensorDataset(data.test_images, data.test_labels)

    model = Digits(data.pixels)
    # Any optimizer: the penalty's gradient is added before it steps, and its value is logged.
    penalty = PenaltyCallback(group=2e-4, rules={"net.3.*": {"group": 0.0, "l2": 1e-3}})
    stopping = EarlyStoppingCallback("val_loss", patience=4)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[penalty, stopping],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(test, 1000))

    print(stopping.stopper.explain())
    found = trainer.validate(model, DataLoader(test, 1000), verbose=False)[0]
    print(f"restored: accuracy {found['val_accuracy']:.3f}, loss {found['val_loss']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
