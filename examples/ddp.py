"""DistributedDataParallel on two processes: the penalty once, one decision about stopping for all.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusereg
from fusereg.demo.data import first_of_each, load_bundled


def main(epochs: int, quick: bool) -> None:
    dist.init_process_group("gloo")  # "nccl" and a device for each process on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)

    torch.manual_seed(0)  # DDP starts all from rank 0's weights anyway
    net = nn.Sequential(
        nn.Linear(data.pixels, 128), nn.ReLU(), fusereg.nn.Dropout(0.2), nn.Linear(128, 10)
    )
    model = DistributedDataParallel(net)
    groups = fusereg.optim.param_groups_weight_decay(net, 0.01, l1=0.1)
    optimizer = fusereg.optim.AdamW(groups, lr=2e-3, max_grad_norm=1.0)
    stopper = fusereg.EarlyStopping(model, patience=4)

    mine = torch.arange(rank, len(data.train_images), world)
    test = torch.arange(rank, len(data.test_images), world)
    shuffle = torch.Generator().manual_seed(rank)
    for epoch in stopper.epochs(epochs):
        model.train()
        # As many batches on every rank: DDP waits for all of them.
        for batch in mine[torch.randperm(len(mine), generator=shuffle)].split(32):
            optimizer.zero_grad()
            out = model(data.train_images[batch])
            nn.functional.cross_entropy(out, data.train_labels[batch]).backward()
            optimizer.step()  # gradients are averaged by now; each rank adds the same penalty
        model.eval()
        with torch.no_grad():
            out = net(data.test_images[test])
            loss = nn.functional.cross_entropy(out, data.test_labels[test])
        # Each rank has seen its part of the test set: the ranks' losses are averaged.
        stopper.step(loss, epoch=epoch)
        if rank == 0:
            print(f"epoch {epoch}: penalty {optimizer.penalty_value:.3f}")

    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    theirs = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(theirs, weights)
    if rank == 0:
        print(stopper.explain())
        same = all(torch.equal(weights, other) for other in theirs)
        print(f"restored on all ranks; the same bits on each: {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
