"""What hf_xet, which carries large files, says of a refusal: its classes and words, each as one line of ours."""

import pytest

from tmerge.errors import PushError
from tmerge.hub.failures import pushing

_XET = "Network error: Request error: HTTP status client error ({}), domain: http://127.0.0.1/api/xet-write-token/main"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("401 Unauthorized", "hf auth login"),
        ("403 Forbidden", "write access"),
        ("413 Payload Too Large", "quota"),
        ("429 Too Many Requests", "wait a while"),
        ("500 Internal Server Error", "try again later"),
    ],
)
def test_a_refusal_in_the_words_of_a_lost_connection(said, remedy):
    with pytest.raises(PushError, match=remedy) as told, pushing("user/x", "hf_secret"):
        raise ConnectionError(_XET.format(said))
    assert "lost" not in str(told.value)


def test_a_connection_that_is_lost_is_told_so():
    with pytest.raises(PushError, match="lost"), pushing("user/x"):
        raise ConnectionError("Network error: connection reset by peer")


def test_a_token_that_the_store_does_not_take():
    xet = pytest.importorskip("hf_xet")
    with pytest.raises(PushError, match="hf auth login"), pushing("user/x", "hf_secret"):
        raise xet.XetAuthenticationError("hf_secret is not accepted")


def test_a_file_that_may_not_be_read_stays_what_it_is():
    with pytest.raises(PermissionError), pushing("user/x"):
        raise PermissionError(13, "Permission denied", "model.safetensors")
