"""TorchX components of fae_torchrec: `torchx run -s local_cwd torchx_components/fae.py:compare --config examples/configs/demo.yaml`.

Torchx executes this file on its own and reads the signatures, so it imports nothing of the package and annotates with plain types.
What runs them, on one machine or on many: docs/cluster.md.
"""

import shlex
import sys
from typing import Dict, List, Optional  # noqa: UP035

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
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Compares the hot/cold placements with stock TorchRec on one machine: prints a table, writes report.html and report.json.

    One role with one replica, which starts the ranks of every comparison itself.

    Args:
        args: more arguments of `fae compare`, after `--`, such as `-- --ranks 1 2`
        config: the run's description, a YAML or JSON file
        output: folder of the report (default: what the config says)
        overrides: config keys to override, such as train.steps=20,compare.placements=[stock, fae]
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores
        gpu: GPUs
        memMB: memory in MB
        h: a named resource instead of cpu, gpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data,readonly
    """
    arguments = _cli_arguments("compare", config, output, overrides, args)
    return _one_process("compare", arguments, image, python, specs.resource(cpu, gpu, memMB, h or None), mounts)


def plan(
    *args: str,
    config: str,
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    memMB: int = 8192,
    h: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Plans where the rows of every table would lie, for ranks and hardware that need not be there: writes plan.json or what_if.json.

    One role with one replica.

    Args:
        args: more arguments of `fae plan`, after `--`, such as `-- --what-if --hardware v100:8`
        config: the run's description, a YAML or JSON file
        output: folder of what is written (default: what the config says)
        overrides: config keys to override, such as placement.budget=64MiB,train.batch_size=8192
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores
        memMB: memory in MB
        h: a named resource instead of cpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data,readonly
    """
    arguments = _cli_arguments("plan", config, output, overrides, args)
    return _one_process("plan", arguments, image, python, specs.resource(cpu, 0, memMB, h or None), mounts)


def report(
    *args: str,
    config: str,
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    memMB: int = 8192,
    h: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Pictures how skewed the accesses are and what a budget buys: writes popularity.html, popularity.json and the pictures.

    One role with one replica.

    Args:
        args: more arguments of `fae report`, after `--`, such as `-- --max-bad-lines 3`
        config: the run's description, a YAML or JSON file
        output: folder of the report (default: what the config says)
        overrides: config keys to override, such as placement.budget=64MiB,profile.workers=8
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores
        memMB: memory in MB
        h: a named resource instead of cpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data,readonly
    """
    arguments = _cli_arguments("report", config, output, overrides, args)
    return _one_process("report", arguments, image, python, specs.resource(cpu, 0, memMB, h or None), mounts)


def segregate(
    *args: str,
    config: str,
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    memMB: int = 8192,
    h: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Writes the train data once as a store of hot and cold samples, for fast epochs.

    One role with one replica, which starts its workers (loader.workers) itself.

    Args:
        args: more arguments of `fae segregate`, after `--`, such as `-- --workers 8 --store /data/store`
        config: the run's description, a YAML or JSON file
        output: folder of the placement, and of the store if loader.store names none (default: what the config says)
        overrides: config keys to override, such as placement.budget=64MiB,loader.workers=8
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores
        memMB: memory in MB
        h: a named resource instead of cpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data
    """
    arguments = _cli_arguments("segregate", config, output, overrides, args)
    return _one_process("segregate", arguments, image, python, specs.resource(cpu, 0, memMB, h or None), mounts)


def profile(
    *args: str,
    config: str,
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    j: str = "1x2",
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    memMB: int = 8192,
    h: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Counts how often each row is accessed, on `j` processes that share the data and are started by torchrun: writes profile.npz.

    Args:
        args: more arguments of `fae profile`, after `--`, such as `-- --max-bad-lines 3`
        config: the run's description, a YAML or JSON file
        output: folder of the profile (default: what the config says)
        overrides: config keys to override, such as profile.sample_rate=0.1,profile.seed=3
        j: nodes x processes on each node
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores of each node
        memMB: memory of each node in MB
        h: a named resource instead of cpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data,readonly
        env: environment of the processes, such as GLOO_SOCKET_IFNAME=eth0
        rdzv_port: port on the first node at which several nodes meet
    """
    arguments = _cli_arguments("profile", config, output, overrides, args)
    app = ddp(
        *arguments,
        m=_CLI,
        image=image,
        name="fae-profile",
        cpu=cpu,
        memMB=memMB,
        h=h or None,
        j=j,
        mounts=mounts,
        env=env,
        rdzv_port=rdzv_port,
    )
    return _ranks("profile", python, app)


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
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    rdzv_port: int = 29500,
    max_restarts: int = 0,
    max_retries: int = 0,
) -> specs.AppDef:
    """Trains with hot/cold embeddings on `j` processes, started by torchrun; with checkpoints, a restarted run goes on from the newest.

    Args:
        args: more arguments of `fae train`, after `--`, such as `-- --placement fae --checkpoint runs/demo/checkpoints`
        config: the run's description, a YAML or JSON file
        output: folder of the report (default: what the config says)
        overrides: config keys to override, such as train.steps=20,compare.placements=[stock, fae]
        j: nodes x processes on each node; with GPUs, at most as many processes as GPUs
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource instead of cpu, gpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data,readonly
        env: environment of the ranks, such as NCCL_SOCKET_IFNAME=eth0
        rdzv_port: port on the first node at which several nodes meet
        max_restarts: times that torchrun starts all ranks again after one has failed
        max_retries: times that the scheduler starts the job again, where it can
    """
    arguments = _cli_arguments("train", config, output, overrides, args)
    app = ddp(
        *arguments,
        m=_CLI,
        image=image,
        name="fae-train",
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h or None,
        j=j,
        mounts=mounts,
        env=env,
        rdzv_port=rdzv_port,
        max_retries=max_retries,
    )
    return _ranks("train", python, app, max_restarts)


def launch(
    *args: str,
    config: str,
    script: str = "",
    m: str = "",
    output: str = "",
    overrides: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045 - torchx 0.7 reads only these spellings
    j: str = "1x2",
    image: str = "",
    python: str = sys.executable,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    rdzv_port: int = 29500,
    max_restarts: int = 0,
    max_retries: int = 0,
) -> specs.AppDef:
    """Runs an unmodified TorchRec training script with hot/cold embeddings on `j` processes, started by torchrun.

    Args:
        args: the script's own arguments, after `--`, such as `-- --epochs 1 --batch_size 2048`
        config: how to launch, a JSON or YAML file; the smallest is {"hbm_budget": "64MiB"}
        script: the training script, a Python file
        m: the training script as a Python module, instead of a file
        output: folder of what is written (default: what the config says)
        overrides: config keys to override, such as hbm_budget=1GiB,profile_batches=200
        j: nodes x processes on each node; with GPUs, at most as many processes as GPUs
        image: image to run in; for local_cwd and slurm the current folder, whatever this says
        python: interpreter inside the image (default: the one that runs torchx)
        cpu: CPU cores of each node
        gpu: GPUs of each node
        memMB: memory of each node in MB
        h: a named resource instead of cpu, gpu and memMB
        mounts: folders of the machine inside the image, such as type=bind,src=/data,dst=/data,readonly
        env: environment of the ranks, such as NCCL_SOCKET_IFNAME=eth0
        rdzv_port: port on the first node at which several nodes meet
        max_restarts: times that torchrun starts all ranks again after one has failed
        max_retries: times that the scheduler starts the job again, where it can
    """
    if bool(script) == bool(m):
        raise ValueError(f"give either a script or a module, --script or --m; received script={script!r} and m={m!r}")
    arguments = _cli_arguments("launch", config, output, overrides, ((script,) if script else ("-m", m)) + args)
    app = ddp(
        *arguments,
        m=_CLI,
        image=image,
        name="fae-launch",
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h or None,
        j=j,
        mounts=mounts,
        env=env,
        rdzv_port=rdzv_port,
        max_retries=max_retries,
    )
    return _ranks("launch", python, app, max_restarts)


def _one_process(
    command: str,
    arguments: list[str],
    image: str,
    python: str,
    resource: specs.Resource,
    mounts: Optional[List[str]],  # noqa: UP006, UP045
) -> specs.AppDef:
    role = specs.Role(
        name=command,
        image=image,
        entrypoint=python,
        args=["-m", _CLI, *arguments],
        env={"PYTHONUNBUFFERED": "1"},
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=f"fae-{command}", roles=[role])


def _ranks(command: str, python: str, app: specs.AppDef, max_restarts: int = 0) -> specs.AppDef:
    """The ranks that torchx's ddp component starts, by the given interpreter; restarted by torchrun, which ddp leaves out."""
    for role in app.roles:
        # torchx 0.7 calls `torchrun`, which is on the PATH only where the environment is activated.
        launcher, _, rest = role.args[-1].partition(" ")
        if launcher != "torchrun":
            raise RuntimeError(f"torchx's ddp component runs {launcher!r}, expected 'torchrun'; install torchx 0.7")
        role.name = command
        role.args[-1] = f"{shlex.quote(python)} -m torch.distributed.run --max-restarts {max_restarts} {rest}"
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
