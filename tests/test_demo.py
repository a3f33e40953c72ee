"""The embedded corpus: seeded, as uneven as the real case, its evidence where it says, not given away by words."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from data.demo_corpus import CONTENT, FRAMED, LABELS, REAL, demo_corpus
from scripts.common.packaged_encoder import copy_packaged_encoder


@pytest.fixture(scope="module")
def corpus():
    return demo_corpus(2000)


def test_it_is_written_from_its_seed(corpus):
    assert demo_corpus(40, seed=3) == demo_corpus(40, seed=3) != demo_corpus(40, seed=4)
    assert Counter(document["label"] for document in corpus) == {"General": 1200, "Teen": 540, "Mature": 260}
    assert len({document["text"] for document in corpus}) == 2000


def test_stories_are_of_1_to_25_chunks(corpus):
    words = np.array([len(document["text"].split()) for document in corpus])
    chunks = words / 30
    assert chunks.min() > 0.3
    assert 10 < chunks.max() < 27
    assert 5 < np.median(chunks) < 9


def scene_words(template: str) -> list[str]:
    """The fixed parts of a template, by which a filled one is known."""
    import re

    return [part for part in re.split(r"\{\w+\}", template) if len(part) > 12]


def contents_of(paragraph: str) -> list[str]:
    return [
        level
        for level in LABELS
        for template in CONTENT[level]
        if all(part in paragraph for part in scene_words(template))
    ]


def is_framed(paragraph: str) -> bool:
    return any(all(part in paragraph for part in scene_words(before) + scene_words(after)) for before, after in FRAMED)


def test_the_label_is_the_severest_scene_that_happens_and_its_place_is_recorded(corpus):
    for document in corpus:
        happening = []
        for paragraph in document["text"].split("\n\n"):
            for level in contents_of(paragraph):
                if not is_framed(paragraph):
                    happening.append(LABELS.index(level))
        assert document["label"] == LABELS[max(happening, default=0)]
        if document["label"] == "General":
            assert document["evidence"] == []
        else:
            [scene] = document["evidence"]
            text = document["text"][scene["start"] : scene["end"]]
            assert contents_of(text) == [document["label"]]
            assert not is_framed(text)
            assert any(part in text for before, _ in REAL for part in scene_words(before))


def test_the_deciding_scene_stands_anywhere(corpus):
    middles = [
        (d["evidence"][0]["start"] + d["evidence"][0]["end"]) / 2 / len(d["text"]) for d in corpus if d["evidence"]
    ]
    assert np.mean(middles) == pytest.approx(0.5, abs=0.05)
    assert np.histogram(middles, bins=4, range=(0, 1))[0].min() > len(middles) / 8


def test_words_alone_do_not_tell(corpus):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = [d["text"] for d in corpus], [d["label"] for d in corpus]
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(class_weight="balanced", max_iter=2000, C=10)
    )
    model.fit(texts[:1400], labels[:1400])
    assert f1_score(labels[1400:], model.predict(texts[1400:]), average="macro") < 0.55


def test_the_packaged_encoder_is_checked_and_attributed(tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    folder = copy_packaged_encoder(tmp_path / "encoder")
    assert "Apache License 2.0" in (folder / "NOTICE").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer.backend_tokenizer.encode("word " * 400).ids) > 400  # its built-in truncation at 128 is off
    whole = AutoModel.from_pretrained(folder)
    copy_packaged_encoder(folder, num_layers=2)
    assert "first 2 of 6 layers" in (folder / "NOTICE").read_text()
    cut, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    ids = torch.tensor([[101, 2023, 2003, 102]])
    expected = whole(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(cut(ids).last_hidden_state, expected)
    monkeypatch.setattr("scripts.common.packaged_encoder.WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"0{64}|sha256|SHA-256|hash"):
        copy_packaged_encoder(tmp_path / "other")
    assert not (tmp_path / "other").exists()
