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


def target_unloaded(reference, dtype, device, question, *, listener):
    """The target is never loaded; of the others nothing is asked."""
    if reference.endswith("target"):
        time.sleep(600)
    return Said("done", "said", "", 1)


def target_unbegun(reference, dtype, device, question, *, listener):
    """The target comes to no token, as where its chat template never ends."""
    if reference.endswith("target"):
        never(reference, dtype, device, question, listener=listener)
    return Said("done", "said", "", 1)


def target_unended(reference, dtype, device, question, *, listener):
    """The target says one token, and no other."""
    if reference.endswith("target"):
        listener(Said("speaking", "one", "", 1))
        time.sleep(600)
    return Said("done", "said", "", 1)


def broken(reference, dtype, device, question, *, listener):
    """One that cannot be found, one that fails, one that ends its process; the last of them after that."""
    if reference.endswith("source"):
        raise ModelNotFoundError("it is gone; name another")
    if reference.endswith("fused"):
        raise RuntimeError(f"secret in {reference}")
    os._exit(9)
