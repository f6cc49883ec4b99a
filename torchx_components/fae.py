"""TorchX components of fae_torchrec: `torchx run -s local_cwd torchx_components/fae.py:compare --config examples/configs/demo.yaml`.

Torchx executes this file on its own and reads the signatures, so it imports nothing of the package and annotates with plain types.
"""

import shlex
import sys
from typing import Dict, Optional  # noqa: UP035

import torchx.specs as specs
from torchx.components.dist import ddp

_CLI = "fae_torchrec.cli"


def compare(
    *args: str,
    config: str,
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: str = "",
) -> specs.AppDef:
    """Compares the hot/cold placements with stock TorchRec on one machine: prints a table, writes report.html and report.json.

    One role with one replica, which starts the ranks of every comparison itself.

    Args:
        args: more arguments of `fae compare`, after `--`, such as `-- --ranks 1 2`
        config: the run's description, a YAML or JSON file
        output: folder of the report (default: what the config says)
        overrides: config keys to override, such as train.steps=20,compare.placements=[stock, fae]
        image: image to run in; for local_cwd the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores
        gpu: GPUs
        memMB: memory in MB
        h: a named resource instead of cpu, gpu and memMB
    """
    role = specs.Role(
        name="compare",
        image=image,
        entrypoint=python,
        args=["-m", _CLI, *_cli_arguments("compare", config, output, overrides, args)],
        env={"PYTHONUNBUFFERED": "1"},
        resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h or None),
    )
    return specs.AppDef(name="fae-compare", roles=[role])


def train(
    *args: str,
    config: str,
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    j: str = "1x2",
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: str = "",
) -> specs.AppDef:
    """Trains with hot/cold embeddings on `j` processes, started by torchrun.

    Args:
        args: more arguments of `fae train`, after `--`, such as `-- --placement fae`
        config: the run's description, a YAML or JSON file
        output: folder of the report (default: what the config says)
        overrides: config keys to override, such as train.steps=20,compare.placements=[stock, fae]
        j: nodes x processes on each node; with GPUs, at most as many processes as GPUs
        image: image to run in; for local_cwd the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource instead of cpu, gpu and memMB
    """
    script_args = _cli_arguments("train", config, output, overrides, args)
    app = ddp(*script_args, m=_CLI, image=image, name="fae-train", cpu=cpu, gpu=gpu, memMB=memMB, h=h or None, j=j)
    for role in app.roles:
        # torchx 0.7 calls `torchrun`, which is on the PATH only where the environment is activated.
        launcher, _, rest = role.args[-1].partition(" ")
        if launcher != "torchrun":
            raise RuntimeError(f"torchx's ddp component runs {launcher!r}, expected 'torchrun'; install torchx 0.7")
        role.name = "train"
        role.args[-1] = f"{shlex.quote(python)} -m torch.distributed.run {rest}"
        role.env["PYTHONUNBUFFERED"] = "1"
    return app


def _cli_arguments(
    command: str,
    config: str,
    output: str,
    overrides: Optional[Dict[str, str]],  # noqa: UP006, UP045
    more: tuple[str, ...],
) -> list[str]:
    # torchx refuses an option that comes twice, so several `--set` cannot come in as `more`.
    sets = [word for key, value in (overrides or {}).items() for word in ("--set", f"{key}={value}")]
    return [command, "--config", config, *(["--output", output] if output else []), *sets, *more]
