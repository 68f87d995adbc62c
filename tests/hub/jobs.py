"""Jobs on the loopback Hub: what was asked for, and what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["Job", "start_job"]


@dataclass
class Job:
    """A job that was asked for, and what it is to say."""

    spec: dict[str, Any]
    log: list[str]
    stage: str

    def stream(self) -> bytes:
        """Its log, as server-sent events."""
        lines = ["===== Job started at 2026-01-01 00:00:00 =====", *self.log]
        events = [json.dumps({"data": line, "timestamp": "2026-01-01T00:00:00Z"}) for line in lines]
        return "".join(f"data: {event}\n\n" for event in events).encode()

    def info(self, number: str, owner: str, stage: str | None = None) -> dict[str, Any]:
        """As the Hub speaks of it."""
        return {
            "id": number,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "dockerImage": "image",
            "command": self.spec.get("command"),
            "flavor": self.spec.get("flavor"),
            "status": {"stage": stage or self.stage, "message": None},
            "owner": {"id": "0", "name": owner, "type": "user"},
        }


def start_job(hub: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Take a job on a `WritableHub`, which says what its jobs log and how they end."""
    number = f"{len(hub.jobs) + 1:024x}"
    hub.jobs[number] = Job(spec, list(hub.job_log), hub.job_stage)
    return hub.jobs[number].info(number, hub.user, "SCHEDULING")
