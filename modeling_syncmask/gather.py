"""Differentiable gather of equal slices over processes; alone, the identity."""

import torch
import torch.distributed as dist


class _AllGather(torch.autograd.Function):
    """Concatenate every process's slice; the gradient of a slice is the sum over processes of its gradients."""

    @staticmethod
    def forward(ctx, slice_: torch.Tensor) -> torch.Tensor:
        ctx.rows = slice_.shape[0]
        return gather_rows(slice_)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def num_processes() -> int:
    """Return the number of processes that train together, 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(slice_: torch.Tensor) -> torch.Tensor:
    """Concatenate (B, ...) of every process in rank order, without gradient; B must be equal on all."""
    if num_processes() == 1:
        return slice_
    slices = [torch.empty_like(slice_) for _ in range(num_processes())]
    dist.all_gather(slices, slice_.contiguous())
    return torch.cat(slices)


def gather_with_gradient(slice_: torch.Tensor) -> torch.Tensor:
    """Concatenate (B, ...) of every process in rank order; gradients flow back to the process that owns the rows.

    With DDP's mean over processes, the gradient equals that of one process which holds the whole batch.
    """
    return slice_ if num_processes() == 1 else _AllGather.apply(slice_)


def own_rows(slice_: torch.Tensor) -> torch.Tensor:
    """Number the rows of this process's slice (B, ...) within the global batch: (B,)."""
    rows = slice_.shape[0]
    start = dist.get_rank() * rows if num_processes() > 1 else 0
    return torch.arange(start, start + rows, device=slice_.device)
