"""A product with 4-bit weights in Triton, as one would write it first: what its compiler makes of that is the peer."""

import torch
import triton
import triton.language as tl


@triton.jit
def q4_matmul(
    x,  # bf16 [M, K]
    codes,  # u8 [N, K/2], the even column in the low half
    scales,  # f16 [N, K/GROUP]
    mins,  # f16 [N, K/GROUP]
    y,  # f32 [M, N]
    M,
    N,
    K,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,  # bytes along K
    FACTOR: tl.constexpr,  # what is multiplied, after rounding to bf16
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K // 2, BLOCK_B):
        # Even and odd columns apart: no lane has to be exchanged for another.
        across = first + tl.arange(0, BLOCK_B)[None, :]
        down = first + tl.arange(0, BLOCK_B)[:, None]
        of_x = (rows < M) & (across < K // 2)
        even = tl.load(x + rows * K + 2 * across, mask=of_x, other=0.0)
        odd = tl.load(x + rows * K + 2 * across + 1, mask=of_x, other=0.0)
        of_w = (columns < N) & (down < K // 2)
        byte = tl.load(codes + columns * (K // 2) + down, mask=of_w, other=0)
        group = columns * (K // GROUP) + 2 * down // GROUP
        scale = tl.load(scales + group, mask=of_w, other=0.0).to(tl.float32)
        least = tl.load(mins + group, mask=of_w, other=0.0).to(tl.float32)
        low = ((byte & 15).to(tl.float32) * scale + least).to(tl.bfloat16)
        high = ((byte >> 4).to(tl.float32) * scale + least).to(tl.bfloat16)
        sum = tl.dot(even.to(FACTOR), low.to(FACTOR), sum)
        sum = tl.dot(odd.to(FACTOR), high.to(FACTOR), sum)
    tl.store(y + rows * N + columns, sum, mask=(rows < M) & (columns < N))


def matmul(x, codes, scales, mins):
    """x · Wᵀ of contiguous tensors; K is a multiple of a group, which is even."""
    (m, k), n = x.shape, codes.shape[0]
    y = torch.empty(m, n, dtype=torch.float32, device=x.device)
    block_m = 16 if m <= 16 else 64
    block_n = 32 if m <= 16 else 64
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m))
    # Triton's interpreter multiplies the bits of bf16 as if they were integers.
    factor = tl.float32 if x.device.type == "cpu" else tl.bfloat16
    q4_matmul[grid](x, codes, scales, mins, y, m, n, k, k // scales.shape[1], block_m, block_n, 32, factor)
    return y
