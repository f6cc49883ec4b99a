"""From a stream of inputs to a popularity profile: sample inputs, count their accesses, keep some inputs whole."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from operator import index
from typing import NoReturn

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from fae_torchrec.core.errors import ConfigError, DataError, FAEError
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.core.tables import TableSet
from fae_torchrec.data.partial_profile import PartialProfile, ProfileTally, Sampling
from fae_torchrec.data.segregate import check_ids
from fae_torchrec.data.sharded_source import ShardedSource
from fae_torchrec.data.skipped_lines import SkippedLines

_PLACE_BITS = 40  # of an input's number within its shard; a file has at most 2**23 shards then
_GROUPS_PER_WORKER = 4  # shards are dealt in groups: small enough to keep all workers busy to the end, and few to send back


class Calibrator:
    """FAE's Input Sampler, Embedding Logger and Profiler (FAE §4.1): counts accesses on a small sample of the inputs.

    Every input draws one uniform number and is counted if it is below `sample_rate`. Of the counted inputs and of the others, those with
    the smallest numbers are kept whole: what a selection is fitted on, and what hot inputs are estimated on. Only inputs that the counts
    have not seen serve for the estimate (rows that none but the counted inputs access would pass for popular otherwise); at a rate of 1
    there are none. The numbers of a shard are a Philox stream named by the seed and the shard's number. So the profile is a function of
    the seed and the data, whatever the batches, workers and ranks.

    Args:
        tables: the tables whose accesses are counted.
        sample_rate: the chance of an input to be counted, in (0, 1]; FAE found 5 % to be enough.
        seed: of the sampling, at least 0.
        keep_inputs: counted inputs kept whole at most.
        fresh_inputs: inputs that were not counted, kept whole at most. With 65,536 the interval of hot inputs is at most 1.3 percentage
            points wide.

    Raises:
        ConfigError: a rate outside (0, 1], a negative seed, or a number of inputs below 1.
    """

    def __init__(
        self, tables: TableSet, *, sample_rate: float = 0.05, seed: int = 7, keep_inputs: int = 131_072, fresh_inputs: int = 65_536
    ) -> None:
        self.tables = tables
        # Plain numbers: numpy's cannot be written to JSON, and so not into a profile.
        self.sampling = Sampling(float(sample_rate), index(seed), index(keep_inputs), index(fresh_inputs))

    def run(
        self,
        batches: Iterable[Batch | KeyedJaggedTensor],
        *,
        source: str = "",
        progress: bool = False,
        total: int | None = None,
    ) -> PopularityProfile:
        """Reads all batches once; they are one shard.

        Memory is that of `AccessHistogram` for each table, and about three times the inputs kept. Counting costs what the counted ids
        cost; every id is read once to check its range, so that bad data are found here and not in the middle of training.

        Args:
            batches: the stream, on the CPU; only the ids are read. Features that no table looks up are ignored.
            source: where the batches come from, kept in the profile.
            progress: whether to show a bar on stderr.
            total: samples in the stream, if known, for the bar.

        Returns:
            The profile of the counted inputs.

        Raises:
            DataError: nothing was counted (or, at a rate below 1, everything was), a feature is missing, or an id, counted or not, is
                not a row of its table.
        """
        tally = ProfileTally(self.tables, self.sampling)
        with _bar(total, progress) as bar:
            self._count_shard(tally, 0, batches, source or "input", bar)
        return tally.partial().profile(source)

    def count(self, source: ShardedSource, shards: Iterable[int], *, progress: bool = False) -> PartialProfile:
        """Counts some shards of a source, such as those of one rank; `PartialProfile.merged` joins what was counted.

        Args:
            source: the data.
            shards: numbers of shards, 0..num_shards-1.
            progress: whether to show a bar on stderr.

        Raises:
            DataError: as `run`, but counting nothing is no error here; or more lines are malformed than allowed.
        """
        shards = list(shards)
        tally = ProfileTally(self.tables, self.sampling)
        expected = source.size_hint() * len(shards) // max(source.num_shards, 1)
        known = source.skipped()
        with _bar(expected, progress) as bar:
            for shard in shards:
                self._count_shard(tally, shard, source.read_shard(shard), f"{source.name}, shard {shard}", bar)
                tally.add_shard(shard)
        tally.add_skipped(SkippedLines.since(known, source.skipped(), source.max_bad_lines))
        return tally.partial()

    def run_source(self, source: ShardedSource, *, workers: int = 1, progress: bool = False) -> PopularityProfile:
        """Reads all shards of a source once, by worker processes if there are several workers; the profile is the same.

        Starting workers takes some seconds, for they import torch; a script needs `if __name__ == "__main__":`, as always with worker
        processes. Memory of each worker is as that of `run`.

        Args:
            source: the data; pickled for the workers.
            workers: processes that count, at least 1. One counts in this process.
            progress: whether to show a bar on stderr.

        Raises:
            ConfigError: workers is below 1.
            DataError: as `run`; or more lines are malformed than allowed, by all workers together.
            FAEError: a worker was killed.
        """
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, received {workers}")
        groups = [group.tolist() for group in np.array_split(np.arange(source.num_shards), workers * _GROUPS_PER_WORKER) if len(group)]
        if min(workers, len(groups)) < 2:
            return self.count(source, range(source.num_shards), progress=progress).profile(source.name)
        with _bar(source.size_hint(), progress) as bar:
            return PartialProfile.merged(self._count_groups(source, groups, min(workers, len(groups)), bar)).profile(source.name)

    def _count_groups(self, source: ShardedSource, groups: list[list[int]], workers: int, bar: tqdm[NoReturn]) -> Iterator[PartialProfile]:
        """The groups of shards as they are counted by workers."""
        context = multiprocessing.get_context("forkserver")  # imports torch once for all workers; a fork of this process may deadlock
        context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(workers, context, _start_worker, (logging.getLogger("torch.fx").getEffectiveLevel(),))
        try:
            for future in as_completed([pool.submit(self.count, source, group) for group in groups]):
                part = future.result()
                bar.update(part.total_samples)
                yield part
        except BrokenProcessPool as error:
            raise FAEError(
                f"a worker that counted {source.name} ended without a result: killed, perhaps for lack of memory, or it could not start; "
                'take fewer workers (1 needs no other process), and see that your script has `if __name__ == "__main__":`'
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _count_shard(
        self, tally: ProfileTally, shard: int, batches: Iterable[Batch | KeyedJaggedTensor], where: str, bar: tqdm[NoReturn]
    ) -> None:
        key = np.random.SeedSequence([self.sampling.seed, shard]).generate_state(2, np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        before = 0
        for batch in batches:
            kjt = batch if isinstance(batch, KeyedJaggedTensor) else batch.sparse_features
            size = kjt.stride()
            try:
                check_ids(kjt, self.tables)
            except DataError as error:
                raise DataError(f"{where}, in the {size} samples after the first {before}: {error}") from error
            tally.add_batch(kjt, rng.random(size), (shard << _PLACE_BITS) + before + np.arange(size))
            before += size
            bar.update(size)


def _start_worker(log_level: int) -> None:
    """One thread for each worker; torch.fx, which warns when the first KeyedJaggedTensor is made, says what it may say in this process."""
    torch.set_num_threads(1)
    logging.getLogger("torch.fx").setLevel(log_level)


def _bar(total: int | None, progress: bool) -> tqdm[NoReturn]:
    return tqdm(total=total, desc="calibrate", unit="sample", unit_scale=True, disable=None if progress else True)
