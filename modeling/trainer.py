"""WeightedTrainer: class weights that mean the same under any batching, and a head at its own learning rate.

trainer = WeightedTrainer(model=model, args=args, class_weights=balanced_class_weights(labels), …)
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from .checkpoints import write_checkpoint_manifest
from .losses import weight_sum, weighted_loss_sum
from .resources import random_state, set_random_state, split_documents
from .sampling import EpochSampler, WithBlanks

logger = logging.getLogger(__name__)

# Where a parameter belongs, by the first part of its name, in the order of the optimizer's groups.
PARTS = {
    "encoder": ("encoder",),
    "chunk_attention": ("pooling", "chunk_transformer"),
    "head": ("classifier",),
}
# What is counted between two evaluations: summed loss of the steps, steps, documents, chunks, and seconds: of training
# in all, and waiting for data. Everything but the loss and the seconds is a number of things.
COUNTED = ("loss", "steps", "documents", "chunks", "seconds", "data_seconds")


class WeightedTrainer(Trainer):
    """`Trainer` with class weights, learning rates a part, and exact bookkeeping.

    The loss of an optimizer step is `cross_entropy(weight=class_weights)` over all its documents, over every
    accumulation step and process (transformers 5.23's own weighted recipes divide by each micro-batch's weights).

    Args:
        class_weights: (K,) or None for none.
        head_lr_multiplier: the head's learning rate in multiples of `args.learning_rate`.
        document_costs: what each training document takes to encode, in any unit: with several processes those of a step
            are dealt out so that the processes finish together.
        kwargs: as for `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        class_weights: torch.Tensor | None = None,
        head_lr_multiplier: float = 2.0,
        document_costs: Sequence[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process would drive {self.args.n_gpu} GPUs with DataParallel, which tears documents from their "
                f"chunks. Start one a GPU: accelerate launch --multi_gpu --num_processes {self.args.n_gpu} train_hf.py …"
            )
        num_labels = self.model.config.num_labels
        if class_weights is not None and tuple(class_weights.shape) != (num_labels,):
            raise ValueError(f"class_weights has the shape {tuple(class_weights.shape)}, expected ({num_labels},).")
        self.class_weights = None if class_weights is None else class_weights.float().to(self.args.device)
        self.head_lr_multiplier, self.document_costs = head_lr_multiplier, document_costs
        # The loss is divided by the weights of the whole step: Trainer must not divide by the accumulation steps again.
        self.loss_is_scaled_for_ga = True
        self.optimizer: torch.optim.Optimizer | None
        self.sampler: EpochSampler | None = None
        self.last_grad_norm: torch.Tensor | float | None = None
        # The last evaluation's logits (documents, K) and labels, for whoever draws them.
        self.last_evaluation: EvalLoopOutput | None = None
        # What went through since the totals were last taken: first on this process alone, then of all of them.
        self._passed = {name: torch.zeros((), dtype=torch.float64, device=self.args.device) for name in COUNTED}
        self.totals = dict.fromkeys(COUNTED, 0.0)
        self._clock: float | None = None
        # What is done where memory does not suffice: documents of a batch taken in so many parts, in training and in
        # evaluation, beside the model's live chunks.
        self.document_parts = {True: 1, False: 1}
        self._eval_live_chunks = 0
        self._full_precision = False
        # The micro-batches of the present optimizer step so far, and the random state that it began with.
        self._step_batches: list[dict[str, Any]] = []
        self._step_random: list[torch.Tensor] = []

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """The sum of the class weights of the step's documents, over its micro-batches and all processes: what
        `compute_loss` divides by."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        total = torch.stack(
            [weight_sum(batch["labels"], self.class_weights).to(device) for batch in batch_samples]
        ).sum()
        return self.accelerator.reduce(total) if self.args.world_size > 1 else total

    # The loss must divide by the weights of the whole step, which only Trainer knows.
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Weighted loss of a micro-batch's documents ÷ weights of all the step's documents × processes (DDP takes the
        mean of their gradients)."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = weighted_loss_sum(outputs.logits, labels, self.class_weights, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            num_items_in_batch = weight_sum(labels, self.class_weights)
        loss = loss / num_items_in_batch.clamp(min=torch.finfo(torch.float32).tiny)
        if model.training:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # ---- a step, in the memory there is ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer's. Where memory does not suffice, the optimizer step is begun again in less of it: with half the
        live chunks, or, when one is left, with half the documents at a time. Neither changes the loss, the effective
        batch or the schedule.

        Gradients are reduced over the processes when the step's last micro-batch is through, so that one process may
        begin again without the others.
        """
        if not self._step_batches:
            self._step_random = random_state()
        self._step_batches.append(inputs)
        again = [inputs]
        with self.accelerator.no_sync(model):
            while True:
                try:
                    losses = [self._training_step_in_parts(model, batch, num_items_in_batch) for batch in again]
                    break
                except (RuntimeError, MemoryError) as error:
                    reason = self._out_of_memory(error)
                self._make_room(inputs, reason, training=True)
                model.zero_grad()
                set_random_state(self._step_random)
                again = self._step_batches
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        # Added up without waiting for the device.
        self._passed["loss"] += losses[-1] / self.accelerator.num_processes
        return losses[-1]

    def _training_step_in_parts(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        parts = split_documents(inputs, self.document_parts[True])
        step = super().training_step
        return torch.stack([step(model, part, num_items).detach() for part in parts]).sum()

    @staticmethod
    def _out_of_memory(error: RuntimeError | MemoryError) -> str:
        """The first line of an error that says that memory is full; any other is raised again."""
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise error
        return str(error).partition("\n")[0]

    def _make_room(self, inputs: dict[str, Any], reason: str, training: bool) -> None:
        """Halve what is alive at once, and say so.

        Raises:
            ValueError: one chunk of one document does not fit.
        """
        clear_device_cache(garbage_collection=True)
        model = self.accelerator.unwrap_model(self.model)
        largest = max(int(part["num_chunks"].sum()) for part in split_documents(inputs, self.document_parts[training]))
        live = min(model.live_chunks or largest, largest) if "input_ids" in inputs else 1
        documents = -(-len(inputs["num_chunks"]) // self.document_parts[training])
        if live > 1:
            model.live_chunks = live // 2
            done = f"live chunks {live} → {live // 2}"
        elif documents > 1:
            self.document_parts[training] *= 2
            done = f"documents at a time {documents} → {-(-documents // 2)}, accumulated as before"
        else:
            raise ValueError(
                f"Out of memory with one chunk of one document at a time ({reason}). Lower --chunk_length, freeze "
                "layers (--freeze_layers, --freeze_encoder), use bf16 or fp16, or a smaller encoder."
            )
        where = f"in step {self.state.global_step + 1}" if training else "in evaluation"
        logger.warning(f"Out of memory {where} ({reason}): {done}. The result stays the same.")

    # ---- counting ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """As Trainer's, counting what goes through and how long training waits for it."""
        self._step_batches = []
        started = time.perf_counter()
        self._clock = started if self._clock is None else self._clock
        batches, weights = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._passed["data_seconds"] += (time.perf_counter() - started) / self.accelerator.num_processes
        self._passed["steps"] += 1 / self.accelerator.num_processes
        for batch in batches:
            self._passed["documents"] += (batch["labels"] != -100).sum()
            self._passed["chunks"] += len(batch["input_ids"] if "input_ids" in batch else batch["chunk_vectors"])
        return batches, weights

    def count_totals(self) -> dict[str, float]:
        """Stop the clock and add what went through, on all processes, to `totals`. Every process must call it."""
        now = time.perf_counter()
        self._passed["seconds"] += (now - self._clock if self._clock else 0.0) / self.accelerator.num_processes
        self._clock = None
        passed = torch.stack([self._passed[name] for name in COUNTED])
        passed = self.accelerator.reduce(passed) if self.args.world_size > 1 else passed
        for name, value in zip(COUNTED, passed.tolist(), strict=True):
            self.totals[name] += value
            self._passed[name].zero_()
        return self.totals

    def speed(self) -> dict[str, float]:
        """Documents and chunks a second on this process since the totals were last counted, times the processes."""
        seconds = max(time.perf_counter() - self._clock, 1e-9) if self._clock else 1e-9
        processes = self.accelerator.num_processes
        return {
            f"{name}_per_second": float(self._passed[name]) * processes / seconds if self._clock else 0.0
            for name in ("documents", "chunks")
        }

    def padding_share(self) -> float:
        """Share of padding among the tokens that the encoder was given so far, on this process."""
        real, padding = self.accelerator.unwrap_model(self.model).encoded_tokens
        return padding / max(real + padding, 1)

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; the clock of training stands still meanwhile."""
        self.count_totals()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, in fp32: what the saved weights say to whoever loads them. For after training."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self._full_precision = True
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._full_precision = False

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Logits and labels alone: the split's loss is computed from them at the end, and chunk vectors stay here."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        bare = self.accelerator.unwrap_model(self.model)
        live_chunks = bare.live_chunks
        # Nothing is kept here: the bound of training only cuts micro-batches that memory cannot hold.
        bare.live_chunks = self._eval_live_chunks
        try:
            while True:
                try:
                    parts = split_documents(inputs, self.document_parts[False])
                    autocast = nullcontext() if self._full_precision else self.compute_loss_context_manager()
                    with torch.no_grad(), autocast:
                        logits = torch.cat([model(**part).logits.detach() for part in parts])
                    return None, logits, labels
                except (RuntimeError, MemoryError) as error:
                    reason = self._out_of_memory(error)
                self._make_room(inputs, reason, training=False)
        finally:
            self._eval_live_chunks, bare.live_chunks = bare.live_chunks, live_chunks

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's, with the exact weighted loss of the whole split (Trainer's is a mean of batch means)."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if output.metrics is not None and output.label_ids is not None and len(output.label_ids):
            logits, labels = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
            weights = None if self.class_weights is None else self.class_weights.cpu()
            loss = weighted_loss_sum(logits, labels, weights, self.args.label_smoothing_factor)
            output.metrics[f"{metric_key_prefix}_loss"] = (loss / weight_sum(labels, weights)).item()
        self.last_evaluation = output
        return output

    # ---- the optimizer ----

    # The head starts from noise and the encoder does not: learning rates a part.
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim` with a named group for each part with and without weight decay.

        Raises:
            ValueError: nothing to train; a parameter that belongs to no part; a part without parameters.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = self.parameter_groups(model)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
            for group in groups:
                count = sum(parameter.numel() for parameter in group["params"])
                logger.info(
                    f"Optimizer group {group['name']}: {count:,} parameters, learning rate {group['lr']:g}, "
                    f"weight decay {group['weight_decay']:g}"
                )
        return self.optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups `encoder`, `chunk_attention`, `head`, each with decay and (`_no_decay`) without: biases and norms."""
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trainable:
            raise ValueError(
                "The model has no trainable parameters (frozen_model): unfreeze the head, or leave --freeze_encoder out."
            )
        decayed = set(self.get_decay_parameter_names(model))
        part_of = {name: [part for part, heads in PARTS.items() if name.split(".")[0] in heads] for name in trainable}
        if strays := [name for name, parts in part_of.items() if len(parts) != 1]:
            raise ValueError(f"These parameters are in no optimizer group or in two: {', '.join(strays)}.")
        groups = []
        for part, heads in PARTS.items():
            of_part = [name for name in trainable if part_of[name] == [part]]
            owned = [name for name, _ in model.named_parameters() if name.split(".")[0] in heads]
            if not of_part and (part == "head" or (part == "chunk_attention" and owned)):
                raise ValueError(f"The optimizer group {part} is empty: all its parameters are frozen.")
            rate = self.args.learning_rate * (self.head_lr_multiplier if part == "head" else 1.0)
            for suffix, names, decay in (
                ("", [name for name in of_part if name in decayed], self.args.weight_decay),
                ("_no_decay", [name for name in of_part if name not in decayed], 0.0),
            ):
                if names:
                    parameters = [trainable[name] for name in names]
                    groups.append({"name": part + suffix, "params": parameters, "lr": rate, "weight_decay": decay})
        return groups

    def learning_rates(self) -> dict[str, float]:
        """The present rate of every group, by name."""
        if self.optimizer is None:
            return {}
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.last_grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.last_grad_norm

    # Trainer logs the rate of the first group only, which would hide the head's.
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with every group's learning rate."""
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{name}": rate for name, rate in self.learning_rates().items()}
        super().log(logs, start_time)

    # ---- the order of the documents ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # "batch_rebalance" is what several processes always get, without padding and with every document.
        if self.args.train_sampling_strategy not in ("random", "batch_rebalance") or self.train_dataset is None:
            return super()._get_train_sampler(train_dataset)
        self.sampler = EpochSampler(
            len(self.train_dataset),  # type: ignore[arg-type]
            self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            self.args.world_size,
            self._train_batch_size,
            self.args.gradient_accumulation_steps,
            self.document_costs,
        )
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """As Trainer's; with several processes the last batches are filled up with documents that count for nothing."""
        documents = self.train_dataset
        if self.args.world_size > 1 and not isinstance(documents, torch.utils.data.IterableDataset):
            documents = WithBlanks(documents)
        return self._get_dataloader(
            dataset=documents,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """As Trainer's, with two mends: accelerate's loader does not tell the epoch to every sampler and data set that
        it wraps, and a run that had stopped early would train one step more when it is resumed."""
        for part in (self.sampler, self.train_dataset):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if not self.control.should_training_stop:
            super()._run_epoch(epoch=epoch, **kwargs)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, with a manifest written last: a checkpoint without it, or unlike it, is not whole. Older ones
        are deleted only when it stands."""
        self.count_totals()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_dir = self._get_output_dir(trial)
            write_checkpoint_manifest(f"{run_dir}/checkpoint-{self.state.global_step}")
            rotate_checkpoints(run_dir, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint)

    def _load_callback_state(self) -> None:
        """Restores what callbacks counted. (Trainer builds them anew with the checkpoint's arguments, which would undo
        a patience given now.) And finds the best checkpoint where the run has moved to."""
        if best := self.state.best_model_checkpoint:
            here = Path(self.args.output_dir) / Path(best).name
            self.state.best_model_checkpoint = str(here) if here.is_dir() else best
        for callback in self.callback_handler.callbacks:
            if self.args.restore_callback_states_from_checkpoint and isinstance(callback, ExportableState):
                saved = self.state.stateful_callbacks.get(type(callback).__name__, {})
                for name, value in (saved if isinstance(saved, dict) else {}).get("attributes", {}).items():
                    setattr(callback, name, value)
