"""StoreLayout: what `store.json` says of a segregated store.

A store is a folder of Arrow IPC files (`store_columns` says which columns they have) and `store.json`, which is written last. The data are
cut into parts, runs of source shards; every part has files of its own for its hot and for its cold samples, none for a kind that it lacks.
A kind's samples are those of its files one after the other, in the order of the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from fae_torchrec.core.errors import DataError
from fae_torchrec.core.fingerprint import fingerprint

MANIFEST = "store.json"
ROWS_PER_BATCH = 65_536
"""Samples of a record batch, but for the last one of a file."""

_FORMAT = "fae_torchrec store"
_VERSION = 1


@dataclass(frozen=True)
class StoreFile:
    """One file of a store.

    Attributes:
        name: within the folder.
        kind: "hot" or "cold".
        first_sample: number in the data of the first sample of the file's part.
        samples: how many it holds, at least 1.
        num_bytes: its size.
        crc32: of its bytes.
    """

    name: str
    kind: str
    first_sample: int
    samples: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class StoreLayout:
    """What `store.json` says.

    Attributes:
        feature_names: keys of the KeyedJaggedTensor, in order.
        num_dense: columns of `dense_features`.
        weighted: whether ids have weights.
        placement_fingerprint: of the RowPlacement that decided what is hot.
        data_name: of the source, with everything that decides its samples.
        skipped_lines: file -> malformed lines of the source that were skipped.
        files: in the order of the data, for each kind.
    """

    feature_names: tuple[str, ...]
    num_dense: int
    weighted: bool
    placement_fingerprint: str
    data_name: str
    skipped_lines: Mapping[str, int]
    files: tuple[StoreFile, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Names the store by what it was made from and the checksums of its files."""
        return fingerprint(_FORMAT, _VERSION, asdict(self))

    @cached_property
    def samples(self) -> Mapping[str, int]:
        """Samples of each kind."""
        counts = Counter({"hot": 0, "cold": 0})
        for file in self.files:
            counts[file.kind] += file.samples
        return counts

    @cached_property
    def data_fingerprint(self) -> str:
        """Names the data by their name, features and number of samples."""
        return fingerprint(self.data_name, self.feature_names, self.num_dense, sum(self.samples.values()))

    def to_json(self) -> str:
        """The text of `store.json`."""
        described = {
            "format": _FORMAT, "version": _VERSION, "fingerprint": self.fingerprint, "data_fingerprint": self.data_fingerprint,
            "rows_per_batch": ROWS_PER_BATCH, "samples": dict(self.samples), **asdict(self),
        }  # fmt: skip
        return json.dumps(described, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StoreLayout:
        """Reads what `to_json` wrote.

        Raises:
            DataError: it is not JSON, not of a store, of another version, or was altered.
        """
        try:
            found = json.loads(text)
            if found["format"] != _FORMAT:
                raise KeyError(_FORMAT)
            version = found["version"], found["rows_per_batch"]
            if version != (_VERSION, ROWS_PER_BATCH):
                raise DataError(
                    f"version {version[0]} with {version[1]} rows a batch received, {_VERSION} with {ROWS_PER_BATCH} allowed: written by "
                    "another version of this package; segregate again with this one"
                )
            layout = cls(
                feature_names=tuple(found["feature_names"]),
                num_dense=found["num_dense"],
                weighted=found["weighted"],
                placement_fingerprint=found["placement_fingerprint"],
                data_name=found["data_name"],
                skipped_lines=found["skipped_lines"],
                files=tuple(StoreFile(**file) for file in found["files"]),
            )
            fingerprints = found["fingerprint"], layout.fingerprint
        except DataError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"damaged, or not of a store ({error!r}); segregate the data again") from error
        if fingerprints[0] != fingerprints[1]:
            raise DataError(f"written as {fingerprints[0]}, but its content is {fingerprints[1]}: it was altered; segregate again")
        return layout
