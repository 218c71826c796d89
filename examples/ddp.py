"""DistributedDataParallel on two processes: everything together, and going on after a crash.

torchrun --nproc-per-node 2 examples/ddp.py --folder runs/ddp

Kill it at any time; the same command goes on from the last epoch, to the same weights.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusereg
from fusereg.bench.models import ResNet  # a residual network of torch's layers
from fusereg.demo.data import first_of_each, load_bundled


def main(epochs: int, patience: int, quick: bool, folder: Path | None, verbose: bool) -> None:
    dist.init_process_group("gloo")  # "nccl" and a device for each process on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)
    train, test = (x.view(-1, 1, 28, 28) for x in (data.train_images, data.test_images))

    torch.manual_seed(0)  # DDP starts all from rank 0's weights anyway
    net = ResNet(widths=(8, 16))
    nn.SyncBatchNorm.convert_sync_batchnorm(net)  # statistics of all ranks' images
    fusereg.convert(net)  # norm, shortcut, ReLU and dropout become one kernel
    model = DistributedDataParallel(net)
    augment = fusereg.augment.Augment(28, degrees=12, translate=0.07, mean=0.13, std=0.31)
    penalty = fusereg.WeightPenalty(net, group=1e-4)
    groups = fusereg.optim.param_groups_weight_decay(net, 0.01, l1=0.03, prox="decoupled")
    optimizer = fusereg.optim.AdamW(groups, lr=5e-3, max_grad_norm=1.0)
    stopper = fusereg.EarlyStopping(net, patience=patience)
    run = None
    if folder is not None:  # goes on from what is there
        run = fusereg.TrainingRun(folder, net=net, optimizer=optimizer, stopper=stopper)

    mine = torch.arange(rank, len(train), world)
    judged = torch.arange(rank, len(test), world)
    for epoch in stopper.epochs(epochs):  # from the one after the last check
        # Dropout and order depend on epoch and rank alone, so a resumed run draws the same; the
        # augmentation's numbers are those of the sample and the epoch anyway.
        torch.manual_seed(1000 * epoch + rank)
        model.train()
        # As many batches on every rank: DDP waits for all of them.
        for step, ids in enumerate(mine[torch.randperm(len(mine))].split(32)):
            optimizer.zero_grad()
            x = augment(train[ids], sample_ids=ids, epoch=epoch)
            nn.functional.cross_entropy(model(x), data.train_labels[ids]).backward()
            penalty.add_grad_()  # gradients are averaged by now; each rank adds the same
            optimizer.step()
            if verbose and rank == 0:
                print(f"epoch {epoch}, step {step}", flush=True)
        model.eval()
        with torch.no_grad():
            out = net((test[judged] - 0.13) / 0.31)
            loss = nn.functional.cross_entropy(out, data.test_labels[judged])
        # Each rank has seen its part of the test set: the ranks' losses are averaged.
        stopper.step(loss, epoch=epoch)
        if rank == 0:
            print(stopper.explain(), flush=True)
        if run is not None:
            run.save()

    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    theirs = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(theirs, weights)
    if rank == 0:
        if folder is not None:
            torch.save(net.state_dict(), folder / "best.pt")
        print(stopper.explain())
        same = all(torch.equal(weights, other) for other in theirs)
        print(f"restored on all ranks; the same bits on each: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--patience", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    parser.add_argument("--folder", type=Path, help="for checkpoints; goes on from what is there")
    parser.add_argument("--verbose", action="store_true", help="a line for each step")
    main(**vars(parser.parse_args()))
