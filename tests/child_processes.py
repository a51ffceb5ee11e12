"""Processes that a test starts. One server imports what they need, once, and forks them all."""

import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.multiprocessing as mp
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

multiprocessing.set_forkserver_preload(["recipes.iterate", "recipes.online", "accelerate.commands.launch"])
CONFIGS = Path(__file__).resolve().parents[1] / "recipes" / "configs" / "accelerate"


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call function(*arguments) in a process of its own."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def kill_when(happened: Callable[[], bool], function: Callable[..., Any], *arguments: Any) -> None:
    """Call function(*arguments) in a process of its own, and kill it as soon as something has happened."""
    process = start(function, *arguments)
    while not happened():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.join()


def start_pair(worker: Callable[..., None], *arguments: Any) -> Any:
    """Call worker(rank, *arguments) in two processes of one group, as a launcher would start them.

    Returns:
        What has a `join()` that is True once both are done.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = (_in_group, (port, worker, arguments))
    return mp.start_processes(*processes, nprocs=2, join=False, start_method="forkserver")  # pyright: ignore


def launcher_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes, by one of the shipped configs."""
    argv = [
        "--config_file",
        str(CONFIGS / f"{config}.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "recipes.train",
    ]
    parsed: Any = launch._validate_launch_command(launch.launch_command_parser().parse_args(argv))
    args, defaults, _ = parsed
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def leave_together(folder: str, rank: int) -> NoReturn:
    """End this process once both are done, without gloo's teardown, which hangs or aborts now and then."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"done-{rank}").touch()
    while not all((Path(folder) / f"done-{other}").exists() for other in (0, 1)):
        time.sleep(0.01)
    os._exit(0)


def _in_group(rank: int, port: int, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    gc.freeze()  # as conftest.py
    worker(rank, *arguments)
