"""Tiny experiments on raw data: for every source the files in their original format, and the `data` section that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.test_avazu import make_lines as avazu_lines
from tests.data.test_avazu import write as write_avazu
from tests.data.test_criteo_tsv import criteo_lines
from tests.data.test_taobao import make_events
from tests.data.test_taobao import write as write_taobao
from tests.data.text_files import write_text

CODING = {"method": "hash", "max_rows": 50}
CSV_HEADER = "clicked,age,city,shop,tags\n"
"""The columns of csv_text: one of numbers, one of words, one of whole numbers, and bags of words."""


def csv_text(samples: int, seed: int) -> str:
    """Lines as of CSV_HEADER, without it; small numbers are the popular ones."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(samples):
        city, shop, *tags = (int(40 * rng.random() ** 3) for _ in range(2 + rng.integers(0, 3)))
        lines.append(f"{rng.integers(0, 2)},{rng.random():.3f},city {city},{shop:03d},{'|'.join(f'tag {tag}' for tag in tags)}\n")
    return "".join(lines)


def write_csv(folder: Path, name: str, samples: int, seed: int) -> Path:
    """csv_text with its header, in a file (plain or .gz)."""
    return write_text(folder, (CSV_HEADER + csv_text(samples, seed)).encode(), name)


def _criteo(folder: Path) -> dict[str, Any]:
    for seed, (name, samples) in enumerate((("day_0", 90), ("day_1.gz", 60), ("day_2", 40))):
        write_text(folder, criteo_lines(samples, seed), name)
    return {"criteo": {"train": ["day_0", "day_1.gz"], "test": ["day_2"]}, "coding": {**CODING, "method": "modulo"}}


def _criteo_npy(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for day, samples in enumerate((90, 60, 80)):
        np.save(folder / f"day_{day}_dense.npy", rng.random((samples, 13), dtype=np.float32))
        np.save(folder / f"day_{day}_contig.npy", rng.integers(0, 40, (samples, 26), dtype=np.int32))
        np.save(folder / f"day_{day}_labels.npy", rng.integers(0, 2, (samples, 1), dtype=np.int32))
    npy = {"folder": ".", "train_days": [0, 1], "test_day": 2, "test_stage": "test", "sparse_part": "contig"}
    return {"criteo_npy": npy, "coding": {"method": "none", "max_rows": 40}}


def _avazu(folder: Path) -> dict[str, Any]:
    for seed, (name, samples) in enumerate((("a.csv", 90), ("b.csv.gz", 60), ("c.csv", 40))):
        write_avazu(folder / name, avazu_lines(samples, missing=0.1, seed=seed))
    return {"avazu": {"train": ["a.csv", "b.csv.gz"], "test": ["c.csv"]}, "coding": CODING}


def _taobao(folder: Path) -> dict[str, Any]:
    write_taobao(folder / "u.csv", make_events(seed=1, users=20))
    taobao = {"files": ["u.csv"], "history": 4, "min_history": 2, "windows_per_user": 4, "index_folder": "events"}
    return {"taobao": taobao, "coding": {"rows": {"user": 30, "item": 60, "category": 9}}}


def _csv(folder: Path) -> dict[str, Any]:
    for seed, (name, samples) in enumerate((("a.csv", 90), ("b.csv.gz", 60), ("c.csv", 40))):
        write_csv(folder, name, samples, seed)
    columns = {"dense": ["age"], "sparse": ["city", "shop", "tags"], "label": "clicked", "integers": ["shop"], "separators": {"tags": "|"}}
    return {"csv": {"train": ["a.csv", "b.csv.gz"], "test": ["c.csv"], **columns}, "coding": CODING}


def _parquet(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for name, samples in (("a.parquet", 90), ("b.parquet", 60), ("c.parquet", 40)):
        numbers = (40 * rng.random((3, samples)) ** 3).astype(int).tolist()
        tags = [[f"tag {tag}", f"tag {tag + 1}"][: tag % 3] for tag in numbers[2]]
        columns = {"city": [f"city {city}" for city in numbers[0]], "shop": numbers[1], "tags": pa.array(tags, pa.list_(pa.string()))}
        pq.write_table(pa.table({**columns, "age": rng.random(samples), "clicked": rng.integers(0, 2, samples)}), folder / name)
    columns = {"dense": ["age"], "sparse": ["city", "shop", "tags"], "label": "clicked"}
    return {"parquet": {"train": ["a.parquet", "b.parquet"], "test": "c.parquet", **columns}, "coding": CODING}


RAW: dict[str, Callable[[Path], dict[str, Any]]] = {
    "criteo": _criteo, "criteo_npy": _criteo_npy, "avazu": _avazu, "taobao": _taobao, "csv": _csv, "parquet": _parquet,
}  # fmt: skip
"""Source -> writes its files to a folder and returns the `data` section, with paths relative to the folder."""
