"""Logits of the rows that are asked for, a stretch at a time, against those of the whole batch."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.evaluation.test_choose import loaded
from tests.pico import PICO_FAMILIES, PICO_RARE, PICO_VOCAB, pico_model, save_pico
from tmerge.errors import UnsupportedModelError
from tmerge.evaluation import score_texts
from tmerge.models import find_block_list, head, load_model, read_logits
from tmerge.models.loading import open_by_blocks

IDS = torch.tensor([[5, 9, 40, 7, 33, 80], [8, 3, 3, 61, 0, 0], [90, 12, 44, 0, 0, 0]])
LENGTHS = (6, 4, 3)
MASK = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
# Not all, and not in order: rows are handed on as they are asked for.
TEXTS, POSITIONS = torch.tensor([0, 0, 2, 1, 1, 0, 2, 1]), torch.tensor([4, 1, 2, 0, 3, 0, 0, 2])
SENTENCES = ["the cat sat on the mat", "a dog", "hello there, all of you who read", "one two three", "mat cat", "x"]
# A soft cap, a divisor, a scale, multipliers, tied heads, one with a bias (phi), a projection and a body that is not
# called (opt), one without a base model (llama4), experts.
QUICK = {
    "llama", "llama-tied", "gemma2", "gemma3", "granite", "cohere", "gpt2", "falcon_h1", "mpt", "qwen3", "mixtral",
    "phi", "opt", "llama4",
}  # fmt: skip
FAMILIES = [
    pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow])
    for family in sorted(PICO_FAMILIES | PICO_RARE)
]


@pytest.fixture(autouse=True)
def _three_rows_at_once(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3 * PICO_VOCAB + 1)


def of_head(model):
    """How many rows each call of the head makes logits of."""
    calls = []
    made = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: calls.append(output.numel() // output.shape[-1])
    )
    return calls, made


def of_rows(model):
    stretches = []
    with torch.no_grad():
        read_logits(model, IDS, MASK, TEXTS, POSITIONS, lambda rows, logits: stretches.append((rows, logits)))
    return stretches


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_those_of_the_whole_batch(family):
    model = pico_model(family)
    own_forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[TEXTS, POSITIONS]
    calls, made = of_head(model)
    body_runs = []
    find_block_list(model)[1][0].register_forward_hook(lambda *_: body_runs.append(1))
    stretches = of_rows(model)
    made.remove()
    assert [(rows.start, len(logits)) for rows, logits in stretches] == [(0, 3), (3, 3), (6, 2)]
    # Products of other shapes add in another order.
    torch.testing.assert_close(torch.cat([logits for _, logits in stretches]), whole, rtol=1e-5, atol=1e-5)
    assert calls == [3, 3, 2] and len(body_runs) == 1
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == own_forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_whole_batch(family):
    """Through the body, and of the head, which is an embedding too where it is tied."""
    model, weights = pico_model(family), torch.linspace(0.5, 2, len(TEXTS))
    following = torch.arange(len(TEXTS))

    def loss(logits, rows=slice(None)):
        return weights[rows] @ torch.nn.functional.cross_entropy(logits, following[rows], reduction="none")

    loss(model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[TEXTS, POSITIONS]).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    calls, made = of_head(model)
    use = lambda rows, logits: loss(logits, rows).backward()  # noqa: E731
    read_logits(model, IDS, MASK, TEXTS, POSITIONS, use, backward=True)
    made.remove()
    assert calls == [3, 3, 2]
    for name, parameter in model.named_parameters():
        # Experts that no token goes to have none.
        assert (parameter.grad is None) == (wanted[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_all_logits(family):
    """float64 from the logits that the model itself gives, one text at a time."""
    one = loaded(pico_model(family))
    calls, made = of_head(one.model)
    scores = score_texts(one, SENTENCES, finite=False)
    made.remove()
    assert max(calls) == 3 and sum(calls) == scores.tokens
    for text, bits in zip(SENTENCES, scores.bits, strict=True):
        ids = [one.tokenizer.bos_token_id, *one.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            chances = one.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        wanted = -chances[range(len(ids) - 1), ids[1:]].sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))
        torch.testing.assert_close(bits, wanted, rtol=2e-5, atol=1e-4)


def test_any_model_is_read_so_of_known_layout_or_not():
    config = AutoConfig.for_model("mamba", vocab_size=PICO_VOCAB, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[TEXTS, POSITIONS]
    calls, _ = of_head(model)
    torch.testing.assert_close(torch.cat([logits for _, logits in of_rows(model)]), whole)
    assert calls == [3, 3, 2]


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_a_model_read_by_blocks_gives_the_same_bits(family, tmp_path):
    save_pico(family, tmp_path / "m", layers=3)
    whole, by_blocks = (read(str(tmp_path / "m")) for read in (load_model, open_by_blocks))
    calls, _ = of_head(by_blocks.model)
    wanted, scores = (score_texts(one, [*SENTENCES, ""], batch_tokens=32) for one in (whole, by_blocks))
    assert torch.equal(scores.bits, wanted.bits) and max(calls) == 3


def test_nothing_asked_is_a_pass_all_the_same():
    model = pico_model("llama")
    calls, _ = of_head(model)
    nothing = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        read_logits(model, IDS, MASK, nothing, nothing, lambda *_: pytest.fail("nothing was asked"))
    assert calls == [1]


class _Looking(torch.nn.Module):
    """A head that takes its rows for the batch's, or moves them by their places."""

    def __init__(self, plain, by_shape):
        super().__init__()
        self.plain, self.weight, self.by_shape = plain, plain.weight, by_shape

    def forward(self, hidden):
        if self.by_shape:
            hidden = hidden.reshape(*IDS.shape, -1)
        return self.plain(hidden).repeat(1 if self.by_shape else len(IDS), 1, 1)[: len(IDS)]


@pytest.mark.parametrize("by_shape", [True, False])
def test_a_forward_that_makes_something_else_of_them_gives_all_at_once(by_shape):
    model = pico_model("llama")
    model.lm_head = _Looking(model.lm_head, by_shape)
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=MASK).logits[TEXTS, POSITIONS]
    stretches = of_rows(model)
    assert [len(logits) for _, logits in stretches] == [3, 3, 2]
    torch.testing.assert_close(torch.cat([logits for _, logits in stretches]), whole)
    # Read by blocks it cannot be run again.
    model.model.layers[0].extra = torch.nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(UnsupportedModelError, match="one by one, so it cannot be read block by block; set memory"):
        of_rows(model)


def test_an_error_behind_the_body_is_its_own(monkeypatch):
    model, runs = pico_model("llama"), []

    def full(hidden):
        runs.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.lm_head, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        of_rows(model)
    assert len(runs) == 1 and "forward" not in vars(model.model)
