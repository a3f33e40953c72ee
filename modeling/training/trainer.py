"""WeightedTrainer: class weights that mean the same under any batching, and a head at its own learning rate.

trainer = WeightedTrainer(model=model, args=args, class_weights=balanced_class_weights(labels), …)
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers.trainer_utils import EvalLoopOutput

from ..hierarchical_roberta.precision import full_precision
from ..hierarchical_roberta.recomputation import random_state, set_random_state
from .losses import weight_sum, weighted_loss_sum
from .optimizer import parameter_groups
from .out_of_memory import out_of_memory_reason, split_documents, survive_out_of_memory
from .reduction import average_gradients
from .resumable_trainer import ResumableTrainer, format_ids, ignore_signals
from .sampling import EpochSampler, PaddedDataset
from .sharding import prepare_to_shard, shards_weights
from .training_stats import TrainingStats

logger = logging.getLogger(__name__)

LOSS_WINDOW = 20
# Under fp16 the scaler looks for its scale by skipping steps: only from so many in a row on is one worth a warning.
QUIET_FP16_SKIPS = 2


class WeightedTrainer(ResumableTrainer):
    """`Trainer` with class weights, learning rates a part, and exact bookkeeping.

    The loss of an optimizer step is `cross_entropy(weight=class_weights)` over all its documents, over every
    accumulation step and process (transformers 5.23's own weighted recipes divide by each micro-batch's weights).

    Args:
        class_weights: (K,) or None for none.
        head_lr_multiplier: the head's learning rate in multiples of `args.learning_rate`.
        max_loss_spike: a step whose loss is above so many times the mean of the last 20 is not taken; None: any is.
        document_costs: what each training document takes to encode, in any unit: with several processes those of a step
            are dealt out so that the processes finish together.
        kwargs: as for `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        class_weights: torch.Tensor | None = None,
        head_lr_multiplier: float = 2.0,
        document_costs: Sequence[float] | np.ndarray | None = None,
        max_loss_spike: float | None = None,
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
        if max_loss_spike is not None and self.args.fp16:
            raise ValueError("max_loss_spike is for bf16 and fp32: under fp16 the scaler decides which step is taken.")
        self.max_loss_spike = max_loss_spike
        if shards_weights(self.accelerator):
            prepare_to_shard(self.model, self.accelerator, self.args.ddp_timeout)
        # The loss is divided by the weights of the whole step: Trainer must not divide by the accumulation steps again.
        self.loss_is_scaled_for_ga = True
        self.optimizer: torch.optim.Optimizer | None
        self.last_grad_norm: torch.Tensor | float | None = None
        # The last evaluation's logits (documents, K) and labels, for whoever draws them.
        self.last_evaluation: EvalLoopOutput | None = None
        self.stats = TrainingStats(self.accelerator)
        # What is done where memory does not suffice: documents of a batch taken in so many parts, in training and in
        # evaluation, beside the model's live chunks.
        self.num_splits = {True: 1, False: 1}
        self._eval_live_chunks = 0
        self._full_precision = False
        # Of the present optimizer step: its micro-batches so far with their losses and their documents' ids, and the random
        # state that it began with.
        self._step_batches: list[dict[str, Any]] = []
        self._step_losses: list[torch.Tensor] = []
        self._step_ids: list[list[str]] = []
        self._step_random: list[torch.Tensor] = []
        self._logged_before: torch.Tensor | None = None

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

    # accelerate wraps the forward of a model in autocast, but not of one that FSDP2 has sharded.
    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's (nothing); where weights are sharded, the precision of training."""
        return self.accelerator.autocast() if shards_weights(self.accelerator) else nullcontext()

    # ---- a step, in the memory there is ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer's. Where memory does not suffice, the optimizer step is begun again in less of it: with half the
        live chunks, or, when one is left, with half the documents at a time. Neither changes the loss, the effective
        batch or the schedule.

        Gradients are reduced over the processes when the step's last micro-batch is through, so that one process may
        begin again without the others. (Where the weights are sharded they meet in every layer, and none may.)
        """
        self.raise_if_interrupted()
        if not self._step_batches:
            self._step_random = random_state(self.args.device)
        self._step_batches.append(inputs)
        again = [inputs]
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with nullcontext() if is_sharded else self.accelerator.no_sync(model):
            while True:
                try:
                    losses = [self._training_step_in_parts(model, batch, num_items_in_batch) for batch in again]
                    break
                except (RuntimeError, MemoryError) as error:
                    if (reason := out_of_memory_reason(error)) is None:
                        raise
                self._shrink_batch(inputs, reason, training=True)
                model.zero_grad()
                set_random_state(self.args.device, self._step_random)
                again = self._step_batches
        if self.accelerator.sync_gradients and self.args.world_size > 1 and not is_sharded:
            self._average_gradients(model)
        self._step_losses[len(self._step_batches) - len(losses) :] = losses
        return losses[-1]

    def _average_gradients(self, model: nn.Module) -> None:
        try:
            average_gradients(model.parameters(), self.args.world_size)
        except (RuntimeError, MemoryError) as error:
            if (reason := out_of_memory_reason(error)) is None:
                raise
            raise ValueError(
                f"Out of memory while gradients are averaged over the ranks ({reason}): lower --live_chunks or "
                "--per_device_train_batch_size."
            ) from error

    def _training_step_in_parts(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        parts = split_documents(inputs, self.num_splits[True])
        step = super().training_step
        return torch.stack([step(model, part, num_items).detach() for part in parts]).sum()

    def _shrink_batch(self, inputs: dict[str, Any], reason: str, training: bool) -> None:
        """Halve what is alive at once, and say so.

        Raises:
            ValueError: one chunk of one document does not fit; the other processes are in the midst of this batch too.
        """
        if shards_weights(self.accelerator) or (training and self.is_deepspeed_enabled):
            lower = "--live_chunks or --per_device_train" if training else "--token_budget or --per_device_eval"
            raise ValueError(f"Out of memory ({reason}): lower {lower}_batch_size.")
        clear_device_cache(garbage_collection=True)
        model = self.accelerator.unwrap_model(self.model)
        largest = max(int(part["num_chunks"].sum()) for part in split_documents(inputs, self.num_splits[training]))
        live = 1 if "chunk_vectors" in inputs else min(model.live_chunks or largest, largest)
        documents = -(-len(inputs["num_chunks"]) // self.num_splits[training])
        if live > 1:
            model.live_chunks = live // 2
            done = f"live chunks {live} → {live // 2}"
        elif documents > 1:
            self.num_splits[training] *= 2
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
        self._step_batches, self._step_losses = [], []
        self._logged_before = self._tr_loss.clone()
        self.stats.begin_step()
        started = time.perf_counter()
        batches, weights = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_ids = [batch.pop("ids", []) for batch in batches]
        self.stats.add_batches(batches, time.perf_counter() - started)
        return batches, weights

    def discard_step_stats(self) -> None:
        """As if nothing of the present step had gone through; the seconds were spent all the same."""
        self.stats.discard_step()
        self._tr_loss.copy_(self._logged_before)

    def padding_share(self) -> float:
        """Share of padding among the tokens that the encoder was given so far, on this process."""
        real, padding = self.accelerator.unwrap_model(self.model).token_counts
        return padding / max(real + padding, 1)

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; the clock of training stands still meanwhile."""
        self.stats.synchronize()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, in fp32: what the saved weights say to whoever loads them. For after training."""
        self._full_precision = True
        try:
            with full_precision(self.args.device):
                return super().predict(*args, **kwargs)
        finally:
            self._full_precision = False

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Logits and labels alone: the split's loss is computed from them at the end, and chunk vectors stay here."""
        self.raise_if_interrupted()
        inputs = self._prepare_inputs(inputs)
        inputs.pop("ids", None)
        labels = inputs.pop("labels", None)
        # accelerate wraps the forward in autocast, also when an evaluation is what prepares the model.
        bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=not self._full_precision)
        live_chunks = bare.live_chunks
        # Nothing is kept here: the bound of training only cuts micro-batches that memory cannot hold.
        bare.live_chunks = self._eval_live_chunks
        try:
            while True:
                try:
                    parts = split_documents(inputs, self.num_splits[False])
                    autocast = nullcontext() if self._full_precision else self.compute_loss_context_manager()
                    with torch.no_grad(), autocast:
                        logits = torch.cat([model(**part).logits.detach() for part in parts])
                    return None, logits, labels
                except (RuntimeError, MemoryError) as error:
                    if (reason := out_of_memory_reason(error)) is None:
                        raise
                self._shrink_batch(inputs, reason, training=False)
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
            decayed = set(self.get_decay_parameter_names(model))
            rates = {"encoder": self.args.learning_rate, "chunk_attention": self.args.learning_rate}
            rates["head"] = self.args.learning_rate * self.head_lr_multiplier
            groups = parameter_groups(model, rates, self.args.weight_decay, decayed)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
            survive_out_of_memory(self.optimizer)
            for group in groups:
                count = sum(parameter.numel() for parameter in group["params"])
                logger.info(
                    f"Optimizer group {group['name']}: {count:,} parameters, learning rate {group['lr']:g}, "
                    f"weight decay {group['weight_decay']:g}",
                    extra={"detail": True},
                )
        return self.optimizer

    def learning_rates(self) -> dict[str, float]:
        """The present rate of every group, by name."""
        if self.optimizer is None:
            return {}
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    # ---- steps that are not taken ----

    # The last that Trainer does before the optimizer's step.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's; a step whose loss or gradients are no numbers changes no weight: its gradients go. (Under fp16 the
        scaler sees to that.) It waits for the device, once a step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.stack(self._step_losses).sum() / self.accelerator.num_processes
        loss = float(self.accelerator.reduce(loss) if self.args.world_size > 1 else loss)
        if (wrong := self._skip_reason(loss, float(norm))) is None:
            self.last_grad_norm = norm
            self.stats.add_loss(loss)
            self.carried.skipped = []
            self.carried.losses = [*self.carried.losses, loss][-LOSS_WINDOW:]
            return norm
        broken = [ids for ids, loss in zip(self._step_ids, self._step_losses, strict=True) if not loss.isfinite()]
        ids = self._of_all_processes(broken) or self._of_all_processes(self._step_ids)
        step = self.state.global_step + 1
        self.carried.skipped = [*self.carried.skipped, (step, wrong, ids)]
        is_quiet = self.args.fp16 and len(self.carried.skipped) <= QUIET_FP16_SKIPS
        level = logging.INFO if is_quiet else logging.WARNING
        logger.log(level, f"Step {step} is not taken: {wrong}. Its documents: {format_ids(ids)}.")
        self.stats.discard_step(is_skipped=True)
        self._tr_loss.copy_(self._logged_before)
        self._globalstep_last_logged += 1  # the mean that is logged is over the steps that were taken
        if not self.args.fp16:
            model.zero_grad()
        return norm

    def _of_all_processes(self, batches: list[list[str]]) -> list[str]:
        ids = [id_ for batch in batches for id_ in batch if id_]
        return gather_object(ids) if self.args.world_size > 1 else ids

    def _skip_reason(self, loss: float, norm: float) -> str | None:
        """Why the present step must not be taken, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"its loss is {loss:g}, its gradients' norm {norm:g}"
        past = self.carried.losses
        if self.max_loss_spike is not None and len(past) >= 5 and loss > self.max_loss_spike * sum(past) / len(past):
            return f"its loss is {loss:.3g}, {loss * len(past) / sum(past):.1f} times the mean of the last {len(past)}"
        return None

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
        """As Trainer's; with several processes the last batches are filled up with documents that count for nothing.

        A stream must give each process documents of its own, without end (data/streaming.py): accelerate's sharding would
        read some of them twice, and tear documents from their chunks."""
        documents = self.train_dataset
        if isinstance(documents, IterableDataset):
            return DataLoader(
                documents,
                self._train_batch_size,
                collate_fn=self.data_collator,
                num_workers=min(self.args.dataloader_num_workers, 1),  # which keeps the order
                pin_memory=self.args.dataloader_pin_memory,
                worker_init_fn=partial(ignore_signals, None),
            )
        if self.args.world_size > 1:
            documents = PaddedDataset(documents)
        return self._get_dataloader(
            dataset=documents,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As ResumableTrainer's, with what was counted until now."""
        self.stats.synchronize()
        super()._save_checkpoint(model, trial)
