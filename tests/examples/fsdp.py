"""FSDP2 by ``fully_shard``: torchrun --nproc-per-node=2 fsdp.py FOLDER. Weights and optimizer states are shards."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchcalc.distributed import normalizer
from torchcalc.functional import cross_entropy
from torchcalc.nn import Linear, SiLU
from torchcalc.optim import AdamW
from torchcalc.resume import Loader


def main(folder: Path) -> float:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    net = torch.nn.Sequential(Linear(5, 16), SiLU(), Linear(16, 3))
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdamW(net.parameters(), lr=0.02, max_norm=1.0)
    loader = Loader(data, 15)  # of all processes together: one has seven samples, and the other eight
    for _ in range(8):
        for inputs, target in loader:
            optimizer.zero_grad()
            cross_entropy(net(inputs), target, normalizer=normalizer(len(target))).backward()
            optimizer.step()
    loss = cross_entropy(net(x), data.tensors[1]).item()
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"net": weights, "optimizer": state}, checkpoint_id=str(folder / "last"))
    rank = dist.get_rank()
    dist.barrier()  # gloo's threads let go of what was sent, for which they need an interpreter that is not ending
    dist.destroy_process_group()
    return loss if rank == 0 else -1.0


if __name__ == "__main__":
    if (loss := main(Path(sys.argv[1]))) >= 0:
        print(f"loss {loss:.4f}")
