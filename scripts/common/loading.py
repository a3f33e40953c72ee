"""A trained model with its tokenizer, from a run's folder or the hub."""

from transformers import AutoConfig, PreTrainedTokenizerBase

from data.tokenization import load_tokenizer
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.runtime import use_flash_attention_on_cuda

# So that transformers takes this project's code for such a folder, and not, after asking, the copy in it.
AutoConfig.register(HierarchicalRobertaConfig.model_type, HierarchicalRobertaConfig, exist_ok=True)


def load_classifier(name: str) -> tuple[HierarchicalRobertaForSequenceClassification, PreTrainedTokenizerBase]:
    """The model, in fp32 and in evaluation mode, and its tokenizer. None of the folder's own code is run.

    Raises:
        ValueError: there is no such model, or it is of another kind.
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
            f"{name}: no model could be loaded ({(str(error).splitlines() or [''])[0]}). Expected the output_dir of a "
            "finished run, or its name on the hub."
        ) from error
    raise ValueError(
        f"{name} is a {kind!r} model; expected one that train_hf.py made, with a hierarchical_roberta config."
    )
