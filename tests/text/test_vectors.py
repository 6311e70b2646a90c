from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from llmgr.runtime.errors import UserError
from llmgr.text.items import item_texts
from llmgr.text.vectors import encode_texts, position_offset, principal_components, shuffled, whitening

WORDS = [f"w{i}" for i in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaModel(LlamaConfig(vocab_size=62, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, max_position_embeddings=80)).eval()
    kind, config = (BertModel, BertConfig) if kind == "bert" else (RobertaModel, RobertaConfig)
    return kind(config(vocab_size=62, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, max_position_embeddings=80), add_pooling_layer=False).eval()


def texts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    return [" ".join(WORDS[i] for i in torch.randint(60, (int(n),), generator=generator))
            for n in torch.randint(1, 40, (count,), generator=generator)]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_text_alone_is_the_text_in_a_batch_and_the_mean_over_its_tokens(kind):
    network, read = model(kind), tokenizer()
    many = texts(50)
    together = encode_texts(network, read, many, 32, batch_tokens=300)
    assert torch.equal(together, encode_texts(network, read, many, 32, batch_tokens=300))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(50))
    for i in (0, 17, 49):
        torch.testing.assert_close(together[i], encode_texts(network, read, [many[i]], 32)[0], atol=1e-5, rtol=1e-4)
        ids = torch.tensor([read(many[i])["input_ids"][:32]])
        with torch.no_grad():
            mean = network(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(together[i], mean / mean.norm(), atol=1e-5, rtol=1e-4)
    assert (together @ together.T).fill_diagonal_(0).max() < 0.9999, "different texts differ"


def test_a_batch_holds_no_more_tokens_than_allowed():
    network, read = model("llama"), tokenizer()
    seen = []
    network.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    lengths = ["w1"] * 600 + ["w1 " * 50] * 300 + ["w2 " * 20] * 10
    encode_texts(network, read, lengths, 64, batch_tokens=2000)
    assert sum(rows for rows, _ in seen) == len(lengths)
    assert max(rows * width for rows, width in seen) <= 2000
    assert sum(rows * width for rows, width in seen) < 1.5 * (600 * 2 + 300 * 51 + 10 * 21), "little padding"


def test_texts_longer_than_the_model_are_refused():
    long, read = ["w1 " * 100], tokenizer()
    for kind, positions in (("bert", 80), ("roberta", 78)):  # RoBERTa's begin after the padding's id
        with pytest.raises(UserError, match=rf"text_encoder.max_text_tokens={positions + 1} .* {positions} positions"):
            encode_texts(model(kind), read, ["w1"], positions + 1)
        assert encode_texts(model(kind), read, long, positions).isfinite().all()
        assert position_offset(model(kind)) == 80 - positions


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text",
                                  "bert", "gpt2"])
def test_positions_given_are_the_models_own(kind):
    settings = AutoConfig.for_model(kind, vocab_size=62, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, max_position_embeddings=80, pad_token_id=1)
    torch.manual_seed(0)
    network = AutoModel.from_config(settings).eval()
    ids = torch.randint(5, 60, (2, 9))
    position = torch.arange(9).expand(2, 9) + position_offset(network)
    given = network(inputs_embeds=network.get_input_embeddings()(ids), position_ids=position).last_hidden_state
    torch.testing.assert_close(given, network(input_ids=ids).last_hidden_state)


def test_components_are_those_of_a_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 12, generator=generator) @ torch.diag(torch.linspace(3, 0.3, 12)) + 5
    vectors[0] = 0
    found = principal_components(vectors, 4)
    assert torch.equal(found, principal_components(vectors.clone(), 4))
    assert found.shape == (200, 4) and found[0].abs().sum() == 0
    centred = vectors[1:].double().numpy()
    centred = centred - centred.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:4].T
    expected = expected / np.sqrt((expected**2).mean())
    signs = np.sign((expected * found[1:].numpy()).sum(0))
    np.testing.assert_allclose(found[1:].numpy(), expected * signs, atol=1e-4)
    assert float(found[1:].square().mean()) == pytest.approx(1, abs=1e-4)
    assert principal_components(vectors, 99).shape == (200, 12)


def test_shuffled_vectors_are_a_permutation_by_seed():
    vectors = torch.cat((torch.zeros(1, 3), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))))
    dealt = shuffled(vectors, 1)
    assert torch.equal(dealt[0], vectors[0])
    assert sorted(map(tuple, dealt.tolist())) == sorted(map(tuple, vectors.tolist()))
    assert (dealt[1:] == vectors[1:]).all(1).float().mean() < 0.2
    assert torch.equal(dealt, shuffled(vectors, 1)) and not torch.equal(dealt, shuffled(vectors, 2))


def test_item_texts_come_by_id_and_the_text_stands_in_for_a_title(tmp_path):
    pl.DataFrame({"item_id": [2, 1, 3], "title": ["B", "", "C"], "text": ["B text", "A text", "C text"]}).write_parquet(
        tmp_path / "items.parquet")
    assert item_texts(tmp_path / "items.parquet", "title") == ["A text", "B", "C"]
    assert item_texts(tmp_path / "items.parquet", "text") == ["A text", "B text", "C text"]


def test_shuffled_texts_and_shuffled_vectors_go_to_the_same_items(tmp_path):
    titles = [f"title {n}" for n in range(1, 31)]
    pl.DataFrame({"item_id": range(1, 31), "title": titles, "text": titles}).write_parquet(tmp_path / "items.parquet")
    vectors = torch.arange(31.0)[:, None]
    dealt = item_texts(tmp_path / "items.parquet", "title", 5)
    assert dealt == [f"title {int(n)}" for n in shuffled(vectors, 5)[1:, 0]] != titles
    assert sorted(dealt) == sorted(titles) == sorted(item_texts(tmp_path / "items.parquet", "title"))


@pytest.mark.parametrize("whiten", [False, True])
def test_identical_texts_have_no_components(whiten):
    torch.manual_seed(0)
    alike = torch.nn.functional.normalize(torch.randn(1, 16), dim=1).repeat(30, 1)
    alike = torch.cat((torch.zeros(1, 16), alike + 4e-8 * torch.randn(30, 16)))
    assert not principal_components(alike, 8, whiten).any()
    mean, axes = whitening(alike[1:])
    assert not axes.any() and torch.allclose(mean, alike[1])


def test_a_direction_in_which_nothing_differs_is_0_and_the_others_are_as_they_were():
    torch.manual_seed(0)
    plane = torch.randn(40, 3) @ torch.linalg.qr(torch.randn(8, 8))[0][:3]
    vectors = torch.cat((torch.zeros(1, 8), plane + 1e-8 * torch.randn(40, 8)))
    reduced = principal_components(vectors, 8, whiten=True)
    assert not reduced[:, 3:].any()
    deviation = reduced[1:, :3].square().mean(0).sqrt()
    torch.testing.assert_close(deviation, deviation[:1].expand(3))
