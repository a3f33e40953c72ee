"""One of two ranks with sharded weights and documents of uneven length: python -m tests.uneven_ranks RANK FOLDER

Two steps of training, and an evaluation between them, in which the ranks take turns at having more encoder batches; rank 0
saves weights and logits. `reference` is the same in one process.
"""

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.sharding import agree_on_batches, gloo_group
from tests.conftest import tiny_config

# The chunks of each rank's document: in training, in evaluation, in training again.
TRAINING, EVALUATION, TRAINING_AGAIN = (7, 2), (1, 5), (4, 11)
SECONDS = 20  # after which a rank that waits for the other gives up


def tiny_model() -> HierarchicalRobertaForSequenceClassification:
    """Two chunks in an encoder batch, and at most four alive: rank 0 recomputes in the first step, and rank 1 does not."""
    torch.manual_seed(0)
    model = HierarchicalRobertaForSequenceClassification(tiny_config(classifier_dropout=0.0))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for layer in model.encoder_layers():
        layer.attention.self.dropout.p = 0.0
    model.token_budget, model.live_chunks = 32, 4
    return model.train()


def document(num_chunks: int) -> dict[str, torch.Tensor]:
    """An even number of chunks without padding, or an odd number of any length."""
    generator = torch.Generator().manual_seed(num_chunks)
    ids = torch.randint(5, 90, (num_chunks, 16), generator=generator)
    lengths = torch.randint(3, 17, (num_chunks, 1), generator=generator)
    mask = (torch.arange(16) < lengths if num_chunks % 2 else torch.ones(num_chunks, 16)).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask, "num_chunks": torch.tensor([num_chunks])}


def steps(model: HierarchicalRobertaForSequenceClassification, ranks: tuple[int, ...]) -> torch.Tensor:
    """Train on these ranks' documents; logits of those that were evaluated."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logits = torch.empty(0)
    for chunks in (TRAINING, EVALUATION, TRAINING_AGAIN):
        if chunks == EVALUATION:
            with torch.no_grad():
                logits = torch.cat([model(**document(chunks[rank])).logits for rank in ranks])
            continue
        for rank in ranks:
            loss = model(**document(chunks[rank]), labels=torch.tensor([rank])).loss
            (loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder / 'store'}", timeout=timeout)
    mesh = init_device_mesh("cpu", (2,))
    model = tiny_model()
    # As accelerate does.
    for part in (*model.encoder_layers(), model.get_input_embeddings(), model):
        fully_shard(part, mesh=mesh)
    model.agree_on_batches = partial(agree_on_batches, group=gloo_group(SECONDS))
    logits = steps(model, (rank,))
    weights = {name: value.full_tensor() for name, value in model.named_parameters()}
    real = sum(int(document(chunks[rank])["attention_mask"].sum()) for chunks in (TRAINING, EVALUATION, TRAINING_AGAIN))
    assert model.token_counts[0] == real, "what makes up for missing batches is no token"
    torch.save({"weights": weights, "logits": logits, "encoded": model.token_counts}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
