"""A Hub on the loopback interface, for tests that drive the real client."""

from tests.hub.server import STOP_THE_HUB, LoopbackHub, Repo, run_client
from tests.hub.writes import Fault, WritableHub

__all__ = ["STOP_THE_HUB", "Fault", "LoopbackHub", "Repo", "WritableHub", "run_client"]
