"""Models that answer in one way each, for the process that speaks to call in the place of `tmerge.answers.answer`."""

import os
import time

from tmerge.answers import Said, answer
from tmerge.errors import ModelNotFoundError

TOKEN_SECONDS = 0.2


def slowly(reference, dtype, device, question, *, listener):
    """As a large model: at each token there is time to stop it."""

    def slow(said):
        time.sleep(TOKEN_SECONDS)
        listener(said)

    return answer(reference, dtype, device, question, listener=slow)


def never(reference, dtype, device, question, *, listener):
    """Within something that takes long, and lets no exception through."""
    listener(Said("speaking", str(os.getpid()), ""))
    time.sleep(600)


def broken(reference, dtype, device, question, *, listener):
    """One that cannot be found, one that fails, one that ends its process; the last of them after that."""
    if reference.endswith("source"):
        raise ModelNotFoundError("it is gone; name another")
    if reference.endswith("fused"):
        raise RuntimeError(f"secret in {reference}")
    os._exit(9)
