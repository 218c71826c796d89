"""FSDP2 on two processes: sharded parameters, and going on after a crash from sharded files.

torchrun --nproc-per-node 2 examples/fsdp2.py --folder runs/fsdp2

Kill it at any time; the same command goes on from the last epoch, to the same weights.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusereg
from fusereg.bench.models import ViT  # a vision transformer of torch's layers
from fusereg.demo.data import first_of_each, load_bundled


def main(epochs: int, patience: int, quick: bool, folder: Path | None, verbose: bool) -> None:
    dist.init_process_group("gloo")  # "nccl" and a device for each process on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    data = load_bundled()
    if quick:
        data = first_of_each(data, train=20, test=10)
    train, test = (x.view(-1, 1, 28, 28) for x in (data.train_images, data.test_images))

    torch.manual_seed(0)  # the same on all ranks: fully_shard keeps each one's part
    model = ViT(width=32, depth=2)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # else each rank has statistics of its own
    fusereg.convert(model)  # dropout joins the shortcuts, GELU and dropout become one kernel
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh)
    augment = fusereg.augment.Augment(28, degrees=12, translate=0.07, mean=0.13, std=0.31)
    # Rows stay whole where FSDP2 cuts along dimension 0, so a group lasso needs no communication.
    groups = fusereg.optim.param_groups_weight_decay(
        model, 0.01, group=0.001, exclude=("bias", "norm", "position")
    )
    optimizer = fusereg.optim.AdamW(groups, lr=2e-3)

    stopper = fusereg.EarlyStopping(
        model,
        patience=patience,
        also={"optimizer": optimizer},
        folder=None if folder is None else folder / "best",
        resume=None if folder is None else (folder / "run.json").exists(),  # together or not at all
    )
    run = None
    if folder is not None:  # goes on from what is there
        run = fusereg.TrainingRun(folder, model=model, optimizer=optimizer, stopper=stopper)

    mine = torch.arange(rank, len(train), world)
    judged = torch.arange(rank, len(test), world)
    for epoch in stopper.epochs(epochs):  # from the one after the last check
        # Dropout and order depend on epoch and rank alone, so a resumed run draws the same; the
        # augmentation's numbers are those of the sample and the epoch anyway.
        torch.manual_seed(1000 * epoch + rank)
        model.train()
        for step, ids in enumerate(mine[torch.randperm(len(mine))].split(32)):
            optimizer.zero_grad()
            x = augment(train[ids], sample_ids=ids, epoch=epoch)
            nn.functional.cross_entropy(model(x), data.train_labels[ids]).backward()
            fusereg.optim.clip_grad_norm_(model.parameters(), 1.0)  # by the norm of all shards
            optimizer.step()
            if verbose and rank == 0:
                print(f"epoch {epoch}, step {step}", flush=True)
        model.eval()
        with torch.no_grad():
            out = model((test[judged] - 0.13) / 0.31)
            loss = nn.functional.cross_entropy(out, data.test_labels[judged])
        stopper.step(loss, epoch=epoch)  # writes the best state, if it is that
        if rank == 0:
            print(stopper.explain(), flush=True)
        if run is not None:
            run.save()  # each rank writes its shards

    share = fusereg.sparsity(model)  # of the whole model, so every rank must ask
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        if folder is not None:
            torch.save(state, folder / "best.pt")
        print(stopper.explain())
        print(f"restored on all ranks; {share:.0%} of the weights are 0")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--patience", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="on 200 of the digits")
    parser.add_argument("--folder", type=Path, help="for checkpoints; goes on from what is there")
    parser.add_argument("--verbose", action="store_true", help="a line for each step")
    main(**vars(parser.parse_args()))
