"""What a page's own script is made to touch whenever an event begins or ends."""

import json
import threading
import urllib.request
from functools import partial

from tests.ui.awaited import awaited
from tmerge.ui.server.search import HubSearch


def test_every_event_without_progress_is_told_to_one_hidden_field(served):
    with urllib.request.urlopen(f"{served.url}/config", timeout=20) as answer:
        config = json.load(answer)
    [ended] = [item["id"] for item in config["components"] if item["props"].get("elem_id") == "run-ended"]
    quiet = [event for event in config["dependencies"] if event["show_progress"] == "hidden"]
    assert len(quiet) > 50
    assert {tuple(event["show_progress_on"]) for event in quiet} == {(ended,)}
    # Those that do show it write into one thing, or say where.
    for event in config["dependencies"]:
        if event["show_progress"] != "hidden" and event["backend_fn"]:
            assert len(event["show_progress_on"] or event["outputs"]) == 1, event


def test_every_handler_of_several_components_names_those_that_it_changes(served):
    # A list would have to be counted, and go wrong in silence where one is added.
    returned = {}
    for event in served.app.fns.values():
        if event.fn is not None and len(event.outputs) > 1:
            function = event.fn
            while isinstance(function, partial):
                function = function.func
            returned[function.__qualname__] = function.__annotations__.get("return")
    assert len(returned) > 20
    assert set(returned.values()) <= {
        "dict[Any, Any]",
        "_Changes",
        "Iterator[dict[Any, Any]]",
        "AsyncIterator[dict[Any, Any]]",
    }, returned


def test_a_first_letter_that_is_heard_last_does_not_undo_the_search():
    search, said = HubSearch(private=False), []
    thread = threading.Thread(target=lambda: said.append(awaited(search.settled("page", "zz"))))
    thread.start()
    while "page" not in search._typing._last:
        pass
    assert not awaited(search.settled("page", "z"))
    thread.join(20)
    assert said == [True]
