"""Hugging Face's Trainer: AdamW with an elastic net in its step, and early stopping.

pip install "fusereg[demo,transformers]"; python examples/trainer_digits.py
"""

import argparse
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import fusereg
from fusereg.demo.data import first_of_each, load_bundled
from fusereg.integrations.transformers import EarlyStoppingCallback, optimizer_of


class Digits(nn.Module):
    """Any module will do whose forward returns the loss."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(pixels, 128), nn.ReLU(), fusereg.nn.Dropout(0.2), nn.Linear(128, 10)
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(epochs: int, quick: bool) -> None:
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=1000,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=0.0,  # the optimizer clips inside its step
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            label_names=["labels"],
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
        )
        torch.manual_seed(0)
        model = Digits(data.pixels)
        stopping = EarlyStoppingCallback("eval_accuracy", mode="max", patience=4)
        trainer = Trainer(
            model,
            args,
            train_dataset=Rows(data.train_images, data.train_labels),
            eval_dataset=Rows(data.test_images, data.test_labels),
            compute_metrics=accuracy,
            optimizer_cls_and_kwargs=optimizer_of(
                args, "AdamW", l1=0.1, prox="decoupled", max_grad_norm=1.0
            ),
            callbacks=[stopping],
        )
        trainer.train()
        print(stopping.stopper.explain())
        found = trainer.evaluate()["eval_accuracy"]
    print(f"restored: accuracy {found:.3f}, {fusereg.sparsity(model):.0%} of the weights are 0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
