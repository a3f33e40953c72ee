"""TensorBoard under runs/<timestamp>: scalars, the model's graph, the run's arguments."""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..file_utils import is_disk_full
from .trainer import WeightedTrainer

logger = logging.getLogger(__name__)


class TensorBoard(TensorBoardCallback):
    """transformers' TensorBoard callback, with the model's graph and the run's arguments.

    Its folder is named by date only: transformers' default name contains the hostname, and the folder is pushed.

    Args:
        config: the run's arguments, shown under "text".
    """

    def __init__(self, trainer: WeightedTrainer, config: dict[str, Any]):
        super().__init__()
        self.trainer, self.config = trainer, config

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
        self.tb_writer = SummaryWriter(str(folder))
        self.tb_writer.add_text("arguments", f"```json\n{json.dumps(self.config, indent=2, default=str)}\n```")
        if not self.trainer.is_fsdp_enabled:  # FSDP layers run collectives
            self.add_graph()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        # After training, and on other processes, transformers' callback would open a writer in another folder.
        if self.tb_writer is not None:
            super().on_log(*args, **kwargs)

    def add_graph(self) -> None:
        """Add the model's graph, traced on two documents of two short chunks."""
        assert self.tb_writer is not None
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training, token_counts = model.training, model.token_counts
        model.token_counts = [0, 0]  # tracing would add tensors to these counts
        # Tracing reads every property, which logs warnings.
        transformers_logger = logging.getLogger("transformers.modeling_utils")
        level = transformers_logger.level
        transformers_logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.tb_writer.add_graph(HierarchicalClassifier(model.eval()), _example(model))
        except Exception as error:
            if is_disk_full(error):
                raise
            # Some encoders cannot be traced; that must not end the run.
            logger.warning(f"TensorBoard graph omitted: the encoder cannot be traced ({type(error).__name__}).")
        finally:
            transformers_logger.setLevel(level)
            model.train(training)
            model.token_counts = token_counts


class HierarchicalClassifier(nn.Module):
    """Wrapper with tensor inputs and logits as output, for tracing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_chunks: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, num_chunks=num_chunks).logits


def _example(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    ids_NL = torch.full((4, 8), 3, device=device)
    return ids_NL, torch.ones_like(ids_NL), torch.tensor([2, 2], device=device)
