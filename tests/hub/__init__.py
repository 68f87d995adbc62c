"""A Hub on the loopback interface, for tests that drive the real client."""

from tests.hub.server import LoopbackHub, Repo, run_client

__all__ = ["LoopbackHub", "Repo", "run_client"]
