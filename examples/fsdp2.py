"""A CALM under FSDP2 (fully_shard), on GPUs or on the CPU.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 3 --output model
"""

import argparse
import time

import torch
import torch.distributed as dist
from small_calm import BLOCK, CalmForTraining
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", help="a folder for the model")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
mesh = init_device_mesh(device, (size,))

torch.manual_seed(0)  # the same parameters everywhere before they are cut
model = CalmForTraining().to(device)
for layer in model.calm.transformer.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)  # the rest goes with the module whose forward is the loss
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)

torch.manual_seed(1 + rank)  # other text on every process
for step in range(options.steps):
    ids = torch.randint(256, (4, BLOCK), device=device)
    loss = model(ids, seed=step * size + rank)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
dist.all_reduce(loss.detach())
if rank == 0:
    held = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"loss {loss.item() / size:.3f}; a process holds {held:,} of {whole:,} parameters")
if options.output:
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process only
    tensors = get_model_state_dict(model, options=whole)
    if rank == 0:
        gathered = CalmForTraining()
        gathered.load_state_dict(tensors)
        gathered.calm.save(options.output)
dist.barrier()
time.sleep(0.5)  # a thread of gloo that still frees a tensor when Python ends aborts the process
dist.destroy_process_group()
