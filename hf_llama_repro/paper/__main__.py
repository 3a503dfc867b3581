"""python -m hf_llama_repro.paper"""

import sys

from .report import main

sys.exit(main())
