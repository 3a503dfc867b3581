"""Keeps off the screen what libraries tell their developers."""

import logging
import os
import sys
import warnings


def quiet() -> None:
    """To be called before bitsandbytes and transformers are imported.

    bitsandbytes speaks at its import, and again for every layer and step of an int8 model; torchao, which transformers
    imports where it is installed, of its kernels for other machines; transformers draws bars also where there is no
    terminal.
    """
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
