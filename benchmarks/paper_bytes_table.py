"""What FAE's paper says of the bytes that it moves (Table 7), what that counts, and this benchmark's counts beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paper_bytes_count import Moved

GIB = 1 << 30


@dataclass(frozen=True)
class Published:
    """One data set in FAE's paper (arXiv 2103.00686; VLDB 2022).

    Attributes:
        config: file of `examples/configs` that describes the workload.
        rows: of all tables.
        row_bytes: of a row's fp32 weights.
        lookups: rows of a sample that cross to the GPUs: one a table, for Taobao's TBSM 21 a table.
        host_gib: Table 7, DLRM (its baseline: tables in host memory).
        fae_gib: Table 7, FAE.
        hot_bytes: Fig. 5, the hot rows' share of all bytes at its largest point.
        hot_inputs: the share of inputs that are all hot there.
    """

    config: str
    rows: float
    row_bytes: int
    lookups: int
    host_gib: float
    fae_gib: float
    hot_bytes: float
    hot_inputs: float

    @property
    def sample_bytes(self) -> int:
        """Bytes of rows that a sample brings to the GPUs."""
        return self.lookups * self.row_bytes

    @property
    def samples(self) -> float:
        """Samples of an epoch that Table 7's baseline comes to, if it counts each sample's rows once, in one direction."""
        return self.host_gib * GIB / self.sample_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes of all tables' weights."""
        return self.rows * self.row_bytes

    def formula_gib(self, hot_inputs: float, hot_bytes: float, copies: int = 2) -> float:
        """GiB of an epoch: the rows of samples that are not all hot, in one direction, and so many copies of the hot rows' weights.

        Args:
            hot_inputs: share of the samples.
            hot_bytes: share of all tables' bytes.
            copies: 2 for one cold and one hot phase: once to the GPUs and once back.
        """
        return self.host_gib * (1 - hot_inputs) + copies * hot_bytes * self.weight_bytes / GIB


PUBLISHED = {
    "kaggle": Published("kaggle.yaml", 33_762_577, 64, 26, 60.89, 14.99, 0.068, 0.758),
    "terabyte": Published("terabyte.yaml", 266e6, 256, 26, 375.06, 69.58, 0.0066, 0.817),
    "avazu": Published("avazu_synthetic.yaml", 9.3e6, 64, 21, 40.45, 10.45, 0.18, 0.746),
    "taobao": Published("taobao_synthetic.yaml", 987_994 + 4_162_024 + 9_439, 64, 63, 1.95, 0.61, 0.80, 0.925),
}


def baseline_check() -> dict[str, Any]:
    """Whether Table 7's baseline is one epoch of rows in one direction: its figures from numbers of samples known from elsewhere."""
    known = {
        "kaggle": (39_291_958, "six of the seven days of Criteo Kaggle's 45,840,617 samples"),
        "avazu": (32_343_173, "80 % of Avazu's 40,428,967 samples; the split is an assumption"),
        "taobao": (690_000, "--num-train-pts of the authors' TBSM/run_tbsm_fae.sh; 75 % of it would come to 1.94"),
        "terabyte": (None, "three days after sub-sampling: no number is known here"),
    }
    return {
        name: {
            "table7_gib": paper.host_gib,
            "samples_it_comes_to": round(paper.samples),
            "known_samples": known[name][0],
            "known_from": known[name][1],
            "gib_of_known": None if known[name][0] is None else round(known[name][0] * paper.sample_bytes / GIB, 2),
        }
        for name, paper in PUBLISHED.items()
    }


def beside_table7(paper: Published, hot_inputs: float, hot_bytes: float, paper_epoch: Moved) -> dict[str, Any]:
    """Counted bytes the paper's way, beside Table 7.

    Args:
        paper: the data set.
        hot_inputs: share of the counted samples in hot batches.
        hot_bytes: the hot rows' share of all weights.
        paper_epoch: FAE as published, counted and scaled to the paper's epoch.
    """
    simulated = paper.formula_gib(hot_inputs, hot_bytes)
    return {
        "stock_host_gib": round(paper.samples * paper.sample_bytes / GIB, 2),
        "table7_stock_host_gib": paper.host_gib,
        "table7_fae_gib": paper.fae_gib,
        "by_fig5_gib": round(paper.formula_gib(paper.hot_inputs, paper.hot_bytes), 2),
        "by_fig5_over_table7": round(paper.formula_gib(paper.hot_inputs, paper.hot_bytes) / paper.fae_gib, 3),
        "counted_rows_gib": round(paper_epoch.to_gpu / GIB, 2),
        "hot_copy_gib": round(hot_bytes * paper.weight_bytes / GIB, 3),
        "counted_two_copies_gib": round(paper_epoch.to_gpu / GIB + 2 * hot_bytes * paper.weight_bytes / GIB, 2),
        "counted_over_table7": round(simulated / paper.fae_gib, 3),
        "counted_r50_gib": round((paper_epoch.to_gpu + paper_epoch.sync_to_gpu + paper_epoch.sync_to_host) / GIB, 2),
        "hot_inputs": hot_inputs,
        "published_hot_inputs": paper.hot_inputs,
        "hot_bytes": hot_bytes,
        "published_hot_bytes": paper.hot_bytes,
    }
