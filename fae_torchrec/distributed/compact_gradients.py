"""Brings every rank the same gradients of the hot rows touched by the global batch, so that replicas take the same update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchrec.distributed.types import NoOpQuantizedCommCodec, QuantizedCommCodec

from fae_torchrec.distributed.process_group import all_gather_single
from fae_torchrec.distributed.touched_rows import TouchedRows

EXCHANGES_HOT_GRADIENTS = "## fae: exchange of hot rows' gradients ##"
"""The range of the exchange in a profiler's trace."""


def exchange_compact_gradients(
    own: list[torch.Tensor], touched: TouchedRows, group: dist.ProcessGroup, codec: QuantizedCommCodec | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Exchanges the gradients of touched rows. Collective, unless no rank touched a row; the host waits for no size.

    Every rank's own gradients are gathered, or all are summed over the union of slots, whichever sends fewer bytes (`reduces`).

    Args:
        own: per group of tables, [own, dim] in a float dtype, contiguous: this rank's gradient of its distinct slots, summed over its
            batch; the same dims and dtypes on every rank.
        touched: what the input dist of the same batch exchanged.
        group: the ranks.
        codec: TorchRec's quantized communication for this gradient, `QuantizedCommCodecs.backward`. Encoded gradients are gathered: a
            sum of them would overflow or mean nothing. Its loss scale is multiplied before the wire and divided after it.

    Returns:
        Per group (slots int64 [n], gradients [n, dim] in the dtype of `own`), bit for bit the same on every rank. A slot may occur
        several times; its gradients' sum is the sum over ranks, which is not divided by their number.
    """
    counts = touched.counts
    if not any(any(numbers) for numbers in counts):
        return list(zip(touched.of_all, own, strict=True))
    if codec is not None and _changes_nothing(codec):
        codec = None
    dims = [gradient.shape[1] for gradient in own]
    if codec is None and touched.union and reduces(counts, dims, [slots.numel() for slots in touched.union]):
        return _sum_over_union(own, touched, group)
    lengths = [[count * dim for count, dim in zip(numbers, dims, strict=True)] for numbers in counts]
    longest = max(sum(numbers) for numbers in lengths)
    per_rank = _gather(own, longest, group) if codec is None else _gather_encoded(own, longest, group, codec)
    # [ranks][groups] pieces of what the ranks sent, then per group the ranks' pieces in the order of `of_all`.
    pieces = [sent[: sum(numbers)].split_with_sizes(numbers) for sent, numbers in zip(per_rank, lengths, strict=True)]
    return [
        (slots, torch.cat(of_ranks).view(-1, dim).to(gradient.dtype))
        for slots, of_ranks, dim, gradient in zip(touched.of_all, zip(*pieces, strict=True), dims, own, strict=True)
    ]


def reduces(counts: Sequence[Sequence[int]], dims: Sequence[int], union: Sequence[int]) -> bool:
    """Whether a sum over the union sends fewer bytes than gathering every rank's gradients.

    From each rank of n, gathering sends n-1 times the longest rank's gradients and a ring all-reduce 2(n-1)/n times the union's. With two
    ranks the union is never smaller than the longest, so gathering never sends more.

    Args:
        counts: slots each rank has of each group, [n][groups].
        dims: per group, columns of its rows.
        union: per group, distinct slots of all ranks.
    """
    longest = max(sum(count * dim for count, dim in zip(numbers, dims, strict=True)) for numbers in counts)
    return 2 * sum(count * dim for count, dim in zip(union, dims, strict=True)) < len(counts) * longest


def _sum_over_union(own: list[torch.Tensor], touched: TouchedRows, group: dist.ProcessGroup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sizes = [slots.numel() * gradient.shape[1] for slots, gradient in zip(touched.union, own, strict=True)]
    total = torch.zeros(sum(sizes), dtype=_common_dtype(own), device=own[0].device)
    blocks = [block.view(-1, gradient.shape[1]) for block, gradient in zip(total.split_with_sizes(sizes), own, strict=True)]
    for block, union, slots, gradient in zip(blocks, touched.union, touched.own, own, strict=True):
        block[torch.searchsorted(union, slots)] = gradient.to(total.dtype)
    dist.all_reduce(total, group=group)
    return [(union, block.to(gradient.dtype)) for union, block, gradient in zip(touched.union, blocks, own, strict=True)]


def _gather(own: list[torch.Tensor], length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[world, length], in the order of ranks."""
    sent = _flat(own, length, _common_dtype(own))
    received = sent.new_empty(group.size() * length)
    all_gather_single(received, sent, group=group)
    return received.view(group.size(), length)


def _gather_encoded(own: list[torch.Tensor], length: int, group: dist.ProcessGroup, codec: QuantizedCommCodec) -> torch.Tensor:
    """float32 [world, at least length], in the order of ranks; this rank's part is decoded from its bytes too, as the others see it."""
    context = codec.create_context()
    # FBGEMM's codecs quantize rows of so many values, whole rows only; 0 or less where the values stand alone.
    row = max(getattr(context, "row_dim", 1), 1)
    length = -(-length // row) * row
    # Two dimensions: FBGEMM 1.8's FP8 without rows takes no other shape, and all others take any.
    encoded = codec.encode(_flat(own, length, torch.float32).view(1, -1), context).reshape(-1)
    sent = encoded.view(torch.uint8)  # bytes: not every backend sends every dtype
    received = sent.new_empty(group.size() * sent.numel())
    all_gather_single(received, sent, group=group)
    decoded: torch.Tensor = codec.decode(received.view(encoded.dtype).view(group.size(), -1), context)
    return decoded.reshape(group.size(), length)


def _flat(own: list[torch.Tensor], length: int, dtype: torch.dtype) -> torch.Tensor:
    """All groups' gradients one after the other, and zeros up to `length`."""
    values = [gradient.reshape(-1).to(dtype) for gradient in own]
    padding = length - sum(part.numel() for part in values)
    return torch.cat([*values, values[0].new_zeros(padding)])


def _common_dtype(own: list[torch.Tensor]) -> torch.dtype:
    """The dtype that holds every group's gradients, whatever is empty on this rank."""
    dtype = own[0].dtype
    for gradient in own[1:]:
        dtype = torch.promote_types(dtype, gradient.dtype)
    return dtype


def _changes_nothing(codec: QuantizedCommCodec) -> bool:
    """Whether what travels is what was given: TorchRec's default, or FBGEMM's codec for float32."""
    return isinstance(codec, NoOpQuantizedCommCodec) or codec.quantized_dtype == torch.float32
