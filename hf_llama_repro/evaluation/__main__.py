"""python -m hf_llama_repro.evaluation"""

import sys

from .command import main

sys.exit(main())
