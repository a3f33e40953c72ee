"""The model card: what was run and what came out, and nothing else."""

from typing import Any


def model_card(record: dict[str, Any], metrics: dict[str, dict[str, float]], labels: list[str]) -> str:
    """README.md of a trained model.

    Args:
        record: the training history (`config`, `epochs`, `best`).
        metrics: `{split: {metric: value}}` of the best model.
        labels: label names in their order.
    """
    config, best = record["config"], record["best"] or {}
    shown = ["loss", "accuracy", "f1_macro", "f1_weighted", "severity_f1", "quadratic_kappa"]
    rows = [f"| {name} | " + " | ".join(f"{values[name]:.4f}" for values in metrics.values()) + " |" for name in shown]
    per_class = [
        f"| {label} | "
        + " | ".join(
            f"{values[f'precision_{label}']:.3f} / {values[f'recall_{label}']:.3f} / {values[f'f1_{label}']:.3f}"
            for values in metrics.values()
        )
        + " |"
        for label in labels
    ]
    head = "| | " + " | ".join(f"{split} ({_support(values)} documents)" for split, values in metrics.items()) + " |"
    rule = "|---" * (len(metrics) + 1) + "|"
    facts = {
        "Encoder": f"`{config['encoder']}`" + (", frozen" if config["freeze_encoder"] else ""),
        "Chunks": f"{config['chunk_length']} tokens, overlap {config['chunk_overlap']}, at most {config['max_chunks']} a "
        f"document ({config['chunk_policy']}), {config['pooling']} pooling",
        "Data": ", ".join(
            f"{split}: {sum(counts.values())} ({', '.join(f'{label} {count}' for label, count in counts.items())})"
            for split, counts in config["label_counts"].items()
        ),
        "Class weights": ", ".join(f"{label} {weight:.3f}" for label, weight in config["class_weight_values"].items()),
        "Optimizer": f"{config['optim']}, learning rate {config['learning_rate']:g} (head × "
        f"{config['head_lr_multiplier']:g}), weight decay {config['weight_decay']:g}, {config['lr_scheduler_type']} "
        f"schedule with warm-up {config['warmup_steps']:g}, gradients clipped at {config['max_grad_norm']:g}",
        "Batch": f"{config['effective_batch_size']} documents a step ({config['per_device_train_batch_size']} × "
        f"{config['gradient_accumulation_steps']} accumulated × {config['num_processes']} processes)",
        "Epochs": f"{len(record['epochs'])} evaluated, best at epoch {best.get('epoch')} (step {best.get('step')})"
        + (", stopped early" if record["stopped_early"] else ""),
        "Precision": config["precision"],
        "Seed": config["seed"],
        "Versions": ", ".join(f"{name} {value}" for name, value in config["versions"].items()),
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags: [long-document-classification, hierarchical-roberta]",
        "---",
        "",
        f"# {config['run_name']}",
        "",
        f"Rates documents of any length as {', '.join(labels)}: the text is cut into chunks, an encoder reads each, "
        f"{config['pooling']} pooling makes one vector of them, and a linear head classifies it.",
        "",
        f"## Results of the {'best' if config['load_best_model_at_end'] else 'last'} checkpoint",
        "",
        head,
        rule,
        *rows,
        "",
        "Precision / recall / F1 of each class:",
        "",
        head,
        rule,
        *per_class,
        "",
        "## How it was trained",
        "",
        *[f"- **{name}**: {value}" for name, value in facts.items()],
        "",
    ]
    return "\n".join(lines)


def _support(values: dict[str, float]) -> int:
    return int(sum(value for name, value in values.items() if name.startswith("support_")))
