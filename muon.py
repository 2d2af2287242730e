"""Muon: for matrices, momentum whose step is orthogonalised; its singular values become about 1.

AdamW scales every entry of a step by itself. A weight matrix acts along directions, not entries,
and most of a gradient lies in a few of them; Muon steps equally far in all. torch.optim.Muon is the
same rule, in bf16 and one matrix at a time: on a CPU that took half as long as the forward and the
backward pass of our small networks together (results/speed). Here matrices of one shape go through
the iteration together, in fp32 on a CPU.
"""
import torch
from torch import Tensor, nn


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """The matrices of g (n, rows, columns) with their singular values s replaced by about 1 (0.68
    to 1.13 where s is at least a hundredth of the matrix's norm).

    Newton-Schulz: X <- a X + b (X X') X + c (X X')^2 X maps every s to a s + b s^3 + c s^5 and
    keeps the directions. The coefficients are those of K. Jordan (2024), which lift small s
    fastest. bf16 on CUDA, fp32 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[1] <= g.shape[2]
    x = g if wide else g.mT                                             # the smaller Gram matrix
    x = x.to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                    # now s <= 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for parameters with two dimensions; decoupled weight
    decay.

    A step of an orthogonal matrix with r rows and c columns has entries of root-mean-square
    1 / sqrt(max(r, c)); it is scaled to 0.2, about that of an AdamW step, so that both take one
    learning rate (Moonlight, arXiv 2502.16982).

    A parameter may be several maps one below the other; a group of parameters says how many
    (`maps`). Each is orthogonalised by itself, or they would share the directions of one.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maps=1))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    if p not in self.state:  # named as torch's, to resume its checkpoints
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads = [p.grad for p in params]
                slow = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(slow, grads, 1 - momentum)
                whole = torch.stack(torch._foreach_lerp(grads, slow, momentum))
                each = whole.unflatten(1, (group["maps"], -1)).flatten(0, 1)
                steps = orthogonalize(each).reshape(whole.shape)
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, list(steps.unbind()),
                                    alpha=-lr * 0.2 * max(each.shape[1:]) ** 0.5)


def make_optimizers(cfg, nets: dict[str, nn.Module], trained: list[list[nn.Parameter]],
                    device: str) -> list:
    """AdamW with the paper's betas (0.9, 0.95) and weight decay 0.01; or Muon for the matrices
    within a network (w_*) and of the GRU's cell, and that AdamW for the rest: embeddings,
    registers, m_0, what ends in logits, biases."""
    # Muon steps equally far along all directions of a map from stream to stream. The rows of an
    # embedding or of a last layer are symbols, most of them seldom seen; they shall not all move
    # equally far.
    rest, matrices = [p for group in trained for p in group], {}
    if cfg.optimizer == "muon":
        # queries, keys and values are one parameter, and so are the three gates of a GRU
        inside = {id(p): 3 if "w_qkv" in name or "cell" in name else 1
                  for net in nets.values() for name, p in net.named_parameters()
                  if ("w_" in name or "cell.weight" in name) and p.ndim == 2}
        for p in rest:
            if id(p) in inside:
                matrices.setdefault(inside[id(p)], []).append(p)
        rest = [p for p in rest if id(p) not in inside]
    out = []
    if rest:
        out.append(torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01,
                                     fused=device != "mps"))  # which has no fused kernel
    if matrices:
        out.append(Muon([dict(params=of, maps=n) for n, of in matrices.items()], lr=cfg.lr))
    return out
