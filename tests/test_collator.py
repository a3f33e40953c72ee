"""The batch holds real chunks only; its docstring's tensors are the ones it makes."""

import torch

from data.collator import DocumentCollator


def test_the_batch_of_the_docstring():
    batch = DocumentCollator(pad_token_id=1)(
        [{"input_ids": [[0, 5, 2], [0, 6, 7, 2]], "labels": 1}, {"input_ids": [[0, 2]], "labels": 0}]
    )
    assert next(iter(batch)) == "labels"  # Trainer takes the batch's size from its first tensor
    assert batch.pop("chunk_lengths") == [[3, 4], [2]]
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "labels": [1, 0],
        "num_chunks": [2, 1],
        "input_ids": [[0, 5, 2, 1], [0, 6, 7, 2], [0, 2, 1, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]],
    }


def test_documents_with_chunk_vectors():
    documents = [{"chunk_vectors": torch.ones(2, 3), "labels": 0}, {"chunk_vectors": torch.zeros(1, 3), "labels": 2}]
    batch = DocumentCollator(pad_token_id=1)(documents)
    assert batch["num_chunks"].tolist() == [2, 1]
    assert batch["chunk_vectors"].shape == (3, 3)


def test_ids_are_there_where_they_are_wanted():
    documents = [{"input_ids": [[0, 2]], "labels": 0, "id": "a"}, {"input_ids": [[0, 2]], "labels": 1, "id": "b"}]
    assert DocumentCollator(pad_token_id=1, with_ids=True)(documents)["ids"] == ["a", "b"]
    assert "ids" not in DocumentCollator(pad_token_id=1)(documents)
