"""WeightedTrainer: a class-weighted loss that is independent of batching, and learning rates per model part.

trainer = WeightedTrainer(model=model, args=args, class_weights=balanced_class_weights(labels), …)
"""

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from ..hierarchical_roberta.precision import full_precision
from ..hierarchical_roberta.recomputation import set_random_state
from .calibration import fit_logit_weights, gains_beyond_error
from .data_loading import data_loader
from .losses import weight_sum, weighted_loss_sum
from .optimizer import optimizer_class_and_kwargs, parameter_groups
from .out_of_memory import OutOfMemoryRecovery, out_of_memory_reason, survive_out_of_memory
from .reduction import average_gradients
from .resumable_trainer import ResumableTrainer, TrainingInterrupted, format_ids
from .runtime import peak_memory
from .sampling import EpochSampler, PaddedDataset
from .sharding import prepare_to_shard, shards_weights
from .step_conversion import EpochSize
from .training_stats import TrainingStats

logger = logging.getLogger(__name__)

LOSS_WINDOW = 20
# Prefixes of the metrics on the validation documents.
VALIDATION = ("eval", "validation")
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
        with warnings.catch_warnings():
            # Trainer does not smooth several labels a document; `compute_loss` does.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
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
        self.model_accepts_loss_kwargs = True
        self.optimizer: torch.optim.Optimizer | None
        self.last_grad_norm: torch.Tensor | float | None = None
        # Logits (B, K) of the lexical features alone on the validation documents, if the model has any.
        self.lexical_logits: np.ndarray | None = None
        # Logits (documents, K) and labels of the last evaluation, for callbacks.
        self.last_evaluation: EvalLoopOutput | None = None
        self.stats = TrainingStats(self.accelerator)
        self.add_callback(self.stats)
        self.recovery = OutOfMemoryRecovery(
            lambda: self.accelerator.unwrap_model(self.model), self.args.device, self._can_retry
        )
        self._full_precision = False
        self._counts_before_step: tuple[Any, float] = (0, 0.0)  # Trainer's, of tokens and floating point operations
        self._step_ids: list[list[str]] = []  # document ids of the current step's micro-batches

    # ---- the loss ----

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

    # ---- the training step ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The next step's micro-batches, and the sum of their class weights over all processes: the divisor in
        `compute_loss`.

        Raises:
            TrainingInterrupted: training must stop before this step, e.g. resumed after it had stopped early.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            raise TrainingInterrupted
        self.recovery.reset()
        self.stats.begin_step()
        self._counts_before_step = (self.state.num_input_tokens_seen, self.current_flos)
        started = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self._step_ids = [batch.pop("ids", []) for batch in batches]
        self.stats.add_batches(batches, time.perf_counter() - started)
        if not batches:
            return batches, None
        weights = torch.stack([weight_sum(batch["labels"], self.class_weights).to(device) for batch in batches]).sum()
        return batches, self.accelerator.reduce(weights) if self.args.world_size > 1 else weights

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Like Trainer's, but restart the optimizer step with less memory when out of memory.

        Gradients are all-reduced after the step's last micro-batch, so that one process can restart on its own. (Not
        with sharded weights, whose ranks synchronize in every layer.)

        Returns:
            The micro-batch's loss; 0 if it is not finite, as the step will be skipped.
        """
        self.raise_if_interrupted()
        run = super().training_step
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with nullcontext() if is_sharded else self.accelerator.no_sync(model):
            loss = self.recovery.train(
                lambda batch: run(model, batch, num_items_in_batch), inputs, self.state.global_step + 1
            )
        if self.accelerator.sync_gradients and self.args.world_size > 1 and not is_sharded:
            self._average_gradients(model)
        return loss.nan_to_num(0.0, 0.0, 0.0)

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

    def _can_retry(self, training: bool) -> bool:
        """Whether a rank may repeat a step or an evaluation on its own after out of memory."""
        return not shards_weights(self.accelerator) and not (training and self.is_deepspeed_enabled)

    def restore_step_start(self) -> None:
        """Undo the current step's statistics, except its seconds, and its random numbers."""
        self.stats.discard_step()
        if self.recovery.batches:
            self.state.num_input_tokens_seen, self.current_flos = self._counts_before_step
            set_random_state(self.args.device, self.recovery.step_rng_state)

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

        def logits_of(part: dict[str, Any]) -> torch.Tensor:
            autocast = nullcontext() if self._full_precision else self.compute_loss_context_manager()
            with torch.no_grad(), autocast:
                return model(**part).logits.detach()

        # accelerate may already have wrapped the forward in autocast.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=not self._full_precision)
        return None, self.recovery.evaluate(logits_of, inputs), labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Like Trainer's, but with the exact weighted loss over the split (Trainer averages batch means). On validation, the
        encoder and the lexical features are weighed first."""
        config = self.accelerator.unwrap_model(self.model).config
        lexical_BK = self.lexical_logits if metric_key_prefix in VALIDATION else None
        if lexical_BK is not None:
            config.encoder_weight, config.lexical_weight = 1.0, 0.0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if lexical_BK is not None:
            output = self._weigh_lexical_features(output, lexical_BK, metric_key_prefix)
        if output.metrics is not None and output.label_ids is not None and len(output.label_ids):
            output.metrics[f"{metric_key_prefix}_loss"] = self.exact_loss(output.predictions, output.label_ids)
        self.last_evaluation = output
        return output

    def _weigh_lexical_features(
        self, output: EvalLoopOutput, lexical_BK: np.ndarray, metric_key_prefix: str
    ) -> EvalLoopOutput:
        """Weigh the encoder's logits in `output` and those of the lexical features, and set the weights in the model's
        config. Returns the output of the sum, with its metrics.

        After training the encoder counts only if it lowers the log loss by more than the standard error of that: on a few
        dozen documents a weight can be chance. During training it always does, to see which epoch is best.
        """
        encoder_BK, labels_B = np.asarray(output.predictions), np.asarray(output.label_ids)
        parts_PBK = np.stack([encoder_BK, lexical_BK])
        class_weights = None if self.class_weights is None else self.class_weights.cpu().numpy()
        weights_P = fit_logit_weights(parts_PBK, labels_B, class_weights)
        if metric_key_prefix == "validation":
            [alone] = fit_logit_weights(parts_PBK[1:], labels_B, class_weights)
            both_BK = np.tensordot(weights_P, parts_PBK, axes=1)
            if not gains_beyond_error(both_BK, alone * lexical_BK, labels_B, class_weights):
                weights_P = np.array([0.0, alone])
        config = self.accelerator.unwrap_model(self.model).config
        config.encoder_weight, config.lexical_weight = weights_P.tolist()
        logits_BK = np.tensordot(weights_P, parts_PBK, axes=1).astype(encoder_BK.dtype)
        metrics = dict(output.metrics or {})
        if self.compute_metrics is not None:
            values = self.compute_metrics(EvalPrediction(predictions=logits_BK, label_ids=labels_B))
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return output._replace(predictions=logits_BK, metrics=metrics)

    def exact_loss(self, logits_BK: Any, labels_B: Any) -> float:
        """The weighted loss over documents, from their logits."""
        logits_BK, labels_B = torch.as_tensor(logits_BK), torch.as_tensor(labels_B)
        weights = None if self.class_weights is None else self.class_weights.cpu()
        loss = weighted_loss_sum(logits_BK, labels_B, weights, self.args.label_smoothing_factor)
        return (loss / weight_sum(labels_B, weights)).item()

    # ---- the optimizer ----

    # The head is randomly initialized and the encoder pretrained, so they get separate learning rates.
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Like Trainer's, with named groups per model part, each with weight decay and without.

        Raises:
            ValueError: an optimizer that cannot be used, no trainable parameters, a parameter outside all parts, or an
                empty part.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            learning_rates = {"encoder": self.args.learning_rate, "chunk_attention": self.args.learning_rate}
            learning_rates["head"] = self.args.learning_rate * self.head_lr_multiplier
            groups = parameter_groups(model, learning_rates, self.args.weight_decay, decayed)
            passed = self.optimizer_cls_and_kwargs  # type: ignore[has-type]
            optimizer_class, kwargs = passed or optimizer_class_and_kwargs(self.args)
            self.optimizer_cls_and_kwargs = optimizer_class, kwargs | {"params": groups}
            try:
                self.optimizer = super().create_optimizer(model)
            finally:
                self.optimizer_cls_and_kwargs = passed
            survive_out_of_memory(self.optimizer)
            self.group_settings = [(group["lr"], group["weight_decay"]) for group in groups]
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

    # Trainer's last call before the optimizer step, and the only one with the norm before clipping.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Like Trainer's, but skip a step with a non-finite loss or gradient norm by zeroing its gradients.

        (Under fp16 the gradient scaler skips it.) Synchronizes with the device once per step.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses = self.recovery.losses
        loss = torch.stack(losses).sum() / self.accelerator.num_processes
        loss = float(self.accelerator.reduce(loss) if self.args.world_size > 1 else loss)
        if (reason := self._skip_reason(loss, float(norm))) is None:
            self.last_grad_norm = norm
            self.stats.complete_step(loss)
            self.resume_state.skipped = []
            self.resume_state.losses = [*self.resume_state.losses, loss][-LOSS_WINDOW:]
            self.recovery.reset()
            return norm
        non_finite = [ids for ids, loss in zip(self._step_ids, losses, strict=True) if not loss.isfinite()]
        ids = self._gather_ids(non_finite) or self._gather_ids(self._step_ids)
        step = self.state.global_step + 1
        self.resume_state.skipped = [*self.resume_state.skipped, (step, reason, ids)]
        is_quiet = self.args.fp16 and len(self.resume_state.skipped) <= QUIET_FP16_SKIPS
        level = logging.INFO if is_quiet else logging.WARNING
        logger.log(level, f"Skipping step {step}: {reason}. Documents: {format_ids(ids)}.")
        self.stats.discard_step(is_skipped=True)
        self.recovery.reset()
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

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like Trainer's, so that every tracker gets it: the mean loss of the completed steps, the learning rate of every
        group (Trainer: of the first), throughput, padding and memory.
        """
        for name, mean in (("loss", self.stats.mean_new_loss), ("train_loss", self.stats.mean_loss)):
            if name in logs and (loss := mean()) is not None:
                logs[name] = loss
            else:  # all steps were skipped
                logs.pop(name, None)
        if "grad_norm" in logs:
            logs |= {f"learning_rate_{name}": lr for name, lr in self.learning_rates().items()}
            logs |= self.stats.speed() | {"padding_share": self.padding_share()} | peak_memory(self.args.device)
        super().log(logs, start_time)

    # ---- data loading ----

    def get_train_dataloader(self) -> Any:
        """Batches in the order of `EpochSampler`; with several processes the last ones are padded with documents of weight
        0.

        A stream must be endless and yield different documents on each process (data/streaming.py): accelerate's
        sharding would repeat documents and separate them from their chunks.
        """
        documents, args = self.train_dataset, self.args
        if isinstance(documents, IterableDataset):
            # One worker preserves the order.
            options = {"num_workers": min(args.dataloader_num_workers, 1), "drop_last": False}
            return data_loader(documents, self._train_batch_size, self.data_collator, args, **options)
        assert documents is not None
        self.sampler = EpochSampler(
            len(documents),  # type: ignore[arg-type]
            args.seed if args.data_seed is None else args.data_seed,
            args.world_size,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            self.document_costs,
            shuffle=args.train_sampling_strategy != "sequential",
        )
        loader = data_loader(
            PaddedDataset(documents), self._train_batch_size, self.data_collator, args, sampler=self.sampler
        )
        return self.accelerator.prepare(loader)

    def epoch_size(self) -> EpochSize:
        """Documents of a step over all processes; steps (0: a stream has no epochs) and documents of an epoch."""
        args = self.args
        batch_size = self._train_batch_size * args.world_size
        documents = batch_size * args.gradient_accumulation_steps
        if self.train_dataset is None or isinstance(self.train_dataset, IterableDataset):
            return EpochSize(documents, 0)
        num_documents = len(self.train_dataset)  # type: ignore[arg-type]
        # With several processes, `EpochSampler` pads the last batches.
        drops_last = args.dataloader_drop_last and args.world_size == 1
        num_batches = num_documents // batch_size if drops_last else -(-num_documents // batch_size)
        return EpochSize(documents, max(-(-num_batches // args.gradient_accumulation_steps), 1), num_documents)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Like Trainer's, but no document is dropped."""
        documents = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(documents, str):
            documents = self.eval_dataset[documents]  # type: ignore[index]
        if documents is None:
            raise ValueError("Evaluation requires an `eval_dataset`.")
        return self.accelerator.prepare(
            data_loader(documents, self.args.eval_batch_size, self.data_collator, self.args, drop_last=False)
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Like the loader of an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Like ResumableTrainer's, after synchronizing the statistics."""
        self.stats.synchronize()
        super()._save_checkpoint(model, trial)
