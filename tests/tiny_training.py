"""Random documents and a trainer on them, for tests that train in their own process."""

import torch

from data.collator import DocumentCollator
from modeling.training.metrics import compute_metrics_fn, multi_label_metrics_fn
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import HierarchicalTrainingArguments

WEIGHTS = torch.tensor([0.54, 1.21, 2.97])


class SplitLengths(torch.utils.data.Dataset):
    """Random documents of 1-4 chunks; 50 of them, so that the last step of an epoch has 2."""

    def __init__(self, count: int = 50):
        generator = torch.Generator().manual_seed(3)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        self.items = [
            {
                "input_ids": [torch.randint(5, 99, (number(4, 16),), generator=generator) for _ in range(number(1, 5))],
                "labels": number(0, 3),
            }
            for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def trainer_for(
    model, folder, documents=None, class_weights=WEIGHTS, kind=WeightedTrainer, **arguments
) -> WeightedTrainer:
    given = {
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "dataloader_num_workers": 0,
        "bf16": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        **arguments,
    }
    documents = documents or SplitLengths()
    return kind(
        model=model,
        args=HierarchicalTrainingArguments(output_dir=str(folder), **given),
        class_weights=class_weights,
        max_loss_spike=given.get("max_loss_spike"),
        data_collator=DocumentCollator(model.config.encoder_config.pad_token_id, with_ids="id" in documents[0]),
        train_dataset=documents,
        eval_dataset=documents,
        compute_metrics=(
            multi_label_metrics_fn(list("abc"))
            if model.config.is_multi_label
            else compute_metrics_fn(list("abc"), [0.3, 0.3, 0.4])
        ),
    )
