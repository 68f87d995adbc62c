"""A repo that changes between two requests, and a Hub that calls its commits otherwise than its files' answers do."""

from types import SimpleNamespace

import pytest

from tmerge.models import ModelReference, remote

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What it lists, by revision (commit and files), and which commit each revision's files come from."""
    hub = SimpleNamespace(listed={}, served={}, asked=[])

    class Client:
        def model_info(self, repo, *, revision, **options):
            hub.asked.append(revision)
            commit, files = hub.listed[revision]
            siblings = [SimpleNamespace(rfilename=name, size=1) for name in files]
            return SimpleNamespace(sha=commit, siblings=siblings, card_data=None, gated=False, private=False)

    def download(repo, name, *, revision, local_files_only):
        path = tmp_path / "snapshots" / hub.served[revision] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return str(path)

    monkeypatch.setattr(remote, "hub_client", Client)
    monkeypatch.setattr(remote, "hf_hub_download", download)
    return hub


def test_pushed_to_between_two_requests_it_is_listed_as_it_was_fetched(hub):
    hub.listed = {"main": (FIRST, ["config.json"]), SECOND: (SECOND, ["config.json", "LICENSE"])}
    hub.served = {"main": SECOND, SECOND: SECOND}
    found = remote.open_repo(ModelReference.parse("user/model@main"))
    assert (found.commit, sorted(found.files)) == (SECOND, ["LICENSE", "config.json"])
    assert hub.asked == ["main", SECOND]


@pytest.mark.parametrize("pinned", [False, True])
def test_a_proxy_with_names_of_its_own_for_commits_is_asked_twice_at_most(hub, pinned):
    hub.listed = {"main": ("of the proxy", ["config.json"]), FIRST: ("of the proxy", ["config.json", "LICENSE"])}
    hub.served = {"main": FIRST, FIRST: FIRST}
    found = remote.open_repo(ModelReference.parse("user/model@main"), FIRST if pinned else None)
    assert found.commit == FIRST and set(found.files) == {"config.json", "LICENSE"}
    assert len(hub.asked) == (1 if pinned else 2)
