"""Stock weights <-> hot and cold weights of one table, as plain tensors."""

from __future__ import annotations

import torch


def hot_rows_of(stock: torch.Tensor, hot_ids: torch.Tensor) -> torch.Tensor:
    """The hot tier's copy of a stock tensor.

    Args:
        stock: weights or optimizer state of a whole table, [rows, ...].
        hot_ids: int64 [hot rows], the home of each slot.

    Returns:
        A new tensor [hot rows, ...].
    """
    return stock[hot_ids.to(stock.device)]


def merge_into_stock(stock: torch.Tensor, hot: torch.Tensor, hot_ids: torch.Tensor) -> torch.Tensor:
    """Writes the hot rows back to their homes.

    Args:
        stock: the cold tier's tensor of the whole table, [rows, ...]; its cold rows are current, its hot rows stale.
        hot: the hot tier's tensor, [hot rows, ...].
        hot_ids: int64 [hot rows], the home of each slot.

    Returns:
        A new tensor [rows, ...] on the device of `stock`: what a stock table would hold.
    """
    return stock.index_copy(0, hot_ids.to(stock.device), hot.to(stock.device))
