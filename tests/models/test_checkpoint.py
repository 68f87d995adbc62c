"""What identifies a file: its contents, hashed once for as long as it stays as it is."""

import hashlib
import os
import time

import pytest

from tmerge.models import checkpoint, file_digest


@pytest.fixture
def hashed(monkeypatch):
    """How often a hash was begun."""
    begun = []
    plain = hashlib.sha256

    def counted(*words):
        begun.append(1)
        return plain(*words)

    monkeypatch.setattr(checkpoint.hashlib, "sha256", counted)
    return begun


def _written(path, text, *, seconds_ago):
    path.write_text(text)
    then = time.time_ns() - seconds_ago * 10**9
    os.utime(path, ns=(then, then))


def test_a_file_that_stays_is_hashed_once(tmp_path, hashed, monkeypatch):
    path = tmp_path / "weights"
    _written(path, "one", seconds_ago=60)
    # The time of its last change of any kind cannot be set, so that the rest is as if it were long ago.
    monkeypatch.setattr(checkpoint, "_SETTLED_NS", -(10**10))
    first = file_digest(path)
    assert first == file_digest(path) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert len(hashed) == 1
    _written(path, "two", seconds_ago=60)
    assert file_digest(path) != first and len(hashed) == 2


def test_a_file_that_was_just_written_is_hashed_every_time(tmp_path, hashed):
    path = tmp_path / "weights"
    path.write_text("one")
    assert file_digest(path) == file_digest(path)
    assert len(hashed) == 2
