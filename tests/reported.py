"""Parts of a report made by hand, as whole as a reader asks them to be."""

from tmerge.report import report_of


def typed(document):
    """A report from its document, as it is read from a file."""
    return report_of(document, "the report")


def texts(**changes):
    """What a report says of the texts that were read."""
    return {
        "texts": 80,
        "dataset": "samples:indonesian",
        "revision": None,
        "config": None,
        "split": None,
        "column": "text",
        "read": 100,
        "empty": 0,
        "duplicates": 0,
        "sha256": "c" * 64,
        **changes,
    }


def adaptation(data=None, **changes):
    """A training after the merge, of two steps."""
    return {
        "objective": "sft",
        "residual": "frozen",
        "alpha": 0.1,
        "steps": 2,
        "batch_size": 8,
        "accumulation": 1,
        "learning_rate": 2e-4,
        "warmup": 0.0,
        "max_tokens": 256,
        "lora_rank": 0,
        "distill_weight": 1.0,
        "distill_loss": "pieces",
        "transport_weight": 0.0,
        "completions_only": False,
        "gradient_checkpointing": False,
        "data": texts(held_out=0, notes=[]) if data is None else data,
        "tokens": 1000,
        "seconds": 2.0,
        "trained_parameters": 12345,
        "aligned_share": None,
        "loss_curve": [[0, 2.0], [1, 3.0]],
        "verdict": "hurts",
        **changes,
    }
