"""What FAE's paper prints, as data: its workloads, Table 7, and which numbers of Tables 4 and 5 and of Fig. 14 are at hand.

The paper is Adnan, Maboud, Mahajan, Nair: "Accelerating Recommendation System Training by Leveraging Popular Choices", PVLDB 15(1), 2022
(arXiv 2103.00686). A number stands here only with the source that it was read in. Where that source could not be read, there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
NOT_AT_HAND = "not at hand"
"""What a table says in place of a number of the paper that could not be looked up."""


@dataclass(frozen=True)
class Workload:
    """One workload of the paper.

    Attributes:
        name: as the paper has it.
        data: "taobao", "kaggle", "terabyte" or "avazu".
        title: of the data set.
        model: in words.
        embedding_dim: fp32 weights of a row.
        dense_arch: widths of the bottom MLP after its input.
        over_arch: widths of the top MLP after its input.
        lookups: rows that a sample looks up.
        host_gb: Table 7, the baseline with its tables in host memory; None where the paper has none.
        fae_gb: Table 7, FAE.
        known_samples: samples of an epoch from another source, and which; None where none is at hand.
    """

    name: str
    data: str
    title: str
    model: str
    embedding_dim: int
    dense_arch: tuple[int, ...]
    over_arch: tuple[int, ...]
    lookups: int
    host_gb: float | None = None
    fae_gb: float | None = None
    known_samples: tuple[int, str] | None = None

    @property
    def sample_bytes(self) -> int:
        """Bytes of the fp32 rows that a sample looks up."""
        return 4 * self.embedding_dim * self.lookups

    @property
    def ratio(self) -> float | None:
        """Table 7: FAE's data transfer over the baseline's."""
        return None if self.host_gb is None or self.fae_gb is None else self.fae_gb / self.host_gb

    @property
    def epoch_samples(self) -> float | None:
        """Samples whose rows, in one direction, are as many bytes as Table 7's baseline, if its GB are GiB."""
        return None if self.host_gb is None else self.host_gb * GIB / self.sample_bytes


_KNOWN = {
    "RMC1": (517_500, "75 % of the 690,000 of --num-train-pts in the authors' TBSM/run_tbsm_fae.sh; the 75 % is a guess"),
    "RMC2": (39_291_958, "six sevenths of the data set's 45,840,617 samples, which are seven days"),
    "RMC4": (32_343_173, "80 % of the data set's 40,428,967 samples; the 80 % is a guess"),
}
_RMC2_DATA = ("kaggle", "Criteo Kaggle", "DLRM")
WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("RMC1", "taobao", "Taobao", "TBSM", 16, (16,), (60, 1), 63, 1.95, 0.61, _KNOWN["RMC1"]),
        Workload("RMC2", *_RMC2_DATA, 16, (512, 256, 64, 16), (512, 256, 1), 26, 60.89, 14.99, _KNOWN["RMC2"]),
        Workload("RMC3", "terabyte", "Criteo Terabyte", "DLRM", 64, (512, 256, 64), (512, 512, 256, 1), 26, 375.06, 69.58),
        Workload("RMC4", "avazu", "Avazu", "DLRM", 16, (512, 256, 64, 16), (512, 256, 1), 21, 40.45, 10.45, _KNOWN["RMC4"]),
        Workload("SYN-M1", *_RMC2_DATA, 64, (64,), (512, 1), 26),
        Workload("SYN-M2", *_RMC2_DATA, 64, (512, 64), (512, 256, 1), 26),
        Workload("SYN-M3", *_RMC2_DATA, 64, (1024, 512, 64), (512, 1024, 256, 1), 26),
        Workload("SYN-M4", *_RMC2_DATA, 64, (1024, 512, 256, 64), (512, 1024, 512, 256, 1), 26),
    )
}
"""By name. Models and data: Table 1 and section 5 of the paper; bytes: its Table 7."""


@dataclass(frozen=True)
class PaperTable:
    """One table or figure of the paper, in words.

    Attributes:
        name: "Table 4", ...
        title: what it shows.
        source: where its numbers here are from, or why there are none.
        alike: what of this run can be held against it.
        unlike: what cannot.
    """

    name: str
    title: str
    source: str
    alike: str
    unlike: str


_UNREAD = (
    "Not at hand: the paper's tables could not be read where this was written (only its abstract, the beginning of its first page and the "
    "authors' code, which has no results, were), and a number that nobody looked up is not printed."
)
TABLES: Mapping[str, PaperTable] = {
    "table4": PaperTable(
        "Table 4",
        "test accuracy, AUC and log loss",
        _UNREAD,
        "Whether FAE scores as its baseline does: the difference of the two in this run, with its interval.",
        "The scores themselves. Generated samples have labels of a planted model, so their AUC says nothing of the data set; on the real "
        "file they also depend on the split, the epochs and the optimizer.",
    ),
    "table5": PaperTable(
        "Table 5",
        "training time",
        f"{_UNREAD} The abstract says: 2.3 and 1.52 times less overall training time than XDL on a CPU and on CPU and GPU (PVLDB). The "
        "abstract on Microsoft Research's page says 2.34 times the speed of Xeon CPUs with V100 GPUs, on Kaggle, Terabyte and Alibaba.",
        "Nothing of the times. FAE's time over stock's, on the same machine, is a ratio of the same kind as the abstract's.",
        "Hardware (the paper: Xeon CPUs and V100 GPUs), the baseline (the paper: XDL; here TorchRec with FBGEMM's fused kernels), samples "
        "and epochs. On a machine without a GPU the hot and the cold tier are the same memory, so that the ratio is what the method costs, "
        "not what it gains.",
    ),
    "table7": PaperTable(
        "Table 7",
        "data transferred between CPU and GPU",
        "The paper's figures as they were quoted to this project (not looked up in the paper): GB, of 10 epochs.",
        "FAE's bytes over the baseline's: a ratio that neither samples nor epochs change, as long as the hot rows are as popular. Here it "
        "is of the fp32 weights of the rows that a sample brings from outside the hot tier. The baseline brings every row that it looks "
        "up. FAE as published brings every row of a sample that is not all hot (the share 1 - hot inputs of the baseline's), and copies of "
        "the hot rows at swaps; FAE here only the cold rows, and no copies.",
        "Bytes themselves: other samples, epochs and scale. The share of the bytes that is hot is the config's; the paper's is what its "
        "GPU's memory takes. Gradients on their way back and optimizer state are not counted here.",
    ),
    "fig14": PaperTable(
        "Fig. 14",
        "where a step's time goes",
        f"{_UNREAD} What this project's design notes keep of it: FAE as published spends 13 % of its time on synchronising embeddings when "
        "it changes between hot and cold batches.",
        "Which categories there are: forward, backward, optimizer, CPU-GPU transfer and embedding sync are the paper's. Embedding sync is "
        "0 here, since nothing is synchronised at swaps.",
        "The shares: other hardware, and FBGEMM fuses the embeddings' optimizer into backward, so that optimizer is that of the dense part "
        "alone. On a CPU there is no transfer, and the shares are of the thread that trains.",
    ),
}
ASIDE = (
    "The paper's Terabyte is three days of the data set with 87.5 % of the negative samples left out; its samples are not numbered where "
    "this was written."
)


def recognised(config: Mapping[str, Any]) -> str | None:
    """The workload that a config describes, by its data and its model's widths; None if it is none of them.

    Args:
        config: a run's config as plain values, as report.json has it.
    """
    model, data = config.get("model") or {}, data_of(config)
    shape = (model.get("embedding_dim"), tuple(model.get("dense_arch") or ()), tuple(model.get("over_arch") or ()))
    tbsm = bool(model.get("factory"))
    for workload in WORKLOADS.values():
        alike = shape == (workload.embedding_dim, workload.dense_arch, workload.over_arch) and tbsm == (workload.model == "TBSM")
        if alike and (data == workload.data or (data == "criteo" and workload.data in ("kaggle", "terabyte"))):
            return workload.name
    return None


def data_of(config: Mapping[str, Any]) -> str | None:
    """Which data set a config reads or generates: a workload's `data`, "criteo" for files of either of Criteo's, None for another."""
    data = config.get("data") or {}
    if data.get("synthetic"):
        return str(data["synthetic"].get("dataset"))
    kinds = {"taobao": "taobao", "avazu": "avazu", "criteo": "criteo", "criteo_npy": "criteo"}
    return next((found for kind, found in kinds.items() if data.get(kind)), None)


def data_title(config: Mapping[str, Any]) -> str:
    """A config's data in a few words: "synthetic, shape of Avazu", "files of Taobao"."""
    titles, data = {workload.data: workload.title for workload in WORKLOADS.values()}, data_of(config)
    title = "another kind" if data is None else titles.get(data, data.capitalize())
    return f"synthetic, shape of {title}" if (config.get("data") or {}).get("synthetic") else f"files of {title}"


def unlike_model(workload: Workload, config: Mapping[str, Any]) -> list[str]:
    """How a config's model and data differ from the workload's, a sentence each."""
    model, texts = config.get("model") or {}, []
    for key in ("embedding_dim", "dense_arch", "over_arch"):
        wanted, given = getattr(workload, key), model.get(key)
        if given != (list(wanted) if isinstance(wanted, tuple) else wanted):
            texts.append(f"model.{key} is {given}, the paper's is {list(wanted) if isinstance(wanted, tuple) else wanted}")
    if bool(model.get("factory")) != (workload.model == "TBSM"):
        texts.append(f"the model is {model.get('factory') or 'DLRM'}, the paper's is {workload.model}")
    data = data_of(config)
    if data != workload.data and not (data == "criteo" and workload.data in ("kaggle", "terabyte")):
        texts.append(f"the data are {data or 'of another kind'}, the paper's are {workload.title}")
    return texts


def readings() -> list[str]:
    """What Table 7's baseline comes to, if its GB are GiB: arithmetic of ours, not the paper's words."""
    texts = ["What the baseline's figures equal, in GiB (our arithmetic, not the paper's words; so read they are of one epoch):"]
    for workload in WORKLOADS.values():
        if workload.host_gb is None or workload.epoch_samples is None:
            continue
        samples, row_bytes = workload.epoch_samples / 1e6, 4 * workload.embedding_dim
        text = f"{workload.title}: {workload.host_gb} GiB equals {workload.lookups} rows of {row_bytes} bytes of each of "
        text += f"{samples:.2f} million samples, in one direction"
        if workload.known_samples is not None:
            known, source = workload.known_samples
            text += f"; {known:,} samples ({source}) would come to {known * workload.sample_bytes / GIB:.2f}"
        texts.append(text + ".")
    return texts
