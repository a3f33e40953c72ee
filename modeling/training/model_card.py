"""Model card and LaTeX training section, generated from the recorded configuration and results."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .metrics import absent_labels_note
from .model_card_kinds import kind_of, listed


def describe_lexical(config: dict[str, Any]) -> str:
    """Clause describing the lexical features; empty if disabled."""
    count = config.get("lexical_features")
    return f", with lexical features of up to {count:,} tokens or pairs of tokens" if count else ""


def describe_embeddings(config: dict[str, Any]) -> str:
    """Clause describing the prefix of the chunks, and how their tokens become embeddings; empty for none and the mean."""
    prefix, pooling = config.get("chunk_prefix", ""), config.get("token_pooling", "mean")
    return (f", each after `{prefix}`" if prefix else "") + ("" if pooling == "mean" else f", {pooling} token of each")


def encoder_name(config: dict[str, Any]) -> str:
    """Public name of the encoder: its name on the hub, or its folder name without the path."""
    return config["encoder"] if config.get("encoder_is_on_hub") else Path(config["encoder"]).resolve().name


def num_documents(config: dict[str, Any], split: str) -> int:
    """Documents of a split; of histories before several labels a document, the sum over the labels."""
    known = config.get("num_documents", {}).get(split)
    return sum(config["label_counts"][split].values()) if known is None else known


def training_facts(record: dict[str, Any]) -> dict[str, str]:
    """Facts about the training run, name → description, from a training history (`config`, `epochs`, `best`)."""
    config, best = record["config"], record["best"] or {}
    seconds = sum(epoch.get("seconds") or 0.0 for epoch in record["epochs"])
    weights = listed([f"{label} {weight:.3f}" for label, weight in config["class_weight_values"].items()])
    clipping = f"gradients clipped at norm {config['max_grad_norm']:g}" if config["max_grad_norm"] else "no clipping"
    warmup = config["warmup_steps"]
    return {
        "Encoder": f"`{encoder_name(config)}`"
        + (", frozen" if config["freeze_encoder"] else "")
        + (f", by LoRA adapters of rank {config['lora_rank']}, merged" if config.get("lora_rank") else ""),
        "Chunks": f"{config['chunk_length']} tokens, overlap {config['chunk_overlap']}, at most {config['max_chunks']} "
        f"per document ({config['chunk_policy']}){describe_embeddings(config)}, {config['pooling']} pooling"
        f"{describe_lexical(config)}",
        "Data": "; ".join(
            f"{split}: {num_documents(config, split)} ({listed([f'{label} {count}' for label, count in counts.items()])})"
            for split, counts in config["label_counts"].items()
        ),
        "Class weights": f"{config['class_weights']}: {weights}",
        "Optimizer": f"{config['optim']}, learning rate {config['learning_rate']:g} (head × "
        f"{config['head_lr_multiplier']:g}), weight decay {config['weight_decay']:g}, {clipping}",
        "Schedule": f"{config['lr_scheduler_type']} with warmup over "
        + (f"{warmup:.0%} of the steps" if warmup < 1 else f"{warmup:g} steps"),
        "Batch": f"{config['effective_batch_size']} documents per step ({config['per_device_train_batch_size']} × "
        f"{config['gradient_accumulation_steps']} accumulated × {config['num_processes']} processes)",
        "Decision": kind_of(config).decision(config),
        "Epochs": f"{len(record['epochs'])} evaluated, best at epoch {best.get('epoch')} (step {best.get('step')}) by "
        f"{config['metric_for_best_model']}" + (", stopped early" if record["stopped_early"] else ""),
        "Precision": config["precision"],
        "Hardware": f"{config['num_processes']} × {config.get('hardware', config['device'])}",
        "Training time": f"{seconds / 60:.1f} minutes, excluding evaluation",
        "Seed": str(config["seed"]),
        "Versions": ", ".join(f"{name} {value}" for name, value in config["versions"].items()),
    }


def model_card(
    record: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    labels: list[str],
    evaluation: dict[str, Any] | None = None,
) -> str:
    """README.md of a trained model.

    Args:
        record: training history (`config`, `epochs`, `best`).
        metrics: `{split: {metric: value}}` of the best model.
        labels: label names in order.
        evaluation: `{"split", "model", "baselines", "calibration", "operating_points"}` from
            scripts.evaluate_and_explain, or None.
    """
    config = record["config"]
    card = ModelCard.from_template(
        card_data(record, metrics),
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        config=config,
        metrics=metrics,
        num_documents={split: num_documents(config, split) for split in metrics},
        labels=labels,
        kind=kind_of(config),
        evaluation=evaluation,
        facts=training_facts(record),
        limits=_limits(record, metrics, labels),
        lexical=describe_lexical(config),
    )
    return f"{card}\n"


def card_data(record: dict[str, Any], metrics: dict[str, dict[str, float]]) -> ModelCardData:
    """YAML metadata of the card, with the best checkpoint's metrics as a model-index. Unknown fields are omitted."""
    config = record["config"]
    on_hub = [source["name"] for source in config["data_sources"] if source.get("is_on_hub")]
    dataset = {
        "dataset_name": ", ".join(source.get("name", "") for source in config["data_sources"]),
        "dataset_type": (on_hub or ["private"])[0],
    }
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification",
            **dataset,
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(float(values[key]), 6),
        )
        for split, values in metrics.items()
        for key, (kind, title) in kind_of(config).index.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        license=config.get("license"),
        base_model=config["encoder"] if config.get("encoder_is_on_hub") else None,
        datasets=on_hub or None,
        tags=["text-classification", "long-document-classification", "hierarchical-roberta"],
        widget=[{"text": "The ferry was late again, and they played cards on the jetty until the lamps were lit."}],
        model_name=config["run_name"],
        eval_results=results,
    )


def _interval(entry: dict[str, float]) -> str:
    return f"{entry['value']:.3f} ({entry['low']:.3f}–{entry['high']:.3f})"


def _limits(record: dict[str, Any], metrics: dict[str, dict[str, float]], labels: list[str]) -> list[str]:
    config = record["config"]
    split, values = list(metrics.items())[-1]
    notes = {name: absent_labels_note(each) for name, each in metrics.items()}
    return [
        *(f"Macro-F1 on {name}: {note}." for name, note in notes.items() if note),
        f"False negatives: {kind_of(config).misses(split, values, labels)}. Consequential decisions need a human who has read the evidence.",
        f"At most {config['max_chunks']} chunks of {config['chunk_length']} tokens are "
        + (
            "encoded per document, the most telling ones by their words; of the others words are only counted."
            if config["chunk_policy"] == "lexical"
            else "read per document; `truncated` in the result indicates that there was more."
        ),
        f"The model reflects its {num_documents(config, 'train')} training documents and labels, "
        "including their biases. Other languages, genres or labeling rules were not tested.",
        "It classifies texts, not people, and must not be used to judge authors or readers.",
    ]


def latex_paragraph(
    record: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    labels: list[str],
    evaluation: dict[str, Any] | None = None,
) -> str:
    """LaTeX training paragraph for a publication, from the same facts as the card."""
    config = record["config"]
    facts = {name: _latex(value.replace("`", "")) for name, value in training_facts(record).items()}
    kind = kind_of(config)
    results = "; ".join(
        f"{_latex(split)}: "
        + ", ".join(f"{_latex(name)} {value:.3f}" for name, value in kind.results(values, labels).items())
        + f" ({num_documents(config, split)} documents)"
        for split, values in metrics.items()
    )
    return (
        "\\paragraph{Training.}\n"
        f"A hierarchical classifier based on {facts['Encoder']} encodes each document in chunks of {facts['Chunks']}. "
        f"Documents: {facts['Data']}. The loss is {kind.loss} "
        f"({facts['Class weights']}"
        + (f"; label smoothing {config['label_smoothing_factor']:g}" if config["label_smoothing_factor"] else "")
        + f"). Optimizer: {facts['Optimizer']}; schedule: {facts['Schedule']}; {facts['Batch']}. "
        f"Epochs: {facts['Epochs']}. Decision: {facts['Decision']}. Precision {facts['Precision']}, seed {facts['Seed']}, {facts['Hardware']}, "
        f"{facts['Training time']}. Software: {facts['Versions']}. "
        f"Results of the {'best' if config['load_best_model_at_end'] else 'last'} checkpoint: {results}."
        + (_latex(_comparison_sentence(evaluation)) if evaluation else "")
        + "\n\n\\paragraph{Limitations.}\n"
        + " ".join(_latex(line.replace("`", "")) for line in _limits(record, metrics, labels))
        + "\n"
    )


def _comparison_sentence(evaluation: dict[str, Any]) -> str:
    """Sentence comparing macro-F1, with intervals, with the baselines."""
    rows = {"this model": evaluation["model"]} | evaluation["baselines"]
    parts = ", ".join(f"{name} {_interval(values['f1_macro'])}" for name, values in rows.items())
    return f" Macro-F1 on {evaluation['split']} with 95 % bootstrap confidence intervals: {parts}."


def _latex(text: str) -> str:
    replacements = {
        "\\": r"\textbackslash{}",
        "–": "--",
        "×": r"$\times$",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    return "".join(replacements.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)
