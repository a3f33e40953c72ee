"""WeightedTrainer: a class-weighted loss that is independent of batching, and learning rates per model part.

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
# Under fp16 the gradient scaler skips steps while it searches for its scale: warn only after this many in a row.
QUIET_FP16_SKIPS = 2


class WeightedTrainer(ResumableTrainer):
    """`Trainer` with class weights, learning rates per model part, and out-of-memory recovery.

    The loss of an optimizer step is `cross_entropy(weight=class_weights)` over all its documents, across accumulation
    steps and processes (the weighted recipes of transformers 5.23 divide by each micro-batch's weights instead).

    Args:
        class_weights: (K,), or None for equal weights.
        head_lr_multiplier: the head's learning rate as a multiple of `args.learning_rate`.
        document_costs: relative cost of encoding each training document, used to balance the documents of a step across
            processes.
        max_loss_spike: skip steps whose loss exceeds this multiple of the mean of the last 20 (None: never skip).
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
                f"DataParallel on {self.args.n_gpu} GPUs would separate documents from their chunks. Start one process "
                f"per GPU: accelerate launch --quiet --multi_gpu --num_processes {self.args.n_gpu} train_hf.py …"
            )
        num_labels = self.model.config.num_labels
        if class_weights is not None and tuple(class_weights.shape) != (num_labels,):
            raise ValueError(f"`class_weights` must have the shape ({num_labels},), got {tuple(class_weights.shape)}.")
        self.class_weights = None if class_weights is None else class_weights.float().to(self.args.device)
        self.head_lr_multiplier, self.document_costs = head_lr_multiplier, document_costs
        if max_loss_spike is not None and self.args.fp16:
            raise ValueError(
                "`max_loss_spike` needs bf16 or fp32: under fp16 the gradient scaler decides which steps to skip."
            )
        self.max_loss_spike = max_loss_spike
        if shards_weights(self.accelerator):
            prepare_to_shard(self.model, self.accelerator, self.args.ddp_timeout)
        # compute_loss divides by the weights of the whole step; Trainer must not also divide by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        self.optimizer: torch.optim.Optimizer | None
        self.last_grad_norm: torch.Tensor | float | None = None
        # Logits (documents, K) and labels of the last evaluation, for callbacks.
        self.last_evaluation: EvalLoopOutput | None = None
        self.stats = TrainingStats(self.accelerator)
        # After out of memory: number of parts into which a batch is split, in training (True) and evaluation (False).
        self.num_splits = {True: 1, False: 1}
        self._eval_live_chunks = 0
        self._full_precision = False
        # Current optimizer step: micro-batches so far, their losses and document ids, and the RNG state at its start.
        self._step_batches: list[dict[str, Any]] = []
        self._step_losses: list[torch.Tensor] = []
        self._step_ids: list[list[str]] = []
        self._step_start_rng: list[torch.Tensor] = []
        self._tr_loss_before_step: torch.Tensor | None = None

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Sum of the class weights of the step's documents over all processes: the divisor in `compute_loss`."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        total = torch.stack(
            [weight_sum(batch["labels"], self.class_weights).to(device) for batch in batch_samples]
        ).sum()
        return self.accelerator.reduce(total) if self.args.world_size > 1 else total

    # The loss is divided by the weights of all the step's documents, which only Trainer knows.
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Weighted loss of a micro-batch ÷ weights of all the step's documents × processes (DDP averages gradients)."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = weighted_loss_sum(outputs.logits, labels, self.class_weights, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            num_items_in_batch = weight_sum(labels, self.class_weights)
        loss = loss / num_items_in_batch.clamp(min=torch.finfo(torch.float32).tiny)
        if model.training:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # accelerate wraps a model's forward in autocast, but not that of a model sharded by FSDP2.
    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """No-op as in Trainer; autocast if the weights are sharded."""
        return self.accelerator.autocast() if shards_weights(self.accelerator) else nullcontext()

    # ---- the training step, with out-of-memory recovery ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Like Trainer's, but restart the optimizer step with less memory when out of memory.

        A restart halves the live chunks or, at one live chunk, the documents at a time. Loss, effective batch and
        schedule are unchanged.

        Gradients are all-reduced after the step's last micro-batch, so that one process can restart on its own. (Not
        with sharded weights, whose ranks synchronize in every layer.)
        """
        self.raise_if_interrupted()
        if not self._step_batches:
            self._step_start_rng = random_state(self.args.device)
        self._step_batches.append(inputs)
        pending = [inputs]
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with nullcontext() if is_sharded else self.accelerator.no_sync(model):
            while True:
                try:
                    losses = [self._training_step_in_parts(model, batch, num_items_in_batch) for batch in pending]
                    break
                except (RuntimeError, MemoryError) as error:
                    if (reason := out_of_memory_reason(error)) is None:
                        raise
                self._shrink_batch(inputs, reason, training=True)
                model.zero_grad()
                set_random_state(self.args.device, self._step_start_rng)
                pending = self._step_batches
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
                f"Out of memory while averaging gradients over the ranks ({reason}): lower --live_chunks or "
                "--per_device_train_batch_size."
            ) from error

    def _training_step_in_parts(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        parts = split_documents(inputs, self.num_splits[True])
        step = super().training_step
        return torch.stack([step(model, part, num_items).detach() for part in parts]).sum()

    def _shrink_batch(self, inputs: dict[str, Any], reason: str, training: bool) -> None:
        """Halve the live chunks, or the documents at a time, and log it.

        Raises:
            ValueError: a single chunk does not fit, or the weights are sharded, so that one rank cannot retry alone.
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
            change = f"live_chunks={live // 2} (was {live})"
        elif documents > 1:
            self.num_splits[training] *= 2
            change = f"{-(-documents // 2)} documents at a time (was {documents})"
        else:
            raise ValueError(
                f"Out of memory with one chunk of one document at a time ({reason}). Lower --chunk_length, freeze "
                "layers (--freeze_layers, --freeze_encoder), use bf16 or fp16, or use a smaller encoder."
            )
        where = f"in step {self.state.global_step + 1}" if training else "in evaluation"
        logger.warning(f"Out of memory {where} ({reason}): retrying with {change}; the result is unchanged.")

    # ---- statistics ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Like Trainer's, and count the batches and the time spent waiting for them."""
        self._step_batches, self._step_losses = [], []
        self._tr_loss_before_step = self._tr_loss.clone()
        self.stats.begin_step()
        started = time.perf_counter()
        batches, weights = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_ids = [batch.pop("ids", []) for batch in batches]
        self.stats.add_batches(batches, time.perf_counter() - started)
        return batches, weights

    def discard_step_stats(self) -> None:
        """Undo the statistics of the current step, except its seconds."""
        self.stats.discard_step()
        self._tr_loss.copy_(self._tr_loss_before_step)

    def padding_share(self) -> float:
        """Share of padding among the tokens encoded so far on this process."""
        real, padding = self.accelerator.unwrap_model(self.model).token_counts
        return padding / max(real + padding, 1)

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Like Trainer's, with the training clock stopped."""
        self.stats.synchronize()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but in fp32, so that predictions match those of the loaded model. For use after training."""
        self._full_precision = True
        try:
            with full_precision(self.args.device):
                return super().predict(*args, **kwargs)
        finally:
            self._full_precision = False

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return logits and labels only; `evaluation_loop` computes the loss from them."""
        self.raise_if_interrupted()
        inputs = self._prepare_inputs(inputs)
        inputs.pop("ids", None)
        labels = inputs.pop("labels", None)
        # accelerate may already have wrapped the forward in autocast.
        unwrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=not self._full_precision)
        live_chunks = unwrapped.live_chunks
        # No activations are kept in evaluation, which has its own limit, lowered on out of memory only.
        unwrapped.live_chunks = self._eval_live_chunks
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
            self._eval_live_chunks, unwrapped.live_chunks = unwrapped.live_chunks, live_chunks

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Like Trainer's, but with the exact weighted loss over the split (Trainer averages batch means)."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if output.metrics is not None and output.label_ids is not None and len(output.label_ids):
            logits, labels = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
            weights = None if self.class_weights is None else self.class_weights.cpu()
            loss = weighted_loss_sum(logits, labels, weights, self.args.label_smoothing_factor)
            output.metrics[f"{metric_key_prefix}_loss"] = (loss / weight_sum(labels, weights)).item()
        self.last_evaluation = output
        return output

    # ---- the optimizer ----

    # The head is randomly initialized and the encoder pretrained, so they get separate learning rates.
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer `args.optim` with named groups per model part, with and without weight decay.

        Raises:
            ValueError: no trainable parameters, a parameter outside all parts, or an empty part.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            learning_rates = {"encoder": self.args.learning_rate, "chunk_attention": self.args.learning_rate}
            learning_rates["head"] = self.args.learning_rate * self.head_lr_multiplier
            groups = parameter_groups(model, learning_rates, self.args.weight_decay, decayed)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **kwargs)
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
        """Current learning rate of each group, by name."""
        if self.optimizer is None:
            return {}
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    # ---- skipped steps ----

    # Trainer's last call before the optimizer step.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Like Trainer's, but skip a step with a non-finite loss or gradient norm by zeroing its gradients.

        (Under fp16 the gradient scaler skips it.) Synchronizes with the device once per step.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.stack(self._step_losses).sum() / self.accelerator.num_processes
        loss = float(self.accelerator.reduce(loss) if self.args.world_size > 1 else loss)
        if (reason := self._skip_reason(loss, float(norm))) is None:
            self.last_grad_norm = norm
            self.stats.add_loss(loss)
            self.resume_state.skipped = []
            self.resume_state.losses = [*self.resume_state.losses, loss][-LOSS_WINDOW:]
            return norm
        non_finite = [ids for ids, loss in zip(self._step_ids, self._step_losses, strict=True) if not loss.isfinite()]
        ids = self._gather_ids(non_finite) or self._gather_ids(self._step_ids)
        step = self.state.global_step + 1
        self.resume_state.skipped = [*self.resume_state.skipped, (step, reason, ids)]
        is_quiet = self.args.fp16 and len(self.resume_state.skipped) <= QUIET_FP16_SKIPS
        level = logging.INFO if is_quiet else logging.WARNING
        logger.log(level, f"Skipping step {step}: {reason}. Documents: {format_ids(ids)}.")
        self.stats.discard_step(is_skipped=True)
        self._tr_loss.copy_(self._tr_loss_before_step)
        self._globalstep_last_logged += 1  # the logged mean excludes skipped steps
        if not self.args.fp16:
            model.zero_grad()
        return norm

    def _gather_ids(self, batches: list[list[str]]) -> list[str]:
        ids = [id_ for batch in batches for id_ in batch if id_]
        return gather_object(ids) if self.args.world_size > 1 else ids

    def _skip_reason(self, loss: float, norm: float) -> str | None:
        """Why the current step must be skipped, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"non-finite loss ({loss:g}) or grad norm ({norm:g})"
        past = self.resume_state.losses
        if self.max_loss_spike is not None and len(past) >= 5 and loss > self.max_loss_spike * sum(past) / len(past):
            return (
                f"loss ({loss:.3g}) is {loss * len(past) / sum(past):.1f} times the mean of the last {len(past)} steps"
            )
        return None

    # Trainer logs the learning rate of the first group only.
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like Trainer's, with the learning rate of every group."""
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{name}": lr for name, lr in self.learning_rates().items()}
        super().log(logs, start_time)

    # ---- data loading ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # EpochSampler always balances documents across processes, which covers "batch_rebalance".
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
        """Like Trainer's, but with several processes pad the last batches with documents of weight 0.

        A stream must be endless and yield different documents on each process (data/streaming.py): accelerate's
        sharding would repeat documents and separate them from their chunks.
        """
        documents = self.train_dataset
        if isinstance(documents, IterableDataset):
            return DataLoader(
                documents,
                self._train_batch_size,
                collate_fn=self.data_collator,
                num_workers=min(self.args.dataloader_num_workers, 1),  # one worker preserves the order
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
        """Like ResumableTrainer's, after synchronizing the statistics."""
        self.stats.synchronize()
        super()._save_checkpoint(model, trial)
