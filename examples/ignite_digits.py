"""ignite: handlers for a penalty and for early stopping that restores the best weights.

pip install "fusereg[demo,ignite]"; python examples/ignite_digits.py
"""

import argparse

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusereg
from fusereg.demo.data import first_of_each, load_bundled
from fusereg.integrations.ignite import EarlyStoppingHandler, PenaltyHandler


def main(epochs: int, quick: bool) -> None:
    torch.manual_seed(0)
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)
    train = DataLoader(TensorDataset(data.train_images, data.train_labels), 64, shuffle=True)
    test = DataLoader(TensorDataset(data.test_images, data.test_labels), 1000)

    model = nn.Sequential(
        nn.Linear(data.pixels, 128), nn.ReLU(), fusereg.nn.Dropout(0.2), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy()})

    PenaltyHandler(fusereg.WeightPenalty(model, l1=1e-5, l2=1e-4), optimizer).attach(trainer)
    stopping = EarlyStoppingHandler(model, trainer, "accuracy", mode="max", patience=4)
    stopping.attach(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(test))

    with stopping:  # restores on exceptions and Ctrl-C too
        trainer.run(train, max_epochs=epochs)
    print(stopping.stopper.explain())
    print(f"penalty {trainer.state.metrics['penalty']:.3f}")
    print(f"restored: accuracy {evaluator.run(test).metrics['accuracy']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
