"""A Hub on the loopback interface, for tests that drive the real client."""

from tests.hub.server import STOP_THE_HUB, LoopbackHub, Repo, run_client

__all__ = ["STOP_THE_HUB", "LoopbackHub", "Repo", "run_client"]
