"""What is different where several processes train together: what accelerate divides among them, and how it is saved.

accelerate launch --config_file finetune/accelerate/fsdp2.yaml --num_processes 8 -m finetune.alpaca RECIPE ...
"""

import os
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import InputError

from .recipe import Recipe

CONFIGURATIONS = Path(__file__).parent / "accelerate"


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was told to divide the model by FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` was told to train by DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def divides_weights() -> bool:
    """Whether no process holds the whole model once training begins."""
    return uses_fsdp() or (uses_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def forced_on_cpu() -> bool:
    """Whether accelerate was told to leave cards aside."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def begin() -> Any:
    """accelerate's state of the processes, with their connection to each other."""
    import torch
    from accelerate import PartialState

    # On a CPU every process would else take itself for the only one.
    on_cpu = forced_on_cpu() or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu and not uses_deepspeed(), backend=backend())


def backend() -> str | None:
    """What the processes talk by, where accelerate does not find it: DeepSpeed's on a machine without cards."""
    import torch

    started_together = "LOCAL_RANK" in os.environ
    return "gloo" if uses_deepspeed() and started_together and not torch.accelerator.is_available() else None


def end(state: Any) -> None:
    """Waits for the others and lets go of the connection: a process that just leaves may take them down with it."""
    import torch.distributed as dist

    if state.num_processes > 1:
        # Gloo's thread drops the last barrier some time after it is over, and takes the interpreter's lock if nobody
        # else refers to it. The main thread holds that lock while it takes the connection down, and waits for the
        # thread: both would wait for ever (torch 2.13).
        state.last_barrier = dist.barrier(device_ids=[state.local_process_index], async_op=True)
        state.last_barrier.wait()
        state.destroy_process_group()


def check_engine(recipe: Recipe) -> None:
    """Raises `InputError` for a recipe that the engine of `accelerate launch` cannot train."""
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "FSDP of version 1 is asked for, which saves no adapter of its own: add --fsdp_version 2, or launch with "
            f"--config_file {CONFIGURATIONS / 'fsdp2.yaml'}"
        )
    if uses_deepspeed() and forced_on_cpu():
        raise InputError(
            "DeepSpeed is asked for, and accelerate leaves it aside where ACCELERATE_USE_CPU is true: unset the "
            "variable, which DeepSpeed does not need on a machine without cards"
        )
    if divides_weights() and recipe.quantization != "none":
        engine = "FSDP" if uses_fsdp() else "ZeRO 3"
        raise InputError(
            f"quantization={recipe.quantization} cannot be divided by {engine}: set quantization to none, or launch "
            f"with --config_file {CONFIGURATIONS / 'ddp.yaml'}, where every process holds the quantized base"
        )


def let_fsdp_run_on_cpu(mixed_precision: str) -> None:
    """Makes accelerate's state that of FSDP on a CPU as well: it would leave the configuration aside, without a word.

    To be called after transformers' TrainingArguments were made, which begin that state anew, and before the Trainer.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin

    plugin = FullyShardedDataParallelPlugin()
    given: dict[str, Any] = {"dynamo_plugin": TorchDynamoPlugin(), "fsdp_plugin": plugin, "_from_accelerator": True}
    state = AcceleratorState(mixed_precision=mixed_precision, cpu=True, **given)
    if state.distributed_type == DistributedType.MULTI_CPU:
        # The Trainer's Accelerator takes what the processes share over into its own state once more.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = plugin


def gather_trained(model: Any) -> dict[str, Any]:
    """Every trained tensor of a model that is divided, on the CPU of the main process; empty on the others.

    All processes must call it. Nothing that is frozen is gathered.
    """
    if uses_deepspeed():
        import deepspeed

        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with deepspeed.zero.GatheredParameters(list(trained.values())):
            is_main = int(os.environ.get("RANK", "0")) == 0
            return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()} if is_main else {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
