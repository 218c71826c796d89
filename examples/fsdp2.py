"""FSDP2 on two processes: sharded parameters, each rank steps its shards, the norm is that of all.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusereg
from fusereg.demo.data import first_of_each, load_bundled


def main(epochs: int, quick: bool) -> None:
    dist.init_process_group("gloo")  # "nccl" and a device for each process on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)

    torch.manual_seed(0)  # the same on all ranks: fully_shard keeps each one's part
    model = nn.Sequential(
        nn.Linear(data.pixels, 128), nn.ReLU(), fusereg.nn.Dropout(0.2), nn.Linear(128, 10)
    )
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    # Rows stay whole where FSDP2 cuts along dimension 0, so a group lasso needs no communication.
    groups = fusereg.optim.param_groups_weight_decay(model, 0.01, group=0.1)
    optimizer = fusereg.optim.AdamW(groups, lr=2e-3)
    stopper = fusereg.EarlyStopping(model, patience=4, also={"optimizer": optimizer})

    mine = torch.arange(rank, len(data.train_images), world)
    test = torch.arange(rank, len(data.test_images), world)
    shuffle = torch.Generator().manual_seed(rank)
    torch.manual_seed(rank)  # from here on, dropout of its own on each rank
    for epoch in stopper.epochs(epochs):
        model.train()
        for batch in mine[torch.randperm(len(mine), generator=shuffle)].split(32):
            optimizer.zero_grad()
            out = model(data.train_images[batch])
            nn.functional.cross_entropy(out, data.train_labels[batch]).backward()
            norm = fusereg.optim.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            out = model(data.test_images[test])
            loss = nn.functional.cross_entropy(out, data.test_labels[test])
        stopper.step(loss, epoch=epoch)
        if rank == 0:
            print(f"epoch {epoch}: norm {norm:.3f}, penalty {optimizer.penalty_value:.3f}")

    share = fusereg.sparsity(model)  # of the whole model, so every rank must ask
    if rank == 0:
        print(stopper.explain())
        print(f"restored on all ranks; {share:.0%} of the weights are 0")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    main(**vars(parser.parse_args()))
