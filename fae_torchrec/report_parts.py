"""What the reports of `fae compare` and `fae report` have in common, as plain values: the environment, and what was counted."""

from __future__ import annotations

from typing import Any

from fae_torchrec.core.histogram import skew_curve
from fae_torchrec.core.popularity import PopularityProfile
from fae_torchrec.doctor import Environment


def describe_environment(environment: Environment) -> dict[str, Any]:
    """Versions and hardware as the reports have them."""
    return {
        "versions": {"python": ".".join(map(str, environment.python)), **environment.packages, "cuda": environment.cuda},
        "hardware": {
            "machine": environment.machine,
            "cores": environment.cores,
            "ram_bytes": environment.ram_bytes,
            "gpus": [list(device) for device in environment.devices],
        },
    }


def describe_profile(profile: PopularityProfile) -> dict[str, Any]:
    """The profile as the reports have it, with a skew curve per table of more than one row that was accessed."""
    skew = []
    for table in profile.tables:
        counts = profile.counts[table.name]
        if table.rows > 1 and counts.total:
            row_share, access_share = skew_curve(counts)
            skew.append(
                {
                    "table": table.name,
                    "rows": table.rows,
                    "seen_rows": counts.ids.size,
                    "accesses": counts.total,
                    "row_share": row_share.tolist(),
                    "access_share": access_share.tolist(),
                }
            )
    return {
        "fingerprint": profile.fingerprint,
        "source": profile.source,
        "num_samples": profile.num_samples,
        "total_samples": profile.total_samples,
        "sample_rate": profile.sample_rate,
        "seed": profile.seed,
        "skipped": dict(profile.skipped),
        "counted_inputs": profile.counted_inputs.num_samples,
        "fresh_inputs": profile.fresh_inputs.num_samples if profile.fresh_inputs is not None else 0,
        "skew": skew,
    }
