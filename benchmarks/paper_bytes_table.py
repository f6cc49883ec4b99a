"""What FAE's paper says of the bytes that it moves (Table 7), what that counts, and this benchmark's counts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paper_bytes_count import Moved

from fae_torchrec.data.criteo_shape import SHAPES
from fae_torchrec.data.taobao_shape import TAOBAO
from fae_torchrec.training.paper_tables import GIB, WORKLOADS, Workload


@dataclass(frozen=True)
class Published:
    """One data set in FAE's paper (arXiv 2103.00686; VLDB 2022).

    Attributes:
        config: file of `examples/configs` that describes the workload.
        overrides: of the config, for a run of minutes.
        workload: of Table 7.
        rows: of all tables.
        points: Fig. 5: hot rows' share of all bytes, share of the inputs that are all hot.
    """

    config: str
    overrides: tuple[str, ...]
    workload: Workload
    rows: int
    points: Sequence[tuple[float, float]]

    @property
    def samples(self) -> float:
        """Samples of an epoch that Table 7's baseline comes to, if it counts each sample's rows once, in one direction."""
        samples = self.workload.epoch_samples
        assert samples is not None
        return samples

    @property
    def weight_bytes(self) -> float:
        """Bytes of all tables' weights."""
        return self.rows * 4.0 * self.workload.embedding_dim

    @property
    def hot_bytes(self) -> float:
        """Fig. 5's largest point: the hot rows' share of all bytes."""
        return self.points[-1][0]

    @property
    def hot_inputs(self) -> float:
        """The share of inputs that are all hot there."""
        return self.points[-1][1]

    def formula_gib(self, hot_inputs: float, hot_bytes: float, copies: int = 2) -> float:
        """GiB of an epoch: the rows of samples that are not all hot, in one direction, and so many copies of the hot rows' weights.

        Args:
            hot_inputs: share of the samples.
            hot_bytes: share of all tables' bytes.
            copies: 2 for one cold and one hot phase: once to the GPUs and once back.
        """
        rows = self.samples * self.workload.sample_bytes / GIB
        return rows * (1 - hot_inputs) + copies * hot_bytes * self.weight_bytes / GIB


_MILLION = ("data.synthetic.test_samples=1048576",)
# A tenth of the rows, and as many samples a user as all rows would need to be seen; every train sample counted.
_SMALL_TAOBAO = (
    "data.synthetic.scale=0.1",
    "data.synthetic.train_samples=1048576",
    "data.synthetic.test_samples=262144",
    "profile.sample_rate=1.0",
)


def _criteo(config: str, workload: str, data: str) -> Published:
    return Published(config, _MILLION, WORKLOADS[workload], sum(SHAPES[data].published_rows), SHAPES[data].published_points)


PUBLISHED = {
    "kaggle": _criteo("kaggle.yaml", "RMC2", "kaggle"),
    "terabyte": _criteo("terabyte.yaml", "RMC3", "terabyte"),
    "avazu": _criteo("avazu_synthetic.yaml", "RMC4", "avazu"),
    "taobao": Published("rmc1.yaml", _SMALL_TAOBAO, WORKLOADS["RMC1"], sum(TAOBAO.published_rows), TAOBAO.published_points),
}


def baseline_check() -> dict[str, Any]:
    """Whether Table 7's baseline is one epoch of rows in one direction: its figures from numbers of samples known from elsewhere."""
    found = {}
    for name, paper in PUBLISHED.items():
        known = paper.workload.known_samples
        found[name] = {
            "table7_gib": paper.workload.host_gb,
            "samples_it_comes_to": round(paper.samples),
            "known_samples": known and known[0],
            "known_from": "no number is known here" if known is None else known[1],
            "gib_of_known": known and round(known[0] * paper.workload.sample_bytes / GIB, 2),
        }
    return found


def beside_table7(paper: Published, hot_inputs: float, hot_bytes: float, paper_epoch: Moved) -> dict[str, Any]:
    """Counted bytes the paper's way, beside Table 7.

    Args:
        paper: the data set.
        hot_inputs: share of the counted samples in hot batches.
        hot_bytes: the hot rows' share of all weights.
        paper_epoch: FAE as published, counted and scaled to the paper's epoch.
    """
    simulated = paper.formula_gib(hot_inputs, hot_bytes)
    fae_gib = paper.workload.fae_gb
    assert fae_gib is not None
    return {
        "stock_host_gib": round(paper.samples * paper.workload.sample_bytes / GIB, 2),
        "table7_stock_host_gib": paper.workload.host_gb,
        "table7_fae_gib": fae_gib,
        "by_fig5_gib": round(paper.formula_gib(paper.hot_inputs, paper.hot_bytes), 2),
        "by_fig5_over_table7": round(paper.formula_gib(paper.hot_inputs, paper.hot_bytes) / fae_gib, 3),
        "counted_rows_gib": round(paper_epoch.to_gpu / GIB, 2),
        "hot_copy_gib": round(hot_bytes * paper.weight_bytes / GIB, 3),
        "counted_two_copies_gib": round(paper_epoch.to_gpu / GIB + 2 * hot_bytes * paper.weight_bytes / GIB, 2),
        "counted_over_table7": round(simulated / fae_gib, 3),
        "counted_r50_gib": round((paper_epoch.to_gpu + paper_epoch.sync_to_gpu + paper_epoch.sync_to_host) / GIB, 2),
        "hot_inputs": hot_inputs,
        "published_hot_inputs": paper.hot_inputs,
        "hot_bytes": hot_bytes,
        "published_hot_bytes": paper.hot_bytes,
    }
