"""More than one GPU. Without torchrun nothing here does anything.

    torchrun --standalone --nproc_per_node=2 smt.py --dataset mnist

Each process (a rank) takes its share of a batch, with a generator of its own; all make the same
step, with the mean of their gradients. Rank 0 alone decides when to stop, evaluates, logs, saves.
"""
import atexit
import dataclasses
import datetime
import os
import time

import torch
import torch.distributed as dist

from console import fail


def number_of(name: str, default: int) -> int:
    """A number that torchrun leaves in the environment."""
    text = os.environ.get(name, str(default))
    return int(text) if text.isascii() and text.isdigit() else -1  # join() says so


RANK, WORLD = number_of("RANK", 0), number_of("WORLD_SIZE", 1)


def join(device: str) -> str:
    """Meet the other ranks; the device of this one. Raises UserError."""
    if not 0 <= RANK < WORLD or WORLD > 1 and "MASTER_ADDR" not in os.environ:
        fail("the environment's RANK, WORLD_SIZE or MASTER_ADDR are not those of torchrun; unset "
             "RANK and WORLD_SIZE, or start with torchrun")
    if WORLD == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            fail(f"--nproc_per_node asks for more GPUs than the {torch.cuda.device_count()} here; "
                 "give a smaller one")
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # gloo for what is on the CPU, NCCL for GPUs
        dist.init_process_group(timeout=datetime.timedelta(hours=2))  # others wait for evaluations
        atexit.register(leave)
    return device


def leave() -> None:
    """End with no thread of torch.distributed alive. One that still lets go of its last tensor
    waits for Python's lock, and would abort the process if Python ended now: time for it to."""
    time.sleep(.2)
    dist.destroy_process_group()


def share(cfg):
    """A copy of the flags, with what this rank does of a step."""
    if WORLD == 1:
        return dataclasses.replace(cfg)
    part = {}
    for name, pieces in (("batch_size", getattr(cfg, "micro", 1)), ("spans", 1)):
        n = getattr(cfg, name, 0)
        if n % (WORLD * pieces):
            fail(f"--{name} {n} does not divide among {WORLD} processes; give a multiple")
        part[name] = n // WORLD
    for name in ("rnn_batch", "futures"):  # of the batch; 0 has a meaning of its own
        part[name] = -(-getattr(cfg, name, 0) // WORLD)
    return dataclasses.replace(cfg, **{k: v for k, v in part.items() if hasattr(cfg, k)})


def average_gradients(parameters: list) -> None:
    """In place, over all ranks; one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if WORLD > 1 and grads:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        parts = (flat / WORLD).split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [v.view_as(g) for v, g in zip(parts, grads)])


def decided(*numbers: float) -> list[float]:
    """Rank 0's numbers, for all."""
    if WORLD == 1:
        return [*numbers]
    out = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(out, 0)
    return out.tolist()


def least(n: int) -> int:
    """The smallest n of all ranks."""
    if WORLD > 1:
        out = torch.tensor(n)
        dist.all_reduce(out, dist.ReduceOp.MIN)
        n = int(out)
    return n


def gathered(v: torch.Tensor) -> torch.Tensor:
    """v (n,) of every rank, one after another: (n * ranks,)."""
    parts = [torch.empty_like(v) for _ in range(WORLD)]
    if WORLD > 1:
        dist.all_gather(parts, v)
    return torch.cat(parts) if WORLD > 1 else v
