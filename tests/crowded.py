"""``python -m tests.crowded``: tmerge's command line, whose second process has little room.

It trains on one text at a time, and reconstructs on no more than 512 tokens at a time, which it finds out at its second
block.
"""

import importlib
import os
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tmerge.cli import main

if __name__ == "__main__":
    stage = importlib.import_module("tmerge.stages.reconstruct")
    forward, reconstruct = LlamaForCausalLM.forward, stage.reconstruct

    def train(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.training and len(named["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, **named)

    def fit(passage: Any, *words: Any, take: Any, **named: Any) -> None:
        def taken(block: Any) -> None:
            take(block)
            if passage.batch_tokens > 512:
                raise torch.OutOfMemoryError("CUDA out of memory")

        reconstruct(passage, *words, take=taken, **named)

    if os.environ["RANK"] == "1":
        LlamaForCausalLM.forward, stage.reconstruct = train, fit
    main()
