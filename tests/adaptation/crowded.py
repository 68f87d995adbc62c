"""``python -m tests.adaptation.crowded``: tmerge's command line, whose second process has room for one text."""

import os
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tmerge.cli import main

if __name__ == "__main__":
    forward = LlamaForCausalLM.forward

    def crowded(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.training and os.environ["RANK"] == "1" and len(named["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, **named)

    LlamaForCausalLM.forward = crowded
    main()
