"""The plain values of a made-up popularity report, of any number of tables."""

from __future__ import annotations

from typing import Any

import numpy as np


def popularity_values(tables: int = 4, points: int = 12) -> dict[str, Any]:
    """Table k of `tables` has 10 rows more than the one before times 2.2; the first two of four or more are always hot."""
    rows = [int(10 * 2.2**k) for k in range(tables)]
    names = [f"t_cat_{k}" for k in range(tables)]
    pinned = names[: tables // 3]
    all_bytes = 68 * sum(rows)
    x = np.geomspace(1e-4, 1, 40)
    return {
        "schema": 1,
        "kind": "popularity",
        "created": "2026-11-20T18:00:00+00:00",
        "command": ["fae", "report", "--config", "a <b> & c.yaml"],
        "versions": {"python": "3.11.7"},
        "hardware": {"cores": 2, "ram_bytes": 25276510208, "gpus": []},
        "profile": {
            "fingerprint": "3f2a91bc0d11",
            "source": "made <up>, 65536 samples",
            "num_samples": 3276,
            "total_samples": 65536,
            "sample_rate": 0.05,
            "seed": 7,
            "skipped": {"day <0>.gz": 3},
            "fresh_inputs": 4096,
            "counted_inputs": 3276,
            "skew": [
                {
                    "table": name,
                    "rows": size,
                    "seen_rows": max(size // 3, 1),
                    "accesses": 3276,
                    "row_share": x.tolist(),
                    "access_share": (x ** (0.15 + 0.6 * k / tables)).tolist(),
                }
                for k, (name, size) in enumerate(zip(names, rows, strict=True))
            ],
        },
        "placement": {
            "budget_bytes": int(0.021 * all_bytes),
            "policy": "input_aware",
            "used_bytes": int(0.02 * all_bytes),
            "byte_share": int(0.02 * all_bytes) / all_bytes,
            "all_bytes": all_bytes,
            "hot_inputs": 0.5044,
            "hot_inputs_interval": [0.478, 0.531],
            "coverage": 0.8714,
            "resolution": None,
            "pinned": pinned,
            "selections": {
                "input_aware": {"used_bytes": int(0.02 * all_bytes), "hot_inputs": 0.5044, "low": 0.478, "high": 0.531, "coverage": 0.8714},
                "threshold": {"used_bytes": int(0.0199 * all_bytes), "hot_inputs": 0.43, "low": 0.41, "high": 0.456, "coverage": 0.8914},
            },
            "per_table": [
                {
                    "table": name,
                    "rows": size,
                    "seen_rows": max(size // 3, 1),
                    "hot_rows": {
                        "input_aware": size if name in pinned else size // 40,
                        "threshold": size if name in pinned else size // 50,
                    },
                    "row_bytes": 68,
                    "kind": "hot" if name in pinned else "split" if size >= 40 else "cold",
                }
                for name, size in zip(names, rows, strict=True)
            ],
        },
        "curves": {
            policy: [
                {
                    "used_bytes": int(share * all_bytes),
                    "byte_share": share,
                    "hot_inputs": (value := (0.9 - lag) * share**0.17),
                    "low": value - 0.03,
                    "high": value + 0.03,
                    "coverage": (0.92 + lag / 2) * share**0.02,
                }
                for share in np.geomspace(0.002, 0.3, points).tolist()
            ]
            for policy, lag in (("input_aware", 0.0), ("threshold", 0.1))
        },
        "thresholds": [
            {
                "threshold_percent": percent,
                "byte_share": (share := 0.0002 / percent**0.7),
                "hot_rows": int(share * sum(rows)),
                "hot_inputs": (value := 0.9 * share**0.17),
                "low": value - 0.03,
                "high": value + 0.03,
                "coverage": 0.92 * share**0.02,
                "clamped": index == points - 1,
            }
            for index, percent in enumerate(np.geomspace(1, 100 / 3276, points).tolist())
        ],
    }
