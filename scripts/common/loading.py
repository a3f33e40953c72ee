"""Load a trained model with its tokenizer, from a local run or the Hub."""

from transformers import AutoConfig, PreTrainedTokenizerBase

from data.tokenization import load_tokenizer
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.runtime import use_flash_attention_on_cuda

# Use this project's code instead of the copy saved with the model, which would need trust_remote_code.
AutoConfig.register(HierarchicalRobertaConfig.model_type, HierarchicalRobertaConfig, exist_ok=True)


def load_classifier(name: str) -> tuple[HierarchicalRobertaForSequenceClassification, PreTrainedTokenizerBase]:
    """Load the model, in fp32 and evaluation mode, and its tokenizer. Code saved with the model is not executed.

    Raises:
        ValueError: the model cannot be loaded, or has another model type.
    """
    tokenizer = load_tokenizer(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = config.model_type
        if isinstance(config, HierarchicalRobertaConfig):
            model = HierarchicalRobertaForSequenceClassification.from_pretrained(name, config=config)
            use_flash_attention_on_cuda()
            return model.float().eval(), tokenizer
    except Exception as error:
        raise ValueError(
            f"No model could be loaded from {name} ({(str(error).splitlines() or [''])[0]}). Expected the output_dir "
            "of a finished run, or a model id on the Hub."
        ) from error
    raise ValueError(f"{name} has model type {kind!r}; expected a hierarchical_roberta model trained by train_hf.py.")
